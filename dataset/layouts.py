"""Where the images of a data set lie and what each one is: every layout ends in one `LabelledImages`. No TensorFlow.

Nothing here decodes an image. An entry that is named like an image but is a dangling link or an empty file is an
example all the same: whoever checks the files reports it, and must be able to name it.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from console import UserError, one_line
from dataset.folders import LAYOUTS, read_folders
from dataset.lists import FOOD101_LISTS, NO_SPLIT, ByClass, collect, read_csv, read_food101_lists
from dataset.walk import some, summary, with_ignored


@dataclass(frozen=True, eq=False)
class Examples:
    """Image files and what they show; `labels` (int64 [N]) are indices into the class names."""

    paths: tuple[str, ...]  # absolute; bytes that are not UTF-8 as os.fsdecode gives them
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """The examples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Examples(tuple(self.paths[i] for i in chosen), self.labels[chosen])


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A data set: `splits` always has "train" and "val" (which may be empty), and "test" when there is one.

    Listed for scoring, it has the splits that the data bring, or "all".
    """

    root: str  # absolute; the folder that names are relative to
    layout: str  # "food-101" | "split folders" | "class folders" | "csv"
    class_names: tuple[str, ...]
    splits: dict[str, Examples]
    ignored: tuple[str, ...] = ()  # what is not read, relative to `root`; folders end with "/"
    notes: tuple[str, ...] = ()  # what else to tell of the data set, a line each

    def relative_names(self, split: str) -> list[str]:
        """The file names of a split relative to `root`, in the order of its examples."""
        start = len(os.path.join(self.root, ""))
        return [path[start:] for path in self.splits[split].paths]

    def digest(self) -> str:
        """A hex hash of every (relative name, class name, split) in order: the same wherever `root` lies."""
        digest = hashlib.sha256()
        for split, examples in self.splits.items():
            ends = [f"\0{name}\0{split}\0" for name in self.class_names]
            names = self.relative_names(split)
            digest.update(_bytes("".join([n + ends[i] for n, i in zip(names, examples.labels.tolist(), strict=True)])))
        return digest.hexdigest()

    def remarks(self) -> str:
        """One line on what is not read and what else a person should know of the data set; "" where nothing is."""
        return one_line("; ".join(filter(None, (summary(self.ignored), *self.notes))))


@dataclass
class _Found:
    """What the reader of a layout found: {split: {class: relative names}}, and the fields of `LabelledImages`."""

    layout: str
    splits: dict[str, ByClass]
    class_names: list[str] = field(default_factory=list)  # where the data list them in an order of their own
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_images(
    data: str,
    *,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    image_root: str | None = None,
    scoring: bool = False,
) -> LabelledImages:
    """Recognises the layout of `data` and lists its images, class by class and by name within a class.

    A split that the data do not bring is cut from train by its fraction (see `cut_by_hash`); one that they bring is
    taken as it is. `image_root` is the folder that the paths of a CSV are relative to, by default the CSV's own.
    `scoring` lists all images in the splits that the data bring, or in one that is named "all"; nothing is cut, and
    neither training images nor a second class are needed. Raises `UserError` for everything that a user can fix.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise UserError(
            f"--val-fraction {val_fraction} and --test-fraction {test_fraction} leave nothing to train on or are "
            "negative: give numbers from 0 to below 1 that sum to less than 1"
        )
    if not data or not os.path.exists(data):
        raise UserError(f"no such file or folder: {data!r}: {LAYOUTS}")
    data = os.path.abspath(data)
    is_csv = not os.path.isdir(data)
    if is_csv and not data.lower().endswith(".csv"):
        raise UserError(f"{data!r} is a single file and not a .csv: {LAYOUTS}")
    if image_root is not None and not (is_csv and os.path.isdir(image_root)):
        why = "is not a folder: give the one that the CSV's paths are relative to" if is_csv else "is for a CSV only"
        raise UserError(f"image root {image_root!r} {why}")

    root = data if not is_csv else os.path.dirname(data) if image_root is None else os.path.abspath(image_root)
    found = _read(data, root, is_csv, scoring)
    if scoring:
        class_names, splits = _all_images(data, found)
    else:
        class_names, splits = _training_images(data, found, val_fraction, test_fraction)
    examples = {split: _examples(root, class_names, by_class) for split, by_class in splits.items()}
    return LabelledImages(root, found.layout, tuple(class_names), examples, tuple(found.ignored), tuple(found.notes))


def cut_by_hash(names: Iterable[str], val_fraction: float, test_fraction: float) -> ByClass:
    """Cuts one class into {"train": …, "val": …, "test": …} by a hash of each name; no seed, so that runs compare.

    The hash is a number u in [0, 1): val is u < val_fraction, test is u >= 1 - test_fraction. A file's split thus
    depends on nothing but its own name: adding or removing others never moves it, and another test fraction leaves val
    as it is. The price is that counts are near the fraction and not at it (100 images at 0.2: 20, give or take 4).

    The exception is a class too small for its fractions: one image goes to train, and from two on train and (with a
    val_fraction) val have at least one each; they are then taken in the order of u. Such a class may move an image
    when files are added, until it is large enough.
    """
    ordered = sorted(names)
    count = len(ordered)
    val_count = test_count = 0
    if val_fraction or test_fraction:
        u = _uniform(ordered)
        ordered = [ordered[i] for i in np.argsort(u, kind="stable").tolist()]
        val_count = max(int((u < val_fraction).sum()), int(val_fraction > 0))
        test_count = int((u >= 1 - test_fraction).sum())
    val_count = max(0, min(val_count, count - 1))
    test_count = max(0, min(test_count, count - 1 - val_count))
    parts = {"val": ordered[:val_count], "test": ordered[count - test_count :]}
    return {"train": ordered[val_count : count - test_count], **parts}


def take_per_class(examples: Examples, count: int, seed: int) -> Examples:
    """`count` images of each class (a class with fewer keeps all), by `seed`; those for n are among those for n + 1."""
    if count < 1:
        raise UserError(f"{count} images per class leave nothing: give at least 1")
    chosen = []
    for label in np.unique(examples.labels):
        indices = np.flatnonzero(examples.labels == label)
        # The raw bits of a bit generator are the same in every NumPy version, which a Generator's shuffles are not.
        rank = np.argsort(np.random.PCG64([seed, int(label)]).random_raw(len(indices)), kind="stable")
        chosen.append(indices[rank[:count]])
    return examples.subset(np.sort(np.concatenate(chosen)) if chosen else [])


def _read(data: str, root: str, is_csv: bool, scoring: bool) -> _Found:
    """Recognises the layout and lists what it names or holds."""
    if is_csv:
        by_split, notes = collect(data, root, read_csv(data, root))
        return _Found("csv", by_split, notes=notes)
    meta = os.path.join(data, "meta")
    if any(os.path.isfile(os.path.join(meta, name)) for name in ("classes.txt", *FOOD101_LISTS.values())):
        class_names, rows = read_food101_lists(meta)
        by_split, notes = collect(meta, root, rows, class_names)
        return _Found("food-101", by_split, class_names, notes=notes)
    by_split, ignored = read_folders(data, scoring)
    return _Found("class folders" if NO_SPLIT in by_split else "split folders", by_split, ignored=ignored)


def _training_images(
    data: str, found: _Found, val_fraction: float, test_fraction: float
) -> tuple[list[str], dict[str, ByClass]]:
    """The class names and {split: {class: names}} to train on; raises UserError for what can't be trained on."""
    train = found.splits.get("train") or found.splits.get(NO_SPLIT) or {}
    class_names = found.class_names or sorted(train or set().union(*found.splits.values()))
    alike = _alike(name for by_class in found.splits.values() for name in by_class)
    if empty := [name for name in class_names if not train.get(name)]:
        what = f"{data!r}: no images in train of class {some(empty)}: add some or remove the class"
        raise UserError(with_ignored(f"{what}{alike}", found.ignored))
    if len(class_names) < 2:
        raise UserError(f"{data!r} has only one class, {some(class_names)}: give images of at least two")
    known = set(class_names)
    for split, by_class in found.splits.items():
        full = {name for name in by_class if by_class[name]}
        if not full:
            what = f"{data!r}: the {split} split has no images: add some or remove the split"
            raise UserError(with_ignored(what, found.ignored))
        if new := sorted(full - known):
            folder = by_class[new[0]][0].partition("/")[0]
            sides = ((sorted(known - full), "train"), (new, folder))
            differ = ", ".join(f"{some(names)} only in {side}/" for names, side in sides if names)
            raise UserError(f"{data!r}: class folders differ: {differ}: make both have the same classes{alike}")
        if lacking := [name for name in class_names if name not in full]:
            found.notes.append(f"no images in {split} of class {some(lacking)}")
    if alike:
        found.notes.append(alike.removeprefix("; "))

    fractions = [0.0 if s in found.splits else f for s, f in (("val", val_fraction), ("test", test_fraction))]
    cut = {name: cut_by_hash(train[name], *fractions) for name in class_names}
    splits = {}
    for split in ("train", "val", "test"):
        brought = found.splits.get(split) if split != "train" else None
        splits[split] = brought or {name: cut[name][split] for name in class_names}
    if not any(splits["test"].values()):
        del splits["test"]
    return class_names, splits


def _all_images(data: str, found: _Found) -> tuple[list[str], dict[str, ByClass]]:
    """The class names and {split: {class: names}} of everything that is there."""
    full = {name for by_class in found.splits.values() for name in by_class if by_class[name]}
    if not full:
        raise UserError(with_ignored(f"{data!r} has no images", found.ignored))
    if empty := sorted({name for by_class in found.splits.values() for name in by_class} - full):
        found.notes.append(f"no images of class {some(empty)}")
    splits = {split: by_class for split, by_class in found.splits.items() if any(by_class.values())}
    return found.class_names or sorted(full), splits


def _alike(class_names: Iterable[str]) -> str:
    """Which class names look the same and are not, as the end of a message; "" where none do."""
    spellings: dict[str, set[str]] = {}
    for name in class_names:
        if not name.isascii():
            spellings.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
    pairs = [" and ".join(map(ascii, sorted(names))) for names in spellings.values() if len(names) > 1]
    return f"; {', '.join(pairs)} differ only in Unicode normalisation: rename one like the other" if pairs else ""


def _examples(root: str, class_names: Sequence[str], by_class: ByClass) -> Examples:
    names = [sorted(by_class.get(class_name, ())) for class_name in class_names]
    labels = np.repeat(np.arange(len(names), dtype=np.int64), [len(n) for n in names])
    start = os.path.join(root, "")
    return Examples(tuple([start + name for of_class in names for name in of_class]), labels)


def _uniform(names: Sequence[str]) -> np.ndarray:
    """For each name a number in [0, 1) that depends on it alone: float64 [N] of 53 bits."""
    digests = b"".join([hashlib.blake2b(_bytes(name), digest_size=8).digest() for name in names])
    return (np.frombuffer(digests, ">u8") >> 11) / 2**53


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # the same bytes whatever the locale, unlike os.fsencode
