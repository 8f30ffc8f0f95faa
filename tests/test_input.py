"""The way from a JPEG file to the network's input: the same pixels as by Pillow, the same numbers as by plain steps."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import skimage.data
import tensorflow as tf
from PIL import Image, ImageOps

import data
from dataset import images, jpeg
from dataset.images import ImageError, decode_image
from dataset.layouts import Examples
from exporting import graph
from tools import benchmark_input

ORIENTATION = 0x0112


def photograph(height: int, width: int) -> np.ndarray:
    """Ramps with some noise, so that chroma has something to lose: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], -1)
    return np.clip(ramps + np.random.default_rng(3).normal(0, 30, ramps.shape), 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(contents: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (33, 47), (130, 95)])
@pytest.mark.parametrize("quality", [5, 75, 100])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_colour_jpegs_have_pillows_bits(size: tuple[int, int], quality: int, options: dict, subsampling: int) -> None:
    contents = encode(photograph(*size), quality=quality, subsampling=subsampling, **options)
    pixels = jpeg.decode(contents)
    assert pixels is not None  # not left to Pillow
    assert np.array_equal(pixels, by_pillow(contents))


@pytest.mark.parametrize("samples", ["411", "440"])
def test_rare_subsampling_has_pillows_bits(samples: str) -> None:
    contents = simplejpeg.encode_jpeg(photograph(65, 91), colorsubsampling=samples)
    assert np.array_equal(decode_image(contents, "x"), by_pillow(contents))


@pytest.mark.parametrize("progressive", [False, True])
def test_grey_jpegs_have_pillows_bits(progressive: bool) -> None:
    contents = encode(photograph(61, 83), "L", progressive=progressive)
    assert jpeg.decode(contents) is not None
    assert np.array_equal(decode_image(contents, "x"), by_pillow(contents))


def test_a_jpeg_that_stores_rgb_has_pillows_bits() -> None:
    contents = encode(photograph(40, 50), keep_rgb=True, quality=90)
    assert np.array_equal(decode_image(contents, "x"), by_pillow(contents))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_colour_jpeg(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    contents = encode(photograph(24, 40), exif=exif)
    pixels = decode_image(contents, "x")
    assert pixels.flags["C_CONTIGUOUS"]
    assert np.array_equal(pixels, by_pillow(contents))


def entry(order: str, value: int, kind: str = "H") -> bytes:
    """EXIF with one entry, the orientation; order: < or >; kind: H for a short number, L for a long one."""
    number = struct.pack(order + kind, value).ljust(4, b"\0")
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, 1)
    return b"Exif\0\0" + start + struct.pack(order + "HHL", ORIENTATION, 3 if kind == "H" else 4, 1) + number + bytes(4)


def xmp(value: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % value


PLAIN: dict[str, dict] = {
    "nothing else": {},
    "other metadata": {
        "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0",
        "comment": b"by hand",
        "icc_profile": bytes(9000),
    },
    "upright, little-endian": {"exif": entry("<", 1)},
    "upright, big-endian": {"exif": entry(">", 1)},
    "no orientation, little-endian": {"exif": entry("<", 0)},
    "no orientation, big-endian": {"exif": entry(">", 0)},
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_plain_jpegs_have_pillows_bits_without_pillow(
    mode: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = encode(photograph(35, 50), mode, **options)
    header = jpeg.header(contents)
    assert header is not None
    assert (header.width, header.height, header.plain) == (50, 35, True)
    monkeypatch.setattr(images, "_open_image", lambda *_: pytest.fail("by Pillow"))
    assert np.array_equal(decode_image(contents, "x"), by_pillow(contents))


TURNED = {
    f"{kind} {order} {value}": {"exif": entry(order, value, kind)}
    for kind in "HL"
    for order in "<>"
    for value in (3, 6)
}
TURNED |= {"in XMP": {"xmp": xmp(6)}, "in XMP, upright in EXIF": {"xmp": xmp(6), "exif": entry("<", 0)}}


@pytest.mark.parametrize("options", TURNED.values(), ids=TURNED)
def test_turned_jpegs_are_turned_as_by_pillow(options: dict) -> None:
    contents = encode(photograph(24, 40), **options)
    header = jpeg.header(contents)
    assert header is not None
    assert not header.plain
    assert np.array_equal(decode_image(contents, "x"), by_pillow(contents))


def test_jpegs_of_several_scans_and_cmyk_are_not_plain() -> None:
    contents = encode(photograph(24, 40))
    scan = contents.index(b"\xff\xda")
    for other in (
        encode(photograph(24, 40), progressive=True),
        encode(photograph(24, 40), "CMYK"),
        contents[: scan + 4] + b"\1" + contents[scan + 5 :],  # a first scan of one channel
    ):
        header = jpeg.header(other)
        assert header is not None
        assert (header.width, header.height, header.plain) == (40, 24, False)
    assert jpeg.header(contents[:scan]) is None
    with pytest.raises(ImageError, match=r"3001 scans, more than the limit of 200"):
        decode_image(contents[:-2] + contents[scan:-2] * 3000 + contents[-2:], "x")


def test_odd_jpegs_are_left_to_pillow() -> None:
    contents = encode(photograph(64, 64))
    start = contents.index(b"\xff\xda") + 14
    damaged = contents[:start] + b"\xff\xd0" + contents[start:]  # a restart marker that nothing announced
    assert jpeg.decode(damaged) is None
    assert np.array_equal(decode_image(damaged, "x"), by_pillow(damaged))
    assert jpeg.decode(contents[: len(contents) // 2]) is None
    with pytest.raises(ImageError, match=r"^half: is truncated$"):
        decode_image(contents[: len(contents) // 2], "half")


def test_photographs_have_pillows_bits(shared: Path) -> None:
    paths = sorted(shared.glob("food-101-mini/images/*/*.jpg"))[::5]
    paths += sorted(shared.glob("mini_natural_images/*/*/*.jpg"))[::25]
    assert len(paths) > 100
    for path in paths:
        contents = path.read_bytes()
        assert jpeg.decode(contents) is not None, path
        assert np.array_equal(decode_image(contents, str(path)), by_pillow(contents)), path


# -- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(512, 384), (97, 130), (30, 31)])
@pytest.mark.parametrize("seed", [None, (3, 4), (-5, 2**40)])
def test_preprocess_has_the_bits_of_plain_steps(size: tuple[int, int], seed: tuple[int, int] | None) -> None:
    spec = data.Preprocessing(64, 10, mean_rgb=(100.0, 110.0, 120.5), std_rgb=(58.4, 57.1, 57.4))
    image, key = photograph(*size), None if seed is None else tf.constant(seed, tf.int64)
    side = min(size) - 2 * min(10, min(size) // 4)
    room = np.array(size) - side
    top, left = room // 2
    if key is not None:
        fraction = tf.random.stateless_uniform([2], key).numpy()
        top, left = np.minimum((fraction * (room + 1).astype(np.float32)).astype(int), room)
    crop = tf.image.resize(image[top : top + side, left : left + side], [64, 64], method="area").numpy()
    expected = (crop - np.float32(spec.mean_rgb)) / np.float32(spec.std_rgb)
    assert np.array_equal(data.preprocess(tf.constant(image), spec, key), expected)


@pytest.mark.parametrize("augment", [(), data.AUGMENTATIONS])
def test_a_seed_that_is_not_to_be_used_gives_the_central_view(augment: tuple[str, ...]) -> None:
    image, spec = tf.constant(photograph(70, 90)), data.Preprocessing(32, augment=augment)
    key = tf.constant([1, 2], tf.int64)
    central = data.preprocess(image, spec).numpy()
    assert np.array_equal(data.preprocess(image, spec, key, tf.constant(False)), central)
    assert np.array_equal(data.preprocess(image, spec, key, tf.constant(True)), data.preprocess(image, spec, key))
    assert not np.array_equal(data.preprocess(image, spec, key), central)


def test_the_loader_gives_what_preprocess_gives(tmp_path: Path) -> None:
    paths = []
    for number in range(5):
        paths.append(str(tmp_path / f"{number}.jpg"))
        Path(paths[-1]).write_bytes(encode(photograph(50 + number, 60)))
    spec = data.Preprocessing(24, 4, augment=("flip", "color"))
    load = data.image_loader(Examples(tuple(paths), np.zeros(5, np.int64)), spec, view_seed=9)
    fold_in: Callable = tf.random.experimental.stateless_fold_in
    for view in (data.CENTRAL_VIEW, 0, 3):
        (x, _, indices), *rest = data.ordered_batches(load, np.zeros(5, np.int64), 8, view)
        assert not rest
        assert list(indices.numpy()) == list(range(5))
        for index, path in enumerate(paths):
            key = fold_in(tf.constant([9, index], tf.int64), tf.constant(view, tf.int64))
            image = tf.constant(by_pillow(Path(path).read_bytes()))
            expected = data.preprocess(image, spec, None if view == data.CENTRAL_VIEW else key)
            assert np.abs(x[index] - expected).max() < 1e-3  # the compiled colour changes may round differently


def test_every_way_of_the_benchmark_reads_every_file(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encode(photograph(60, 80)))
    ways = benchmark_input.candidates([str(path) for path in sorted(tmp_path.iterdir())])
    assert {way: run() for way, run in ways.items()} == dict.fromkeys(ways, 3)


# -- a photograph decoded at a part of its size ------------------------------------------------------------------------


def smooth_photograph(height: int, width: int) -> np.ndarray:
    """A cat, as sharp as a camera's picture of many pixels: uint8 [H, W, 3]."""
    large = Image.fromarray(skimage.data.chelsea()).resize((width, height), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(5).normal(0, 4, (height, width, 3))
    return np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8)


def scaled(image_size: int, crop_margin: int = 10) -> data.Preprocessing:
    return data.Preprocessing(image_size, crop_margin, decode="scaled")


def test_a_jpeg_is_reduced_only_where_its_crop_stays_four_times_the_input() -> None:
    least = scaled(32).least_side
    assert least == 4 * 32 + 2 * 10
    assert data.Preprocessing(32).least_side == 0
    for short, expected in ((2 * least - 1, 1), (2 * least, 2), (4 * least - 1, 2), (4 * least, 4), (9 * least, 8)):
        assert jpeg.reduction(short, 10 * least, least) == jpeg.reduction(10 * least, short, least) == expected
    assert jpeg.reduction(60_000, 60_000, 0) == 1


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"exif": entry("<", 6)}], ids=["plain", "scans", "exif"]
)
@pytest.mark.parametrize(
    ("mode", "least", "reduction"), [("RGB", 60, 4), ("L", 100, 2), ("RGB", 30, 8), ("RGB", 200, 1)]
)
def test_reduced_pixels_are_those_of_pillow(options: dict, mode: str, least: int, reduction: int) -> None:
    """And of TensorFlow in an export; Pillow reaches the same decoder by `draft`."""
    contents = encode(smooth_photograph(251, 333), mode, **options)
    pixels, found = images.decode_reduced(contents, "x", least)
    assert found == reduction
    reference = Image.open(io.BytesIO(contents))
    if reduction > 1:
        reference.draft(mode, (333 // reduction, 251 // reduction))
    expected = np.asarray(ImageOps.exif_transpose(reference).convert("RGB"))
    assert sorted(pixels.shape[:2]) == sorted((-(-251 // reduction), -(-333 // reduction)))
    assert np.array_equal(pixels, expected)
    export = tf.function(lambda text: (n := graph.jpeg_reduction(text, least), graph.decode(text, n)), autograph=False)
    found_there, of_export = export(tf.constant(contents))
    assert int(found_there) == reduction
    assert np.array_equal(of_export, expected)


def test_other_formats_and_cmyk_are_never_reduced() -> None:
    pixels = smooth_photograph(120, 160)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        same, reduction = images.decode_reduced(buffer.getvalue(), "x", 10)
        assert reduction == 1
        assert np.array_equal(same, pixels)
    of_print, reduction = images.decode_reduced(encode(pixels, "CMYK"), "x", 10)
    assert (reduction, of_print.shape) == (1, pixels.shape)
    assert int(graph.jpeg_reduction(tf.constant(encode(pixels, "CMYK")), 10)) == 1
    assert int(graph.jpeg_reduction(tf.constant(encode(pixels, "RGB")), 10)) == 8
    assert int(graph.jpeg_reduction(tf.io.encode_png(pixels), 10)) == 1


@pytest.mark.parametrize(("size", "reduction"), [((600, 800), 4), ((1200, 904), 4), ((2000, 1504), 8)])
def test_a_scaled_input_is_the_exact_one_within_a_grey_level(size: tuple[int, int], reduction: int) -> None:
    """The central view. The margin and the sides can be divided here, so that the crops are the same."""
    contents = encode(smooth_photograph(*size), quality=95)
    spec = scaled(32, crop_margin=8)
    pixels, found = images.decode_reduced(contents, "x", spec.least_side)
    assert found == reduction
    reduced = data.preprocess(tf.constant(pixels), spec, reduction=reduction).numpy()
    exact = data.preprocess(tf.constant(decode_image(contents, "x")), data.Preprocessing(32, 8)).numpy()
    assert np.abs(reduced - exact).mean() < 0.5


def test_the_loader_and_a_central_crop_know_the_reduction(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    path.write_bytes(encode(smooth_photograph(700, 640)))
    spec = scaled(32, crop_margin=40)
    load = data.image_loader(Examples((str(path),), np.zeros(1, np.int64)), spec, 0)
    x, _ = next(iter(load(tf.data.Dataset.from_tensors((np.int64(0), np.int64(data.CENTRAL_VIEW))), 1)))
    half, reduction = images.read_reduced(path, spec.least_side)
    assert (reduction, half.shape) == (2, (350, 320, 3))
    side = 320 - 2 * 20
    expected = data.area_resize(half[35:-35, 20:-20], 32)
    assert expected.shape == (32, 32, 3)
    assert half[35:-35, 20:-20].shape[:2] == (side, side)
    np.testing.assert_allclose(x[0], expected, atol=1e-4)
