"""One training run from its settings: find the images, restore the weights, open the run directory, train, report."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import data
import features
import images
import layouts
import metrics
import plan
import pretrained
import report
from console import StopSignals, UserError, one_line
from fit import Fit, progress_bar
from model import VGG, compute_dtype
from run import Run
from settings import Settings
from training import Phase, Trainer, compiled_forward, predict

EVALUATION_BATCH = 32


def train(settings: Settings, data_path: str, run: Run, command: list[str]) -> dict[str, Any]:
    """Trains `run` on the images of `data_path`, from the start or from its last checkpoint, and evaluates its best.

    Returns the scores of the best checkpoint on the validation images (the content of results-val.json). Raises
    UserError for what the user can mend and console.Stopped after a signal; the run can then be resumed.
    """
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    found = plan.find_images(settings, data_path)
    if run.exists():
        config = run.config()
        plan.check_agreement(run.path, config, settings, found)
        arrays = None
    else:
        config, arrays = plan.new_config(settings, found, command)
        config["data"]["path"] = os.path.abspath(data_path)
    with run.locked(), StopSignals() as stop:
        if not run.exists():
            run.create(config)
        for line in _introduction(run, config):
            print(line, flush=True)
        with readable_failures():
            return _train(run, config, settings, found, arrays, stop)


@contextlib.contextmanager
def readable_failures() -> Iterator[None]:
    """Turns TensorFlow's errors that a person can mend into a UserError of one line."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(
            "the device has not enough memory: lower --batch-size, or keep it and compute it in parts with "
            f"--accumulate 2 or more ({one_line(error.message)[:160]})"
        ) from None
    except tf.errors.OpError as error:
        # An image that could not be read inside the pipeline arrives as the text of its Python exception.
        unreadable = re.search(r"ImageError: (.+)", error.message)
        if unreadable is None:
            raise
        raise UserError(f"{unreadable[1]}; python -m tools.check_data finds all bad images") from None


def _introduction(run: Run, config: dict[str, Any]) -> list[str]:
    gpus = tf.config.list_physical_devices("GPU")
    return [
        f"run        {run.path}",
        f"data       {config['data']['root']} ({config['data']['layout']}): {len(config['class_names'])} classes, "
        + ", ".join(f"{count} {split}" for split, count in config["counts"].items()),
        f"weights    {config['pretrained']['source']}: {config['pretrained']['summary']}",
        f"head       {config['model']['head']} ({config['head_reason']})",
        "training   "
        + ", then ".join(
            f"steps {p['first_step']}-{p['last_step']} from {p['train_from']}"
            + (f" on {p['views']} cached views" if p["views"] else "")
            for p in config["phases"]
        ),
        f"device     {f'{len(gpus)} GPU' if gpus else 'CPU: TensorFlow sees no GPU'}, {config['precision']}",
    ]


# -- training --------------------------------------------------------------------------------------------------------


def _train(
    run: Run,
    config: dict[str, Any],
    settings: Settings,
    found: layouts.LabelledImages,
    arrays: dict[str, np.ndarray] | None,
    stop: StopSignals,
) -> dict[str, Any]:
    examples = plan.usable_examples(settings, found, config["excluded"])
    train, val = examples["train"], examples["val"]
    model = VGG(**config["model"], compute_dtype=compute_dtype(config["precision"]))
    phases = [Phase(**phase) for phase in config["phases"]]
    new_variables = frozenset(config["new_variables"])
    trainer = Trainer(model, plan.optimisation(settings, train), phases, new_variables, settings.seed)
    fit = Fit(run, trainer, train, val, settings.batch_size, settings.patience, settings.seed, stop)
    if not fit.restore():
        source = config["pretrained"]["source"]
        if arrays is None:  # killed before its first checkpoint
            arrays = {} if source == "none" else pretrained.load_pretrained(source, settings.network)
        plan.restore_pretrained(model, arrays, source)
    spec = run.preprocessing()
    image_loads = tuple(data.image_loader(split, spec, settings.seed) for split in (train, val))
    if fit.is_done() and (results := run.path / "results-val.json").is_file():
        print("this run is complete: name a new --run to train again", flush=True)
        return json.loads(results.read_text(encoding="utf-8"))
    # Of phases still to do: once a phase has changed a stage, what a finished phase cached above it is gone.
    to_do = [phase for phase in phases if phase.last_step >= fit.step()]
    cached_loads = _cached_loads(model, to_do, train, val, spec, settings.cache_dir, stop)
    fit.open_logs()
    with progress_bar(settings.epochs * len(train), fit.images_between(0, fit.step()), "training") as bar:
        for phase in to_do:
            train_load, val_load = cached_loads[phase.input_stage] if phase.views else image_loads
            fit.run_phase(phase, train_load, val_load, bar)
    fit.finish()
    best = run.load_model()
    # The frozen stages are those of the last phase's input, so its cached activations serve the best checkpoint too.
    return _write_results(run, best, val, found.root, "val", val_load, phase.input_stage)


def _cached_loads(
    model: VGG,
    phases: list[Phase],
    train: layouts.Examples,
    val: layouts.Examples,
    spec: data.Preprocessing,
    cache_dir: str,
    stop: StopSignals,
) -> dict[str, tuple[data.Load, data.Load]]:
    """{stage: loaders of what enters it, training and validation}; computed where they are not on disk yet.

    Later stages are computed from the activations of earlier ones where those are cached too.
    """
    loads: dict[str, tuple[data.Load, data.Load]] = {}
    source_stage = "conv1"
    source = data.image_loader(train, spec, features.VIEW_SEED), data.image_loader(val, spec, features.VIEW_SEED)
    stages = {phase.input_stage: phase.views for phase in phases if phase.views}
    for stage in sorted(stages, key=model.stages.index):
        caches = (
            features.Cache(model, stage, train, spec, range(stages[stage]), cache_dir),
            features.Cache(model, stage, val, spec, range(data.CENTRAL_VIEW, data.CENTRAL_VIEW + 1), cache_dir),
        )
        missing = sum(cache.missing_rows() for cache in caches)
        if missing:
            size = sum(cache.missing_bytes() for cache in caches) / 1e6
            print(f"caching    {missing} activations that enter {stage} in {cache_dir}/: {size:.0f} MB", flush=True)
            with progress_bar(missing, 0, f"caching {stage}") as bar:

                def each(rows: int, bar: tqdm = bar) -> None:
                    bar.update(rows)
                    stop.check()

                for cache, load in zip(caches, source, strict=True):
                    cache.fill(load, source_stage, each)
        loads[stage] = source = caches[0].loader(), caches[1].loader()
        source_stage = stage
    return loads


# -- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(run: Run, data_path: str | None, split: str) -> dict[str, Any]:
    """Scores the best checkpoint of `run` on a split of its own data, or of `data_path`, matching classes by name.

    Writes results-<split>.json and the rest beside the run's other files; returns the scores.
    """
    config = run.config()
    settings = Settings(**{**config["settings"], "augment": tuple(config["settings"]["augment"])})
    model = run.load_model()
    found = plan.find_images(settings, data_path or config["data"]["path"])
    if split not in found.splits:
        raise UserError(f"--split {split}: {found.root} has the splits {', '.join(found.splits)}")
    examples = found.splits[split]
    if data_path is None:
        examples = plan.usable_examples(settings, found, config["excluded"])[split]
    names = config["class_names"]
    if unknown := sorted(set(found.class_names) - set(names)):
        raise UserError(f"{found.root}: the run has no class {', '.join(unknown)}; its classes are {', '.join(names)}")
    position = np.array([names.index(name) for name in found.class_names])
    examples = layouts.Examples(examples.paths, position[examples.labels])
    load = data.image_loader(examples, run.preprocessing(), settings.seed)
    with readable_failures():
        return _write_results(run, model, examples, found.root, split, load, "conv1")


def _write_results(
    run: Run, model: VGG, examples: layouts.Examples, root: str, split: str, load: data.Load, input_stage: str
) -> dict[str, Any]:
    """Scores `model` on `examples` and writes every result file of the split into the run directory."""
    batches = data.ordered_batches(load, examples.labels, EVALUATION_BATCH)
    with progress_bar(len(examples), 0, f"evaluating {split}", leave=False) as bar:
        logits = predict(compiled_forward(model, input_stage), batches, bar.update)
    return report.write_results(
        run.path,
        split,
        run.config()["class_names"],
        examples.labels,
        metrics.softmax(logits),
        [os.path.relpath(path, root) for path in examples.paths],
        read_image=lambda name: images.read_image(os.path.join(root, name)),
    )
