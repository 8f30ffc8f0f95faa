"""From JPEG files to the network's input, against what it replaces: python -m tools.benchmark_input FOLDER [flags].

The ways take turns in one process, since machines are shared and their speed drifts. The time of a processor is given
beside that of a clock: other work on the machine lengthens mostly the latter. `taskset -c 0` in front gives the figures
of one core.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from console import ArgumentParser, UserError, cores, quiet_tensorflow, run_script

quiet_tensorflow()

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
import tensorflow as tf

import data
from dataset import images
from dataset.layouts import Examples
from reports.tables import table

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
    """{way: a function that takes all the files, JPEGs, through it once and returns their number}."""
    load = data.image_loader(Examples(tuple(paths), np.zeros(len(paths), np.int64)), SPEC, view_seed=1)
    positions = tf.data.Dataset.range(len(paths)).map(lambda index: (index, tf.constant(0, tf.int64)))
    files = tf.data.Dataset.from_tensor_slices(list(paths))
    return {
        PUBLISHED: lambda: count(files.map(published).batch(BATCH)),
        "published, parallel calls": lambda: count(files.map(published, num_parallel_calls=cores()).batch(BATCH)),
        "ours": lambda: count(load(positions, BATCH).map(lambda x, _: x)),
        "ours, reading alone": lambda: in_threads(images.read_image, paths),
        "libjpeg-turbo alone": lambda: in_threads(lambda path: simplejpeg.decode_jpeg(Path(path).read_bytes()), paths),
    }


def measure(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, np.ndarray]:
    """{way: [rounds, 2], milliseconds of the clock and of all processors for an image}, after a round not counted."""
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(1 + rounds):
        for way, run in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            number = run()
            spent = time.perf_counter() - clock, time.process_time() - processor
            results[way].append((spent[0] / number * 1e3, spent[1] / number * 1e3))
    return {way: np.array(values[1:]) for way, values in results.items()}


def main() -> int:
    parser = ArgumentParser(prog="tools.benchmark_input", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="every *.jpg in and below it is read")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--images", type=int, default=400, help="at most so many files (default: 400)")
    flags = parser.parse_args()
    if flags.rounds < 1 or flags.images < 1:
        raise UserError("--rounds and --images must be at least 1")
    paths = [str(path) for path in sorted(flags.folder.rglob("*.jpg"))[: flags.images]]
    if not paths:
        raise UserError(f"{str(flags.folder)!r} holds no *.jpg: give a folder of JPEG files")
    results = measure(candidates(paths), flags.rounds)
    rows = []
    for way, values in results.items():
        ratio = [statistics.median(results[PUBLISHED][:, kind] / values[:, kind]) for kind in (0, 1)]
        clock, processor = np.median(values, axis=0)
        rows.append([way, f"{1e3 / clock:.0f}", f"{ratio[0]:.2f}", f"{processor:.2f}", f"{ratio[1]:.2f}"])
    print(table(rows, ["", "images/s", "x published", "CPU ms/image", "x published by CPU"]))
    print(f"medians of {flags.rounds} rounds of {len(paths)} files, {cores()} cores; ratios within a round")
    return 0


if __name__ == "__main__":
    run_script(main)
