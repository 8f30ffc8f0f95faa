"""Pictures of a data set to look at before training, as PNG files and one HTML page that holds them all.

Counts are of all files; everything else is of a sample that has the same share of every split and the same number of
images of every class, as far as there are so many. Bad files are left out and counted.
"""

import argparse
import functools
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from console import ArgumentParser, UserError, cores, one_line, quiet_tensorflow, run_script

quiet_tensorflow()

import numpy as np
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from data import AUGMENTATIONS, Preprocessing, preprocess, to_picture
from dataset import images, layouts
from reports.pictures import image_grid
from tools.data_flags import add_data_flags, find_images
from tools.explore_page import write_page
from tools.explore_pictures import draw_counts, draw_densities, draw_sizes

BINS = 64  # of a channel's 256 values
MEAN_SIDE = 112  # pixels of a mean image, which has no detail
CLASS_MEANS = 20  # up to so many classes, each has a mean image
VIEWS = 4  # of each image in the grid of samples
SAMPLE_CLASSES = 8  # rows of that grid


@dataclass(frozen=True)
class Look:
    """What one image adds to the statistics."""

    size: tuple[int, int]  # height, width
    density: np.ndarray  # [3, BINS], each row sums to 1
    centre: np.ndarray  # uint8 [MEAN_SIDE, MEAN_SIDE, 3]: what validation would see


@dataclass
class Statistics:
    """Sums over the images that could be read; `labels`, `splits` and `sizes` have an entry for each."""

    densities: np.ndarray  # [C, 3, BINS]: sums
    centres: np.ndarray  # [C or 1, S, S, 3]: sums
    labels: list[int]
    splits: list[str]
    sizes: list[tuple[int, int]]
    faults: list[str]

    def mean_density(self, label: int | None = None) -> np.ndarray:
        """[3, BINS] of a class, or of all images; each image counts the same, whatever its size."""
        total = self.densities.sum(axis=0) if label is None else self.densities[label]
        return total / max(1, len(self.labels) if label is None else self.labels.count(label))

    def mean_image(self, label: int | None = None) -> np.ndarray:
        """uint8 [S, S, 3] of a class, or of all images."""
        total = self.centres.sum(axis=0) if label is None else self.centres[label]
        count = len(self.labels) if label is None else self.labels.count(label)
        return np.rint(total / max(1, count)).astype(np.uint8)


def look(path: str, crop_margin: int) -> Look | str:
    """Reads one image; the reason why it cannot be used where it cannot."""
    try:
        pixels = images.read_image(path)
    except images.ImageError as error:
        return str(error)
    size = pixels.shape[0], pixels.shape[1]
    density = np.stack([np.bincount(pixels[..., c].ravel() // (256 // BINS), minlength=BINS) for c in range(3)])
    spec = Preprocessing(MEAN_SIDE, crop_margin)
    centre = preprocess(tf.constant(pixels), spec)
    return Look(size, density / density.sum(axis=1, keepdims=True), to_picture(centre.numpy(), spec))


def choose(found: layouts.LabelledImages, count: int, seed: int) -> dict[str, layouts.Examples]:
    """About `count` examples by split, at most so many of each class that they would sum to `count`."""
    total = sum(map(len, found.splits.values()))
    if total <= count:
        return found.splits
    shares = {split: count * len(e) / total / len(found.class_names) for split, e in found.splits.items()}
    return {s: layouts.take_per_class(e, max(1, int(shares[s])), seed) for s, e in found.splits.items() if len(e)}


def gather(sample: dict[str, layouts.Examples], class_count: int, crop_margin: int) -> Statistics:
    """Reads the sample by a thread a core, one image at a time in each."""
    listed = [
        (split, path, int(label))
        for split, examples in sample.items()
        for path, label in zip(examples.paths, examples.labels, strict=True)
    ]
    means = class_count if class_count <= CLASS_MEANS else 1
    statistics = Statistics(
        np.zeros((class_count, 3, BINS)), np.zeros((means, MEAN_SIDE, MEAN_SIDE, 3)), [], [], [], []
    )
    work = functools.partial(look, crop_margin=crop_margin)
    with ThreadPoolExecutor(cores()) as pool:
        looks: Iterable[Look | str] = pool.map(work, [path for _, path, _ in listed])
        bar = tqdm(looks, total=len(listed), desc="looking at images", unit="img", leave=False, disable=None)
        for (split, _, label), seen in zip(listed, bar, strict=True):
            if isinstance(seen, str):
                statistics.faults.append(seen)
                continue
            statistics.densities[label] += seen.density
            statistics.centres[label if means > 1 else 0] += seen.centre
            statistics.labels.append(label)
            statistics.splits.append(split)
            statistics.sizes.append(seen.size)
    return statistics


def draw_samples(path: Path, train: layouts.Examples, names: Sequence[str], spec: Preprocessing, seed: int) -> None:
    """A row for each of some classes: a training image as it is, then as the network may see it in training."""
    pictures: list[np.ndarray] = []
    titles: list[str] = []
    order = np.random.default_rng(seed).permutation(len(train))
    labels = sorted(np.random.default_rng(seed).permutation(len(names))[:SAMPLE_CLASSES])
    for label in labels:
        for index in order[train.labels[order] == label]:
            try:
                image = images.read_image(train.paths[index])
            except images.ImageError:
                continue  # another of this class
            small = Image.fromarray(image)
            small.thumbnail((400, 400))
            pictures.append(np.asarray(small))
            titles.append(f"{one_line(names[label])}\n{image.shape[1]} × {image.shape[0]} pixels")
            for view in range(VIEWS):
                seen = preprocess(tf.constant(image), spec, tf.constant([seed, view], tf.int64) + int(index) * 1000)
                pictures.append(to_picture(seen.numpy(), spec))
                titles.append(f"\nrandom view {view + 1}")
            break
    image_grid(path, pictures, titles, VIEWS + 1)


def draw_all(
    folder: Path, found: layouts.LabelledImages, statistics: Statistics, spec: Preprocessing, seed: int
) -> None:
    """Writes the PNG files that the page shows."""
    names = found.class_names
    counts = {s: np.bincount(e.labels, minlength=len(names)) for s, e in found.splits.items() if len(e)}
    draw_counts(folder / "counts.png", names, counts)
    splits, sizes = np.array(statistics.splits), np.array(statistics.sizes)
    draw_sizes(folder / "sizes.png", {split: sizes[splits == split] for split in counts}, spec.image_size)
    draw_samples(folder / "samples.png", found.splits["train"], names, spec, seed)
    there = [label for label in range(len(names)) if label in set(statistics.labels)]
    titles = ["all classes", *(names[label] for label in there)]
    densities = [statistics.mean_density(), *map(statistics.mean_density, there)]
    draw_densities(folder / "colours.png", titles, np.stack(densities))
    means = [statistics.mean_image()]
    if len(names) <= CLASS_MEANS:
        means += map(statistics.mean_image, there)
    image_grid(folder / "means.png", means, [one_line(title) for title in titles[: len(means)]], 5)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, looks at the images, writes the pictures and the page."""
    parser = ArgumentParser(
        prog="python -m tools.explore_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_flags(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("exploration"), help="folder to write (default %(default)s)"
    )
    parser.add_argument("--augment", nargs="*", default=(), choices=AUGMENTATIONS, help="as in train.py")
    parser.add_argument("--image-size", type=int, default=224, help="as in train.py (default %(default)s)")
    parser.add_argument("--crop-margin", type=int, default=10, help="as in train.py (default %(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="images to look at (default about %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws another sample (default %(default)s)")
    flags = parser.parse_args(argv)
    if flags.image_size < 32 or flags.crop_margin < 0 or flags.samples < 1 or flags.seed < 0:
        raise UserError("--image-size must be at least 32, --samples 1, --crop-margin and --seed 0")
    found = find_images(flags)
    if remarks := found.remarks():
        print(remarks, file=sys.stderr)
    spec = Preprocessing(flags.image_size, flags.crop_margin, tuple(flags.augment))
    statistics = gather(choose(found, flags.samples, flags.seed), len(found.class_names), flags.crop_margin)
    if not statistics.labels:
        raise UserError(f"{flags.data!r}: none of {len(statistics.faults)} images can be read: {statistics.faults[0]}")
    try:
        flags.output.mkdir(parents=True, exist_ok=True)
        draw_all(flags.output, found, statistics, spec, flags.seed)
        page = write_page(flags.output, flags.data, found, statistics.sizes, statistics.faults, spec)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {str(flags.output)!r} ({error.strerror}): name another with --output") from None
    if statistics.faults:
        print(f"left out {len(statistics.faults)} bad files; python -m tools.check_data lists all", file=sys.stderr)
    print(f"{one_line(page)}: {len(statistics.labels)} of {sum(map(len, found.splits.values()))} images looked at")
    return 0


if __name__ == "__main__":
    run_script(main)
