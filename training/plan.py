"""What is decided when a run begins, and whether a resumed run would be the same run."""

import csv
import hashlib
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple

import numpy as np

import data
from console import UserError, one_line
from dataset import layouts
from dataset.contents import XXH3, Fingerprint
from dataset.corrections import Correction, as_written, read_corrections
from files import write_csv
from model import Network
from run import Run
from run_config import Phase, RunConfig
from training.head import can_solve
from training.settings import Settings, flag_name
from training.step import Optimisation

COLUMNS = ("image", "class", "split", "bytes", "modified_ns", "changed_ns", "content")
# Settings that a resumed run may change: where things lie and are computed, and in how many parts.
# `check_corrections` compares `relabel`.
NOT_COMPARED = ("accumulate", "auto_batch", "cache_dir", "devices", "image_root", "relabel")


def list_images(settings: Settings, data_path: str) -> layouts.LabelledImages:
    """The images of `data_path`, split as the settings say."""
    return layouts.find_images(
        data_path,
        val_fraction=settings.val_fraction,
        test_fraction=settings.test_fraction,
        image_root=settings.image_root or None,
    )


def corrections(settings: Settings, found: layouts.LabelledImages) -> list[Correction]:
    """What --relabel says of the images of `found`."""
    return read_corrections(settings.relabel, found) if settings.relabel else []


def usable_examples(
    settings: Settings, found: layouts.LabelledImages, excluded: list[str]
) -> dict[str, layouts.Examples]:
    """The examples of each split that this run uses."""
    bad = {os.path.join(found.root, name) for name in excluded}
    kept = {
        split: examples.subset([i for i, path in enumerate(examples.paths) if path not in bad]) if bad else examples
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


def make_phases(settings: Settings, network: Network, new: list[str], train_count: int) -> tuple[Phase, ...]:
    """The steps of the run: with --head-epochs, first those that train the new layers alone."""
    new_stages = {network.stage_of(name) for name in new}
    images, head = network.stages[0], next(stage for stage in network.head_stages if stage in new_stages)
    train_from = head if settings.train_from == "head" else settings.train_from
    if train_from not in network.stages:
        raise UserError(
            f"--train-from {train_from}: {network.network} with the {network.head} head has the stages "
            f"{', '.join(network.stages)}; 'head' means its new layers"
        )
    if settings.pretrained != "none" and network.stages.index(train_from) > network.stages.index(head):
        raise UserError(f"--train-from {train_from}: {head} is newly initialised and would never be trained; use head")
    epoch_steps = data.Order(train_count, settings.batch_size, settings.seed).epoch_steps
    change = settings.head_epochs * epoch_steps if train_from != head else 0

    def phase(name: str, stage: str, first: int, end: int) -> Phase:
        views = settings.cached_views
        if views < 0:
            views = 2 if stage == head and settings.pretrained != "none" else 0
        views = views if stage != images else 0
        solver = "sgd"
        if stage == network.stages[-1] and views and can_solve(network, train_count * views):
            solver = "lbfgs" if settings.solves_heads() else "sgd"
        return Phase(name, stage, stage if views else images, views, first, end, solver)

    phases = (
        phase("head", head, 0, change),
        phase("head" if train_from == head else train_from, train_from, change, settings.epochs * epoch_steps),
    )
    kept = tuple(p for p in phases if p.first_step < p.end_step)
    if settings.head_solver == "lbfgs" and not any(p.solver == "lbfgs" for p in kept):
        raise UserError(
            "--head-solver lbfgs: no phase trains a linear head alone on cached activations: give --train-from head or "
            "--head-epochs, --head gap, and --cached-views"
        )
    return kept


def optimisation(settings: Settings, train: layouts.Examples) -> Optimisation:
    """The optimiser's share of the settings."""
    shared = {field.name for field in fields(Optimisation)} & {field.name for field in fields(Settings)}
    values = {name: getattr(settings, name) for name in shared - {"class_weights"}}
    weights = None
    if settings.class_weights == "balanced":
        counts = np.bincount(train.labels)
        weights = tuple(float(w) for w in len(train) / (len(counts) * counts))  # a mean of 1 over the examples
    return Optimisation(**values, class_weights=weights)


# -- the images of a run ---------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """An image as images.csv has it."""

    class_name: str
    split: str
    fingerprint: Fingerprint


def record_images(
    found: layouts.LabelledImages, examples: Mapping[str, layouts.Examples], prints: Mapping[str, Fingerprint]
) -> dict[str, Recorded]:
    """{name relative to the data's root: what it is} of the images that a run uses."""
    start = len(os.path.join(found.root, ""))
    return {
        as_written(path[start:]): Recorded(found.class_names[label], split, prints[path])
        for split, of_split in examples.items()
        for path, label in zip(of_split.paths, of_split.labels.tolist(), strict=True)
    }


def write_images(run: Run, images: Mapping[str, Recorded]) -> None:
    """Writes images.csv."""
    rows = ((name, image.class_name, image.split, *image.fingerprint) for name, image in images.items())
    write_csv(run.path / "images.csv", COLUMNS, rows)


def read_images(run: Run) -> dict[str, Recorded]:
    """The content of images.csv; empty for a run that has none, or a damaged one: `RunConfig.data.content` remains."""
    try:
        with open(run.path / "images.csv", encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            if tuple(next(rows, ())) != COLUMNS:
                return {}
            return {
                name: Recorded(label, split, Fingerprint(int(size), int(modified), int(changed), content))
                for name, label, split, size, modified, changed, content in rows
            }
    except (OSError, ValueError, csv.Error):
        return {}


def known_fingerprints(then: Mapping[str, Recorded], root: str) -> dict[str, Fingerprint]:
    """{path below `root`: fingerprint} of recorded images."""
    start = os.path.join(root, "")
    return {start + name: image.fingerprint for name, image in then.items()}


def check_settings(run: Run, config: RunConfig, settings: Settings) -> None:
    """Raises UserError, naming the differing values, where resuming with these settings would not be the same run."""
    differing = []
    for field in fields(Settings):
        old, new = config.settings.get(field.name, field.default), getattr(settings, field.name)
        new = list(new) if isinstance(new, tuple) else new
        old = list(old) if isinstance(old, tuple) else old
        if old != new and field.name not in NOT_COMPARED:
            differing.append(f"{flag_name(field)} was {old}, now {new}")
    if differing:
        raise UserError(f"{run.path} can't be resumed: {'; '.join(differing)}; repeat its settings or name a new --run")


def check_corrections(run: Run, config: RunConfig, now: list[Correction]) -> None:
    """Raises UserError where --relabel does not say now what it said when the run began."""
    if now != config.corrections:
        others = "other ones" if len(now) == len(config.corrections) else str(len(now))
        raise UserError(
            f"{run.path} can't be resumed: --relabel corrected {len(config.corrections)} images when it began, now "
            f"{others}: repeat that list or name a new --run"
        )


def image_changes(
    config: RunConfig, found: layouts.LabelledImages, then: Mapping[str, Recorded], now: Mapping[str, Recorded]
) -> list[str]:
    """What has changed, in phrases, since the run began with its images, which are listed in `then` unless it is lost.

    now: the images that it would use today.
    """
    if then:
        both = [name for name in now if name in then]
        kinds = {
            "new": sorted(now.keys() - then.keys()),
            "gone": sorted(then.keys() - now.keys()),
            "of another class or split": [
                n for n in both if (now[n].class_name, now[n].split) != (then[n].class_name, then[n].split)
            ],
            "of other content": [n for n in both if now[n].fingerprint.content != then[n].fingerprint.content],
        }
        changes = [f"{len(names)} {kind} (first {one_line(names[0])!r})" for kind, names in kinds.items() if names]
    else:
        changes = [] if config.data.content in ("", content_digest(now)) else ["some are of other content"]
    if not changes and found.digest() != config.data.digest:
        changes = ["the list of files is another"]
    return changes


def content_digest(images: Mapping[str, Recorded]) -> str:
    """One hash for the content of all images of a run, in their order; it begins as most of their hashes do."""
    contents = [image.fingerprint.content for image in images.values()]
    mark = XXH3 if any(content.startswith(XXH3) for content in contents) else ""
    return mark + hashlib.sha256("\n".join(contents).encode()).hexdigest()
