"""CSV files about the images of a data set, as tools.clean_data writes them: corrected labels, groups of copies."""

import csv
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from console import UserError
from dataset.layouts import LabelledImages
from files import defused

DROP = "drop"  # the action that leaves an image out; every other one is a class


@dataclass(frozen=True)
class Correction:
    """What a person decided about an image: its name relative to the data's root, its class, `DROP` or a new class."""

    image: str
    label: str
    action: str


@dataclass(frozen=True)
class Row:
    """A row of a list: where it stands (for messages), the split and the place in it of its image, and its cells."""

    where: str
    split: str
    index: int
    cells: dict[str, str]


def read_rows(path: str, found: LabelledImages, column: str) -> Iterator[Row]:
    """The rows of a CSV with the columns `image` and `column` where the latter is filled in.

    Raises UserError for a file that is no such CSV, and for an image that `found` does not have.
    """
    place = {
        as_written(name): (split, index)
        for split in found.splits
        for index, name in enumerate(found.relative_names(split))
    }
    try:
        with open(path, encoding="utf-8-sig", errors="backslashreplace", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [name for name in ("image", column) if name not in (reader.fieldnames or ())]:
                raise UserError(
                    f"{path!r} has no column {missing[0]!r}: give comma-separated text whose first line names the "
                    f"columns image and {column}, as python -m tools.clean_data writes it"
                )
            for cells in reader:
                where = f"{path!r} line {reader.line_num}"
                if None in cells:
                    raise UserError(f"{where} has more cells than the first line: put names with commas in quotes")
                cells = {name: (value or "").strip() for name, value in cells.items() if name != "image"} | {
                    "image": cells["image"] or ""
                }
                if not cells[column]:
                    continue
                name = os.path.normpath(cells["image"])
                if name not in place:
                    raise UserError(f"{where}: {name!r} is not an image of {found.root}: remove the row")
                yield Row(where, *place[name], cells)
    except OSError as error:
        raise UserError(f"cannot read {path!r} ({error.strerror}): give a CSV file") from None
    except csv.Error as error:
        raise UserError(f"{path!r} is not CSV ({error}): save it as comma-separated text") from None


def read_corrections(path: str, found: LabelledImages) -> list[Correction]:
    """The corrections that the column `action` of a CSV asks for, by image: `drop`, or the name of a class of `found`.

    Where the CSV has a column `label`, it must be the image's label today: a list of other data must not change these.
    """
    classes = {text: name for name in found.class_names for text in (as_written(defused(name)).strip(), name.strip())}
    corrections: dict[str, Correction] = {}
    names = {split: found.relative_names(split) for split in found.splits}
    for row in read_rows(path, found, "action"):
        image, label = names[row.split][row.index], found.class_names[found.splits[row.split].labels[row.index]]
        action = DROP if row.cells["action"].lower() == DROP else classes.get(row.cells["action"])
        if action is None:
            raise UserError(
                f"{row.where}: {row.cells['action']!r} is no class of the data: write {DROP}, or one of "
                f"{', '.join(found.class_names[:20])}{', ...' if len(found.class_names) > 20 else ''}"
            )
        if action == DROP and DROP in classes:
            raise UserError(f"{row.where}: {DROP!r} is a class of these data too: rename that class")
        if (given := row.cells.get("label")) and classes.get(given, given) != label:
            raise UserError(
                f"{row.where}: {image!r} is of class {label!r} and not {given!r}: the list is of other data, or the "
                "data were corrected since: run python -m tools.clean_data again"
            )
        correction = Correction(as_written(image), label, action)
        if corrections.setdefault(image, correction) != correction:
            raise UserError(f"{row.where}: {image!r} is corrected twice: keep one of the rows")
    return sorted((c for c in corrections.values() if c.action != c.label), key=lambda c: c.image)


def apply_corrections(found: LabelledImages, corrections: Sequence[Correction]) -> LabelledImages:
    """The data set without the images that are dropped and with the new labels; images keep their order.

    Raises UserError where an image is not there, or is not of the class that it was corrected from.
    """
    if not corrections:
        return found
    left, splits = {correction.image: correction for correction in corrections}, {}
    dropped = 0
    for split, examples in found.splits.items():
        labels, kept = examples.labels.copy(), []
        for index, name in enumerate(found.relative_names(split)):
            correction = left.pop(as_written(name), None)
            if correction is not None and correction.label != found.class_names[labels[index]]:
                raise UserError(f"{name!r} is not of class {correction.label!r} any more, from which it was corrected")
            if correction is None or correction.action != DROP:
                kept.append(index)
            if correction is not None and correction.action != DROP:
                labels[index] = found.class_names.index(correction.action)
        dropped += len(examples) - len(kept)
        splits[split] = dataclasses.replace(examples, labels=labels).subset(kept)
    if left:
        raise UserError(f"{found.root}: {len(left)} corrected images are not there, first {min(left)!r}")
    note = f"corrected: {len(corrections) - dropped} images with another label, {dropped} dropped"
    return dataclasses.replace(found, splits=splits, notes=(*found.notes, note))


def as_written(name: str) -> str:
    """A name as it comes out of a CSV that `files.write_csv` wrote."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()
