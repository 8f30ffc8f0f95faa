"""What the face tools share: pictures made from every image of a data set, on all cores, resumable, and their list.

OUT gets the pictures under the names of their images, `faces.csv`, which train.py reads, and `left-out.csv`, the images
that gave no picture, with the reason: each image is in exactly one of the two.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from console import StopSignals, UserError, one_line
from dataset.images import ImageError, read_image
from files import replace_file, write_csv, write_text
from reports.tables import table
from tools.data_flags import add_data_flags, find_images

JOURNAL = ".progress.jsonl"  # what OUT was begun with, then a line for each image that is done
LIST, LEFT_OUT = "faces.csv", "left-out.csv"
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Picture:
    """A picture to write (uint8 [H, W, 3] or grey [H, W]) and what `faces.csv` says of it."""

    pixels: np.ndarray
    columns: dict[str, int | float]


Make = Callable[[np.ndarray, argparse.Namespace], list[Picture] | str]  # of uint8 [H, W, 3]; a text: why there is none
Record = dict[str, Any]  # a line of the journal: image, pictures (their rows of faces.csv), reason


def write_pictures(make: Make, flags: argparse.Namespace, path: str, name: str) -> Record:
    """Writes the pictures of one image, each aside and renamed; returns its line of the journal."""
    try:
        made = make(read_image(path), flags)
    except ImageError as error:
        made = error.reason
    if isinstance(made, str):
        return {"image": name, "pictures": [], "reason": made}
    rows = []
    for number, picture in enumerate(made, 1):
        # The whole old name stays in it, so that a.jpg and a.png beside each other give two pictures.
        target = f"{one_line(name)}-{number}.{flags.format}"
        (flags.out / target).parent.mkdir(parents=True, exist_ok=True)
        with replace_file(flags.out / target) as aside:
            Image.fromarray(picture.pixels).save(aside, quality=JPEG_QUALITY)
        rows.append({"path": target, **picture.columns})
    return {"image": name, "pictures": rows, "reason": ""}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """DATA, OUT and what all face tools let people choose."""
    add_data_flags(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the pictures and faces.csv")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in pixels (default %(default)s)")
    parser.add_argument("--grey", action="store_true", help="write grey pictures")
    parser.add_argument("--equalize", action="store_true", help="equalise the histogram of grey pictures")
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="of the pictures (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")


def check_flags(flags: argparse.Namespace) -> None:
    """Raises UserError for values that make no pictures."""
    if not 16 <= flags.size <= 4096 or flags.jobs < 1:
        raise UserError(f"--size {flags.size} --jobs {flags.jobs}: give 16 to 4096 pixels and at least 1 process")
    if flags.equalize and not flags.grey:
        raise UserError("--equalize is for grey pictures: add --grey")


def to_grey(pixels: np.ndarray, flags: argparse.Namespace) -> np.ndarray:
    """RGB uint8 [H, W, 3] as grey [H, W] by the luma of ITU-R BT.601, its histogram equalised; or as it is."""
    if not flags.grey:
        return pixels
    image = Image.fromarray(pixels).convert("L")
    return np.asarray(ImageOps.equalize(image) if flags.equalize else image)


def make_pictures(flags: argparse.Namespace, make: Make, columns: Sequence[str]) -> int:
    """Runs `make` on every image of DATA that is not done yet, writes the lists, prints the counts; the exit status.

    `columns` are the names in `Picture.columns`, in the order of `faces.csv`.
    """
    found = find_images(flags)
    if found.layout != "csv" and flags.out.resolve().is_relative_to(os.path.realpath(found.root)):
        raise UserError(f"{str(flags.out)!r} lies inside the data, as one more class: give a folder outside")
    listed = [
        (path, name, found.class_names[label], split)
        for split, examples in found.splits.items()
        for path, name, label in zip(examples.paths, found.relative_names(split), examples.labels, strict=True)
    ]
    done = begin(flags, found.digest())
    todo = [(path, name) for path, name, *_ in listed if name not in done]
    with open(flags.out / JOURNAL, "a", encoding="utf-8") as journal, StopSignals() as stop:
        results = on_all_cores(partial(write_pictures, make, flags), todo, flags.jobs)
        for record in tqdm(results, total=len(listed), initial=len(done), unit="img", disable=None):
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            done[record["image"]] = record
            stop.check()
    for aside in flags.out.rglob(".tmp-*"):  # of a run that was killed
        aside.unlink()
    return write_lists(flags.out, [(name, label, split, done[name]) for _, name, label, split in listed], columns)


def write_lists(out: Path, records: Sequence[tuple[str, str, str, Record]], columns: Sequence[str]) -> int:
    """Writes both lists from (image, class, split, record), ends the journal, prints the counts; the exit status."""
    left_out = [(name, label, split, record["reason"]) for name, label, split, record in records if record["reason"]]
    rows = [
        (picture["path"], label, split, name, *(picture[column] for column in columns))
        for name, label, split, record in records
        for picture in record["pictures"]
    ]
    write_csv(out / LEFT_OUT, ["image", "label", "split", "reason"], left_out)
    write_csv(out / LIST, ["path", "label", "split", "image", *columns], rows)
    (out / JOURNAL).unlink()

    counts = [Counter(label for _, label, *_ in lines) for lines in (records, rows, left_out)]
    lines = [[label, *(count[label] for count in counts)] for label in sorted(counts[0])]
    print(table([*lines, ["all", *map(len, (records, rows, left_out))]], ["class", "images", "pictures", "left out"]))
    if left_out:
        print(f"\nimages left out, with the reason: {one_line(out / LEFT_OUT)}")
    if rows:
        print(f"\npython train.py {one_line(shlex.quote(str(out / LIST)))}")
    return 0 if rows else 1


def begin(flags: argparse.Namespace, digest: str) -> dict[str, Record]:
    """Makes OUT and its journal, or reads from the journal of a run that was stopped what is done: {image: record}."""
    ignored = ("data", "image_root", "out", "jobs", "val_fraction", "test_fraction")  # the digest has what they change
    head = json.dumps({**{name: value for name, value in vars(flags).items() if name not in ignored}, "images": digest})
    out, journal = flags.out, flags.out / JOURNAL
    try:
        if journal.is_file():
            first, *lines = journal.read_text(encoding="utf-8").split("\n")[:-1]  # the last is empty or was cut off
            if first != head:
                raise UserError(
                    f"{str(out)!r} was begun with other images or flags, {first}: repeat those or name another"
                )
            write_text(journal, "".join(f"{line}\n" for line in (first, *lines)))
            return {record["image"]: record for record in map(json.loads, lines)}
        out.mkdir(parents=True, exist_ok=True)
        if any(not entry.name.startswith(".tmp-") for entry in out.iterdir()):
            raise UserError(f"{str(out)!r} is finished or holds other files: remove it or name another")
        write_text(journal, f"{head}\n")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write in {str(out)!r} ({error.strerror}): name another folder") from None
    return {}


def on_all_cores(work: Callable[[str, str], Record], todo: Sequence[tuple[str, str]], jobs: int) -> Iterator[Record]:
    """The record of each image of `todo` (path, name), in order."""
    if not todo:
        return
    pool = ProcessPoolExecutor(min(jobs, len(todo)), multiprocessing.get_context("spawn"), initializer=_start_process)
    try:
        yield from pool.map(work, *zip(*todo, strict=True))
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, perhaps for lack of memory: repeat the command with a smaller --jobs; it goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """Leaves Ctrl-C to the main process, and ends when that ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
