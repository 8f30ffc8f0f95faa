"""Where the images of a data set lie and what each one is: every layout ends in one `LabelledImages`. NumPy only.

Nothing here opens an image. An entry that is named like an image but is a folder, a dangling link or an empty file is
an example all the same: whoever checks the files reports it, and must be able to name it.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from console import UserError
from dataset.lists import FOOD101_LISTS, SPLIT_OF_NAME, ByClass, collect, read_csv, read_food101_lists, some

IMAGE_EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
LAYOUTS = (
    "DATA is a folder with one folder of images per class, or with train/ and val/ that hold such folders, "
    "or a Food-101 folder (images/ and meta/), or a CSV file (path,label[,split])"
)


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
    """A data set: `splits` always has "train" and "val" (which may be empty), and "test" when there is one."""

    root: str  # absolute; the folder that names are relative to
    layout: str  # "food-101" | "split folders" | "class folders" | "csv"
    class_names: tuple[str, ...]
    splits: dict[str, Examples]

    def relative_names(self, split: str) -> list[str]:
        """The file names of a split relative to `root`, in the order of its examples."""
        start = len(os.path.join(self.root, ""))
        return [path[start:] for path in self.splits[split].paths]

    def digest(self) -> str:
        """A hex hash of every (relative name, class name, split) in order: the same wherever `root` lies."""
        digest = hashlib.sha256()
        for split, examples in self.splits.items():
            for name, label in zip(self.relative_names(split), examples.labels, strict=True):
                digest.update(_bytes(f"{name}\0{self.class_names[label]}\0{split}\0"))
        return digest.hexdigest()


def find_images(
    data: str, *, val_fraction: float = 0.2, test_fraction: float = 0.0, image_root: str | None = None
) -> LabelledImages:
    """Recognises the layout of `data` and lists its images, class by class and by name within a class.

    A split that the data do not bring is cut from train by its fraction (see `cut_by_hash`); one that they bring is
    taken as it is. `image_root` is the folder that the paths of a CSV are relative to, by default the CSV's own.
    Raises `UserError` for everything that a user can mend.
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
    meta = os.path.join(data, "meta")
    if is_csv:
        layout, found = "csv", collect(data, root, read_csv(data, root))
        class_names = sorted(found["train"])
    elif any(os.path.isfile(os.path.join(meta, name)) for name in ("classes.txt", *FOOD101_LISTS.values())):
        layout, (class_names, rows) = "food-101", read_food101_lists(meta)
        found = collect(meta, root, rows, class_names)
    else:
        split_folders = _find_split_folders(data)
        layout = "split folders" if split_folders else "class folders"
        found = _read_split_folders(data, split_folders) if split_folders else {"train": _read_class_folders(data)}
        class_names = sorted(found["train"])
    _check_classes(data, class_names, found)

    fractions = [0.0 if s in found else f for s, f in (("val", val_fraction), ("test", test_fraction))]
    cut = {name: cut_by_hash(found["train"][name], *fractions) for name in class_names}
    splits = {}
    for split in ("train", "val", "test"):
        by_class = found[split] if split in found and split != "train" else {c: cut[c][split] for c in class_names}
        if split != "test" or any(by_class.values()):
            splits[split] = _examples(root, class_names, by_class)
    return LabelledImages(root, layout, tuple(class_names), splits)


def cut_by_hash(names: Iterable[str], val_fraction: float, test_fraction: float) -> ByClass:
    """Cuts one class into {"train": …, "val": …, "test": …} by a hash of each name; no seed, so that runs compare.

    The hash is a number u in [0, 1): val is u < val_fraction, test is u >= 1 - test_fraction. A file's split thus
    depends on nothing but its own name: adding or removing others never moves it, and another test fraction leaves val
    as it is. The price is that counts are near the fraction and not at it (100 images at 0.2: 20, give or take 4).

    The exception is a class too small for its fractions: one image goes to train, and from two on train and (with a
    val_fraction) val have at least one each; they are then taken in the order of u. Such a class may move an image
    when files are added, until it is large enough.
    """
    u_and_name = sorted((_uniform(name), name) for name in names)
    count = len(u_and_name)
    val_count = sum(u < val_fraction for u, _ in u_and_name)
    test_count = sum(u >= 1 - test_fraction for u, _ in u_and_name)
    if val_fraction > 0:
        val_count = max(val_count, 1)
    val_count = max(0, min(val_count, count - 1))
    test_count = max(0, min(test_count, count - 1 - val_count))
    ordered = [name for _, name in u_and_name]
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


def _find_split_folders(root: str) -> dict[str, str]:
    """{split: folder name}, empty unless this is the layout: "train" can be a class of its own, beside "car"."""
    folders = _folders(root)
    named = [folder for folder in folders if folder.lower() in SPLIT_OF_NAME]
    train = [folder for folder in named if folder.lower() == "train"]
    if not named or not (named == folders or any(_folders(os.path.join(root, folder)) for folder in train)):
        return {}
    if not train:
        raise UserError(f"{root!r} has {some(named)} but no train folder: give the folder that has train/ in it")
    splits: dict[str, str] = {}
    for folder in named:
        first = splits.setdefault(SPLIT_OF_NAME[folder.lower()], folder)
        if first != folder:
            raise UserError(f"{root!r} has both {first!r} and {folder!r} for one split: move one of them elsewhere")
    return splits


def _read_split_folders(root: str, folders: dict[str, str]) -> dict[str, ByClass]:
    found = {split: _images_by_class(root, folder) for split, folder in folders.items()}
    train = set(found["train"])
    for split, by_class in found.items():
        sides = ((train - set(by_class), "train"), (set(by_class) - train, split))
        differ = [f"{some(sorted(names))} only in {folders[side]}/" for names, side in sides if names]
        if differ:
            raise UserError(f"{root!r}: class folders differ: {', '.join(differ)}: make both have the same classes")
    return found


def _read_class_folders(root: str) -> ByClass:
    by_class = _images_by_class(root)
    empty = [name for name in by_class if not by_class[name]]
    if inner := [name for name in empty if _looks_like_data_set(os.path.join(root, name))]:
        paths = [os.path.join(root, name) for name in inner]
        raise UserError(f"{root!r} has no class folders of its own; it is one level too high: give {some(paths)}")
    if len(empty) == len(by_class):
        raise UserError(f"unknown layout: no images in the folders of {root!r} ({some(empty)}): {LAYOUTS}")
    return by_class


def _looks_like_data_set(folder: str) -> bool:
    inside = _folders(folder)
    if {"images", "meta"} <= set(inside) or "train" in [name.lower() for name in inside]:
        return True
    return sum(bool(_images(os.path.join(folder, name))) for name in inside) > 1


def _images_by_class(root: str, part: str = "") -> ByClass:
    folder = os.path.join(root, part) if part else root
    class_names = _folders(folder)
    if not class_names:
        if _images(folder):
            elsewhere = ", or move the folder elsewhere" if part.lower() == "test" else ""
            raise UserError(f"{folder!r} has images but no classes: put them into one folder per class{elsewhere}")
        state = "has no folders in it" if _entries(folder) else "is empty"
        raise UserError(f"{folder!r} {state}: {LAYOUTS}")
    start = f"{part}/" if part else ""
    return {name: [f"{start}{name}/{image}" for image in _images(os.path.join(folder, name))] for name in class_names}


def _check_classes(data: str, class_names: list[str], found: dict[str, ByClass]) -> None:
    if empty := [name for name in class_names if not found["train"][name]]:
        raise UserError(f"{data!r}: no images in train of class {some(empty)}: add some or remove the class")
    if len(class_names) < 2:
        raise UserError(f"{data!r} has only one class, {some(class_names)}: give images of at least two")
    for split, by_class in found.items():
        if not any(by_class.values()):
            raise UserError(f"{data!r}: the {split} split has no images: add some or remove the split")


def _examples(root: str, class_names: Sequence[str], by_class: ByClass) -> Examples:
    names = [sorted(by_class[class_name]) for class_name in class_names]
    labels = np.repeat(np.arange(len(names), dtype=np.int64), [len(n) for n in names])
    return Examples(tuple(os.path.join(root, name) for of_class in names for name in of_class), labels)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, sorted by name (code points), because a listing has no order to rely on."""
    try:
        with os.scandir(folder) as listing:
            return sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {folder!r} ({error.strerror}): mend its permissions or move it away") from error


def _folders(folder: str) -> list[str]:
    def is_folder(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link that leads to itself
            return False

    return [entry.name for entry in _entries(folder) if is_folder(entry)]


def _images(folder: str) -> list[str]:
    return [entry.name for entry in _entries(folder) if is_image_name(entry.name)]


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image, whatever it holds; hidden files do not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, of 53 bits, as many as a float64 holds exactly."""
    return (int.from_bytes(hashlib.blake2b(_bytes(name), digest_size=8).digest(), "big") >> 11) / 2**53


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # the same bytes whatever the locale, unlike os.fsencode
