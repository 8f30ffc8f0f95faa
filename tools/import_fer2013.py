"""Writes the images of the official fer2013.csv into split folders that train.py reads: train, val and test.

FER-2013: 48 x 48 grey pictures of faces with one of seven expressions (Goodfellow et al., arXiv:1307.0414). Its
PublicTest is val here, its PrivateTest test. Nothing is written where a row is damaged.
"""

import csv
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from console import ArgumentParser, UserError, run_script
from reports.tables import table

CLASS_NAMES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # the numbers 0 to 6 of `emotion`
SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
OFFICIAL = {"train": 28_709, "val": 3_589, "test": 3_589}
SIDE = 48
Row = tuple[str, str, np.ndarray]  # split, class name, uint8 [SIDE, SIDE]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of fer2013.csv in order; raises UserError with the line of a damaged one."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            if missing := [name for name in ("emotion", "pixels", "Usage") if name not in reader.fieldnames]:
                raise UserError(f"{str(path)!r} has no column {missing[0]!r}: give the file with emotion,pixels,Usage")
            for row in reader:
                yield _parse(row, f"{str(path)!r} line {reader.line_num}")
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror}): give the path of fer2013.csv") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} line {reader.line_num + 1} is not CSV ({error}): get the file again") from None


def _parse(row: dict[str, str | None], where: str) -> Row:
    emotion, usage = ((row[name] or "").strip() for name in ("emotion", "Usage"))
    if emotion not in map(str, range(len(CLASS_NAMES))):
        raise UserError(f"{where}: emotion {emotion!r} is none of 0 to 6: mend or remove the row")
    if usage not in SPLITS:
        raise UserError(f"{where}: Usage {usage!r} is none of {', '.join(SPLITS)}: mend or remove the row")
    try:
        pixels = np.array((row["pixels"] or "").split(), dtype=np.uint8)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: pixels that are not numbers from 0 to 255: mend or remove the row") from None
    if pixels.size != SIDE * SIDE:
        raise UserError(f"{where}: {pixels.size} pixels in place of {SIDE * SIDE}: mend or remove the row")
    return SPLITS[usage], CLASS_NAMES[int(emotion)], pixels.reshape(SIDE, SIDE)


def write_folders(rows: Iterator[Row], out: Path) -> Counter[tuple[str, str]]:
    """Writes OUT/split/class/number.png in one step; returns the count of each split and class."""
    counts: Counter[tuple[str, str]] = Counter()
    aside = out.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        for number, (split, class_name, pixels) in enumerate(tqdm(rows, unit="img", disable=None), 1):
            if not any(split == known for known, _ in counts):
                for name in CLASS_NAMES:  # the same in every split, as train.py expects
                    (aside / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(aside / split / class_name / f"{number:05d}.png")
            counts[split, class_name] += 1
        if not counts:
            raise UserError("the CSV has no rows: get the file again")
        os.replace(aside, out)  # takes the place of an empty folder, never of one with files
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, writes the images and prints their counts."""
    parser = ArgumentParser(prog="python -m tools.import_fer2013", description=__doc__)
    parser.add_argument("csv", type=Path, metavar="fer2013.csv", help="the official file (emotion,pixels,Usage)")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the images")
    flags = parser.parse_args(argv)
    if flags.out.exists() and not (flags.out.is_dir() and not any(flags.out.iterdir())):
        raise UserError(f"{str(flags.out)!r} exists already: give a new folder")
    counts = write_folders(read_rows(flags.csv), flags.out.absolute())
    rows = [[name, *(counts[split, name] for split in OFFICIAL)] for name in CLASS_NAMES]
    sums = {split: sum(counts[split, name] for name in CLASS_NAMES) for split in OFFICIAL}
    print(table([*rows, ["all", *sums.values()]], ["class", *OFFICIAL]))
    if sums != OFFICIAL:
        print(f"\nnot the official counts, which are {', '.join(f'{n} {split}' for split, n in OFFICIAL.items())}")
    return 0


if __name__ == "__main__":
    run_script(main)
