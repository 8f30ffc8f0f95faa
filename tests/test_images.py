"""The image reader against arrays built without it: formats, modes, orientations, faults, threads."""

import contextlib
import errno
import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import xxhash
from PIL import Image
from skimage.transform import rotate

from dataset import images, jpeg, parallel, pixels
from dataset.contents import Fingerprint, fingerprint, fingerprints
from dataset.images import ImageError, decode_image, find_fault, find_faults, image_format, read_image
from tests.fuzz_images import OUTCOMES, make_seeds, run, run_inference

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest undoes the reader's own filter
EXTENSIONS = {"jpeg": "JPEG", "png": "PNG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tiff": "TIFF"}


def noise(height: int = 33, width: int = 47, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int = 64, width: int = 96) -> np.ndarray:
    """Slow ramps, which lossy formats keep: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], -1).astype(np.uint8)


def encode(array: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand: `rows` are the unfiltered rows, each with its zero filter byte."""
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(array: np.ndarray, colour: int, extra: bytes = b"") -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return png(array.shape[1], array.shape[0], 16, colour, rows, extra)


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """float [H, W, 3]: rgb [H, W, 3] with alpha [H, W] in 0..255 over white."""
    opacity = alpha[..., None] / 255
    return rgb * opacity + 255 * (1 - opacity)


def good_seeds() -> list[tuple[str, bytes]]:
    """The seeds of the fuzz without the kinds of grey that are refused."""
    seeds = [(kind, contents) for kind, contents in make_seeds() if "grey values" not in refusal(contents)]
    assert len(seeds) == len(make_seeds()) - 6  # TIFF of 32-bit integers and of floats, in three sizes
    return seeds


def refusal(contents: bytes) -> str:
    """Why the reader refuses a file; "" where it does not."""
    try:
        decode_image(contents, "x")
    except ImageError as error:
        return error.reason
    return ""


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, -1)


def assert_pixels(contents: bytes, expected: np.ndarray, tolerance: float) -> None:
    """Asserts that a file is decoded to `expected`, [H, W, 3], by up to `tolerance` levels."""
    pixels = decode_image(contents, "x")
    assert pixels.shape == expected.shape
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(float) - expected).max() <= tolerance


# Formats and modes


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_colour_is_exact(kind: str) -> None:
    assert_pixels(encode(noise(), kind), noise(), 0)


def test_lossless_webp_is_exact() -> None:
    assert_pixels(encode(noise(), "WEBP", lossless=True), noise(), 0)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg(options: dict) -> None:
    assert_pixels(encode(smooth(), "JPEG", quality=98, **options), smooth(), 8)


def test_lossy_webp() -> None:
    assert_pixels(encode(smooth(), "WEBP", quality=98), smooth(), 12)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_greyscale(kind: str) -> None:
    levels = noise()[..., 0]
    assert_pixels(encode(levels, kind), grey(levels), 0)


def test_greyscale_jpeg() -> None:
    levels = smooth()[..., 0]
    assert_pixels(encode(levels, "JPEG", quality=98), grey(levels), 4)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_one_bit(kind: str) -> None:
    bits = noise()[..., 0] > 127
    assert_pixels(encode(Image.fromarray(bits), kind), grey(bits * 255), 0)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_palette(kind: str) -> None:
    palette, indices = noise(1, 16)[0], noise()[..., 0] % 16
    image = Image.fromarray(indices, "L").convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    assert_pixels(encode(image, kind), palette[indices], 0)


def test_palette_with_transparency_of_every_level() -> None:
    palette, indices = noise(1, 16)[0], noise()[..., 0] % 16
    alphas = np.arange(16, dtype=np.uint8) * 17
    rows = b"".join(b"\0" + row.tobytes() for row in indices)
    extra = chunk(b"PLTE", palette.tobytes()) + chunk(b"tRNS", alphas.tobytes())
    assert_pixels(png(47, 33, 8, 3, rows, extra), over_white(palette[indices], alphas[indices]), 1)


def test_transparent_gif_is_white_there_and_only_the_first_frame_counts() -> None:
    indices = np.zeros((20, 20), np.uint8)
    indices[5:10] = 1
    first = Image.new("P", (20, 20))
    first.putdata(indices.ravel().tolist())
    first.putpalette([200, 10, 20, 0, 0, 0])
    second = Image.new("P", (20, 20), 1)
    second.putpalette([200, 10, 20, 0, 0, 0])
    contents = encode(first, "GIF", save_all=True, append_images=[second] * 3, transparency=1)
    expected = np.full((20, 20, 3), (200, 10, 20))
    expected[5:10] = 255
    assert_pixels(contents, expected, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_laid_over_white(kind: str) -> None:
    rgba = noise(channels=4)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert_pixels(encode(rgba, kind, **options), over_white(rgba[..., :3], rgba[..., 3]), 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_with_alpha(kind: str) -> None:
    la = noise(channels=2)
    assert_pixels(encode(Image.fromarray(la, "LA"), kind), over_white(grey(la[..., 0]), la[..., 1]), 1)


def test_premultiplied_alpha_in_tiff() -> None:
    levels, alpha = np.full((8, 8), 100, np.uint8), np.full((8, 8), 128, np.uint8)  # 100 of 128: 199 at half opacity
    contents = tiff(np.stack([levels, alpha], -1), photometric="minisblack", planarconfig="contig", extrasamples=[1])
    assert_pixels(contents, np.full((8, 8, 3), 100 + 127), 2)


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_16_bit_png(colour: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    wide = np.random.default_rng(1).integers(0, 65536, (33, 47, channels))
    if channels == 1:
        wide[0] = np.arange(47)[:, None] * 257  # whole levels come out exactly
        assert_pixels(png16(wide, 0), grey(np.rint(wide[..., 0] / 257)), 0)
        return
    narrow = wide / 257
    rgb = narrow[..., :3] if channels > 2 else grey(narrow[..., 0])
    # Pillow keeps the high byte: up to one level off.
    assert_pixels(
        png16(wide, colour), over_white(rgb, narrow[..., -1]) if channels in (2, 4) else rgb, 2 - (channels == 3)
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_level_of_a_grey_png(bits: int) -> None:
    """A hand-written row of two pixels: level 1, which is transparent, and level 0."""
    row = {1: b"\x80", 2: b"\x40", 4: b"\x10", 8: b"\x01\x00", 16: b"\x00\x01\x00\x00"}[bits]
    contents = png(2, 1, bits, 0, b"\0" + row, chunk(b"tRNS", b"\0\1"))
    assert_pixels(contents, np.array([[[255] * 3, [0] * 3]]), 0)


def test_transparent_colour_of_a_png() -> None:
    contents = png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3])))
    assert_pixels(contents, np.array([[[255] * 3, [4, 5, 6]]]), 0)


def test_transparent_colour_of_a_16_bit_png() -> None:
    contents = png16(np.array([[[256, 512, 768], [1024, 1280, 1536]]]), 2, chunk(b"tRNS", bytes([1, 0, 2, 0, 3, 0])))
    assert_pixels(contents, np.array([[[255] * 3, [4, 5, 6]]]), 0)


def cmyk_to_rgb(cmyk: np.ndarray) -> np.ndarray:
    ink = cmyk.astype(float)
    return (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255


def test_cmyk_tiff() -> None:
    cmyk = noise(channels=4)
    assert_pixels(encode(Image.fromarray(cmyk, "CMYK"), "TIFF"), cmyk_to_rgb(cmyk), 1)


def test_cmyk_jpeg_with_and_without_adobe_marker() -> None:
    cmyk = np.dstack([smooth(), np.full((64, 96), 40, np.uint8)])
    adobe = encode(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=98, subsampling=0)
    assert_pixels(adobe, cmyk_to_rgb(cmyk), 8)
    at = adobe.index(b"\xff\xee")
    plain = adobe[:at] + adobe[at + 2 + int.from_bytes(adobe[at + 2 : at + 4], "big") :]
    assert_pixels(plain, cmyk_to_rgb(255 - cmyk), 8)  # the same numbers, not inverted


def test_ycck_jpeg() -> None:
    """The Adobe marker's transform 2 makes libjpeg turn the first three from YCbCr, of the inks that are not there."""
    rgb = smooth()
    ycc = np.asarray(Image.fromarray(255 - rgb).convert("YCbCr"))
    # libjpeg's C' is 255 - R(YCbCr) and Adobe's ink is 255 - C'; Pillow inverts what it is given to store.
    stored = np.dstack([ycc, np.full((64, 96), 255, np.uint8)])
    contents = bytearray(encode(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=98, subsampling=0))
    at = contents.index(b"Adobe")
    assert contents[at + 11] == 0
    contents[at + 11] = 2
    assert_pixels(bytes(contents), rgb, 12)


# Numbers that are no pictures yet


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff(order: str) -> None:
    wide = np.random.default_rng(1).integers(0, 65536, (20, 30)).astype(np.uint16)
    assert_pixels(tiff(wide, byteorder=order), grey(np.rint(wide / 257)), 0)


def test_tiff_whose_least_value_is_white() -> None:
    wide: np.ndarray = np.random.default_rng(1).integers(0, 65536, (20, 30)).astype(np.uint16)
    assert_pixels(tiff(wide, photometric="miniswhite"), grey(255 - np.rint(wide / 257)), 0)


def test_16_bit_colour_tiff() -> None:
    wide = np.random.default_rng(1).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    assert_pixels(tiff(wide, photometric="rgb"), wide / 257, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int32, np.uint32])
def test_grey_numbers_without_an_agreed_white_are_refused(dtype: type) -> None:
    assert "save it as such" in refusal(tiff(np.array([[0, 1, 255]], dtype)))


def test_12_bit_tiff_is_refused() -> None:
    packed = bytes([0xFF, 0xF8, 0x00])  # 4095, 2048
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags)
    contents = b"II*\0" + struct.pack("<L", 12) + packed + b"\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert "save it as such" in refusal(contents)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd"])
def test_compressed_tiff(compression: str) -> None:
    assert_pixels(encode(noise(), "TIFF", compression=compression), noise(), 0)


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"tile": (16, 16)}, {"planarconfig": "separate"}])
def test_tiff_layouts(options: dict) -> None:
    array = noise()
    stored = np.moveaxis(array, -1, 0) if "planarconfig" in options else array
    assert_pixels(tiff(stored, photometric="rgb", **options), array, 0)


def test_first_page_of_a_tiff() -> None:
    assert_pixels(tiff(np.stack([noise(), 255 - noise()]), photometric="rgb"), noise(), 0)


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = good_seeds()
    whole = [decode_image(contents, "x") for _, contents in seeds]
    monkeypatch.setattr(pixels, "BAND_PIXELS", 500)
    for expected, (kind, contents) in zip(whole, seeds, strict=True):
        np.testing.assert_array_equal(decode_image(contents, "x"), expected, kind)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 100), (700, 7), (65535, 1)])
def test_small_and_long(width: int, height: int) -> None:
    assert_pixels(encode(noise(height, width), "PNG"), noise(height, width), 0)


# Orientation

TURNS = {  # by scikit-image's rotation (counter-clockwise, degrees) and numpy's mirror, which comes first
    1: (0, False),
    2: (0, True),
    3: (180, False),
    4: (180, True),
    5: (90, True),
    6: (270, False),
    7: (270, True),
    8: (90, False),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
def test_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif.tobytes()}
    if kind == "WEBP":
        options["lossless"] = True
    array = smooth()
    stored = decode_image(encode(array, kind, **({"lossless": True} if kind == "WEBP" else {})), "x")
    angle, mirrored = TURNS.get(orientation, (0, False))
    expected = rotate(stored[:, ::-1] if mirrored else stored, angle, resize=True, order=0, preserve_range=True)
    assert_pixels(encode(array, kind, **options), expected, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_upright_or_ignored(kind: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker of cameras"
    good = exif.tobytes()
    options = {"lossless": True} if kind == "WEBP" else {}
    expected = decode_image(encode(noise(), kind, **options), "x")
    for broken in (
        b"Exif\0\0garbage",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        good[:-9],
        good[:20] + b"\xff" * 40,
    ):
        np.testing.assert_array_equal(decode_image(encode(noise(), kind, exif=broken, **options), "x"), expected)


# Faults


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "is empty"),
        (bytes(5000), "holds only zero bytes"),
        (b"not an image", "is not an image (starts with b'not an image')"),
        (b"BMW makes cars, not pictures", "is not an image (starts with b'BMW makes ca')"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is not an image (starts with b'%!PS-Adobe-3')"),
        (b"%PDF-1.7\n", "is not an image (starts with b'%PDF-1.7\\n')"),
    ],
)
def test_no_image(tmp_path: Path, contents: bytes, reason: str, thorough: bool) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(contents)
    assert find_fault(path, thorough) == reason
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: {reason}"


@pytest.mark.parametrize("kind", EXTENSIONS.values())
@pytest.mark.parametrize("thorough", [False, True])
def test_truncated(tmp_path: Path, kind: str, thorough: bool) -> None:
    path = tmp_path / "a.jpg"
    contents = encode(noise(), kind)
    for length in (19, 40, len(contents) // 2, len(contents) * 3 // 4):
        path.write_bytes(contents[:length])
        assert find_fault(path, thorough)
    path.write_bytes(contents)
    assert find_fault(path, thorough) is None


def test_a_cut_file_is_an_error_or_all_there() -> None:
    for kind, contents in good_seeds():
        if len(contents) > 5000:
            continue
        whole = decode_image(contents, "x")
        for length in range(1, len(contents), max(1, len(contents) // 40)):
            with contextlib.suppress(ImageError):
                np.testing.assert_array_equal(decode_image(contents[:length], "x"), whole, kind)


def test_a_jpeg_cut_and_closed_by_an_end_marker_is_seen_when_it_is_much(tmp_path: Path) -> None:
    contents = bytearray(encode(np.zeros((16, 16, 3), np.uint8), "JPEG"))
    at = contents.index(b"\xff\xc0") + 5
    contents[at : at + 4] = struct.pack(">HH", 9000, 12000)
    (tmp_path / "a.jpg").write_bytes(contents)
    assert find_fault(tmp_path / "a.jpg") == f"declares 12000x9000 pixels in {len(contents)} bytes"


def bombs() -> dict[str, bytes]:
    """A file of a few hundred bytes of every format that declares 60,000 x 60,000 pixels (WebP: its most)."""
    tiny = {kind: bytearray(encode(np.zeros((4, 4, 3), np.uint8), kind)) for kind in EXTENSIONS.values()}
    at = tiny["JPEG"].index(b"\xff\xc0") + 5
    tiny["JPEG"][at : at + 4] = struct.pack(">HH", 60000, 60000)
    tiny["GIF"][6:10] = struct.pack("<HH", 60000, 60000)
    tiny["BMP"][18:26] = struct.pack("<LL", 60000, 60000)
    tiny["PNG"] = bytearray(png(60000, 60000, 8, 2, b"\0\0"))
    vp8x = b"VP8X" + struct.pack("<LL", 10, 0) + (16382).to_bytes(3, "little") * 2
    body = b"WEBP" + vp8x + tiny["WEBP"][12:]
    tiny["WEBP"] = bytearray(b"RIFF" + struct.pack("<L", len(body)) + body)
    tags = [(256, 60000), (257, 60000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 60000), (279, 4)]
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags)
    tiny["TIFF"] = bytearray(b"II*\0" + struct.pack("<LLH", 12, 0, len(tags)) + entries + bytes(4))
    return {kind: bytes(contents) for kind, contents in tiny.items()}


@pytest.mark.parametrize("kind", EXTENSIONS.values())
@pytest.mark.parametrize("thorough", [False, True])
def test_bomb(tmp_path: Path, kind: str, thorough: bool) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(bombs()[kind])
    reason = find_fault(path, thorough)
    assert reason is not None
    if kind == "WEBP":
        assert reason == f"declares more pixels than the limit of {images.MAX_PIXELS}"
    else:
        assert reason == f"declares 60000x60000 pixels, more than the limit of {images.MAX_PIXELS}"


def test_too_long_a_side() -> None:
    with pytest.raises(ImageError, match="declares 70000x1 pixels, more than the limit of 65535 a side"):
        decode_image(png(70000, 1, 8, 0, bytes(70001)), "x")


def test_text_chunk_bomb() -> None:
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))
    with pytest.raises(ImageError, match="too large"):
        decode_image(png(1, 1, 8, 0, b"\0\0", bomb), "x")


def progressive(scans: int) -> bytes:
    """A progressive JPEG with `scans` scans: its last one again and again, as an attacker would write it."""
    contents = encode(noise(), "JPEG", progressive=True)
    starts = [at for _, at in jpeg.segments(contents, {jpeg.SOS})]
    last = contents[starts[-1] - 2 : -2]
    return contents[:-2] + last * (scans - len(starts)) + contents[-2:]


def test_jpeg_of_many_scans(tmp_path: Path) -> None:
    for scans in (10, 100, jpeg.MAX_SCANS):
        assert progressive(scans).count(b"\xff\xda") == scans
        assert decode_image(progressive(scans), "x").shape == (33, 47, 3)
    (tmp_path / "a.jpg").write_bytes(progressive(3000))
    assert "(3000 scans, more than the limit of 200)" in str(find_fault(tmp_path / "a.jpg", thorough=True))


def test_scans_are_counted_in_the_picture_only() -> None:
    plain = encode(noise(), "JPEG")
    marks = b"\xff\xda" * 400
    metadata = b"\xff\xe5" + struct.pack(">H", 2 + len(marks)) + marks
    behind = plain + marks  # as the film behind the picture of a telephone
    np.testing.assert_array_equal(decode_image(plain[:2] + metadata + plain[2:], "x"), decode_image(plain, "x"))
    np.testing.assert_array_equal(decode_image(behind, "x"), decode_image(plain, "x"))


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif"])
def test_absurdly_many_parts(kind: str) -> None:
    """Half a million empty segments, chunks or blocks before the picture, which Pillow reads one by one."""
    contents = encode(np.zeros((4, 4), np.uint8), EXTENSIONS[kind])
    part = {"jpeg": b"\xff\xe5\0\2", "png": chunk(b"abCd", b""), "gif": b"!\xfe\1A\0"}[kind]
    at = {"jpeg": 2, "png": 33, "gif": 13 + 3 * 2 ** (contents[10] % 8 + 1)}[kind]
    whole = decode_image(contents, "x")
    np.testing.assert_array_equal(decode_image(contents[:at] + part * 5000 + contents[at:], "x"), whole)
    assert "too many parts" in refusal(contents[:at] + part * 500_000 + contents[at:])


def test_a_long_header_is_no_fault(tmp_path: Path) -> None:
    """More than the bytes that the quick check reads, at first or at all: large profiles and previews."""
    for kind, part in (("JPEG", b"\xff\xe5\xff\xff" + bytes(65_533)), ("PNG", chunk(b"abCd", bytes(200_000)))):
        contents = encode(noise(), kind)
        at = 2 if kind == "JPEG" else 33
        for times in (1, 5):
            (tmp_path / "a").write_bytes(contents[:at] + part * times + contents[at:])
            assert find_fault(tmp_path / "a") is None
            (tmp_path / "a").write_bytes(contents[:at] + part * times + contents[at : len(contents) // 2])
            assert find_fault(tmp_path / "a")


def test_absurd_strip_table() -> None:
    count = images.MAX_TIFF_VALUES + 1
    tags = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1)]
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags)
    entries += struct.pack("<HHLL", 273, 4, count, 8)
    contents = b"II*\0" + struct.pack("<LH", 8, len(tags) + 1) + entries + bytes(4) + bytes(4 * count)
    with pytest.raises(ImageError, match=f"{count} values in tag 273"):
        decode_image(contents, "x")


def test_too_long_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # a hole: it takes no disk
    assert find_fault(path) == f"holds {images.MAX_BYTES + 1} bytes, more than the limit of {images.MAX_BYTES}"


def test_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "fifolink.jpg").symlink_to(tmp_path / "fifo.jpg")
    reasons = find_faults([str(path) for path in sorted(tmp_path.iterdir())] + ["/dev/zero", "/no", "a\0b", "n" * 300])
    assert list(reasons.values()) == [
        "is not a regular file",
        "is not a regular file",
        "is a folder",
        "is a dangling link",
        "cannot be read: too many levels of symbolic links",
        "is not a regular file",
        "does not exist",
        "cannot be read: embedded null byte",
        "cannot be read: file name too long",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_by_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(noise(), "PNG"))
    path.chmod(0)
    assert find_fault(path) == "cannot be read: permission denied"


@pytest.mark.parametrize("name", ["a b.jpg", 'it\'s "q".jpg', "żółw 亀.jpg", "two\nlines.jpg", "n" * 251 + ".jpg"])
def test_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(encode(noise(), "PNG"))
    for form in (path, str(path), os.fsencode(path)):
        np.testing.assert_array_equal(read_image(form), noise())
    path.write_bytes(b"text")
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert find_faults([path]) == {path: "is not an image (starts with b'text')"}


def test_name_that_is_not_unicode(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    Path(os.fsdecode(path)).write_bytes(encode(noise(), "PNG"))
    np.testing.assert_array_equal(read_image(path), noise())


@pytest.mark.parametrize(("name", "kind"), EXTENSIONS.items())
def test_format_by_content_whatever_the_extension(tmp_path: Path, name: str, kind: str) -> None:
    contents = encode(smooth(), kind)
    path = tmp_path / "a.jpg"
    path.write_bytes(contents)
    assert image_format(path) == image_format(contents) == name
    assert read_image(path).shape == (64, 96, 3)
    assert find_fault(path) is None
    assert image_format(b"RIFF....WAVE") is None


def test_find_faults_keeps_the_order_and_reports_progress(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(50)]
    for number, path in enumerate(paths):
        path.write_bytes(b"text" if number % 7 == 0 else encode(noise(), "PNG"))
    seen: list[tuple[int, int]] = []

    def progress(results: Iterable[str | None], total: int) -> Iterator[str | None]:  # as tqdm
        for number, result in enumerate(results):
            seen.append((number, total))
            yield result

    for thorough in (False, True):
        assert list(find_faults(paths, thorough, progress)) == paths[::7]
    assert seen == [(number, 50) for number in range(50)] * 2
    assert find_faults([]) == {}


@pytest.mark.parametrize("thorough", [False, True])
def test_a_file_is_opened_once_for_its_verdict_and_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thorough: bool
) -> None:
    jpeg, png = encode(noise(64, 96), "JPEG"), encode(noise(), "PNG")
    profile = bytes(60_000)  # five of them fill more than what is looked at of a header
    contents = {
        "good.jpg": jpeg,
        "good.png": png,
        "good.gif": encode(smooth(), "GIF"),
        "good.webp": encode(smooth(), "WEBP"),
        "long head.jpg": jpeg[:2] + 5 * (b"\xff\xe2" + (len(profile) + 2).to_bytes(2, "big") + profile) + jpeg[2:],
        "large.bmp": encode(np.zeros((400, 400, 3), np.uint8), "BMP"),
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[:-30],
        "head only.jpg": jpeg[:200],
        "no header.jpg": b"\xff\xd8\xff\xe0" + b"\xff\xd9" * 20,
        "damaged inside.png": png[:60] + bytes(9) + png[69:],
        "empty.jpg": b"",
        "text.jpg": b"text",
        "zeros.jpg": bytes(300_000),
    }
    for name, of_file in contents.items():
        (tmp_path / name).write_bytes(of_file)
    (tmp_path / "unreadable.jpg").write_bytes(jpeg)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link.jpg").symlink_to("good.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    original, opened = os.open, list[str]()

    def recorded(path: str, *arguments: Any) -> int:
        opened.append(path)
        if "unreadable" in path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(path, *arguments)

    def read(path: Path) -> bytes:  # what is asked where a file is not used as it was read
        opened.append(str(path))
        if "unreadable" in str(path):
            raise ImageError(str(path), "cannot be read: permission denied")
        return read_whole(path)

    read_whole = images._read
    monkeypatch.setattr(os, "open", recorded)
    monkeypatch.setattr(images, "_read", read)
    paths = sorted(str(path) for path in tmp_path.iterdir())
    expected = {}
    for path in paths:
        try:
            read_image(path)
        except ImageError as error:
            expected[path] = error.reason
    damaged = str(tmp_path / "damaged inside.png")
    assert damaged in expected
    if not thorough:
        del expected[damaged]  # its ends are in place
    opened.clear()
    prints: dict[str, Fingerprint] = {}

    def keep(path: str, status: os.stat_result, of_file: bytes) -> None:
        prints[path] = fingerprint(status, of_file)

    assert find_faults(paths, thorough, seen=keep) == expected
    usable = [path for path in paths if path in prints]
    assert all(opened.count(path) == 1 for path in usable)
    assert find_faults(paths, thorough) == expected
    assert {os.path.basename(path) for path in paths} - {os.path.basename(path) for path in usable} == {
        "unreadable.jpg", "gone.jpg", "folder.jpg", "fifo.jpg", "huge.jpg",
    }  # fmt: skip
    assert prints == fingerprints(usable, {}, threads=1)
    assert prints[str(tmp_path / "good.jpg")].content == f"xxh3:{xxhash.xxh3_128(jpeg).hexdigest()}"


def test_a_file_that_grows_or_comes_in_parts_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = encode(noise(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(contents[:40])
    original = os.read

    def grown(descriptor: int, count: int) -> bytes:
        path.write_bytes(contents)
        return original(descriptor, min(count, 50))

    monkeypatch.setattr(os, "read", grown)
    seen: list[tuple[int, bytes]] = []
    assert find_fault(path, seen=lambda _, status, of_file: seen.append((status.st_size, of_file))) is None
    assert seen == [(40, contents)]  # of the size before: the next look finds that it was changed


def test_find_faults_checks_few_files_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that wait for whoever takes them would fill the memory, for 200,000 files."""
    begun: list[str] = []
    monkeypatch.setattr(images, "find_fault", lambda path, thorough, seen: begun.append(path))
    monkeypatch.setattr(parallel, "QUICK", 0)  # by the threads
    paths = [str(number) for number in range(20_000)]
    ahead: list[int] = []

    def progress(results: Iterable[str | None], total: int) -> Iterator[str | None]:
        for number, result in enumerate(results):
            ahead.append(len(begun) - number)
            yield result

    assert find_faults(paths, progress=progress, threads=4) == {}
    assert sorted(begun, key=int) == paths
    assert max(ahead) <= 10 * parallel.FILES_AT_ONCE


def test_only_files_that_take_long_are_shared_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    here, long = threading.get_ident(), 2 * parallel.QUICK * parallel.FILES_AT_ONCE

    def work(seconds: float) -> int:
        nonlocal now
        now += seconds
        return threading.get_ident()

    # A long one now and then, such as by a pause of the machine, is none of the file's.
    some = [long if number % 50 == 0 else 0.0 for number in range(1000)]
    assert list(parallel.over_files(work, some, threads=2)) == [here] * len(some)
    by = list(parallel.over_files(work, [long] * 100, threads=2))
    measured = parallel.SLOW_BATCHES * parallel.FILES_AT_ONCE
    assert by[:measured] == [here] * measured
    assert here not in by[measured:]


def test_find_faults_needs_no_semaphores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(38, "Function not implemented")  # as on AWS Lambda

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    assert find_faults([tmp_path]) == {tmp_path: "is a folder"}


# The files of the project's shared folder


def test_odd_files(shared: Path) -> None:
    paths = sorted((shared / "odd").iterdir())
    expected = {
        "empty.jpg": "is empty",
        "text.jpg": "is not an image (starts with b'not an image')",
        "truncated.jpg": "is truncated",
        "zero_filled.jpg": "holds only zero bytes",
    }
    for thorough in (False, True):
        assert {path.name: reason for path, reason in find_faults(paths, thorough).items()} == expected
    good = {path.name: read_image(path).shape for path in paths if path.name not in expected}
    assert good["corrupt_exif.jpg"] == (512, 384, 3)
    levels = read_image(shared / "odd/greyscale.jpg")
    assert (levels == levels[..., :1]).all()
    assert image_format(shared / "odd/webp_named.jpg") == "webp"


# Threads and fuzz

HAMMER = """
import pathlib, sys, threading
from dataset.images import ImageError, decode_image
files = [pathlib.Path(path).read_bytes() for path in sys.argv[1:]]
def work():
    for _ in range(40):
        for contents in files:
            try:
                decode_image(contents, "x")
            except ImageError:
                pass
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_threads_print_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker of cameras"
    exif[0x0112] = 6
    good = exif.tobytes()
    broken = encode(noise(), "JPEG", exif=good[:16] + b"\xff" * 30 + good[46:])
    loud = tiff(noise(), photometric="rgb").replace(struct.pack("<HH", 305, 2), struct.pack("<HH", 305, 5))
    animated = chunk(b"acTL", bytes(8))  # APNG with no frames: Pillow would warn
    files = [
        broken,
        encode(noise(), "TIFF", compression="tiff_lzw")[:1500],
        loud,
        encode(noise(), "TIFF", compression="tiff_adobe_deflate").replace(b"\x78\x9c", b"\x00\x00"),
        png(1, 1, 8, 0, b"\0\0", animated),
    ]
    paths = [tmp_path / str(number) for number in range(len(files))]
    for path, contents in zip(paths, files, strict=True):
        path.write_bytes(contents)
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", HAMMER, *map(str, paths)],
        cwd=Path(images.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_threads_agree() -> None:
    seeds = [contents for _, contents in good_seeds()[:40]]
    expected = [decode_image(contents, "x") for contents in seeds]
    wrong: list[int] = []

    def work() -> None:
        for number, contents in enumerate(seeds):
            if not np.array_equal(decode_image(contents, "x"), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_fuzz() -> None:
    counts = run(400, seed=1)
    assert counts["decoded"] > 20
    assert counts["decoded"] + counts["refused"] == 400, {name: counts[name] for name in OUTCOMES}


def test_fuzz_through_inference(tmp_path: Path) -> None:
    counts, _ = run_inference(150, seed=2, folder=tmp_path)
    assert counts["decoded"] > 10
    assert counts["decoded"] + counts["refused"] == 150, {name: counts[name] for name in OUTCOMES}
