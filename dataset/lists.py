"""Images that are named in a file: the lists of Food-101, and a CSV. Each must be on disk and inside the folder."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence

from console import UserError

SPLIT_OF_NAME = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NO_SPLIT = "all"  # the only split of data that bring none
FOOD101_LISTS = {"train": "train.txt", "val": "test.txt"}  # the published test list is what others validate on
ByClass = dict[str, list[str]]  # class name -> names relative to the data folder
Row = tuple[str, str, str, str]  # where it is listed (for messages), name relative to the data folder, class, split


def read_food101_lists(meta: str) -> tuple[list[str], list[Row]]:
    """Class names in the order of Food-101's `classes.txt`, and the rows of its `train.txt` and `test.txt`."""
    class_names = [line for _, line in _numbered_lines(os.path.join(meta, "classes.txt"))]
    for name in class_names:
        if "/" in name or name in (".", "..") or class_names.count(name) > 1:
            raise UserError(f"{meta!r}: classes.txt has {name!r} twice or as no plain folder name: fix that line")
    known = set(class_names)
    rows = []
    for split, list_name in FOOD101_LISTS.items():
        path = os.path.join(meta, list_name)
        for number, line in _numbered_lines(path):
            where = f"{path!r} line {number}"
            class_name, _, image_id = line.partition("/")
            if class_name not in known or not image_id or "/" in image_id:  # with "/" it could leave its folder
                raise UserError(f"{where}: {line!r} is not <class>/<id> with a class of classes.txt: fix the line")
            rows.append((where, f"images/{class_name}/{image_id}.jpg", class_name, split))
    return class_names, rows


def read_csv(path: str, root: str) -> Iterator[Row]:
    """The rows of a CSV with the columns path, label and perhaps split; raises UserError with the line of a mistake.

    A space after a comma is not part of what follows, unless that is in quotes.
    """
    line = 1
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            header = [column.strip().lower() for column in next(reader, [])]
            for column in ("path", "label", "split"):
                if header.count(column) > 1:
                    raise UserError(f"{path!r} has {header.count(column)} columns {column!r}: keep one of them")
                if column not in header and column != "split":
                    raise UserError(
                        f"{path!r} has no column {column!r} in its first line: "
                        "give comma-separated UTF-8 text that begins with path,label or path,label,split"
                    )
            roots = [os.path.join(folder, "") for folder in (root, os.path.realpath(root))]
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield _csv_row(cells, header, roots, f"{path!r} line {line}")
                line = reader.line_num + 1  # where the next row begins: a quoted name may hold line breaks
    except OSError as error:
        raise UserError(f"cannot read {path!r} ({error.strerror}): fix its permissions or give another") from error
    except csv.Error as error:
        raise UserError(f"{path!r} line {line} is not CSV ({error}): fix the quotes there") from error


def _csv_row(cells: list[str], header: list[str], roots: list[str], where: str) -> Row:
    if any(cells[len(header) :]):
        raise UserError(f"{where} has more cells than the first line: put names with commas in double quotes")
    row = dict(zip(header, cells, strict=False))
    label = row.get("label", "").strip()
    if not row.get("path") or not label:
        raise UserError(f"{where} lacks a path or a label: fill it in or remove the row")
    # A stray quote takes the rows up to the next quote into its cell.
    if any(line.count(",") >= len(header) - 1 for line in label.splitlines()[1:]):
        raise UserError(f"{where}: the label holds whole rows: fix the quotes there")
    # A path may be any bytes, a label is text. (Nearly all are ASCII: a quarter of the time of a long list.)
    if not label.isascii() and any("\udc80" <= character <= "\udcff" for character in label):
        raise UserError(f"{where}: the label {label!r} is not UTF-8: save the file as UTF-8")
    split = row.get("split", "").strip().lower() if "split" in header else NO_SPLIT
    if split != NO_SPLIT and split not in SPLIT_OF_NAME:
        raise UserError(f"{where}: unknown split {split!r}: write one of {', '.join(SPLIT_OF_NAME)}")
    name = os.path.normpath(row["path"])
    for folder in roots:
        name = name.removeprefix(folder)
    if os.path.isabs(name) or name.split(os.sep)[0] in (".", ".."):
        raise UserError(f"{where}: {row['path']!r} is no file inside {roots[0]!r}: move it there or set the image root")
    return where, name, label, SPLIT_OF_NAME.get(split, NO_SPLIT)


def collect(
    listed_in: str, root: str, rows: Iterable[Row], class_names: Sequence[str] = ()
) -> tuple[dict[str, ByClass], list[str]]:
    """{split: {class: names}} of listed images, which must be on disk, and what to tell of the list.

    An image that is listed twice alike counts once, which is told.
    """
    places: dict[str, tuple[str, str]] = {}
    repeats: list[str] = []
    for where, name, label, split in rows:
        was = places.get(name)
        if was is None:
            places[name] = label, split
        elif was == (label, split):
            repeats.append(where)
        else:
            listed = " and before ".join(
                f"as {c!r} in {s.replace(NO_SPLIT, 'train')}" for c, s in ((label, split), was)
            )
            raise UserError(f"{where}: {name!r} is listed {listed}: remove one of the two")
    if not places:
        raise UserError(f"{listed_in!r} lists no images: give a line for each image")
    _check_present(root, list(places), listed_in)
    class_names = class_names or sorted({label for label, _ in places.values()})
    splits = sorted({split for _, split in places.values()}, key=("train", "val", "test", NO_SPLIT).index)
    found: dict[str, ByClass] = {split: {name: [] for name in class_names} for split in splits}
    for name, (label, split) in places.items():
        found[split][label].append(name)
    notes = [f"{len(repeats)} rows repeat an earlier one and count once, first {repeats[0]}"] if repeats else []
    return found, notes


def _check_present(root: str, names: list[str], listed_in: str) -> None:
    """Raises for names that are not on disk; looks once into each folder, which is quicker than once for each file."""
    present: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, base = name.rpartition("/")
        if folder not in present:
            try:
                present[folder] = set(os.listdir(os.path.join(root, folder)))
            except (OSError, ValueError):  # no such folder, or a NUL in its name
                present[folder] = set()
        # The second look is for file systems that take other spellings of a name (upper case, composed accents).
        if base not in present[folder] and not os.path.lexists(os.path.join(root, name)):
            missing.append(name)
    if missing:
        remedy = "add them or remove their lines"
        if "\\" in missing[0]:
            remedy = "write the paths with forward slashes, relative to that folder"
        raise UserError(
            f"{listed_in!r} lists {len(missing)} of {len(names)} files that are not in {root!r}, first {missing[0]!r}: "
            + remedy
        )


def _numbered_lines(path: str) -> list[tuple[int, str]]:
    """(line number, line) of the lines that are not blank."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path!r} ({error.strerror}): Food-101 needs this list") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
