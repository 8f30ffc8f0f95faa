"""Scoring the best checkpoint of a run, on its own images or on others."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import data
import devices
from console import StopSignals, UserError, cores, one_line
from dataset import corrections, images, layouts
from dataset.contents import XXH3, Fingerprint, fingerprint, fingerprints
from files import check_folder, write_json
from model import Network
from reports import metrics
from reports.calibration import draw_reliability, fit_temperature, reliability
from reports.results import write_results
from run import Run
from run_config import RunConfig
from training import features, plan
from training.settings import Settings
from training.step import compiled_forward

LEAST_TO_CALIBRATE = 100


def evaluate(
    run: Run,
    data_path: str | None,
    split: str | None,
    image_root: str | None = None,
    skip_bad: bool = False,
    raw: bool = False,
) -> tuple[Path, str, dict[str, Any]]:
    """Scores the best checkpoint of `run` on a split of its own data (default val), or on other data (default all).

    `data_path` may also name the place that the run's own data have been moved to: they are recognised by content.
    Classes are matched by name; other data need neither training images nor all classes. Results on other data go to
    `evaluations/<data>-<split>-<hash of its path>/`, so that they never replace the run's.

    Probabilities are calibrated where the run has a temperature, unless `raw`: those scores go to `evaluations/` too.

    Returns the folder of the results, the split and the scores.
    """
    config = run.config()
    devices.grow_gpu_memory()
    network = run.load_model()
    settings = Settings.from_dict(config.settings)
    place = data_path or config.data.path or config.data.root
    found, splits, are_own = _find_data(run, config, settings, data_path, place, image_root)
    if remarks := found.remarks():
        print(f"note       {remarks}", flush=True)
    split = split or ("val" if are_own else "all")
    examples = _examples_of(split, found, splits, config.class_names)
    if skip_bad:
        examples = _without_bad(examples)
    if not len(examples):
        raise UserError(f"--split {split}: {found.root} has no usable image in it")
    folder = (
        run.path
        if are_own and not raw
        else _evaluation_folder(run, found.root, place, f"{split}-raw" if raw else split)
    )
    check_folder("--run", folder)
    load = data.image_loader(examples, config.preprocessing, settings.seed)
    batches = data.ordered_batches(load, examples.labels, settings.images_at_once)
    with readable_failures(), StopSignals() as stop:
        logits = batch_logits(network, batches, len(examples), split, None, stop)
        temperature = 1.0 if raw else run.temperature()
        results = write_scores(folder, config, logits, examples, found.root, split, temperature)
    return folder, split, results


def _find_data(
    run: Run, config: RunConfig, settings: Settings, data_path: str | None, place: str, image_root: str | None
) -> tuple[layouts.LabelledImages, Mapping[str, layouts.Examples], bool]:
    """The images at `place`, the examples of each split to score, and whether they are the run's own.

    Raises UserError where they are not, and the user has named no other data with `data_path`.
    """
    if not os.path.exists(place) and data_path is None:
        raise UserError(f"{place}: the run's data are not there any more: name their new place with --data")
    own, changes = _own_data(run, config, settings, place, image_root)
    if own is not None:
        return own, plan.usable_examples(settings, own, config.excluded), True
    if data_path is None:
        raise UserError(
            f"{place}: the images are not those that the run began with ({', '.join(changes)}): restore them, or score "
            f"them as other data with --data {place}"
        )
    other = layouts.find_images(place, image_root=image_root, scoring=True)
    return other, other.splits, False


def _examples_of(
    split: str, found: layouts.LabelledImages, splits: Mapping[str, layouts.Examples], class_names: Sequence[str]
) -> layouts.Examples:
    """The examples of a split, or of `all`, with the labels that the run gives to their classes, `class_names`."""
    if split not in (*splits, "all"):
        raise UserError(f"--split {split}: {found.root} has the splits {', '.join(splits)}, all")
    chosen = list(splits.values()) if split == "all" else [splits[split]]
    if unknown := sorted(set(found.class_names) - set(class_names)):
        names = ", ".join(class_names)
        raise UserError(f"{found.root}: the run has no class {', '.join(unknown)}; its classes are {names}")
    position = np.array([class_names.index(name) for name in found.class_names])
    paths = tuple(path for examples in chosen for path in examples.paths)
    return layouts.Examples(paths, position[np.concatenate([examples.labels for examples in chosen])])


def _own_data(
    run: Run, config: RunConfig, settings: Settings, place: str, image_root: str | None
) -> tuple[layouts.LabelledImages | None, list[str]]:
    """The images at `place` where they are those that the run was begun with, perhaps moved; else what differs."""
    if os.path.abspath(place) == config.data.path:
        image_root = image_root or settings.image_root
    settings = dataclasses.replace(settings, image_root=image_root or "")
    try:
        found = corrections.apply_corrections(plan.list_images(settings, place), config.corrections)
        if found.digest() != config.data.digest:
            return None, ["another list of files"]
        examples = plan.usable_examples(settings, found, config.excluded)
    except UserError as error:  # not a data set to train on, but perhaps one to score
        return None, [str(error)]
    paths = [path for of_split in examples.values() for path in of_split.paths]
    then = plan.read_images(run)
    prints = fingerprint_images(paths, plan.known_fingerprints(then, found.root), config.data.content)
    changes = plan.image_changes(config, found, then, plan.record_images(found, examples, prints))
    return (None if changes else found), changes


def _evaluation_folder(run: Run, root: str, place: str, split: str) -> Path:
    """`evaluations/<data>-<split>-<hash of where the list and the images lie>` in the run; no link is followed."""
    place = os.path.abspath(place)
    name = re.sub(r"[^\w.-]+", "_", os.path.basename(place))[:60] or "data"
    key = hashlib.sha256(os.fsencode(place) + b"\0" + os.fsencode(root)).hexdigest()[:6]
    folder = run.path / "evaluations" / f"{name}-{split}-{key}"
    for part in (folder.parent, folder):
        if part.is_symlink():
            raise UserError(f"{part} is a link, which is not ours: move it away")
    return folder


def _without_bad(examples: layouts.Examples) -> layouts.Examples:
    """The examples whose files can be decoded; the others are named."""
    faults = find_faults(sorted(set(examples.paths)), thorough=True)
    for path, reason in faults.items():
        print(f"skipped {one_line(path)}: {reason}")
    return examples.subset([i for i, path in enumerate(examples.paths) if path not in faults])


def batch_logits(
    network: Network,
    batches: tf.data.Dataset,
    count: int,
    split: str,
    input_stage: str | None,
    stop: StopSignals,
) -> Iterator[np.ndarray]:
    """Logits, float32 [B, C], of `count` examples whose `batches` enter `input_stage`, under a progress bar."""
    forward = compiled_forward(network, input_stage)
    for x, *_ in stop.watch(batches, count, f"evaluating {split}", size=lambda batch: len(batch[0])):
        logits = forward(x).numpy()
        if not np.isfinite(logits).all():
            raise UserError(f"{split}: the network's outputs are not finite numbers: train with a lower rate")
        yield logits


def write_scores(
    folder: Path,
    config: RunConfig,
    logits: Iterable[np.ndarray],
    examples: layouts.Examples,
    root: str,
    split: str,
    temperature: float,
) -> dict[str, Any]:
    """Writes every result file of a split from the logits of its examples, a batch at a time; returns the scores."""
    return write_results(
        folder,
        split,
        config.class_names,
        examples.labels,
        (metrics.softmax(of_batch / temperature) for of_batch in logits),
        [os.path.relpath(path, root) for path in examples.paths],
        {"data": root, "temperature": temperature},
        read_image=lambda name: images.read_image(os.path.join(root, name)),
    )


def calibrate(run: Run, logits: np.ndarray, labels: np.ndarray) -> float:
    """Fits the run's temperature on its validation images; writes calibration.json and reliability-val.png.

    Fewer than `LEAST_TO_CALIBRATE` images say nothing about a temperature: it is then 1.
    """
    temperature = fit_temperature(logits, labels) if len(labels) >= LEAST_TO_CALIBRATE else 1.0
    parts = {
        "as trained": metrics.softmax(logits),
        f"temperature {temperature:.2f}": metrics.softmax(logits / temperature),
    }
    figures = {
        key: {
            "expected_calibration_error": metrics.expected_calibration_error(probabilities, labels),
            "log_loss": metrics.log_loss(of_logits, labels),
        }
        for key, probabilities, of_logits in zip(
            ("before", "after"), parts.values(), (logits, logits / temperature), strict=True
        )
    }
    record = {"temperature": temperature, "fitted_on": "val", "examples": len(labels), **figures}
    write_json(run.path / "calibration.json", record)
    shown = {name: reliability(probabilities, labels) for name, probabilities in parts.items()}
    draw_reliability(run.path / "reliability-val.png", shown, f"val: {len(labels)} examples")
    return temperature


def find_faults(paths: Sequence[str], thorough: bool, prints: dict[str, Fingerprint] | None = None) -> dict[str, str]:
    """`images.find_faults` under a progress bar.

    `prints` takes the fingerprint, by path, of every file that could be read: of the same bytes that were checked.
    """

    def keep(path: str, status: os.stat_result, contents: bytes) -> None:
        if prints is not None:
            prints[path] = fingerprint(status, contents)

    progress = functools.partial(tqdm, desc="checking images", unit="img", leave=False, disable=None)
    return images.find_faults(paths, thorough, progress, seen=None if prints is None else keep)


@contextlib.contextmanager
def readable_failures() -> Iterator[None]:
    """Turns TensorFlow's errors that a person can fix into a UserError of one line."""
    try:
        yield
    except tf.errors.OpError as error:
        # What Python raised inside the pipeline arrives as text.
        unreadable = re.search(r"ImageError: (.+)", error.message)
        if damaged := features.DamagedCache.from_text(error.message):
            raise damaged from None
        if unreadable:
            raise UserError(f"{unreadable[1]}; python -m tools.check_data finds all bad images") from None
        if "No space left" in error.message or "File too large" in error.message:
            raise UserError(
                f"no space left: free some disk and run the same command again ({one_line(error.message)[-160:]})"
            ) from None
        if isinstance(error, tf.errors.ResourceExhaustedError):
            found = re.search(r"(OOM when allocating tensor [^\n]*?) (on|by) ", error.message)
            cause = found[1] if found else one_line(error.message)[:160]
            raise UserError(
                "the device has not enough memory: compute a batch in parts with --accumulate 2 or more, or "
                f"--auto-batch, also in a run that has begun; else lower --batch-size ({cause})"
            ) from None
        raise


def fingerprint_images(
    paths: Sequence[str], known: Mapping[str, Fingerprint], like: str = XXH3
) -> dict[str, Fingerprint]:
    """`dataset.contents.fingerprints` under a progress bar."""
    progress = functools.partial(tqdm, desc="reading images", unit="img", leave=False, disable=None)
    return fingerprints(paths, known, cores(), progress, like)
