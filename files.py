"""Writing files so that another program never reads half of one (aside first, then renamed), and opening our own."""

import csv
import errno
import functools
import io
import json
import math
import os
import re
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from console import UserError, one_line

# What file systems answer that lack a call (CIFS, FUSE, some network file systems): the call's promise is missing, the
# data are not.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EACCES, errno.EPERM)


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path beside `path` to write; at the end of the block that file takes `path`'s place in one step.

    When the block raises, the file written so far is removed and an earlier `path` stays as it was. The yielded name
    starts with ".tmp-" and keeps the suffix, from which np.savez and Pillow take the format. It is not created here:
    the writer's open() gives it the user's usual permissions, where tempfile would make it unreadable for others.
    """
    path = Path(path)
    aside = path.with_name(f".tmp-{uuid.uuid4().hex}{path.suffix[:32]}")
    try:
        yield aside
        with open(aside, "rb") as file:
            flush_to_disk(file.fileno())  # else a power cut can leave the new name with no content
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def flush_to_disk(descriptor: int) -> None:
    """`os.fsync`; where the file system has no such call, one warning."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once("this file system can't flush files to the disk: a power cut may lose the newest ones")


@functools.cache
def warn_once(message: str) -> None:
    """A warning on stderr, the first time only."""
    print(f"warning: {message}", file=sys.stderr)


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file of ours (created where `flags` say so); links are not followed.

    Raises UserError for a link, a folder, a FIFO or a device in its place, without waiting; OSError as `os.open`.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise UserError(f"{one_line(os.fspath(path))} is a link or no regular file, which is not ours: move it away")


def check_writable(flag: str, path: str | os.PathLike[str]) -> None:
    """Raises UserError, before work is done, where writing `path`, the file that `flag` names, would fail."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # a device, a FIFO: it would be replaced, not written to
            raise OSError(errno.EINVAL, "not a regular file")
        _try_writing(path.parent)
    except OSError as error:
        raise UserError(f"{flag} {one_line(path)}: can't be written: {error.strerror}; name another file") from None


def check_folder(flag: str, path: str | os.PathLike[str]) -> None:
    """Makes the folder that `flag` names, and raises UserError where nothing can be written in it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        _try_writing(Path(path))
    except OSError as error:
        raise UserError(f"{flag} {one_line(path)}: can't be written: {error.strerror}; name another folder") from None


def _try_writing(folder: Path) -> None:
    aside = folder / f".tmp-{uuid.uuid4().hex}"
    aside.touch()
    aside.unlink()


def unnamed_beside(path: str | os.PathLike[str]) -> io.FileIO:
    """A file without a name on the disk of `path`, for what may not fit in memory; it ends with this process."""
    return tempfile.TemporaryFile(dir=Path(path).absolute().parent, buffering=0)


def append(file: io.FileIO, content: bytes) -> None:
    """Writes all of `content`; OSError where the disk has no room for it, when a part may be written."""
    if file.write(content) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    r"""Writes `text` as UTF-8 with "\n" line ends, aside and renamed.

    A lone surrogate, which is how Python holds a byte of a file name that is not UTF-8, is written as `\udc80`
    (backslashreplace): the file stays valid UTF-8, and in JSON that escape reads back as the same string.
    """
    with replace_file(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as JSON, indented by two, aside and renamed; NumPy values as numbers and NaN and inf as null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: str | os.PathLike[str], header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a header and rows as CSV, aside and renamed; text as in `write_text`, names as they come."""
    write_text(path, csv_text([header, *rows]))


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV."""

    def written(quoting: Literal[0, 1]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n", quoting=quoting).writerows(rows)
        return text.getvalue()

    text = written(csv.QUOTE_MINIMAL)
    # The csv module quotes a cell for the line end that it writes, but a lone carriage return ends a row for readers.
    return written(csv.QUOTE_ALL) if "\r" in text else text


# What a spreadsheet takes for a formula, but numbers such as -1: OWASP, "CSV Injection"; the wide signs count in East
# Asian settings.
FORMULA = re.compile(r"(?![+-](\d+\.?\d*|\.\d+)(e[+-]?\d+)?\Z)[=+\-@\t\r\n＝＋－＠]", re.ASCII | re.IGNORECASE)


def defused(cell: Any) -> Any:
    """A cell of a CSV file that people open: what a spreadsheet would run as a formula gets an apostrophe before it.

    Anybody may have named the images and classes, and spreadsheets take the apostrophe for "this is text".
    """
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def defused_path(name: str) -> str:
    """The same for the name of a file, with "./" before it instead: it still names the same file."""
    return f"./{name}" if FORMULA.match(name) else name


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: NaN and infinity, which strict readers refuse, become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
