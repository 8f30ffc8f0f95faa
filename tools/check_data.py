"""Decodes every image of a data set and lists what is wrong: bad files, wrong extensions, duplicates, leaks.

What is not read at all (other formats, folders that are no split) is listed too.

Exit status: 0 if every image can be decoded (the rest are warnings), 1 if some cannot, 2 if there is nothing to check
or train.py would not take DATA.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from console import ArgumentParser, UserError, cores, one_line, run_script
from dataset import images
from dataset.contents import content_hash
from dataset.walk import IMAGE_EXTENSIONS, walk
from reports.tables import table
from tools.data_flags import add_data_flags, find_images

EXTENSIONS = {
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "png": (".png",),
    "gif": (".gif",),
    "bmp": (".bmp",),
    "webp": (".webp",),
    "tiff": (".tif", ".tiff"),
}
FILES_FOR_PROCESSES = 2000
NO_SPLIT = "-"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Listed:
    """One file of a data set: its path, its name within the data set, its class, its split."""

    path: str
    name: str
    label: str
    split: str


@dataclass(frozen=True)
class Found:
    """What decoding a file shows: why it is bad, or its format and its size in bytes."""

    fault: str | None
    kind: str | None = None
    size: int = 0


@dataclass(frozen=True)
class Duplicates:
    """Files of the same content, in the order of the data set."""

    files: tuple[Listed, ...]

    def within_splits(self) -> Iterator[list[Listed]]:
        """The copies of each split that has more than one."""
        by_split: dict[str, list[Listed]] = defaultdict(list)
        for file in self.files:
            by_split[file.split].append(file)
        return (files for files in by_split.values() if len(files) > 1)

    def across_splits(self) -> bool:
        return len({file.split for file in self.files}) > 1

    def labels_differ(self) -> bool:
        return len({file.label for file in self.files}) > 1


@dataclass(frozen=True)
class Listing:
    """What there is to check, and what is not read."""

    title: str
    files: list[Listed]
    ignored: list[str]
    notes: list[str]
    error: UserError | None = None  # why this is no data set


def list_files(flags: argparse.Namespace) -> Listing:
    """The files of a data set.

    Of a folder that is no data set, perhaps because of the very files that are to be found, all images are listed; the
    class is then the folder.
    """
    try:
        found = find_images(flags)
    except UserError as error:
        if not os.path.isdir(flags.data):
            raise
        listing = walk(flags.data)
        files = [
            Listed(os.path.join(flags.data, name), name, os.path.dirname(name) or ".", NO_SPLIT)
            for name in listing.names()
        ]
        if not files:
            raise
        ignored = [*listing.ignored, *listing.ours]
        return Listing(f"{flags.data}: a folder that is no data set", files, ignored, [], error)
    files = [
        Listed(path, name, found.class_names[label], split)
        for split, examples in found.splits.items()
        for path, name, label in zip(examples.paths, found.relative_names(split), examples.labels, strict=True)
    ]
    return Listing(f"{flags.data}: {found.layout}", files, list(found.ignored), list(found.notes))


def in_parallel(work: Callable[[str], Result], paths: Sequence[str], what: str) -> list[Result]:
    """`work` on every path, on all cores, with a bar.

    By processes where there are files enough to repay their start: of decoding an image about a third holds the
    interpreter, so that threads would occupy three cores at most.
    """
    pool: Executor = ThreadPoolExecutor(cores())
    if len(paths) >= FILES_FOR_PROCESSES:
        with contextlib.suppress(OSError, ImportError, NotImplementedError):  # a host without semaphores: AWS Lambda
            pool = ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn"))
    try:
        with pool:
            results = pool.map(work, paths, chunksize=16)
            return list(tqdm(results, total=len(paths), desc=what, unit="img", leave=False, disable=None))
    except BrokenExecutor:
        raise UserError(
            f"{what}: a process was killed, perhaps for lack of memory: close other programs, or use fewer cores "
            "with: taskset -c 0 python -m tools.check_data ..."
        ) from None


def examine(path: str) -> Found:
    """Decodes one file whole."""
    fault = images.find_fault(path, thorough=True)
    if fault is not None:
        return Found(fault)
    try:
        return Found(None, images.image_format(path), os.path.getsize(path))
    except (images.ImageError, OSError) as error:  # gone since it was decoded
        return Found(str(error))


def hash_or_path(path: str) -> str:
    """A hash of a file's bytes; of a file that has become unreadable, its path, which equals no other."""
    try:
        return content_hash(path)
    except OSError:
        return path


def find_duplicates(files: Sequence[Listed], found: Sequence[Found]) -> list[Duplicates]:
    """Groups of good files with the same bytes; only files of equal size are read for it."""
    sizes = Counter(f.size for f in found if f.fault is None)
    candidates = [file for file, f in zip(files, found, strict=True) if f.fault is None and sizes[f.size] > 1]
    hashes = in_parallel(hash_or_path, [file.path for file in candidates], "comparing files of equal size")
    groups: dict[str, list[Listed]] = defaultdict(list)
    for file, digest in zip(candidates, hashes, strict=True):
        groups[digest].append(file)
    return [Duplicates(tuple(group)) for group in groups.values() if len(group) > 1]


def counts_table(files: Sequence[Listed], found: Sequence[Found]) -> str:
    """Files per class and split, the bad ones included, and how many of them are bad."""
    splits = list(dict.fromkeys(file.split for file in files))
    count = Counter((file.label, file.split) for file in files)
    bad = Counter(file.label for file, f in zip(files, found, strict=True) if f.fault is not None)
    labels = sorted({file.label for file in files})
    numbers = [[*(count[la, s] for s in splits), sum(count[la, s] for s in splits), bad[la]] for la in labels]
    rows = [[name, *line] for name, line in zip(labels, numbers, strict=True)]
    return table([*rows, ["all", *map(sum, zip(*numbers, strict=True))]], ["class", *splits, "files", "bad"])


def section(title: str, lines: Sequence[str]) -> list[str]:
    """A heading with the number of lines under it; nothing where there are none."""
    return ["", f"{title}: {len(lines)}", *(f"  {one_line(line)}" for line in lines)] if lines else []


def findings(listing: Listing, found: Sequence[Found]) -> list[str]:
    """The lines of the report that follow the table."""
    files = listing.files
    pairs: list[tuple[Listed, Found]] = list(zip(files, found, strict=True))
    bad = [f"{file.name}: {f.fault}" for file, f in pairs if f.fault is not None]
    wrong = [
        f"{file.name}: is {f.kind.upper()}"
        for file, f in pairs
        if f.kind is not None
        and (extension := os.path.splitext(file.name)[1].lower()) in IMAGE_EXTENSIONS
        and extension not in EXTENSIONS[f.kind]
    ]
    groups = find_duplicates(files, found)
    within = [f"{part[0].split}: " + " = ".join(f.name for f in part) for g in groups for part in g.within_splits()]
    across = [" = ".join(f"{f.name} ({f.split})" for f in g.files) for g in groups if g.across_splits()]
    differ = [" = ".join(f"{f.name} ({f.label})" for f in g.files) for g in groups if g.labels_differ()]
    lines = [
        *section("bad files", bad),
        *section("files whose extension names another format (read by content all the same)", wrong),
        *section("identical files within a split", within),
        *section("identical files in several splits (a leak: scores will be too good)", across),
        *section("identical files with different labels", differ),
        *section("notes", listing.notes),
        *section("not read (files of other formats, folders that are no part of the data set)", listing.ignored),
    ]
    return lines or ["", "nothing wrong found"]


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, checks the data set and prints the report."""
    parser = ArgumentParser(prog="python -m tools.check_data", description=__doc__)
    add_data_flags(parser)
    flags = parser.parse_args(argv)
    listing = list_files(flags)
    found = in_parallel(examine, [file.path for file in listing.files], "decoding")
    counts = counts_table(listing.files, found)
    print("\n".join([one_line(listing.title), "", counts, *findings(listing, found)]))
    if any(f.fault is not None for f in found):
        if listing.error:
            print(f"warning: {one_line(listing.error)}", file=sys.stderr)
        return 1
    if listing.error:
        raise listing.error
    return 0


if __name__ == "__main__":
    run_script(main)
