"""Writes which image is for training, validation and test as CSV lists that train.py reads; copies nothing.

Stratified: each class is split by itself, its share rounded to whole images. The images of DATA's own train and val
are pooled and drawn anew; a test split that DATA brings stays the test split. Names are written as they are on disk,
so one that begins with =, +, - or @ is a formula to a spreadsheet.

With --keep-groups the images of a group (near-duplicates, one animal, one patient) stay together, so that scores do not
come from images that training has seen. Shares are then as near as whole groups allow. Images of a group that reaches
into a test split of DATA's own are left out of train and val.
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
from dataset.corrections import read_rows
from files import replace_file
from reports.tables import table

Splits = dict[str, np.ndarray]  # split -> indices of examples, sorted


def shuffled_by_class(labels: np.ndarray, groups: np.ndarray, seed: int) -> Iterator[list[np.ndarray]]:
    """The groups of each class, as indices of images, in a random order of its own.

    `groups`: a number for each image; a group belongs to the class of its first image.
    """
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    first = np.array([group[0] for group in members])
    members = [members[i] for i in np.argsort(first, kind="stable")]
    of_group = labels[np.sort(first)]
    for label in np.unique(of_group):
        of_class = np.flatnonzero(of_group == label)
        # The raw bits of a bit generator are the same in every NumPy version, which a Generator's shuffles are not.
        drawn = of_class[np.argsort(np.random.PCG64([seed, int(label)]).random_raw(len(of_class)), kind="stable")]
        yield [members[i] for i in drawn]


def share(count: int, fraction: float) -> int:
    """`fraction` of `count`, a half rounded up; the fraction is the decimal that was typed, not its nearest float."""
    return int(count * Fraction(str(fraction)) + Fraction(1, 2))


def split_once(labels: np.ndarray, groups: np.ndarray, val_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Train, val and test by the shares of each class; a group lies in one of them.

    Every class keeps a group for training; of single images one is in val if there are two and a `val_fraction`.
    """
    parts: dict[str, list[np.ndarray]] = {"test": [], "val": [], "train": []}
    for members in shuffled_by_class(labels, groups, seed):
        count = sum(map(len, members))
        val = max(share(count, val_fraction), int(val_fraction > 0))
        val = min(val, count - 1)
        wanted = {"test": min(share(count, test_fraction), count - 1 - val), "val": val}
        trained = False
        for number, group in enumerate(members, 1):
            # Where it brings the count nearer to the share: always for single images, as long as one is wanted.
            fits = [split for split, left in wanted.items() if left > 0 and len(group) <= 2 * left]
            split = fits[0] if fits and (trained or number < len(members)) else "train"
            parts[split].append(group)
            trained = trained or split == "train"
            wanted = {name: left - len(group) * (name == split) for name, left in wanted.items()}
    none = np.zeros(0, np.int64)
    return {split: np.sort(np.concatenate([none, *parts[split]])) for split in ("train", "val", "test")}


def folds(labels: np.ndarray, groups: np.ndarray, k: int, seed: int) -> list[Splits]:
    """`k` splits of which each image is in val exactly once; a group lies in one fold.

    Folds of single images differ by at most one image, in every class too.
    """
    fold = np.empty(len(labels), np.int64)
    sizes = [0] * k
    for members in shuffled_by_class(labels, groups, seed):
        of_class = [0] * k
        for group in members:
            least = min(range(k), key=lambda i: (of_class[i], sizes[i]))
            fold[group] = least
            of_class[least] += len(group)
            sizes[least] += len(group)
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


def read_groups(path: str | None, found: layouts.LabelledImages) -> np.ndarray:
    """The group of each image of all splits in turn, int64 [N]; one of its own for those that the CSV does not name."""
    starts = dict(zip(found.splits, np.cumsum([0, *map(len, found.splits.values())]).tolist(), strict=False))
    groups = np.arange(sum(map(len, found.splits.values())))
    first: dict[str, int] = {}
    grouped: dict[int, str] = {}
    for row in read_rows(path, found, "group") if path else ():
        name, image = row.cells["group"], starts[row.split] + row.index
        if grouped.setdefault(image, name) != name:
            raise UserError(
                f"{row.where}: {row.cells['image']!r} is in group {name!r} and {grouped[image]!r}: join them"
            )
        groups[image] = first.setdefault(name, image)
    return groups


def plan(
    found: layouts.LabelledImages,
    groups: np.ndarray,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    k: int | None,
) -> tuple[layouts.Examples, list[Splits]]:
    """All the images of a data set, and one split of them, or `k`. A test split of its own stays as it is."""
    parts = list(found.splits.values())
    examples = layouts.Examples(
        tuple(path for part in parts for path in part.paths), np.concatenate([part.labels for part in parts])
    )
    count = sum(len(part) for split, part in found.splits.items() if split != "test")
    fixed = np.arange(count, len(examples))  # test comes last
    pool = np.flatnonzero(~np.isin(groups[:count], groups[fixed]))
    if left_out := count - len(pool):
        print(f"left out {left_out} images of train and val, whose groups reach into the test split", file=sys.stderr)
    labels, groups = examples.labels[pool], groups[pool]
    if k is None:
        check(found, labels, None)
        made = [split_once(labels, groups, val_fraction, test_fraction, seed)]
    else:
        aside = split_once(labels, groups, 0.0, test_fraction, seed)
        rest = aside["train"]
        check(found, labels[rest], k)
        made = [
            {**{split: rest[part] for split, part in fold.items()}, "test": aside["test"]}
            for fold in folds(labels[rest], groups[rest], k, seed)
        ]
    made = [{split: pool[part] for split, part in splits.items()} for splits in made]
    for number, splits in enumerate(made, 1):
        splits["test"] = np.concatenate([splits["test"], fixed])
        trained = np.bincount(examples.labels[splits["train"]], minlength=len(found.class_names))
        if not trained.all():
            where = "" if k is None else f" of fold {number}"
            raise UserError(
                f"--keep-groups leaves no training image{where} of class {found.class_names[trained.argmin()]!r}: "
                "add images, or remove rows from its list"
            )
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
    parser.add_argument(
        "--keep-groups",
        metavar="CSV",
        help="keep images of a group in one split: columns image and group, such as duplicates.csv of tools.clean_data",
    )
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
    groups = read_groups(flags.keep_groups, found)
    examples, made = plan(found, groups, val, test, flags.seed, flags.k_fold)

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
