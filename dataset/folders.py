"""Images in folders: a folder per class, or train/, val/ and test/ that hold such folders."""

import os
import re

from console import UserError
from dataset.lists import NO_SPLIT, SPLIT_OF_NAME, ByClass
from dataset.walk import Listing, scan, some, walk, with_ignored

LAYOUTS = (
    "DATA is a folder with one folder of images per class, or with train/ and val/ that hold such folders, "
    "or a Food-101 folder (images/ and meta/), or a CSV file (path,label[,split])"
)
SPLIT_WORDS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def read_folders(root: str, scoring: bool) -> tuple[dict[str, ByClass], list[str]]:
    """{split: {class: names}}, with one split `NO_SPLIT` where the folders are classes, and what is not read."""
    folders = _find_split_folders(root, scoring)
    ignored: list[str] = []
    if not folders:
        return {NO_SPLIT: _read_classes(root, "", ignored, scoring)}, ignored
    found = {split: _read_classes(root, folder, ignored, scoring) for split, folder in folders.items()}
    entries = scan(root)
    others = [f"{name}/" for name in (*entries.folders, *entries.links) if name not in folders.values()]
    return found, ignored + sorted([*entries.images, *entries.others, *others])


def _find_split_folders(root: str, scoring: bool) -> dict[str, str]:
    """{split: folder name}, empty unless this is the layout: "train" can be a class of its own, beside "car"."""
    folders = _folders(root)
    named = [folder for folder in folders if folder.lower() in SPLIT_OF_NAME]
    if not named or not (named == folders or any(_folders(os.path.join(root, folder)) for folder in named)):
        return {}
    splits: dict[str, str] = {}
    for folder in named:
        first = splits.setdefault(SPLIT_OF_NAME[folder.lower()], folder)
        if first != folder:
            raise UserError(f"{root!r} has both {first!r} and {folder!r} for one split: move one of them elsewhere")
    if "train" not in splits and not scoring:
        raise UserError(f"{root!r} has {some(named)} but no train folder: give the folder that has train/ in it")
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}


def _read_classes(root: str, part: str, ignored: list[str], scoring: bool) -> ByClass:
    """The images below the class folders of `root`/`part`; what is not read is added to `ignored`."""
    folder, start = (os.path.join(root, part), f"{part}/") if part else (root, "")
    listing = walk(folder)
    by_class: ByClass = {}
    for inner, names in listing.images.items():
        if inner:
            class_name = inner[: inner.index("/")]
            by_class.setdefault(class_name, []).extend([start + inner + name for name in names])
    for ours in listing.ours:  # checkpoints/ that holds nothing but runs is no class
        name = ours[: ours.index("/")]
        if not by_class.get(name, True):
            del by_class[name]
    stray = listing.images.pop("")
    ignored += [start + name for name in (*sorted(stray), *listing.ignored, *listing.ours)]
    if not by_class:
        if stray:
            elsewhere = ", or move the folder elsewhere" if part.lower() == "test" else ""
            raise UserError(f"{folder!r} has images but no classes: put them into one folder per class{elsewhere}")
        state = "has no folders in it" if listing.ignored or listing.ours else "is empty"
        raise UserError(f"{folder!r} {state}: {LAYOUTS}")
    if not any(by_class.values()) and not part:
        what = f"unknown layout: no images in the folders of {root!r} ({some(sorted(by_class))}): {LAYOUTS}"
        raise UserError(with_ignored(what, ignored))
    if part.lower() in ("", "train"):
        _check_level(folder, listing, by_class, scoring)
    return by_class


def _check_level(folder: str, listing: Listing, by_class: ByClass, scoring: bool) -> None:
    """Raises for splits under other names, and where the only class that has images may be a data set itself."""
    direct = {inner[:-1] for inner, names in listing.images.items() if names and inner.count("/") == 1}
    splits = [name for name in sorted(by_class) if SPLIT_WORDS.intersection(re.split("[^a-z]+", name.lower()))]
    no_other = len(splits) == len(by_class)
    if splits and (no_other or len(splits) > 1) and (not direct.intersection(splits) or (no_other and len(splits) > 1)):
        raise UserError(
            f"{folder!r}: the folders {some(splits)} are named like splits: rename them to train/ and val/ (or test/), "
            "with a folder per class in each; if they are classes, put their images directly into them"
        )
    full = [name for name in by_class if by_class[name]]
    if not scoring and len(full) == 1 and not direct:
        raise UserError(
            f"{folder!r} has images in one folder only, {full[0]!r}, and only deeper in it: if that is the data set, "
            f"this is one level too high: give {os.path.join(folder, full[0])!r} or move its folders up"
        )


def _folders(folder: str) -> list[str]:
    entries = scan(folder)
    return sorted(entries.folders + entries.links)
