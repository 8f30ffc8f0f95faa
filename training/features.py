"""Activations of frozen stages, computed once, kept on disk and reused by later runs.

A cache holds what enters one stage: a row for each example, a file for each view. Every row is followed by its
checksum, which is verified each time the row is read. Rows are appended and the file is renamed when it is whole, so
that a killed computation is resumed where it was, a full disk is an ordinary error (writing to a memory map would be a
fatal signal), and memory is bounded by one batch.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorflow as tf

import data
from console import StopSignals, UserError, progress_bar
from dataset.contents import Fingerprint
from dataset.layouts import Examples
from files import UNSUPPORTED, check_folder, flush_to_disk, open_regular, warn_once, write_json
from model import Network
from run_config import Phase
from training.settings import IMAGES_AT_ONCE

CHECKSUM_BYTES = 4
DISK_RESERVE = 2**30  # bytes left free on the disk
VIEW_SEED = 0  # of the random views: not the run's seed, so that runs with other seeds share them


class DamagedCache(UserError):
    """A row whose bytes are not those that were written, in the file `path`, last `modified` so many ns after 1970.

    TensorFlow hands on the text alone of what is raised in its pipelines: `from_text` reads one back.
    """

    def __init__(self, path: str, modified: int):
        super().__init__(
            f"{path}: damaged cached activations (modified {modified}); delete this file and run the same command again"
        )
        self.path, self.modified = path, modified

    @classmethod
    def from_text(cls, text: str) -> "DamagedCache | None":
        """The one whose traceback `text` holds, if any."""
        found = re.search(r"DamagedCache: (.+): damaged cached activations \(modified (\d+)\)", text)
        return cls(found[1], int(found[2])) if found else None

    def delete_file(self) -> None:
        """Deletes the file, unless another run has done so, or has put a new one in its place.

        Not by inode: some network file systems give a file another one each time.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(self.path).st_mtime_ns == self.modified:
                os.unlink(self.path)


class Cache:
    """What enters `stage` of `model`, for the views `views` of `examples`.

    The folder's name is a hash of all that the activations depend on: the weights below the stage, the preprocessing,
    the compute dtype, the threads and the `batch` of rows computed at once (which decide how sums are rounded) and the
    content of the images. It does not depend on the head, the learning rate or the seed of the run, nor on where the
    images lie, so runs that differ in those share it. Rows are always computed from the images, in batches of the same
    rows, so that one key has one value.

    A network that computes in bfloat16 is stored in bfloat16, losing nothing; float32 is rounded to float16. Of what
    enters a stage that pools (the `gap` head), and of any stage if `pooled`, only the mean over positions is kept, in
    float32. `weights`: their hash below the stage, where it is known.
    """

    def __init__(
        self,
        model: Network,
        stage: str,
        examples: Examples,
        prints: Mapping[str, Fingerprint],
        spec: data.Preprocessing,
        views: list[int],
        root: str,
        pooled: bool = False,
        weights: str = "",
        batch: int = IMAGES_AT_ONCE,
    ):
        self.model, self.stage, self.examples, self.views, self.batch = model, stage, examples, views, batch
        self.shape, exact = model.input_shape(stage), model.compute_dtype == tf.bfloat16
        self.dtype = np.dtype(ml_dtypes.bfloat16 if exact else np.float16)
        self.pooled = pooled or model.pools(stage)
        if self.pooled:
            self.shape, self.dtype = (1, 1, self.shape[-1]), np.dtype(np.float32)
        self._description = {
            "format": 2,
            "network": model.network,
            "after": model.stages[model.stages.index(stage) - 1],  # so that heads share it
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "preprocessing": {k: v for k, v in asdict(spec).items() if (k, v) != ("decode", "full")},  # as it was
            "view_seed": VIEW_SEED,
            "examples": len(examples),
            "images": hashlib.sha256("\n".join(prints[p].content for p in examples.paths).encode()).hexdigest(),
            "weights": weights or _hash_weights(model, stage),
            "threads": tf.config.threading.get_intra_op_parallelism_threads(),
            **({} if batch == IMAGES_AT_ONCE else {"batch": batch}),  # the usual one is in no key of earlier versions
        }
        key = hashlib.sha256(json.dumps(self._description, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(root) / key

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize + CHECKSUM_BYTES

    def file(self, view: int) -> Path:
        return self.folder / ("central.bin" if view == data.CENTRAL_VIEW else f"view-{view}.bin")

    def is_filled(self, view: int) -> bool:
        """Whether the file of a view is there; one of another size is damaged: it is deleted, which a line says."""
        file = self.file(view)
        if not os.path.lexists(file):
            return False
        if file.is_symlink() or not file.is_file():
            raise UserError(f"{file} is a link or a folder, where cached activations are kept: move it away")
        size = file.stat().st_size
        if size == len(self.examples) * self._row_bytes:
            return True
        print(f"cache      {file} is damaged ({size} bytes): computed again", flush=True)
        file.unlink(missing_ok=True)  # another run may have been first
        return False

    def missing_rows(self) -> int:
        """Rows that `fill` has to provide."""
        return len(self.examples) * sum(not self.is_filled(view) for view in self.views)

    def missing_bytes(self) -> int:
        """What they take on disk, beyond what an interrupted computation left there."""
        partial = sum(self._partial(view).stat().st_size for view in self.views if self._partial(view).is_file())
        return max(0, self.missing_rows() * self._row_bytes - partial)

    def _partial(self, view: int) -> Path:
        return self.file(view).with_suffix(".partial")

    @contextlib.contextmanager
    def appending(self, view: int, stop: StopSignals) -> Iterator["_Rows | None"]:
        """The rows of a view that is being computed; None where another process has finished it meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "cache.json", self._description)
        descriptor = open_regular(self._partial(view), os.O_RDWR | os.O_APPEND | os.O_CREAT)
        with os.fdopen(descriptor, "ab") as file:
            _lock(descriptor, self._partial(view), stop)
            if self.is_filled(view):
                yield None
                return
            # Whole batches only, so that an interrupted computation batches the images as an uninterrupted one.
            done = os.fstat(descriptor).st_size // (self._row_bytes * self.batch) * self.batch
            file.truncate(done * self._row_bytes)
            rows = _Rows(file, done, self.dtype)
            yield rows
            if rows.done == len(self.examples):
                file.flush()
                flush_to_disk(descriptor)
                os.replace(self._partial(view), self.file(view))

    def loader(self, examples: Examples | None = None) -> data.Load:
        """Loads rows of the filled cache: x is [B, *shape] float32. `examples`: some of the cache's, default all.

        Raises, while iterating: tf.errors.OpError whose message holds the path of a damaged file as `DamagedCache`.
        """
        descriptors = {view: open_regular(self.file(view)) for view in self.views}  # open as long as the process is
        size = self._row_bytes
        place_of = {path: place for place, path in enumerate(self.examples.paths)}
        rows = np.array([place_of[path] for path in (examples or self.examples).paths], np.int64)

        def read(indices: np.ndarray, views: np.ndarray) -> np.ndarray:
            x = np.empty((len(indices), *self.shape), np.float32)
            for place, (index, view) in enumerate(zip(rows[indices].tolist(), views.tolist(), strict=True)):
                # Not a memory map: a file that is cut while it is read would end the process by a signal.
                row = os.pread(descriptors[view], size, index * size)
                values, checksum = row[:-CHECKSUM_BYTES], row[-CHECKSUM_BYTES:]
                if len(row) != size or zlib.crc32(values).to_bytes(CHECKSUM_BYTES, "little") != checksum:
                    raise DamagedCache(str(self.file(view)), os.fstat(descriptors[view]).st_mtime_ns)
                x[place] = np.frombuffer(values, self.dtype).reshape(self.shape)
            return x

        @data.traced
        def load_batch(indices: tf.Tensor, views: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            x = tf.numpy_function(read, [indices, views], tf.float32, stateful=False)
            return tf.ensure_shape(x, [None, *self.shape]), indices

        def load(positions: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
            return positions.batch(batch_size).map(load_batch, num_parallel_calls=2)

        return load


class _Rows:
    """An unfinished file of a cache."""

    def __init__(self, file, done: int, dtype: np.dtype):  # type: ignore[no-untyped-def]
        self._file, self.done, self._dtype = file, done, dtype

    def append(self, first: int, rows: np.ndarray) -> None:
        """Writes the rows `first` ... but those that are there already."""
        if first < self.done:
            return
        if self._dtype == np.float16:
            rows = np.clip(rows, 0, np.finfo(np.float16).max)  # activations follow a ReLU: none is negative
        for row in rows.astype(self._dtype):
            values = row.tobytes()
            self._file.write(values + zlib.crc32(values).to_bytes(CHECKSUM_BYTES, "little"))
        self.done = first + len(rows)


def fill(caches: Sequence[Cache], images: data.Load, stop: StopSignals, worker: int = 0) -> None:
    """Computes what is missing in caches of one split and batch, in the order of their stages, in one pass over images.

    Rows so far are kept when a signal stops it. Each `worker` of a run begins with another view, so that workers that
    share a disk divide the views.
    """
    model, examples, views = caches[0].model, caches[0].examples, caches[0].views
    first = worker % len(views)
    for view in views[first:] + views[:first]:
        with contextlib.ExitStack() as stack:
            # In the order of the stages, so that two processes never wait for each other.
            rows = [(c, stack.enter_context(c.appending(view, stop))) for c in caches if not c.is_filled(view)]
            unfinished = [(cache, part) for cache, part in rows if part is not None]
            if not unfinished:
                continue
            forward = _activations(model, [(cache.stage, cache.pooled) for cache, _ in unfinished])
            done = min(part.done for _, part in unfinished)
            every = tf.data.Dataset.range(done, len(examples))
            positions = every.map(data.traced(lambda i: (i, tf.constant(view, tf.int64))))  # noqa: B023
            batches = images(positions, caches[0].batch).prefetch(2)
            with progress_bar(len(examples), done, f"caching view {view}" if view >= 0 else "caching") as bar:
                for x, _ in batches:
                    for (_, part), activations in zip(unfinished, forward(x), strict=True):
                        part.append(done, activations.numpy())
                    done += len(x)
                    bar.update(len(x))
                    stop.check()


def _activations(model: Network, stages: Sequence[tuple[str, bool]]):  # type: ignore[no-untyped-def]
    """The compiled function images -> what enters each of `stages` (in order), or its mean over positions."""

    @tf.function(input_signature=[model.input_spec(model.stages[0])], autograph=False)
    def forward(x: tf.Tensor) -> list[tf.Tensor]:
        entered, outputs = model.stages[0], []
        for stage, is_pooled in stages:
            x = model.forward(x, first=entered, last=model.stages[model.stages.index(stage) - 1])
            mean = tf.reduce_mean(tf.cast(x, tf.float32), axis=[1, 2], keepdims=True) if is_pooled else x
            outputs.append(mean)
            entered = stage
        return outputs

    return forward


def cached_loads(
    network: Network,
    phases: Sequence[Phase],
    examples: Mapping[str, Examples],
    listed: Mapping[str, Examples],
    prints: Mapping[str, Fingerprint],
    spec: data.Preprocessing,
    root: str,
    stop: StopSignals,
    worker: int = 0,
    batch: int = IMAGES_AT_ONCE,
) -> dict[str, dict[str, data.Load]]:
    """{stage: {split: loader of what enters the stage}} for the phases that train on cached views.

    Computes what is not on disk yet, in one pass over the images: random views for `train`, the central view for other
    splits. The caches hold the `listed` examples, which include `examples`. `prints` by path; `batch` images at once.
    """
    views = {phase.input_stage: phase.views for phase in phases if phase.views}
    in_order = sorted(views, key=network.stages.index)
    weights = {stage: _hash_weights(network, stage) for stage in in_order}  # once for all splits: VGG19's take 0.3 s

    def caches_of(split: str, batch: int) -> list[Cache]:
        return [
            Cache(
                network,
                stage,
                listed[split],
                prints,
                spec,
                list(range(views[stage])) if split == "train" else [data.CENTRAL_VIEW],
                root,
                weights=weights[stage],
                batch=batch,
            )
            for stage in in_order
        ]

    caches = {split: caches_of(split, IMAGES_AT_ONCE) for split in examples}
    if batch != IMAGES_AT_ONCE:  # what is whole serves where memory is short, too
        for split, of_split in caches.items():
            if any(cache.missing_rows() for cache in of_split):
                caches[split] = caches_of(split, batch)
    every = [cache for of_split in caches.values() for cache in of_split]
    check_disk(every, root)
    if missing := sum(cache.missing_rows() for cache in every):
        size = sum(cache.missing_bytes() for cache in every) / 1e6
        print(
            f"caching    {missing} activations that enter {', '.join(in_order)} in {root}/: {size:.1f} MB", flush=True
        )
        for split in examples:
            fill(caches[split], data.image_loader(listed[split], spec, VIEW_SEED), stop, worker)
    return {
        stage: {split: caches[split][place].loader(of_split) for split, of_split in examples.items()}
        for place, stage in enumerate(in_order)
    }


def check_disk(caches: Sequence[Cache], root: str) -> None:
    """Raises UserError where the missing rows of all caches together would not leave `DISK_RESERVE` free."""
    if not caches:
        return
    check_folder("--cache-dir", root)
    needed, free = sum(cache.missing_bytes() for cache in caches), shutil.disk_usage(root).free
    if needed and needed + DISK_RESERVE > free:
        raise UserError(
            f"{root}: the cached activations take {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free: "
            "take fewer --cached-views (0: none) or another --cache-dir"
        )


def _lock(descriptor: int, path: Path, stop: StopSignals) -> None:
    """Waits while another process computes the same rows."""
    waiting = False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                print(f"cache      waiting for another process that computes {path}", flush=True)
            waiting = True
            time.sleep(0.2)
            stop.check()
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return warn_once(f"{path.parent}: this file system has no locks: start one run at a time with this cache")


def _hash_weights(model: Network, stage: str) -> str:
    digest = hashlib.sha256()
    below = model.stages[: model.stages.index(stage)]
    for name, variable in model.variables_by_name.items():
        if model.stage_of(name) in below:
            digest.update(name.encode() + b"\0" + variable.numpy().tobytes())
    return digest.hexdigest()
