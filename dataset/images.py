"""Image files as people have them, as uint8 RGB arrays: one reader for training, checking and prediction."""

import ctypes
import errno
import functools
import glob
import io
import logging
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TypeVar

import numpy as np
import PIL
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from console import UserError, cores, one_line
from dataset import jpeg
from dataset.parallel import over_files
from dataset.pixels import rgb, scale_transparency, upright

MAX_PIXELS = 128_000_000  # 12,000 x 9,000 fits; decoding takes up to 16 bytes a pixel, so it stays below 2 GiB
MAX_SIDE = 65_535  # no JPEG is longer
MAX_BYTES = 1 << 30  # of a file
MAX_TIFF_VALUES = 1 << 18  # strips of one row in four planes fit; Pillow makes a Python object of each
# A block of 8x8 takes at least a bit, and subsampling may leave half the blocks to each component. Without this limit
# libjpeg fills what is missing with grey and reports nothing.
JPEG_PIXELS_PER_BYTE = 2 * 8 * 64
MAX_READS = 200_000  # by Pillow of one file: a few for each segment, chunk or block, which it reads in Python
# What is looked at of a file to see whether it is whole; profiles and previews come first in it.
HEAD_BYTES, TAIL_BYTES = 1 << 18, 1 << 10

# Pillow's classes themselves, not `Image.open`: no other format can be reached, an MPO is read as the JPEG that it is,
# and the reason of a failure is not replaced by "cannot identify image file".
READERS: dict[str, type[ImageFile.ImageFile]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
}
BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
Path = str | bytes | os.PathLike
P = TypeVar("P", bound=Path)
Seen = Callable[[P, os.stat_result, bytes], None]


class ImageError(UserError):
    """A file that cannot be used as an image; `reason` says why, in words that follow its name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, one_line(reason)

    def __str__(self) -> str:
        return f"{one_line(self.name)}: {self.reason}"


def image_format(source: Path) -> str | None:
    """The format by the first bytes of a file (`bytes` are its contents): a key of `READERS`, or None.

    Raises ImageError where the file cannot be read.
    """
    head = source[:18] if isinstance(source, bytes) else _read(source, 18)
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in BMP_HEADER_SIZES:  # "BM" alone begins words
        return "bmp"
    return None


def read_image(path: Path) -> np.ndarray:
    """The picture in a file as `decode_image` gives it: uint8 [H, W, 3]. Raises ImageError, and nothing else."""
    return decode_image(_read(path), os.fsdecode(path))


def read_reduced(path: Path, least: int) -> tuple[np.ndarray, int]:
    """As `decode_reduced`, of a file."""
    return decode_reduced(_read(path), os.fsdecode(path), least)


def decode_image(contents: bytes, name: str) -> np.ndarray:
    """The picture in an image file's bytes: uint8 [H, W, 3] RGB, upright; raises ImageError, which begins with `name`.

    JPEG, PNG, GIF, BMP, WebP and TIFF, recognised by content; of several frames or pages the first. Transparency is
    laid over white; CMYK in a JPEG is inverted where Adobe's marker is (as TensorFlow has it); colour profiles are not
    applied. 16-bit grey is divided by 257; of 16-bit colour Pillow keeps the high byte. Grey of other numbers (12-bit,
    32-bit, signed, floats) is refused, because no white is agreed for it.
    """
    return decode_reduced(contents, name, 0)[0]


def decode_reduced(contents: bytes, name: str, least: int) -> tuple[np.ndarray, int]:
    """As `decode_image`, and 1; but a JPEG whose sides are at least n * `least` pixels at 1/n of its size, and n.

    n is 2, 4 or 8; `least` 0: never. A photograph of many pixels is read in half the time so.
    """
    if not contents:
        raise ImageError(name, "is empty")
    kind = image_format(contents)
    if kind is None:
        zeros = contents.count(0) == len(contents)
        raise ImageError(name, "holds only zero bytes" if zeros else f"is not an image (starts with {contents[:12]!r})")
    if kind == "jpeg" and (plain := _decode_plain_jpeg(contents, least)) is not None:
        return plain
    image = _open_image(contents, kind, name)
    try:
        pixels, reduction = None, 1
        if kind == "jpeg":
            jpeg.check_scans(contents)
            if image.mode in ("RGB", "L"):
                pixels, reduction = _decode_jpeg(contents, *image.size, least)
        if kind == "png":
            scale_transparency(image, contents[24])
        if pixels is None:
            image.load()
            pixels, reduction = rgb(image), 1
        return upright(pixels, image), reduction
    except Exception as error:
        raise ImageError(name, _damage(kind, error)) from error


def _decode_plain_jpeg(contents: bytes, least: int) -> tuple[np.ndarray, int] | None:
    """A `plain` JPEG without a fault, as most are, as `decode_reduced` gives it; else None.

    Pillow would take a sixth more time.
    """
    header = jpeg.header(contents[:HEAD_BYTES])
    if header is None or not header.plain or _size_fault("jpeg", header.width, header.height, len(contents)):
        return None
    pixels, reduction = _decode_jpeg(contents, header.width, header.height, least)
    return None if pixels is None else (pixels, reduction)


def _decode_jpeg(contents: bytes, width: int, height: int, least: int) -> tuple[np.ndarray | None, int]:
    """`jpeg.decode` of a JPEG of that size, and what its sides were divided by."""
    reduction = jpeg.reduction(width, height, least)
    return jpeg.decode(contents, (-(-height // reduction), -(-width // reduction))), reduction


def find_fault(path: P, thorough: bool = False, seen: Seen[P] | None = None) -> str | None:
    """The reason why a file cannot be used, or None; `thorough` decodes it whole.

    Otherwise a JPEG, PNG or GIF whose header can be read and whose end is in place is assumed intact, at the cost of
    opening it; every other file is decoded, so that a reason is always that of `read_image`.

    `seen` is given the path, the status and all bytes of a file that could be read, whatever its verdict: of the same
    reading, the status taken before it. Without it only the ends of a file that looks whole are read.
    """
    whole = thorough or seen is not None
    try:
        status, head, tail = _read_with_status(path, -1 if whole else HEAD_BYTES, TAIL_BYTES)
        if seen is not None:
            seen(path, status, head)
        if thorough or not _looks_whole(head[:HEAD_BYTES], tail, status.st_size):
            decode_image(head if whole else _read(path), os.fsdecode(path))
    except ImageError as error:
        return error.reason
    return None


def find_faults(
    paths: Sequence[P],
    thorough: bool = False,
    progress: Callable[..., Iterable[str | None]] | None = None,
    threads: int | None = None,
    seen: Seen[P] | None = None,
) -> dict[P, str]:
    """The path and reason of every file that cannot be used, in the order of `paths`, found by up to a thread a core.

    `progress` wraps the results as they come: `progress(iterable, total=len(paths))`, as tqdm does. `seen`, which the
    threads call, is that of `find_fault`.
    """
    results: Iterable[str | None] = over_files(lambda path: find_fault(path, thorough, seen), paths, threads or cores())
    if progress is not None:
        results = progress(results, total=len(paths))
    return {path: reason for path, reason in zip(paths, results, strict=True) if reason is not None}


def _open_file(path: Path) -> tuple[int, os.stat_result]:
    """The descriptor and status of a regular file of a bearable size; raises ImageError for anything else.

    Never waits for a FIFO. Not by Python's `open`, which asks the system twice as often, and threads hand over Python's
    lock each time.
    """
    name = os.fsdecode(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ImageError(name, "is a dangling link" if os.path.islink(path) else "does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte; ENXIO: a socket
        is_socket = isinstance(error, OSError) and error.errno == errno.ENXIO
        raise ImageError(name, "is not a regular file" if is_socket else _os_reason(error)) from error
    status = os.fstat(descriptor)
    fault = None
    if stat.S_ISDIR(status.st_mode):
        fault = "is a folder"
    elif not stat.S_ISREG(status.st_mode):
        fault = "is not a regular file"
    elif status.st_size > MAX_BYTES:
        fault = f"holds {status.st_size} bytes, more than the limit of {MAX_BYTES}"
    if fault:
        os.close(descriptor)
        raise ImageError(name, fault)
    return descriptor, status


def _read(path: Path, count: int = -1) -> bytes:
    """The first `count` bytes of a file, or all; raises ImageError."""
    return _read_with_status(path, count)[1]


def _read_with_status(path: Path, count: int = -1, end: int = 0) -> tuple[os.stat_result, bytes, bytes]:
    """The status of a file as it was before, its first `count` bytes or all, and the last `end`; raises ImageError."""
    descriptor, status = _open_file(path)
    size = status.st_size
    try:
        head = os.read(descriptor, size + 1 if count < 0 else count)
        while count < 0 and len(head) != size and (more := os.read(descriptor, 1 << 20)):  # it grows, or comes in parts
            head += more
        if 0 <= count < size:
            return status, head, os.pread(descriptor, end, max(0, size - end))
        return status, head, head[-end:] if end else b""
    except (OSError, MemoryError) as error:
        raise ImageError(os.fsdecode(path), _os_reason(error)) from error
    finally:
        os.close(descriptor)


def _os_reason(error: Exception) -> str:
    words = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error) or "no memory"
    return "cannot be read: " + words[:1].lower() + words[1:]


@functools.cache
def _mute_pillow() -> None:
    """Turns off what Pillow and libtiff say of odd files, which is nothing to our users: a file is good or an error."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    for library in glob.glob(os.path.join(PIL.__path__[0], "..", "pillow.libs", "libtiff*")):  # as in Pillow's wheels
        ctypes.CDLL(library).TIFFSetErrorHandler(None)


class _CountedReads(io.BytesIO):
    """A file in memory that raises ValueError after `MAX_READS` reads: it has an absurd number of parts."""

    left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has too many parts: more than {MAX_READS} reads")
        return super().read(size)


def _open_image(contents: bytes, kind: str, name: str) -> ImageFile.ImageFile:
    """Reads the header of a file of that kind; raises ImageError where it is broken or declares too large a picture."""
    _mute_pillow()
    file = _CountedReads(contents)
    try:
        if kind == "tiff":
            _check_tiff(file)
        image = READERS[kind](file)
    except Exception as error:
        raise ImageError(name, _damage(kind, error)) from error
    if (fault := _size_fault(kind, *image.size, len(contents))) is not None:
        raise ImageError(name, fault)
    return image


def _size_fault(kind: str, width: int, height: int, size: int) -> str | None:
    """What is wrong with a picture of that many pixels in a file of `size` bytes."""
    if width * height > MAX_PIXELS:
        return f"declares {width}x{height} pixels, more than the limit of {MAX_PIXELS}"
    if kind == "jpeg" and width * height > JPEG_PIXELS_PER_BYTE * size:
        return f"declares {width}x{height} pixels in {size} bytes"
    if max(width, height) > MAX_SIDE:
        return f"declares {width}x{height} pixels, more than the limit of {MAX_SIDE} a side"
    return None


def _check_tiff(file: IO[bytes]) -> None:
    """Raises ValueError where a table of the first page (strips, tiles, bits) is absurdly long, before it is parsed."""
    head = file.read(16)
    order, big = "<" if head[:2] == b"II" else ">", 43 in head[2:4]
    (start,) = struct.unpack(order + "Q", head[8:16]) if big else struct.unpack(order + "L", head[4:8])
    file.seek(min(start, MAX_BYTES))
    (entries,) = struct.unpack(order + "Q", file.read(8)) if big else struct.unpack(order + "H", file.read(2))
    entry = struct.Struct(order + ("HHQ8x" if big else "HHL4x"))
    table = file.read(min(entries, 65_535) * entry.size)
    for tag, _, count in entry.iter_unpack(table[: len(table) // entry.size * entry.size]):
        if tag < 700 and count > MAX_TIFF_VALUES:  # 700 and above: metadata, which nobody parses here
            raise ValueError(f"{count} values in tag {tag}")
    file.seek(0)


def _damage(kind: str, error: Exception) -> str:
    """What a failure of Pillow, whatever its type, says about the file."""
    if isinstance(error, Image.DecompressionBombError):  # WebP's reader looks first
        return f"declares more pixels than the limit of {MAX_PIXELS}"
    words = str(error) or type(error).__name__
    short = isinstance(error, (EOFError, IndexError, struct.error)) or "truncated" in words.lower()
    return "is truncated" if short else f"is a damaged or unsupported {kind.upper()} file ({words[:200]})"


def _looks_whole(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file has a readable header of a bearable size and, at its end, the mark that its format puts there."""
    kind = image_format(head)
    return _has_end(kind, tail) and _good_header(kind, head, size)


def _has_end(kind: str | None, tail: bytes) -> bool:
    if kind == "gif":
        return tail.rstrip(b"\0").endswith(b";")
    return (kind == "jpeg" and b"\xff\xd9" in tail) or (kind == "png" and b"IEND\xaeB`\x82" in tail)


def _good_header(kind: str | None, head: bytes, size: int) -> bool:
    """Whether the first bytes of a file of `size` bytes hold a whole header."""
    if kind == "jpeg":  # not by Pillow, which takes four times as long: most of the time of checking 100,000 files
        header = jpeg.header(head)
        return header is not None and _size_fault(kind, header.width, header.height, size) is None
    try:
        _open_image(head, str(kind), "")
    except ImageError:
        return False
    return True
