"""Writes a run in another format, and compares what it answers with our own answers before it takes its name."""

import contextlib
import dataclasses
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage
import tensorflow as tf

import data
from console import StopSignals, UserError, one_line
from dataset import images
from exporting import graph
from exporting.formats import FORMATS, Options, Photograph, is_decoded_alike, package
from files import check_folder
from model import Network
from reports import metrics
from run import Run
from run_config import RunConfig, new_network
from training import plan
from training.evaluation import readable_failures
from training.settings import Settings
from training.step import compiled_forward

COMPARED = 16  # photographs
SAMPLES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")


def export(run: Run, out: str, form: str, options: Options) -> None:
    """Writes the best checkpoint of `run` to `out` in the format `form` of `FORMATS`, and prints how it compares.

    Its probabilities are calibrated where the run has a temperature, and computed in float32 whatever the run's
    precision. It is loaded again in its own runtime and asked about validation images of the run. Raises UserError, and
    leaves nothing behind, where a probability differs from ours by more than the format's tolerance; reduced
    precisions (`options.quantize`) are reported only.
    """
    config, temperature, target = run.config(), run.temperature(), Path(out)
    _check_request(config, target, form, options)
    network = new_network(dataclasses.replace(config, precision="float32"))
    run.load_best(network)
    spec = config.preprocessing
    if options.input_size:  # the image that is given is a photograph's crop already
        spec = dataclasses.replace(spec, crop_margin=0)
    model = graph.Model(network, spec, config.class_names, temperature)
    origin, paths = _find_photographs(config)

    def watch(doing: str, input_size: int | None = options.input_size) -> Iterator[Photograph]:
        photographs = (_read(path, config.preprocessing, input_size) for path in paths)
        return stop.watch(photographs, len(paths), doing, size=lambda _: 1)

    with readable_failures(), StopSignals() as stop, _aside(target) as aside:
        ours = _answers(network, spec, temperature, watch("our answers"))
        FORMATS[form].write(aside, model, options)
        stop.check()
        ask = FORMATS[form].open(aside, model)
        theirs = np.stack([ask(photograph) for photograph in watch("answers of the export")])  # [N, ways, classes]
        print(f"compared   {len(paths)} {origin}: {_compare(ours, theirs, FORMATS[form].tolerance, out, options)}")
        if form == "saved_model":
            alike = sum(map(is_decoded_alike, watch("decoding")))
            print(f"decoding   TensorFlow makes the same pixels of {alike} of these {len(paths)} files as inference.py")
        if options.input_size:
            change = np.abs(ours - _answers(network, config.preprocessing, temperature, watch("whole", None)))
            print(f"input      the crop at {options.input_size} px changes a probability by up to {change.max():.2g}")
        if config.precision != "float32" and form != "npz":
            change = np.abs(ours - _answers(run.load_model(), spec, temperature, watch(config.precision)))
            print(f"precision  {config.precision} in inference.py changes a probability by up to {change.max():.2g}")
        size = sum(file.stat().st_size for file in (aside, *aside.rglob("*")) if file.is_file())
    print(f"written    {one_line(out)}: {form}, {size / 1e6:.1f} MB")


def _check_request(config: RunConfig, target: Path, form: str, options: Options) -> None:
    """Raises UserError for what can be known to fail before anything is computed."""
    asked = {"quantize": options.quantize != "none", "input_size": options.input_size is not None}
    for name in (name for name in asked if asked[name] and name not in FORMATS[form].flags):
        formats = " and ".join(other for other in FORMATS if name in FORMATS[other].flags)
        raise UserError(f"--{name.replace('_', '-')} is for --format {formats}, not for {form}")
    least = config.preprocessing.image_size
    if options.input_size is not None and options.input_size < least:
        raise UserError(f"--input-size {options.input_size}: the network sees {least} px, so give {least} or more")
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already, and is not replaced: name another file, or move it away")
    if form == "saved_model" and re.search(r"[\[\\\ud800-\udfff]", os.path.abspath(target)):
        raise UserError(f"{target}: TensorFlow loads no SavedModel at a path with [, \\ or other than UTF-8")
    for name in FORMATS[form].packages:
        package(name)
    check_folder("OUT", target.parent)  # made where it is missing: serving/1 of a first export


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Yields the path of the same name in a new folder beside `target`; at the end it becomes `target`.

    When the block raises, what was written is removed.
    """
    folder = target.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
        yield folder / target.name
        os.rename(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find_photographs(config: RunConfig) -> tuple[str, list[str]]:
    """What to compare on, in words and as files: validation images of the run, else photographs of scikit-image."""
    settings = Settings.from_dict(config.settings)
    with contextlib.suppress(UserError):
        found = plan.list_images(settings, config.data.path or config.data.root)
        paths = plan.usable_examples(settings, found, config.excluded)["val"].paths
        spread = np.unique(np.linspace(0, len(paths) - 1, COMPARED).astype(int))
        if readable := [paths[i] for i in spread if images.find_fault(paths[i], thorough=True) is None]:
            return "validation images", readable
    folder = os.path.dirname(skimage.data.__file__)
    return "photographs of scikit-image (the run's are not there)", [os.path.join(folder, name) for name in SAMPLES]


def _read(path: str, spec: data.Preprocessing, input_size: int | None) -> Photograph:
    """A photograph as the export is to be given it: whole, or its central crop at the size of a fixed input."""
    pixels = images.read_image(path)
    if input_size:
        plain = data.Preprocessing(input_size, spec.crop_margin)
        pixels = np.rint(data.preprocess(pixels, plain)).astype(np.uint8)
    return Photograph(path, pixels)


def _answers(
    network: Network, spec: data.Preprocessing, temperature: float, photographs: Iterator[Photograph]
) -> np.ndarray:
    """What inference.py answers: probabilities, float64 [N, classes]."""
    forward = compiled_forward(network)
    logits = [forward(data.preprocess(each.pixels, spec)[tf.newaxis]).numpy()[0] for each in photographs]
    return metrics.softmax(np.stack(logits) / temperature)


def _compare(ours: np.ndarray, theirs: np.ndarray, tolerance: float, out: str, options: Options) -> str:
    """The largest difference in words; raises UserError where it is more than rounding."""
    difference = np.abs(theirs - ours[:, np.newaxis]).max()
    reduced = options.quantize != "none"
    if not difference <= (np.inf if reduced else tolerance):  # NaN too
        raise UserError(
            f"{out}: not written: its probabilities differ from ours by up to {difference:.2g}, where {tolerance:g} is "
            "allowed: use another format, and report this with the versions of requirements-export.txt's packages"
        )
    same = (theirs.argmax(axis=2) == ours.argmax(axis=1)[:, np.newaxis]).all(axis=1)
    allowed = f"{options.quantize}, not limited" if reduced else f"{tolerance:g} is allowed"
    return f"probabilities differ by up to {difference:.2g} ({allowed}), same best class {same.sum()} of {same.size}"
