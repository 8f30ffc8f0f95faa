"""Examples -> `tf.data` batches, and the one `preprocess` that makes what the network sees.

There is no shuffle buffer: the order is a permutation that is computed (`index_shuffle`), and every random choice for
an image is a stateless function of (seed, example, view). A stream can therefore start at any step and be the same
stream, and neither parallelism nor prefetching can change it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from console import cores
from dataset import images
from dataset.layouts import Examples
from replicas import ALL, Share

DECODE = ("full", "scaled")
SCALED_SIDE = 4  # sides of the network's input that the crop of a JPEG keeps at least where it is decoded `scaled`
AUGMENTATIONS = ("flip", "rotate", "shear", "zoom", "color")
CENTRAL_VIEW = -1  # the view of validation and inference; views 0, 1, 2, ... are random crops

# For functions that `tf.data` calls: they need no rewriting by AutoGraph, which takes time and leaves files in /tmp.
traced = tf.autograph.experimental.do_not_convert

# (positions, batch size) -> dataset of (x [B, ...], index [B]); positions are (index, view) pairs of int64 scalars.
Load = Callable[[tf.data.Dataset, int], tf.data.Dataset]


@dataclass(frozen=True)
class Preprocessing:
    """What happens between a decoded image and the network.

    image_size: side of the network's square input, pixels.
    crop_margin: the crop is a square of side min(h, w) - 2 * margin, pixels.
    augment: names out of `AUGMENTATIONS`; for random views only.
    mean_rgb, std_rgb: of each channel, in 0..255; the network sees (value - mean) / std.
    decode: `full`, or `scaled`: a JPEG is decoded at 1/8, 1/4 or 1/2 of its size where its sides then still have
        `least_side` pixels (docs/benchmarks.md has the difference); the crop's margin is divided alike.
    """

    image_size: int = 224
    crop_margin: int = 10
    augment: tuple[str, ...] = ()
    mean_rgb: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std_rgb: tuple[float, float, float] = (1.0, 1.0, 1.0)
    decode: str = "full"

    @property
    def least_side(self) -> int:
        """Pixels that the sides of a JPEG keep when it is decoded at a part of its size, so that its crop has at least
        `SCALED_SIDE` times the network's; 0: it never is.
        """
        return SCALED_SIDE * self.image_size + 2 * self.crop_margin if self.decode == "scaled" else 0


def central_crop(size: tf.Tensor, margin: int, reduction: tf.Tensor | int = 1) -> tuple[tf.Tensor, tf.Tensor]:
    """(top, left), int32 [2], and side, int32 [], of the central square of an image whose height and width are `size`.

    `margin`: of the image before its sides were divided by `reduction`. It is at most a quarter of the short side.
    """
    margin = (margin + reduction // 2) // reduction  # rounded
    short = tf.reduce_min(size)
    side = short - 2 * tf.minimum(margin, short // 4)
    return (size - side) // 2, side


def area_resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """[H, W, 3] -> float32 [size, size, 3]: each pixel the mean of the area that it covers."""
    return tf.image.resize(image, [size, size], method="area")


def preprocess(
    image: tf.Tensor,
    spec: Preprocessing,
    seed: tf.Tensor | None = None,
    random: tf.Tensor | bool = True,
    resize: Callable[[tf.Tensor, int], tf.Tensor] = area_resize,
    reduction: tf.Tensor | int = 1,
) -> tf.Tensor:
    """The one way from a decoded image, uint8 [H, W, 3] RGB, to the network's input, float32 [S, S, 3].

    A square crop, area resize, minus the mean, divided by the deviation. The crop is central, or random and augmented
    where there is a `seed`, int [2], and `random`, bool [], holds. Pure TensorFlow, so that it can live in an exported
    model; `resize` is another form of the same for formats that lack an operation. `reduction`, int32 []: what the
    sides of the image were divided by when it was decoded.
    """
    size = tf.shape(image)[:2]
    corner, side = central_crop(size, spec.crop_margin, reduction)
    if seed is not None:
        room = size - side
        fraction = tf.random.stateless_uniform([2], seed)  # [0, 1)
        anywhere = tf.cast(fraction * tf.cast(room + 1, tf.float32), tf.int32)
        anywhere = tf.minimum(anywhere, room)  # the product can round up to room + 1
        corner = tf.where(random, anywhere, corner)
    crop = image[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
    crop = resize(crop, spec.image_size)  # float32, 0..255
    if seed is not None and spec.augment:
        crop = tf.cond(tf.constant(True) & random, lambda: _augment(crop, spec.augment, seed), lambda: crop)
    # In rows of S * 3 numbers, which is faster than spreading three numbers over the last axis.
    mean, std = (np.tile(np.array(channels, np.float32), spec.image_size) for channels in (spec.mean_rgb, spec.std_rgb))
    return tf.reshape((tf.reshape(crop, [spec.image_size, -1]) - mean) / std, [spec.image_size, spec.image_size, 3])


def to_picture(x: np.ndarray, spec: Preprocessing) -> np.ndarray:
    """What the network sees, [..., S, S, 3], as a picture, uint8: the inverse of the last step of `preprocess`."""
    return np.clip(np.rint(x * spec.std_rgb + spec.mean_rgb), 0, 255).astype(np.uint8)


def _augment(image: tf.Tensor, names: tuple[str, ...], seed: tf.Tensor) -> tf.Tensor:
    """Random changes of a square image, float32 [S, S, 3] in 0..255, each drawn from its own stateless stream."""
    draws = {
        name: tf.random.stateless_uniform([3], tf.random.experimental.stateless_fold_in(seed, number), -1.0, 1.0)
        for number, name in enumerate(AUGMENTATIONS)
    }
    if "flip" in names:
        image = tf.cond(draws["flip"][0] < 0, lambda: image[:, ::-1], lambda: image)
    geometry = {"rotate", "shear", "zoom"} & set(names)
    if geometry:
        angle = draws["rotate"][0] * np.pi / 12 if "rotate" in names else 0.0  # up to 15 degrees
        shear = draws["shear"][0] * 0.2 if "shear" in names else 0.0  # up to 11 degrees
        scale = 1.0 + draws["zoom"][0] * 0.2 if "zoom" in names else 1.0  # 0.8 to 1.2
        image = _warp(image, angle, shear, scale)
    if "color" in names:
        brightness, contrast, saturation = tf.unstack(draws["color"] * tf.constant([32.0, 0.3, 0.3]))
        grey = tf.reduce_sum(image * tf.constant([0.2989, 0.587, 0.114]), axis=-1, keepdims=True)  # Rec. 601 luma
        image = grey + (image - grey) * (1.0 + saturation)
        mean = tf.reduce_mean(image)
        image = tf.clip_by_value(mean + (image - mean) * (1.0 + contrast) + brightness, 0.0, 255.0)
    return image


def _warp(image: tf.Tensor, angle: tf.Tensor, shear: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """An affine map about the centre of a square image; what comes in from outside is the image's reflection."""
    side = image.shape[0]
    centre = (side - 1) / 2.0
    cos, sin = tf.cos(angle) * scale, tf.sin(angle) * scale
    # Rows of the map from output to input pixels: rotation and scale, then a horizontal shear.
    a, b, d, e = cos + shear * sin, -sin + shear * cos, sin, cos
    c, f = centre - a * centre - b * centre, centre - d * centre - e * centre
    transform = tf.stack([tf.cast(v, tf.float32) for v in (a, b, c, d, e, f, 0.0, 0.0)])
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[tf.newaxis],
        transforms=transform[tf.newaxis],
        output_shape=[side, side],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )[0]


def image_loader(examples: Examples, spec: Preprocessing, view_seed: int) -> Load:
    """Loads the images of `examples`: x is [B, S, S, 3] float32.

    Raises, while iterating: tf.errors.OpError whose message holds the `images.ImageError` of a file that can't be read.
    """
    paths = tf.constant([os.fsencode(path) for path in examples.paths])

    def read(path: bytes) -> tuple[np.ndarray, np.int32]:
        pixels, reduction = images.read_reduced(os.fsdecode(path), spec.least_side)
        return pixels, np.int32(reduction)

    @traced
    def load_one(index: tf.Tensor, view: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # Python reads the file since it must read every format; decoding leaves the interpreter free to do the next.
        path, types = tf.gather(paths, index), (tf.uint8, tf.int32)
        image, reduction = tf.numpy_function(read, [path], types, stateful=False)
        image.set_shape([None, None, 3])
        reduction.set_shape([])
        seed = tf.random.experimental.stateless_fold_in(tf.stack([tf.constant(view_seed, tf.int64), index]), view)
        return preprocess(image, spec, seed, view != CENTRAL_VIEW, reduction=reduction), index

    def load(positions: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
        return positions.map(load_one, num_parallel_calls=cores()).batch(batch_size)

    return load


@dataclass(frozen=True)
class Order:
    """The order in which a run sees its training examples: a permutation for each epoch, a pure function of the seed.

    count: examples; batch_size: of a step, where the last one of an epoch may be shorter.
    views: cached random views that the epochs take in turn; 0: every epoch has a random view of its own.
    share: of every step, what this process loads.
    """

    count: int
    batch_size: int
    seed: int
    views: int = 0
    share: Share = ALL

    @property
    def epoch_steps(self) -> int:
        """Steps that visit every example once."""
        return -(-self.count // self.batch_size)

    def images_before(self, step: int) -> int:
        """Examples in the steps before `step`."""
        epoch, within = divmod(step, self.epoch_steps)
        return epoch * self.count + min(within * self.batch_size, self.count)

    def positions(self, epoch: tf.Tensor, start: tf.Tensor) -> tf.data.Dataset:
        """The (index, view) pairs of one epoch from place `start` on, int64 scalars."""
        view = epoch % self.views if self.views else epoch
        last = tf.constant(self.count - 1, tf.int64)
        # The op of tf.random.experimental.index_shuffle with a whole hash for a key and twice its rounds: that function
        # repeats its orders after 256 epochs or seeds, and with many examples its neighbouring epochs are alike.
        seed = tf.stack([tf.constant(self.seed, tf.int64), epoch])
        key = tf.random.stateless_uniform([3], seed, None, None, tf.uint32)

        @traced
        def position(place: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return tf.raw_ops.RandomIndexShuffle(index=place, seed=key, max_index=last, rounds=8), view

        return tf.data.Dataset.range(start, self.count).map(position)

    def indices(self, step: int) -> list[int]:
        """The examples of one step."""
        epoch, within = divmod(step, self.epoch_steps)
        start = tf.constant(within * self.batch_size, tf.int64)
        positions = self.positions(tf.constant(epoch, tf.int64), start).take(self.batch_size)
        return [int(index) for index, _ in positions.as_numpy_iterator()]


def train_batches(load: Load, labels: np.ndarray, order: Order, first_step: int, end_step: int) -> tf.data.Dataset:
    """Batches (x, labels int64 [B], indices int64 [B]) of the steps [first_step, end_step) of a run.

    Step s is always the same batch, wherever the stream starts. `end_step` must end an epoch. Of a batch that several
    processes share, x is the rows of `order.share`, perhaps none, and labels and indices are those of the whole batch.
    """
    first_epoch, within = divmod(first_step, order.epoch_steps)
    first_start = within * order.batch_size

    @traced
    def epoch_batches(epoch: tf.Tensor) -> tf.data.Dataset:
        start = tf.where(epoch == first_epoch, tf.constant(first_start, tf.int64), tf.constant(0, tf.int64))
        positions = order.positions(epoch, start)
        if order.share.parts == 1:
            return load(positions, order.batch_size)
        return _load_share(load, positions, order)

    epochs = tf.data.Dataset.range(first_epoch, end_step // order.epoch_steps)
    return _with_labels(epochs.flat_map(epoch_batches), labels)


def ordered_batches(
    load: Load, labels: np.ndarray, batch_size: int, view: int = CENTRAL_VIEW, share: Share = ALL
) -> tf.data.Dataset:
    """Batches (x, labels, indices) of one view of every example, in order, the last short batch included.

    Of a `share` of the examples alone where one is given; without an example it is one empty batch.
    """
    first, end = share.bounds(len(labels))
    positions = tf.data.Dataset.range(first, end).map(traced(lambda index: (index, tf.constant(view, tf.int64))))
    batches = load(positions, batch_size)
    return _with_labels(batches if first < end else batches.concatenate(_empty_batch(batches)), labels)


def _load_share(load: Load, positions: tf.data.Dataset, order: Order) -> tf.data.Dataset:
    """Batches (x of `order.share`, indices of the whole step): `positions` of an epoch from a step on, cut unread."""

    @traced
    def cut(indices: tf.Tensor, views: tf.Tensor) -> tf.data.Dataset:
        first, end = order.share.bounds(tf.size(indices))
        return tf.data.Dataset.from_tensor_slices((indices[first:end], views[first:end]))

    steps = positions.batch(order.batch_size)
    # All steps but the last of an epoch have the same number of rows, and the last one has no more.
    first, end = order.share.bounds(order.batch_size)
    ours = load(steps.flat_map(cut), end - first)
    last_first, last_end = order.share.bounds(order.count - (order.epoch_steps - 1) * order.batch_size)
    if last_first == last_end:
        ours = ours.concatenate(_empty_batch(ours))
    return tf.data.Dataset.zip(ours, steps).map(traced(lambda of_share, of_step: (of_share[0], of_step[0])))


def _empty_batch(batches: tf.data.Dataset) -> tf.data.Dataset:
    """One batch like those of `batches`, without a row."""
    empty = [
        tf.zeros([0 if size is None else size for size in spec.shape], spec.dtype) for spec in batches.element_spec
    ]
    return tf.data.Dataset.from_tensors(tuple(empty))


def _with_labels(batches: tf.data.Dataset, labels: np.ndarray) -> tf.data.Dataset:
    table = tf.constant(labels, tf.int64)
    return batches.map(traced(lambda x, indices: (x, tf.gather(table, indices), indices))).prefetch(2)
