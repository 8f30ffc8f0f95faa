"""Everything that is decided when a run begins and kept when it is resumed: settings and images -> config.json."""

import functools
import os
import platform
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import data
from console import UserError, one_line
from dataset import images, layouts
from devices import compute_dtype
from model import Network
from training.settings import Settings, flag_name
from training.step import Optimisation, Phase, Trainer
from weights.names import find_imagenet, load_pretrained
from weights.restore import RestoreReport, restore


def find_images(settings: Settings, data_path: str) -> layouts.LabelledImages:
    """The images of `data_path`, split as the settings say."""
    return layouts.find_images(
        data_path,
        val_fraction=settings.val_fraction,
        test_fraction=settings.test_fraction,
        image_root=settings.image_root or None,
    )


def new_config(
    settings: Settings, found: layouts.LabelledImages, command: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Everything that is decided when a run begins and kept when it is resumed, and the pretrained arrays."""
    arrays: dict[str, np.ndarray] = {}
    source = settings.pretrained
    if source != "none":
        source = find_imagenet(settings.network) if source == "imagenet" else source
        arrays = load_pretrained(source, settings.network)
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
        model = Network(**model_config)
    except ValueError as error:
        raise UserError(f"--image-size {settings.image_size}: {error}") from None
    report = restore_pretrained(model, arrays, source)
    new = [name for name, _ in report.new]
    excluded = _bad_images(settings, found)
    counts = {split: len(kept) for split, kept in usable_examples(settings, found, excluded).items()}
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
        "preprocessing": {**asdict(preprocessing(settings)), "mean_rgb": list(data.MEAN_RGB)},
        "phases": [asdict(phase) for phase in _phases(settings, model, new, counts["train"])],
        "pretrained": {"source": source, "summary": report.summary(), **report.as_dict()},
        "new_variables": new if arrays else [],
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "numpy": np.__version__},
    }
    return config, arrays


def restore_pretrained(model: Network, arrays: dict[str, np.ndarray], source: str) -> RestoreReport:
    """Restores everything but the last layer, whose classes are other ones; only the head may be missing in the file.

    Without arrays (`--pretrained none`) nothing is restored.
    """
    last = f"{model.network}/{model.stages[-1]}"
    may_be_new = [f"{model.network}/{stage}" for stage in (model.head_stages if arrays else model.stages)]
    return restore(model.variables_by_name, arrays, exclude=[last], may_be_new=may_be_new, source=source)


def _bad_images(settings: Settings, found: layouts.LabelledImages) -> list[str]:
    """Relative names of the files to train without; raises UserError for the first bad one unless they are skipped."""
    skip = settings.on_bad_image == "skip"
    paths = {path for examples in found.splits.values() for path in examples.paths}
    # Skipping must find every bad image now, by decoding all: the list of examples is fixed when the run begins.
    progress = functools.partial(tqdm, desc="checking images", unit="img", leave=False, disable=None)
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


def usable_examples(
    settings: Settings, found: layouts.LabelledImages, excluded: list[str]
) -> dict[str, layouts.Examples]:
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


def _phases(settings: Settings, model: Network, new: list[str], train_count: int) -> list[Phase]:
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


def check_agreement(run_path: Path, config: dict[str, Any], settings: Settings, found: layouts.LabelledImages) -> None:
    """Raises UserError, naming the differing values, where to go on would not be the same run."""
    asked, differing = settings.as_dict(), []
    for field in fields(Settings):
        old, new = config["settings"].get(field.name), asked[field.name]
        if old != new and field.name not in ("cache_dir", "image_root"):
            differing.append(f"{flag_name(field)} was {old}, now {new}")
    if found.digest() != config["data"]["digest"]:
        differing.append(f"the images of {config['data']['root']} are not those of {found.root}, or have changed")
    if differing:
        raise UserError(f"{run_path} can't be resumed: {'; '.join(differing)}; repeat its settings or name a new --run")


def preprocessing(settings: Settings) -> data.Preprocessing:
    """What the network of a run with these settings sees."""
    return data.Preprocessing(settings.image_size, settings.crop_margin, settings.augment)


def make_trainer(
    config: dict[str, Any],
    settings: Settings,
    train: layouts.Examples,
    phases: list[Phase],
    kind: type[Trainer] = Trainer,
) -> Trainer:
    """The network that `config` describes, at its initial values, with its optimiser."""
    model = Network(**config["model"], compute_dtype=compute_dtype(config["precision"]))
    return kind(model, _optimisation(settings, train), phases, frozenset(config["new_variables"]), settings.seed)


def _optimisation(settings: Settings, train: layouts.Examples) -> Optimisation:
    """The optimiser's share of the settings."""
    shared = {field.name for field in fields(Optimisation)} & {field.name for field in fields(Settings)}
    values = {name: getattr(settings, name) for name in shared - {"class_weights"}}
    weights = None
    if settings.class_weights == "balanced":
        counts = np.bincount(train.labels)
        weights = tuple(float(w) for w in len(train) / (len(counts) * counts))  # a mean of 1 over the examples
    return Optimisation(**values, class_weights=weights)
