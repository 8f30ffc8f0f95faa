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
from console import StopSignals, UserError, one_line
from dataset import images, layouts
from model import Network
from reports import metrics
from reports.results import write_results
from run import Run
from training import features, plan
from training.loop import Fit, progress_bar
from training.settings import Settings
from training.step import Phase, compiled_forward, predict
from weights.names import load_pretrained

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
    trainer = plan.make_trainer(config, settings, train, [Phase(**phase) for phase in config["phases"]])
    fit = Fit(run, trainer, train, val, settings.batch_size, settings.patience, settings.seed, stop)
    if not fit.restore():
        source = config["pretrained"]["source"]
        if arrays is None:  # killed before its first checkpoint
            arrays = {} if source == "none" else load_pretrained(source, settings.network)
        plan.restore_pretrained(trainer.model, arrays, source)
    spec = plan.preprocessing(settings)
    image_loads = {split: data.image_loader(examples[split], spec, settings.seed) for split in ("train", "val")}
    stored, complete = run.path / "results-val.json", run.path / ".complete"
    if fit.is_done() and complete.is_file() and stored.is_file():
        print("this run is complete: name a new --run to train again", flush=True)
        return json.loads(stored.read_text(encoding="utf-8"))
    # Of phases still to do: once a phase has changed a stage, what a finished phase cached above it is gone.
    to_do = [phase for phase in trainer.phases if phase.last_step >= fit.step()]
    cached = cached_loads(trainer.model, to_do, {"train": train, "val": val}, spec, settings.cache_dir, stop)
    fit.open_logs()
    fit.events.images("train", "inputs", _sample_inputs(train, spec, settings.seed), step=0)
    with progress_bar(settings.epochs * len(train), fit.images_between(0, fit.step()), "training") as bar:
        for phase in to_do:
            loads = cached[phase.input_stage] if phase.views else image_loads
            fit.run_phase(phase, loads["train"], loads["val"], bar)
    fit.finish()
    best = run.load_model()
    # The frozen stages are those of the last phase's input, so its cached activations serve the best checkpoint too.
    results = _write_results(run, best, val, found.root, "val", loads["val"], phase.input_stage, stop)
    for picture in ("confusion-val", "confusion-val-normalised", "worst-val"):
        fit.events.images("val", picture, images.read_image(run.path / f"{picture}.png")[None], fit.progress.best_step)
    fit.events.close()
    complete.touch()  # results alone do not say so: a kill may have left half of them, or evaluate.py earlier ones
    return results


def _sample_inputs(examples: layouts.Examples, spec: data.Preprocessing, seed: int, count: int = 16) -> np.ndarray:
    """What the network sees of the first training images of the run, uint8 [count, S, S, 3]."""
    batches = data.train_batches(data.image_loader(examples, spec, seed), examples.labels, count, seed, 0, 10**9)
    x = next(iter(batches))[0].numpy()
    return np.clip(np.rint(x + data.MEAN_RGB), 0, 255).astype(np.uint8)


def cached_loads(
    model: Network,
    phases: list[Phase],
    examples: dict[str, layouts.Examples],
    spec: data.Preprocessing,
    cache_dir: str,
    stop: StopSignals,
) -> dict[str, dict[str, data.Load]]:
    """{stage: {split: loader of what enters the stage}}, computed where it is not on disk yet.

    Random views for `train`, the central view for other splits. Later stages are computed from the activations of
    earlier ones where those are cached too.
    """
    loads: dict[str, dict[str, data.Load]] = {}
    source = {split: data.image_loader(examples[split], spec, features.VIEW_SEED) for split in examples}
    source_stage = "conv1"
    stages = {phase.input_stage: phase.views for phase in phases if phase.views}
    in_order = sorted(stages, key=model.stages.index)

    def cache(stage: str, split: str) -> features.Cache:
        views = list(range(stages[stage])) if split == "train" else [data.CENTRAL_VIEW]
        return features.Cache(model, stage, examples[split], spec, views, cache_dir)

    caches = {stage: {split: cache(stage, split) for split in examples} for stage in in_order}
    features.check_disk([cache for of_stage in caches.values() for cache in of_stage.values()], cache_dir)
    for stage in in_order:
        missing = sum(cache.missing_rows() for cache in caches[stage].values())
        if missing:
            size = sum(cache.missing_bytes() for cache in caches[stage].values()) / 1e6
            print(f"caching    {missing} activations that enter {stage} in {cache_dir}/: {size:.1f} MB", flush=True)
            with progress_bar(missing, 0, f"caching {stage}") as bar:

                def each(rows: int, bar: tqdm = bar) -> None:
                    bar.update(rows)
                    stop.check()

                for split in examples:
                    caches[stage][split].fill(source[split], source_stage, each)
        loads[stage] = source = {split: caches[stage][split].loader() for split in examples}
        source_stage = stage
    return loads


# -- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(run: Run, data_path: str | None, split: str) -> dict[str, Any]:
    """Scores the best checkpoint of `run` on a split of its own data, or of `data_path`, matching classes by name.

    Writes results-<split>.json and the rest beside the run's other files; returns the scores.
    """
    config = run.config()
    settings = Settings.from_dict(config["settings"])
    model = run.load_model()
    found = plan.find_images(settings, data_path or config["data"]["path"])
    splits = found.splits if data_path else plan.usable_examples(settings, found, config["excluded"])
    if split not in (*splits, "all"):
        raise UserError(f"--split {split}: {found.root} has the splits {', '.join(splits)}, all")
    chosen = list(splits.values()) if split == "all" else [splits[split]]
    paths = tuple(path for examples in chosen for path in examples.paths)
    labels = np.concatenate([examples.labels for examples in chosen])
    if not paths:
        raise UserError(f"--split {split}: {found.root} has no image in it")
    names = config["class_names"]
    if unknown := sorted(set(found.class_names) - set(names)):
        raise UserError(f"{found.root}: the run has no class {', '.join(unknown)}; its classes are {', '.join(names)}")
    position = np.array([names.index(name) for name in found.class_names])
    examples = layouts.Examples(paths, position[labels])
    load = data.image_loader(examples, run.preprocessing(), settings.seed)
    with readable_failures():
        return _write_results(run, model, examples, found.root, split, load, "conv1")


def _write_results(
    run: Run,
    model: Network,
    examples: layouts.Examples,
    root: str,
    split: str,
    load: data.Load,
    input_stage: str,
    stop: StopSignals | None = None,
) -> dict[str, Any]:
    """Scores `model` on `examples` and writes every result file of the split into the run directory."""
    batches = data.ordered_batches(load, examples.labels, EVALUATION_BATCH)
    with progress_bar(len(examples), 0, f"evaluating {split}", leave=False) as bar:

        def each(count: int) -> None:
            bar.update(count)
            if stop:
                stop.check()

        logits = predict(compiled_forward(model, input_stage), batches, each)
    return write_results(
        run.path,
        split,
        run.config()["class_names"],
        examples.labels,
        metrics.softmax(logits),
        [os.path.relpath(path, root) for path in examples.paths],
        {"data": root},
        read_image=lambda name: images.read_image(os.path.join(root, name)),
    )
