"""From JPEG files to the network's input, and what it replaces: the candidates of `tools.benchmark input`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
import tensorflow as tf

import data
from console import cores
from dataset import images
from dataset.layouts import Examples

BATCH = 50
SPEC = data.Preprocessing()
PUBLISHED = "published pipeline"


def published(path: tf.Tensor) -> tf.Tensor:
    """The steps of the published Food-101 script: decoded, made float, cropped at random, resized."""
    image = tf.cast(tf.image.decode_jpeg(tf.io.read_file(path), channels=3), tf.float32)
    side = tf.reduce_min(tf.shape(image)[:2]) - 2 * SPEC.crop_margin
    image = tf.image.random_crop(image, tf.stack([side, side, 3]))
    image = tf.image.resize(image, [SPEC.image_size, SPEC.image_size], method="area")
    return image - tf.constant(SPEC.mean_rgb)


def count(batches: tf.data.Dataset) -> int:
    """Images in all the batches, which are computed for it."""
    return sum(len(batch) for batch in batches)


def in_threads(read: Callable[[str], np.ndarray], paths: Sequence[str]) -> int:
    with ThreadPoolExecutor(cores()) as pool:
        return sum(1 for _ in pool.map(lambda path: read(path).shape, paths))


def candidates(paths: Sequence[str]) -> dict[str, Callable[[], int]]:
    """{way: a function that takes all the files, JPEGs, through it once and returns their number}.

    The pipelines are built here, since a run builds its own once and not for every few hundred images.
    """
    examples = Examples(tuple(paths), np.zeros(len(paths), np.int64))
    positions = tf.data.Dataset.range(len(paths)).map(lambda index: (index, tf.constant(0, tf.int64)))
    files = tf.data.Dataset.from_tensor_slices(list(paths))

    def ours(spec: data.Preprocessing) -> tf.data.Dataset:
        return data.image_loader(examples, spec, view_seed=1)(positions, BATCH).map(lambda x, _: x)

    pipelines = {
        PUBLISHED: files.map(published).batch(BATCH),
        "published, parallel calls": files.map(published, num_parallel_calls=cores()).batch(BATCH),
        "ours": ours(SPEC),
        "ours, --decode scaled": ours(dataclasses.replace(SPEC, decode="scaled")),
    }
    return {name: functools.partial(count, batches) for name, batches in pipelines.items()} | {
        "ours, reading alone": lambda: in_threads(images.read_image, paths),
        "libjpeg-turbo alone": lambda: in_threads(lambda path: simplejpeg.decode_jpeg(Path(path).read_bytes()), paths),
    }
