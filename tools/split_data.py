"""Writes which image is for training, validation and test as CSV lists that train.py reads; copies nothing.

Stratified: each class is split by itself, its share rounded to whole images. The images of DATA's own train and val
are pooled and drawn anew; a test split that DATA brings stays the test split. Names are written as they are on disk,
so one that begins with =, +, - or @ is a formula to a spreadsheet.
"""

import csv
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from console import ArgumentParser, UserError, one_line, run_script
from dataset import layouts
from files import replace_file
from reports.tables import table

Splits = dict[str, np.ndarray]  # split -> indices of examples, sorted


def shuffled_by_class(labels: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The indices of each class in a random order of its own."""
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        # The raw bits of a bit generator are the same in every NumPy version, which a Generator's shuffles are not.
        yield indices[np.argsort(np.random.PCG64([seed, int(label)]).random_raw(len(indices)), kind="stable")]


def share(count: int, fraction: float) -> int:
    """`fraction` of `count`, a half rounded up; the fraction is the decimal that was typed, not its nearest float."""
    return int(count * Fraction(str(fraction)) + Fraction(1, 2))


def split_once(labels: np.ndarray, val_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Train, val and test by the shares of each class.

    Every class keeps an image for training, and has one in val if it has two images and a `val_fraction` is given.
    """
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for order in shuffled_by_class(labels, seed):
        count = len(order)
        val = max(share(count, val_fraction), int(val_fraction > 0))
        val = min(val, count - 1)
        test = min(share(count, test_fraction), count - 1 - val)
        for split, indices in zip(("test", "val", "train"), np.split(order, [test, test + val]), strict=True):
            parts[split].append(indices)
    return {split: np.sort(np.concatenate(indices)) for split, indices in parts.items()}


def folds(labels: np.ndarray, k: int, seed: int) -> list[Splits]:
    """`k` splits of which each image is in val exactly once; folds differ by at most one image, in every class too."""
    fold = np.empty(len(labels), np.int64)
    dealt = 0
    for order in shuffled_by_class(labels, seed):
        fold[order] = (dealt + np.arange(len(order))) % k  # dealt on where the last class ended
        dealt += len(order)
    return [{"train": np.flatnonzero(fold != i), "val": np.flatnonzero(fold == i)} for i in range(k)]


def check(found: layouts.LabelledImages, kept: np.ndarray, k: int | None) -> None:
    """Raises UserError for what no list can hold or no such split can be made of; `kept`: labels to split."""
    names = found.class_names
    # What a CSV's reader makes of a label.
    if odd := [name for name in names if not name.strip() or any("\udc80" <= c <= "\udcff" for c in name)]:
        raise UserError(f"class {odd[0]!r} is blank or not UTF-8, which a CSV cannot name: rename the folder")
    if len({name.strip() for name in names}) < len(names):
        raise UserError("two classes differ only in spaces at their ends, which a CSV cannot tell apart: rename one")
    counts = np.bincount(kept, minlength=len(names))
    if k is not None and counts.min() < 2:
        raise UserError(f"class {names[counts.argmin()]!r} has fewer than 2 images, too few for --k-fold: add some")
    if k is not None and k > len(kept):
        raise UserError(f"--k-fold {k}: more folds than the {len(kept)} images")


def write_list(path: Path, found: layouts.LabelledImages, examples: layouts.Examples, splits: Splits) -> bool:
    """Writes one CSV, aside and renamed; whether its paths are relative to its own folder."""
    folder = os.path.dirname(os.path.abspath(path))
    beside = os.path.commonpath([folder, found.root]) == folder
    start = folder if beside else found.root
    rows = [
        (os.path.relpath(examples.paths[i], start), found.class_names[examples.labels[i]].strip(), split)
        for split, indices in splits.items()
        for i in indices
    ]
    # Quoted throughout where a carriage return or a space in front would get lost, which Python's writer leaves bare.
    bare = any("\r" in text or text.startswith(" ") for row in rows for text in row)
    try:
        # surrogateescape: names come out as the bytes that they are on disk.
        with (
            replace_file(path) as aside,
            open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL)
            writer.writerows([("path", "label", "split"), *rows])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}): name another place") from None
    return beside


def plan(
    found: layouts.LabelledImages, val_fraction: float, test_fraction: float, seed: int, k: int | None
) -> tuple[layouts.Examples, list[Splits]]:
    """All the images of a data set, and one split of them, or `k`. A test split of its own stays as it is."""
    parts = list(found.splits.values())
    examples = layouts.Examples(
        tuple(path for part in parts for path in part.paths), np.concatenate([part.labels for part in parts])
    )
    pool = np.arange(sum(len(part) for split, part in found.splits.items() if split != "test"))
    fixed = np.arange(len(pool), len(examples))  # test comes last
    labels = examples.labels[pool]
    if k is None:
        check(found, labels, None)
        made = [split_once(labels, val_fraction, test_fraction, seed)]
    else:
        aside = split_once(labels, 0.0, test_fraction, seed)
        check(found, labels[aside["train"]], k)
        made = [
            {**{split: aside["train"][part] for split, part in fold.items()}, "test": aside["test"]}
            for fold in folds(labels[aside["train"]], k, seed)
        ]
    for splits in made:
        splits["test"] = np.concatenate([splits["test"], fixed])
    return examples, made


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, writes the lists and says how to use them."""
    parser = ArgumentParser(prog="python -m tools.split_data", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="a data set in any layout that train.py takes")
    parser.add_argument("out", type=Path, metavar="OUT.csv", help="list to write; with --k-fold OUT-1.csv, OUT-2.csv …")
    parser.add_argument("--image-root", help="folder that the paths of a CSV are relative to; default: the CSV's own")
    parser.add_argument("--val-fraction", type=float, help="share of each class to validate on (default 0.2)")
    parser.add_argument("--test-fraction", type=float, help="share of each class to keep for a test (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="draws another split (default %(default)s)")
    parser.add_argument("--k-fold", type=int, metavar="K", help="write K lists with each image in val exactly once")
    flags = parser.parse_args(argv)
    if flags.out.suffix.lower() != ".csv":
        raise UserError(f"{str(flags.out)!r}: give a name that ends in .csv, by which train.py knows a list")
    if flags.seed < 0 or (flags.k_fold is not None and flags.k_fold < 2):
        raise UserError("--seed must be at least 0 and --k-fold at least 2")
    if flags.k_fold is not None and flags.val_fraction is not None:
        raise UserError("--k-fold sets the share of validation images itself: leave out --val-fraction")
    val, test = (0.2 if flags.val_fraction is None else flags.val_fraction), flags.test_fraction or 0.0
    if not (0 <= val < 1 and 0 <= test < 1 and (flags.k_fold is not None or val + test < 1)):
        raise UserError(f"--val-fraction {val} and --test-fraction {test}: numbers from 0, less than 1 in sum")
    found = layouts.find_images(flags.data, val_fraction=0.0, test_fraction=0.0, image_root=flags.image_root or None)
    if remarks := found.remarks():
        print(remarks, file=sys.stderr)
    if test and "test" in found.splits:
        raise UserError(f"{flags.data!r} brings a test split, which stays: leave out --test-fraction")
    examples, made = plan(found, val, test, flags.seed, flags.k_fold)

    numbers = [""] if flags.k_fold is None else [f"-{i}" for i in range(1, flags.k_fold + 1)]
    paths = [flags.out.with_name(f"{flags.out.stem}{number}{flags.out.suffix}") for number in numbers]
    if os.path.isfile(flags.data) and any(path.exists() and path.samefile(flags.data) for path in paths):
        raise UserError(f"{flags.data!r} would be overwritten: name another list")
    beside = [write_list(path, found, examples, splits) for path, splits in zip(paths, made, strict=True)]
    header = ["list", "train", "val", "test"]
    rows = [[path, *(len(splits[split]) for split in header[1:])] for path, splits in zip(paths, made, strict=True)]
    print(table(rows, header))
    image_root = "" if beside[0] else f" --image-root {shlex.quote(found.root)}"
    print("", *(one_line(f"python train.py {shlex.quote(str(path))}{image_root}") for path in paths), sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
