"""Activations of frozen stages, computed once, kept on disk and reused by later runs.

A cache holds what enters one stage: a row for each example, a file for each view. Rows are appended and the file is
renamed when it is whole, so that a killed computation goes on where it was, a full disk is an ordinary error (writing
to a memory map would be a fatal signal), and memory is bounded by one batch. Reading maps the file.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorflow as tf

import data
from console import UserError
from dataset.layouts import Examples
from files import write_json
from model import Network

BATCH_SIZE = 32
DISK_RESERVE = 2**30  # bytes left free on the disk
VIEW_SEED = 0  # of the random views: not the run's seed, so that runs with other seeds share them


class Cache:
    """What enters `stage` of `model`, for the views `views` of `examples`.

    The folder's name is a hash of all that the activations depend on: the weights below the stage, the preprocessing,
    the compute dtype and the list of files (names, sizes and times of change). It does not depend on the head, the
    learning rate or the seed of the run, so runs that differ in those share it.

    A network that computes in bfloat16 is stored in bfloat16, losing nothing; float32 is rounded to float16.
    """

    def __init__(
        self, model: Network, stage: str, examples: Examples, spec: data.Preprocessing, views: list[int], root: str
    ):
        self.model, self.stage, self.examples, self.views = model, stage, examples, views
        self.shape = model.input_shape(stage)
        self.dtype = np.dtype(ml_dtypes.bfloat16 if model.compute_dtype == tf.bfloat16 else np.float16)
        self._description = {
            "network": model.network,
            "after": model.stages[model.stages.index(stage) - 1],  # so that heads share it
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "preprocessing": asdict(spec),
            "view_seed": VIEW_SEED,
            "examples": len(examples),
            "files": _hash_files(examples),
            "weights": _hash_weights(model, stage),
        }
        key = hashlib.sha256(json.dumps(self._description, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(root) / key

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def _file(self, view: int) -> Path:
        return self.folder / ("central.bin" if view == data.CENTRAL_VIEW else f"view-{view}.bin")

    def missing_rows(self) -> int:
        """Rows that `fill` has to provide."""
        return len(self.examples) * sum(not self._file(view).is_file() for view in self.views)

    def missing_bytes(self) -> int:
        """What they take on disk, beyond what an interrupted computation left there."""
        partial = sum(self._partial(view).stat().st_size for view in self.views if self._partial(view).is_file())
        return max(0, self.missing_rows() * self._row_bytes - partial)

    def _partial(self, view: int) -> Path:
        return self._file(view).with_suffix(".partial")

    def fill(self, source: data.Load, source_stage: str, each: Callable[[int], None]) -> None:
        """Computes what is missing from `source`, which loads what enters `source_stage`.

        `each` is called with the number of rows after every batch; it may raise to stop. Rows so far are kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "cache.json", self._description)
        last = self.model.stages[self.model.stages.index(self.stage) - 1]
        spec = tf.TensorSpec([None, *self.model.input_shape(source_stage)], tf.float32)
        forward = tf.function(
            lambda x: self.model.forward(x, first=source_stage, last=last), input_signature=[spec], autograph=False
        )
        for view in self.views:
            if not self._file(view).is_file():
                self._fill_view(view, source, forward, each)

    def _fill_view(
        self, view: int, source: data.Load, forward: Callable[[tf.Tensor], tf.Tensor], each: Callable[[int], None]
    ) -> None:
        partial = self._partial(view)
        with open(partial, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another run that computes the same rows: wait for it
            if self._file(view).is_file():
                return
            # Whole batches only, so that an interrupted computation batches the images as an uninterrupted one.
            done = file.seek(0, os.SEEK_END) // (self._row_bytes * BATCH_SIZE) * BATCH_SIZE
            file.truncate(done * self._row_bytes)
            each(done)
            positions = tf.data.Dataset.range(done, len(self.examples)).map(lambda i: (i, tf.constant(view, tf.int64)))
            for x, _ in source(positions, BATCH_SIZE).prefetch(2):
                rows = forward(x).numpy()
                if self.dtype == np.float16:
                    rows = np.clip(rows, 0, np.finfo(np.float16).max)  # activations follow a ReLU: none is negative
                file.write(rows.astype(self.dtype).tobytes())
                each(len(rows))
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, self._file(view))

    def loader(self) -> data.Load:
        """Loads rows of the filled cache: x is [B, *shape] float32."""
        size = (len(self.examples), *self.shape)
        rows = {view: np.memmap(self._file(view), self.dtype, mode="r", shape=size) for view in self.views}

        def read(indices: np.ndarray, views: np.ndarray) -> np.ndarray:
            return np.stack([rows[int(v)][i] for i, v in zip(indices, views, strict=True)]).astype(np.float32)

        def load_batch(indices: tf.Tensor, views: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            x = tf.numpy_function(read, [indices, views], tf.float32, stateful=False)
            return tf.ensure_shape(x, [None, *self.shape]), indices

        def load(positions: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
            return positions.batch(batch_size).map(load_batch, num_parallel_calls=2)

        return load


def check_disk(caches: Iterable[Cache], root: str) -> None:
    """Raises UserError where the missing rows of all caches together would not leave `DISK_RESERVE` free."""
    Path(root).mkdir(parents=True, exist_ok=True)
    needed, free = sum(cache.missing_bytes() for cache in caches), shutil.disk_usage(root).free
    if needed and needed + DISK_RESERVE > free:
        raise UserError(
            f"{root}: the cached activations take {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free: "
            "take fewer --cached-views (0: none) or another --cache-dir"
        )


def _hash_files(examples: Examples) -> str:
    digest = hashlib.sha256()
    for path in examples.paths:
        status = os.stat(path)
        digest.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _hash_weights(model: Network, stage: str) -> str:
    digest = hashlib.sha256()
    below = model.stages[: model.stages.index(stage)]
    for name, variable in model.variables_by_name.items():
        if model.stage_of(name) in below:
            digest.update(name.encode() + b"\0" + variable.numpy().tobytes())
    return digest.hexdigest()
