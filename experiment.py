"""One training run from its settings: find the images, restore the weights, open the run directory, train, report."""

import contextlib
import functools
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import data
import features
import images
import layouts
import metrics
import pretrained
import report
from console import StopSignals, UserError, one_line
from fit import Fit, progress_bar
from model import VGG, compute_dtype
from run import Run
from settings import Settings, flag_name
from training import Optimisation, Phase, Trainer, compiled_forward, predict

EVALUATION_BATCH = 32


def train(settings: Settings, data_path: str, run: Run, command: list[str]) -> dict[str, Any]:
    """Trains `run` on the images of `data_path`, from the start or from its last checkpoint, and evaluates its best.

    Returns the scores of the best checkpoint on the validation images (the content of results-val.json). Raises
    UserError for what the user can mend and console.Stopped after a signal; the run can then be resumed.
    """
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    found = _find_images(settings, data_path)
    if run.exists():
        config = run.config()
        _check_agreement(run, config, settings, found)
        arrays = None
    else:
        config, arrays = _new_config(settings, found, command)
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


def _find_images(settings: Settings, data_path: str) -> layouts.LabelledImages:
    return layouts.find_images(
        data_path,
        val_fraction=settings.val_fraction,
        test_fraction=settings.test_fraction,
        image_root=settings.image_root or None,
    )


# -- a new run -------------------------------------------------------------------------------------------------------


def _new_config(
    settings: Settings, found: layouts.LabelledImages, command: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Everything that is decided when a run begins and kept when it is resumed, and the pretrained arrays."""
    arrays: dict[str, np.ndarray] = {}
    source = settings.pretrained
    if source != "none":
        source = pretrained.find_imagenet(settings.network) if source == "imagenet" else source
        arrays = pretrained.load_pretrained(source, settings.network)
    head, why = settings.head, "as asked"
    if head == "auto":
        has_fc = all(f"{settings.network}/{stage}/weights" in arrays for stage in ("fc6", "fc7"))
        head = "fc" if has_fc else "gap"
        why = f"the weights bring {'' if has_fc else 'no '}fc6 and fc7"
    model_config: dict[str, Any] = {
        "network": settings.network,
        "head": head,
        "class_count": len(found.class_names),
        "image_size": settings.image_size,
        "seed": settings.seed,
    }
    try:
        model = VGG(**model_config)
    except ValueError as error:
        raise UserError(f"--image-size {settings.image_size}: {error}") from None
    report = restore_pretrained(model, arrays, source)
    new = [name for name, _ in report.new]
    excluded = _bad_images(settings, found)
    counts = {split: len(kept) for split, kept in _examples(settings, found, excluded).items()}
    config = {
        "command": command,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": settings.as_dict(),
        "class_names": list(found.class_names),
        "counts": counts,
        "data": {"root": found.root, "layout": found.layout, "digest": found.digest()},
        "excluded": excluded,
        "model": model_config,
        "head_reason": why,
        "precision": compute_dtype(settings.precision).name,
        "preprocessing": {
            "image_size": settings.image_size,
            "crop_margin": settings.crop_margin,
            "augment": list(settings.augment),
            "mean_rgb": list(data.MEAN_RGB),
        },
        "phases": [asdict(phase) for phase in _phases(settings, model, new, counts["train"])],
        "pretrained": {"source": source, "summary": report.summary(), **report.as_dict()},
        "new_variables": new if arrays else [],
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "numpy": np.__version__},
    }
    return config, arrays


def restore_pretrained(model: VGG, arrays: dict[str, np.ndarray], source: str) -> pretrained.RestoreReport:
    """Restores everything but the last layer, whose classes are other ones; only the head may be missing in the file.

    Without arrays (`--pretrained none`) nothing is restored.
    """
    last = f"{model.network}/{model.stages[-1]}"
    may_be_new = [f"{model.network}/{stage}" for stage in (model.head_stages if arrays else model.stages)]
    return pretrained.restore(model.variables_by_name, arrays, exclude=[last], may_be_new=may_be_new, source=source)


def _bad_images(settings: Settings, found: layouts.LabelledImages) -> list[str]:
    """Relative names of the files to train without; raises UserError for the first bad one unless they are skipped."""
    skip = settings.on_bad_image == "skip"
    paths = {path for examples in found.splits.values() for path in examples.paths}
    # Skipping must find every bad image now, by decoding all: the list of examples is fixed when the run begins.
    progress = functools.partial(tqdm, desc="checking images", unit="img", leave=False)
    faults = images.find_faults(sorted(paths), thorough=skip, progress=progress)
    if not faults:
        return []
    names = {path: os.path.relpath(path, found.root) for path in faults}
    if not skip:
        path, reason = next(iter(faults.items()))
        more = f" (and {len(faults) - 1} more bad files)" if len(faults) > 1 else ""
        raise UserError(
            f"{path}: {reason}{more}; python -m tools.check_data lists all, --on-bad-image skip trains without them"
        )
    for path, reason in faults.items():
        print(f"skipped {one_line(names[path])}: {reason}")
    print(f"skipped {len(faults)} bad files of {len(paths)}")
    return [names[path] for path in faults]


def _examples(settings: Settings, found: layouts.LabelledImages, excluded: list[str]) -> dict[str, layouts.Examples]:
    """The examples of each split that this run uses."""
    bad = {os.path.join(found.root, name) for name in excluded}
    kept = {
        split: examples.subset([i for i, path in enumerate(examples.paths) if path not in bad])
        for split, examples in found.splits.items()
    }
    if settings.examples_per_class:
        kept["train"] = layouts.take_per_class(kept["train"], settings.examples_per_class, settings.seed)
    missing = set(range(len(found.class_names))) - set(kept["train"].labels.tolist())
    if missing:
        raise UserError(
            f"class {found.class_names[min(missing)]!r} has no usable training image: add some or remove it"
        )
    if not len(kept["val"]):
        raise UserError(f"{found.root}: no validation images: raise --val-fraction {settings.val_fraction}")
    return kept


def _phases(settings: Settings, model: VGG, new: list[str], train_count: int) -> list[Phase]:
    """The steps of the run: with --head-epochs, first those that train the new layers alone."""
    new_stages = {model.stage_of(name) for name in new}
    head = next(stage for stage in model.head_stages if stage in new_stages)
    train_from = head if settings.train_from == "head" else settings.train_from
    if train_from not in model.stages:
        raise UserError(
            f"--train-from {train_from}: {model.network} with the {model.head} head has the stages "
            f"{', '.join(model.stages)}; 'head' means its new layers"
        )
    if settings.pretrained != "none" and model.stages.index(train_from) > model.stages.index(head):
        raise UserError(f"--train-from {train_from}: {head} is newly initialised and would never be trained; use head")
    epoch_steps = data.steps_per_epoch(train_count, settings.batch_size)
    change = settings.head_epochs * epoch_steps if train_from != head else 0
    end = settings.epochs * epoch_steps

    def phase(name: str, stage: str, first: int, last: int) -> Phase:
        views = settings.cached_views
        if views < 0:
            views = 2 if stage == head and settings.pretrained != "none" else 0
        return Phase(name, stage, stage if views else "conv1", views if stage != "conv1" else 0, first, last)

    phases = [
        phase("head", head, 0, change),
        phase("head" if train_from == head else train_from, train_from, change, end),
    ]
    return [p for p in phases if p.first_step < p.last_step]


# -- a run that exists -----------------------------------------------------------------------------------------------


def _check_agreement(run: Run, config: dict[str, Any], settings: Settings, found: layouts.LabelledImages) -> None:
    """Raises UserError, naming the differing values, where going on would not be the same run."""
    asked, differing = settings.as_dict(), []
    for field in fields(Settings):
        old, new = config["settings"].get(field.name), asked[field.name]
        if old != new and field.name not in ("cache_dir", "image_root"):
            differing.append(f"{flag_name(field)} was {old}, now {new}")
    if found.digest() != config["data"]["digest"]:
        differing.append(f"the images of {config['data']['root']} are not those of {found.root}, or have changed")
    if differing:
        raise UserError(f"{run.path} can't be resumed: {'; '.join(differing)}; repeat its settings or name a new --run")


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
    examples = _examples(settings, found, config["excluded"])
    train, val = examples["train"], examples["val"]
    model = VGG(**config["model"], compute_dtype=compute_dtype(config["precision"]))
    phases = [Phase(**phase) for phase in config["phases"]]
    new_variables = frozenset(config["new_variables"])
    trainer = Trainer(model, _optimisation(settings, train), phases, new_variables, settings.seed)
    fit = Fit(run, trainer, train, val, settings.batch_size, settings.patience, settings.seed, stop)
    if not fit.restore():
        source = config["pretrained"]["source"]
        if arrays is None:  # killed before its first checkpoint
            arrays = {} if source == "none" else pretrained.load_pretrained(source, settings.network)
        restore_pretrained(model, arrays, source)
    spec = run.preprocessing()
    image_loads = tuple(data.image_loader(split, spec, settings.seed) for split in (train, val))
    cached_loads = _cached_loads(model, phases, train, val, spec, settings.cache_dir, stop)
    with progress_bar(settings.epochs * len(train), fit.images_between(0, fit.step()), "training") as bar:
        for phase in phases:
            train_load, val_load = cached_loads[phase.input_stage] if phase.views else image_loads
            fit.run_phase(phase, phase is phases[-1], train_load, val_load, bar)
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


def _optimisation(settings: Settings, train: layouts.Examples) -> Optimisation:
    shared = {field.name for field in fields(Optimisation)} & {field.name for field in fields(Settings)}
    values = {name: getattr(settings, name) for name in shared - {"class_weights"}}
    weights = None
    if settings.class_weights == "balanced":
        counts = np.bincount(train.labels)
        weights = tuple(float(w) for w in len(train) / (len(counts) * counts))  # a mean of 1 over the examples
    return Optimisation(**values, class_weights=weights)


# -- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(run: Run, data_path: str | None, split: str) -> dict[str, Any]:
    """Scores the best checkpoint of `run` on a split of its own data, or of `data_path`, matching classes by name.

    Writes results-<split>.json and the rest beside the run's other files; returns the scores.
    """
    config = run.config()
    settings = Settings(**{**config["settings"], "augment": tuple(config["settings"]["augment"])})
    model = run.load_model()
    found = _find_images(settings, data_path or config["data"]["path"])
    if split not in found.splits:
        raise UserError(f"--split {split}: {found.root} has the splits {', '.join(found.splits)}")
    examples = found.splits[split]
    if data_path is None:
        examples = _examples(settings, found, config["excluded"])[split]
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
