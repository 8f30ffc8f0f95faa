"""The one walk below a folder, for training, checking and prediction: what counts as an image and what is left out."""

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from console import UserError, one_line
from dataset.images import ImageError, image_format

MOST_RECORD = 1 << 24  # bytes of a record of ours that are looked at
IMAGE_EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"))
# TIFF by their content, but what a TIFF reader finds in them is a small preview.
RAW_EXTENSIONS = frozenset((".arw", ".cr2", ".dng", ".erf", ".nef", ".nrw", ".orf", ".pef", ".rw2", ".sr2", ".srw"))
# What systems put beside people's files; left out without a word, as hidden entries are. (@eaDir holds thumbnails.)
LEFTOVERS = frozenset(("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin"))


class Entries(NamedTuple):
    """The names in one folder, in no order; `others` are files that are not named like images."""

    images: list[str]
    others: list[str]
    folders: list[str]
    links: list[str]  # to folders


@dataclass
class Listing:
    """What lies below a folder. Names are relative to it; those of folders end with "/"."""

    images: dict[str, list[str]] = field(default_factory=dict)  # each folder ("" is the top) -> images in it, unsorted
    ignored: list[str] = field(default_factory=list)  # files that are no images; links to what is listed already
    ours: list[str] = field(default_factory=list)  # runs and caches of this project, which hold pictures too

    def names(self) -> list[str]:
        """All images, sorted by code points."""
        return sorted(folder + name for folder, names in self.images.items() for name in names)


def walk(top: str) -> Listing:
    """Lists the images below `top`, at any depth, and what else is there; raises UserError for an unreadable folder.

    Hidden entries and `LEFTOVERS` are left out. A link to a folder is followed unless it leads to one that is listed
    already or to one above, so that every folder is listed once and a loop ends.
    """
    listing = Listing()
    seen = _above(top)
    pending, links = [""], list[str]()
    while pending or links:
        folder = pending.pop() if pending else links.pop(0)  # real folders first: a link to one must not replace it
        path = os.path.join(top, folder[:-1]) if folder else top
        if folder and (identity := _identity(path)) in seen and os.path.islink(path):
            listing.ignored.append(folder)
            continue
        entries = scan(path)
        if folder and _is_ours(path, entries):
            listing.ours.append(folder)
            continue
        if folder:
            seen.add(identity)
        unknown = [name for name in sorted(entries.others) if not is_image(os.path.join(path, name))]
        listing.ignored += [folder + name for name in unknown]
        listing.images[folder] = entries.images + sorted(set(entries.others).difference(unknown))
        pending += [f"{folder}{name}/" for name in sorted(entries.folders, reverse=True)]
        links += [f"{folder}{name}/" for name in sorted(entries.links)]
    return listing


def scan(folder: str) -> Entries:
    """What is directly in a folder, without hidden entries and `LEFTOVERS`; nothing is opened."""
    entries = Entries([], [], [], [])
    images, others, folders, links = entries
    try:
        with os.scandir(folder) as found:
            for entry in found:
                name = entry.name
                if name[0] == ".":
                    continue
                named_so = name[name.rfind(".") :].lower() in IMAGE_EXTENSIONS
                if named_so and entry.is_file(follow_symlinks=False):  # nearly all; nothing is asked of the disk
                    images.append(name)
                elif _is_folder(entry):
                    if name.lower() not in LEFTOVERS:
                        (links if entry.is_symlink() else folders).append(name)
                elif named_so:
                    images.append(name)
                elif name.lower() not in LEFTOVERS:
                    others.append(name)
    except OSError as error:
        raise UserError(f"cannot read {folder!r} ({error.strerror}): fix its permissions or move it away") from error
    return entries


def is_image(path: str) -> bool:
    """Whether a file that has no image's extension is an image by its content."""
    if os.path.splitext(path)[1].lower() in RAW_EXTENSIONS:
        return False
    try:
        return image_format(path) is not None
    except ImageError:
        return False


def summary(ignored: Sequence[str]) -> str:
    """What is not read, in one line: how many of each extension, and the first; "" where there is nothing."""
    files = [name for name in ignored if not name.endswith("/")]
    folders = [name for name in ignored if name.endswith("/")]
    parts = []
    if files:
        kinds = Counter(os.path.splitext(name)[1].lower() or "without extension" for name in files).most_common()
        counts = [f"{count} {kind}" for kind, count in kinds[:5]]
        if more := sum(count for _, count in kinds[5:]):
            counts.append(f"{more} others")
        noun = "file" if len(files) == 1 else "files"
        parts.append(f"ignored {len(files)} {noun} ({', '.join(counts)}), first {files[0]!r}")
    if folders:
        parts.append(f"ignored {'folder' if len(folders) == 1 else 'folders'} {some(folders)}")
    return one_line("; ".join(parts))


def some(names: Sequence[str]) -> str:
    """The first three names, quoted, and how many more there are; for messages."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def with_ignored(message: str, ignored: Sequence[str]) -> str:
    """A message that there are no images, with what is there instead."""
    return f"{message} ({summary(ignored)})" if ignored else message


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_ours(folder: str, entries: Entries) -> bool:
    """Whether a folder is a run directory or a folder of cached activations, by what its record holds."""
    for name, key in (("config.json", b'"class_names"'), ("cache.json", b'"view_seed"')):
        if name in entries.others:
            with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb") as file:
                if key in file.read(MOST_RECORD):
                    return True
    return False


def _above(folder: str) -> set[tuple[int, int]]:
    """The identities of a folder and of all above it."""
    path, found = os.path.realpath(folder), set()
    while True:
        found.add(_identity(path))
        if path == (path := os.path.dirname(path)):
            return found


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path!r} ({error.strerror}): fix its permissions or move it away") from error
    return status.st_dev, status.st_ino
