"""What tools.advise measures of one network on the training images."""

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

import data
from console import StopSignals, UserError
from model import RootedLinear
from run_config import Phase
from training.cross_validation import cross_validate, strength_grid
from training.features import VIEW_SEED, Cache, check_disk, fill
from training.head import BATCH_SIZE, MOST_BYTES
from training.preparation import Prepared, prepare
from training.settings import Settings

DEPTHS = 3  # last stages of the network whose outputs are judged
SHARES = (0.25, 0.5, 1.0)  # of the images, for the learning curve
TIMED_IMAGES = 16  # of a step on a CPU: a whole batch may take minutes and much memory
TIMED_SECONDS = 10.0  # after which a step is not repeated


@dataclass(frozen=True)
class Evidence:
    """What was measured of one network.

    right: {(depth, with flips): share of each image's views that were classified right out of fold, [images]}; the
    depth `last` is the output of the network's last stage. curve: {share of the images trained on: the same}.
    seconds: {stage: of a step that trains from there on}, the head first.
    """

    settings: Settings
    last: str
    right: dict[tuple[str, bool], np.ndarray]
    curve: dict[float, np.ndarray]
    seconds: dict[str, float]
    epoch_steps: int

    @property
    def name(self) -> str:
        """The network, and its weights where they are not ImageNet's."""
        weights = self.settings.pretrained
        return self.settings.network + ("" if weights == "imagenet" else f" ({os.path.basename(weights)})")

    def hours(self, stage: str) -> float:
        """Of all epochs, trained from `stage` on."""
        return self.seconds[stage] * self.epoch_steps * self.settings.epochs / 3600


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean over images and its standard error."""
    return float(values.mean()), float(values.std() / np.sqrt(len(values)))


def pooled_features(prepared: Prepared, augment: tuple[str, ...], stop: StopSignals) -> dict[str, np.ndarray]:
    """{depth: features of the training images as the gap head normalises them, float32 [views * N, C]}, view by view.

    The last entry is all depths side by side. One pass over the images computes what is not in the cache; that of the
    last depth is train.py's own.
    """
    network, train, settings = prepared.network, prepared.examples["train"], prepared.settings
    spec = dataclasses.replace(prepared.config.preprocessing, augment=augment)
    views = list(range(prepared.config.phases[-1].views))
    head = network.layer(network.stages[-1])
    assert isinstance(head, RootedLinear)
    entered = network.stages[1:][-DEPTHS:]
    numbers = len(train) * len(views) * sum(network.input_shape(stage)[-1] for stage in entered)
    if 2 * 4 * numbers > MOST_BYTES:  # with flips
        raise UserError(
            f"{prepared.found.root}: features of {len(train)} images do not fit in memory: give --examples-per-class"
        )
    caches = [Cache(network, s, train, prepared.prints, spec, views, settings.cache_dir, pooled=True) for s in entered]
    check_disk(caches, settings.cache_dir)
    fill(caches, data.image_loader(train, spec, VIEW_SEED), stop)
    result = {}
    for stage, cache in zip(entered, caches, strict=True):
        rows = []
        for view in views:
            for x, *_ in data.ordered_batches(cache.loader(), train.labels, BATCH_SIZE, view):
                rows.append(head.features(x).numpy())
                stop.check()
        result[network.stages[network.stages.index(stage) - 1]] = np.concatenate(rows)
    result[" + ".join(result)] = np.concatenate(list(result.values()), axis=1)
    return result


def judge(
    prepared: Prepared, features: np.ndarray, weights: np.ndarray, judged_views: int, stop: StopSignals
) -> np.ndarray:
    """The share of the first `judged_views` views of each image that a head gets right out of fold, float64 [images].

    `features` [views * N, D]; rows of weight 0, [views * N], are judged only. Images alone in their class are left out.
    """
    labels = prepared.examples["train"].labels
    views, count = len(features) // len(labels), len(labels)
    of_row, groups = np.tile(labels, views), np.tile(np.arange(count), views)
    try:
        crossed = cross_validate(
            features,
            of_row,
            len(prepared.found.class_names),
            groups,
            strength_grid(features),
            seed=prepared.settings.seed,
            sample_weights=weights,
            each=stop.check,
        )
    except ValueError as error:
        raise UserError(f"{prepared.found.root}: a head can't be judged: {error}; add images") from None
    right = (crossed.logits.argmax(axis=1) == of_row).reshape(views, count)[:judged_views]
    return right.mean(axis=0)[crossed.scored[:count]]


def kept_images(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draws a share of the images of each class, two or more: bool [N]. A smaller share is part of a larger one."""
    keep = np.zeros(len(labels), bool)
    order = np.random.default_rng(seed).permutation(len(labels))
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        keep[of_class[: max(2, round(share * len(of_class)))]] = True
    return keep


def step_seconds(prepared: Prepared, stop: StopSignals) -> dict[str, float]:
    """{first trained stage: seconds of a step of the batch size}: the head on cached activations, others on images.

    Real steps at a learning rate of zero, so that no variable changes; the fastest of a few.
    """
    network, settings, train = prepared.network, prepared.settings, prepared.examples["train"]
    batch = settings.batch_size
    count = min(batch, len(train)) if tf.config.list_physical_devices("GPU") else min(batch, len(train), TIMED_IMAGES)
    images = data.image_loader(train, prepared.config.preprocessing, settings.seed)
    x, labels, _ = next(iter(data.ordered_batches(images, train.labels, count, view=0)))
    head = network.stages[-1]
    seconds = {}
    for stage in (head, network.stages[-2], network.stages[0]):
        cached = stage == head
        phase = Phase(stage, stage, head if cached else network.stages[0], int(cached), 0, 1)
        step = prepared.trainer([phase]).train_step(phase, lambda _: tf.constant(0.0))
        entering = network.forward(x, last=network.stages[-2]) if cached else x
        entering = tf.cast(tf.reduce_mean(entering, [1, 2], keepdims=True), tf.float32) if cached else entering
        step(entering[:1], labels[:1])  # traced
        begin = time.perf_counter()
        taken: list[float] = []
        while len(taken) < 3 and time.perf_counter() - begin < TIMED_SECONDS:
            stop.check()
            start = time.perf_counter()
            step(entering, labels)
            network.variables_by_name[next(iter(network.variables_from(stage)))].numpy()  # waits for a GPU
            taken.append(time.perf_counter() - start)
        seconds[stage] = min(taken) * batch / count
    return seconds


def examine(settings: Settings, data_path: str, flips: bool, stop: StopSignals) -> Evidence:
    """Measures all there is to know of one network."""
    prepared = prepare(settings, data_path)
    labels, views = prepared.examples["train"].labels, prepared.config.phases[-1].views
    plain, mirrored = pooled_features(prepared, settings.augment, stop), {}
    if flips and "flip" not in settings.augment:
        mirrored = pooled_features(prepared, (*settings.augment, "flip"), stop)
    last, ones = list(plain)[DEPTHS - 1], np.ones(views * len(labels))

    def fits() -> Iterator[tuple[tuple[str, bool, float], np.ndarray, np.ndarray]]:
        for depth, x in plain.items():
            yield (depth, False, 1.0), x, ones
            if mirrored:
                yield (depth, True, 1.0), np.concatenate([x, mirrored[depth]]), np.concatenate([0 * ones, ones])
        for share in SHARES[:-1]:
            keep = kept_images(labels, share, settings.seed)
            yield (last, False, share), plain[last], np.tile(keep, views).astype(np.float64)

    count = len(plain) + len(mirrored) + len(SHARES) - 1
    watched = stop.watch(fits(), count, f"heads on {settings.network}", size=lambda _: 1)
    found = {key: judge(prepared, x, weights, views, stop) for key, x, weights in watched}
    right = {(depth, flipped): values for (depth, flipped, share), values in found.items() if share == 1.0}
    curve = {share: found[last, False, share] for share in SHARES}
    steps = -(-len(labels) // settings.batch_size)
    return Evidence(settings, last, right, curve, step_seconds(prepared, stop), steps)
