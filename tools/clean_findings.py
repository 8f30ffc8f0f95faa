"""What tools.clean_data finds in the images of a data set."""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from console import StopSignals, UserError, cores
from data import CENTRAL_VIEW
from dataset.images import read_image
from reports import metrics, neighbours
from reports.label_issues import LabelIssue, find_label_issues
from training import head
from training.cross_validation import cross_validate, strength_grid
from training.preparation import Prepared


@dataclass(frozen=True)
class Images:
    """All images of the data set, split by split, in one order: what every array below has a row for."""

    root: str
    paths: list[str]
    names: list[str]  # relative to `root`
    splits: list[str]
    labels: np.ndarray  # int64 [N]
    class_names: Sequence[str]


@dataclass(frozen=True)
class Findings:
    """What is worth a look. Rows of `Images`; the worst first, and groups across splits or classes before others.

    distances: float32 [N], of every image to its `neighbours.OUTLIER_NEIGHBOUR`-th nearest; those of outliers are the
        largest.
    """

    accuracy: float
    accuracy_error: float
    issues: list[LabelIssue]
    duplicates: neighbours.Duplicates
    groups: list[np.ndarray]
    outliers: np.ndarray
    distances: np.ndarray


def all_images(prepared: Prepared) -> Images:
    """The images that `prepared` would use, of every split."""
    examples, root = prepared.examples, prepared.found.root
    paths = [path for of_split in examples.values() for path in of_split.paths]
    return Images(
        root,
        paths,
        [os.path.relpath(path, root) for path in paths],
        [split for split, of_split in examples.items() for _ in of_split.paths],
        np.concatenate([of_split.labels for of_split in examples.values()]),
        prepared.found.class_names,
    )


def all_features(prepared: Prepared, stop: StopSignals) -> tuple[np.ndarray, np.ndarray]:
    """What the linear head weighs, float32 [rows, D], and the image of each row: views of one follow in any place.

    Training images have their cached views, others the central one: what train.py --train-from head computes too.
    """
    phase = prepared.config.phases[-1]
    loads = prepared.cached_loads([phase], prepared.examples, stop)[phase.input_stage]
    features, groups, first = [], [], 0
    for split, examples in prepared.examples.items():
        views = range(phase.views) if split == "train" else [CENTRAL_VIEW]
        features.append(head.read_features(prepared.network, loads[split], len(examples), views, stop))
        groups.append(np.tile(np.arange(first, first + len(examples)), len(views)))
        first += len(examples)
    return np.concatenate(features), np.concatenate(groups)


def mean_by_image(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The mean of the rows [R, K] of each image, [N, K]; every image has one or more."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return np.add.reduceat(rows[order], starts, axis=0) / np.bincount(groups)[:, None]


def thumbnails(paths: Sequence[str], stop: StopSignals) -> np.ndarray:
    """`neighbours.thumbnail_features` of every image, float32 [N, K]."""

    def look(path: str) -> np.ndarray:
        stop.check()
        return neighbours.thumbnail_features(read_image(path))

    with ThreadPoolExecutor(cores()) as pool:
        looks = stop.watch(pool.map(look, paths), len(paths), "comparing images", size=lambda _: 1)
        return np.stack(list(looks))


def find(images: Images, features: np.ndarray, groups: np.ndarray, seed: int, stop: StopSignals) -> Findings:
    """All that is wrong with `images` as far as `features` [rows, D] of the images `groups` [rows] tell."""
    share = 1 / np.bincount(groups)[groups]  # an image weighs the same, however many views it has
    try:
        crossed = cross_validate(
            features,
            images.labels[groups],
            len(images.class_names),
            groups,
            strength_grid(features),
            seed=seed,
            sample_weights=share,
            each=stop.check,
        )
    except ValueError as error:
        raise UserError(f"{images.root}: no label can be judged: {error}") from None
    best = next(record for record in crossed.records if record.strength == crossed.best)
    scored = np.unique(groups[crossed.scored])
    probabilities = mean_by_image(metrics.softmax(crossed.logits), groups)[scored]
    issues = [
        dataclasses.replace(issue, index=int(scored[issue.index]))
        for issue in find_label_issues(probabilities, images.labels[scored])
    ]
    small = thumbnails(images.paths, stop)
    try:
        duplicates = neighbours.near_duplicates(small, each=lambda _: stop.check())
    except ValueError as error:
        raise UserError(f"{images.root}: too many images are alike: {error}") from None
    copies = neighbours.duplicate_groups(duplicates.pairs, len(images.paths))
    # The head's features are square roots. Squared they are the pooled activations again, which tell strangers better.
    outliers, distances = neighbours.find_outliers(mean_by_image(features**2, groups))
    groups_worst_first = sorted(copies, key=lambda rows: -severity(images, rows))
    return Findings(best.accuracy, best.accuracy_error, issues, duplicates, groups_worst_first, outliers, distances)


def severity(images: Images, rows: np.ndarray) -> int:
    """2 for copies in several splits, else 1 for copies in several classes, else 0."""
    if len({images.splits[i] for i in rows}) > 1:
        return 2
    return int(len(set(images.labels[rows].tolist())) > 1)
