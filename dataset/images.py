"""Image files as people have them, as uint8 RGB arrays: one reader for training, checking and prediction."""

import ctypes
import functools
import glob
import io
import logging
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import IO, TypeVar

import numpy as np
import PIL
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from console import UserError, one_line

MAX_PIXELS = 128_000_000  # 12,000 x 9,000 fits; decoding takes up to 16 bytes a pixel, so it stays below 2 GiB
MAX_SIDE = 65_535  # no JPEG is longer
MAX_BYTES = 1 << 30  # of a file
MAX_TIFF_VALUES = 1 << 18  # strips of one row in four planes fit; Pillow makes a Python object of each
# A block of 8x8 takes at least a bit, and subsampling may leave half the blocks to each component. Without this limit
# libjpeg fills what is missing with grey and reports nothing.
JPEG_PIXELS_PER_BYTE = 2 * 8 * 64
BAND_PIXELS = 1 << 22  # the largest piece that is converted at once

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
# EXIF orientation -> the view of [H, W, 3] that stands upright.
UPRIGHT: dict[object, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
Path = str | bytes | os.PathLike
P = TypeVar("P", bound=Path)


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
    if isinstance(source, bytes):
        head = source[:18]
    else:
        with _open_file(source) as file:
            head = file.read(18)
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
    with _open_file(path) as file:
        try:
            contents = file.read(MAX_BYTES)
        except (OSError, MemoryError) as error:
            raise ImageError(os.fsdecode(path), _os_reason(error)) from error
    return decode_image(contents, os.fsdecode(path))


def decode_image(contents: bytes, name: str) -> np.ndarray:
    """The picture in an image file's bytes: uint8 [H, W, 3] RGB, upright; raises ImageError, which begins with `name`.

    JPEG, PNG, GIF, BMP, WebP and TIFF, recognised by content; of several frames or pages the first. Transparency is
    laid over white; CMYK in a JPEG is inverted where Adobe's marker is (as TensorFlow has it); colour profiles are not
    applied. 16-bit grey is divided by 257, 12-bit by 4095 / 255; of 16-bit colour Pillow keeps the high byte. Other
    grey numbers (32-bit and signed integers, floats) have no agreed white: it is the smallest of 1 (floats only), 255
    and 65535 that holds them all, and where none does or some are negative, they are stretched from least to greatest.
    """
    if not contents:
        raise ImageError(name, "is empty")
    kind = image_format(contents)
    if kind is None:
        zeros = contents.count(0) == len(contents)
        raise ImageError(name, "holds only zero bytes" if zeros else f"is not an image (starts with {contents[:12]!r})")
    image = _open_image(io.BytesIO(contents), kind, name)
    try:
        if kind == "png":
            _scale_transparency(image, contents[24])
        image.load()
        upright = UPRIGHT.get(_orientation(image))
        pixels = _rgb(image)
        return pixels if upright is None else np.ascontiguousarray(upright(pixels))
    except Exception as error:
        raise ImageError(name, _damage(kind, error)) from error


def find_fault(path: Path, thorough: bool = False) -> str | None:
    """The reason why a file cannot be used, or None; `thorough` decodes it whole.

    Otherwise a JPEG, PNG or GIF whose header can be read and whose end is in place is taken for good, at the cost of
    opening it; every other file is decoded, so that a reason is always that of `read_image`.
    """
    try:
        if thorough or not _looks_whole(path):
            read_image(path)
    except ImageError as error:
        return error.reason
    return None


def find_faults(
    paths: Sequence[P],
    thorough: bool = False,
    progress: Callable[..., Iterable[str | None]] | None = None,
    threads: int | None = None,
) -> dict[P, str]:
    """The path and reason of every file that cannot be used, in the order of `paths`, found by a thread a core.

    `progress` wraps the results as they come: `progress(iterable, total=len(paths))`, as tqdm does.
    """
    with ThreadPool(threads or len(os.sched_getaffinity(0))) as pool:
        results: Iterable[str | None] = pool.imap(lambda path: find_fault(path, thorough), paths, chunksize=8)
        if progress is not None:
            results = progress(results, total=len(paths))
        return {path: reason for path, reason in zip(paths, results, strict=True) if reason is not None}


def _open_file(path: Path) -> IO[bytes]:
    """Opens a regular file of a bearable size; raises ImageError for anything else, and never waits for a FIFO."""
    name = os.fsdecode(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(name, "is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(name, "is not a regular file")
        if status.st_size > MAX_BYTES:
            raise ImageError(name, f"holds {status.st_size} bytes, more than the limit of {MAX_BYTES}")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise ImageError(name, "is a dangling link" if os.path.islink(path) else "does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise ImageError(name, _os_reason(error)) from error


def _os_reason(error: Exception) -> str:
    words = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error) or "no memory"
    return "cannot be read: " + words[:1].lower() + words[1:]


@functools.cache
def _mute_pillow() -> None:
    """Turns off Pillow's remarks on odd files, which are nothing to our users: a file is good or an ImageError.

    `warnings.catch_warnings` changes the process for every thread and any other use of it takes a filter away again,
    so the modules that read are given a mute `warnings`. What Pillow logs and libtiff writes would reach stderr too.
    """
    for module in (Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin):
        vars(module)["warnings"] = SimpleNamespace(warn=lambda *args, **kwargs: None)
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    for library in glob.glob(os.path.join(PIL.__path__[0], "..", "pillow.libs", "libtiff*")):  # as in Pillow's wheels
        ctypes.CDLL(library).TIFFSetErrorHandler(None)


def _open_image(file: IO[bytes], kind: str, name: str) -> ImageFile.ImageFile:
    """Reads the header of a file of that kind; raises ImageError where it is broken or declares too large a picture."""
    _mute_pillow()
    try:
        if kind == "tiff":
            _check_tiff(file)
        image = READERS[kind](file)
    except Exception as error:
        raise ImageError(name, _damage(kind, error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(name, f"declares {width}x{height} pixels, more than the limit of {MAX_PIXELS}")
    size = file.seek(0, io.SEEK_END)
    if kind == "jpeg" and width * height > JPEG_PIXELS_PER_BYTE * size:
        raise ImageError(name, f"declares {width}x{height} pixels in {size} bytes")
    if max(width, height) > MAX_SIDE:
        raise ImageError(name, f"declares {width}x{height} pixels, more than the limit of {MAX_SIDE} a side")
    return image


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


def _looks_whole(path: Path) -> bool:
    """Whether a file has a readable header of a bearable size and, at its end, the mark that its format puts there."""
    with _open_file(path) as file:
        kind = image_format(file.read(18))
        if kind not in ("jpeg", "png", "gif"):
            return False
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 1024))
        tail = file.read(1024)
        file.seek(0)
        _open_image(file, kind, os.fsdecode(path))
    if kind == "gif":
        return tail.rstrip(b"\0").endswith(b";")
    return (b"\xff\xd9" if kind == "jpeg" else b"IEND\xaeB`\x82") in tail


def _orientation(image: ImageFile.ImageFile) -> object:
    """The EXIF (or XMP) orientation of a loaded image; whatever cannot be parsed counts as upright, 1."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow has turned it
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1


def _scale_transparency(image: ImageFile.ImageFile, depth: int) -> None:
    """Brings a PNG's transparent colour, which Pillow keeps as stored, to the 8 bits to which it brings the pixels."""
    key = image.info.get("transparency")
    if image.mode == "L" and depth < 8 and isinstance(key, int):
        image.info["transparency"] = key * (255 // (2**depth - 1))
    elif image.mode == "RGB" and depth == 16 and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """The image in bands of rows, each with the rows that it covers, so that no copies of a whole image pile up."""
    width, height = image.size
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield slice(top, bottom), image if rows >= height else image.crop((0, top, width, bottom))


def _rgb(image: ImageFile.ImageFile) -> np.ndarray:
    """A loaded image of any mode as uint8 [H, W, 3]."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_rgb(image)
    inverted = image.mode == "CMYK" and isinstance(image, JpegImagePlugin.JpegImageFile) and "adobe" not in image.info
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, band in _bands(image):
        if inverted:  # Pillow takes every CMYK JPEG for Adobe's
            band = ImageChops.invert(band)
        if band.mode == "La":
            band = band.convert("LA")
        if band.has_transparency_data:
            layer = band.convert("RGBA")
            band = Image.new("RGB", layer.size, "white")
            band.paste(layer, mask=layer)
        elif band.mode != "RGB":
            band = band.convert("RGB")
        pixels[rows] = np.asarray(band)
    return pixels


@np.errstate(invalid="ignore")  # a signalling NaN
def _grey_rgb(image: ImageFile.ImageFile) -> np.ndarray:
    """A loaded image of wide grey numbers as uint8 [H, W, 3]; `decode_image` says how they are scaled."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    # Pillow has no unsigned mode of 32 bits: the bits are right, the sign is not.
    unsigned = image.mode == "I" and np.max(tags.get(TiffImagePlugin.SAMPLEFORMAT, 1)) == 1

    def numbers(band: Image.Image) -> np.ndarray:  # [rows, W] uint16, int32, uint32 or float32
        return np.asarray(band).view(np.uint32) if unsigned else np.asarray(band)

    if image.mode.startswith("I;16"):
        low, high = 0.0, 4095.0 if np.max(tags.get(TiffImagePlugin.BITSPERSAMPLE, 16)) == 12 else 65535.0
    else:
        extremes: list[float] = []
        for _, band in _bands(image):
            values = numbers(band)
            if (finite := values[np.isfinite(values)]).size:
                extremes += [float(finite.min()), float(finite.max())]
        low, high = min(extremes, default=0.0), max(extremes, default=0.0)
        whites = [white for white in (1.0, 255.0, 65535.0) if high <= white and (white > 1 or image.mode == "F")]
        if low >= 0 and whites:
            low, high = 0.0, whites[0]
    key = image.info.get("transparency")  # of a 16-bit grey PNG: the level that is transparent
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, band in _bands(image):
        values = numbers(band)
        scaled = (values.astype(np.float64) - low) * (255 / (high - low or 1))
        grey = np.rint(np.clip(np.nan_to_num(scaled), 0, 255)).astype(np.uint8)  # NaN is black
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # the least is white, which Pillow leaves to us
            grey = 255 - grey
        if isinstance(key, int):
            grey[values == key] = 255
        pixels[rows] = grey[..., None]
    return pixels
