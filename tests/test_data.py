"""What the network sees and in which order, against NumPy, scikit-image, SciPy and counting."""

import itertools
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import skimage.measure
import skimage.transform
import tensorflow as tf
from PIL import Image

import data
from data import CENTRAL_VIEW, Order, Preprocessing, preprocess
from dataset import images
from dataset.layouts import Examples
from networks.vgg import MEAN_RGB

COUNT, BATCH, SEED = 11, 4, 5  # three steps an epoch, the last one short


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose red is the row and whose green is the column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def pixels(image: np.ndarray, spec: Preprocessing, seed: tuple[int, int] | None = None) -> np.ndarray:
    """`preprocess` with the mean added again, 0..255."""
    key = None if seed is None else tf.constant(seed, tf.int64)
    return preprocess(tf.constant(image), spec, key).numpy() + np.float32(spec.mean_rgb)


def area_weights(size: int, target: int) -> np.ndarray:
    """[target, size]: the share of each source pixel in the interval that a target pixel covers."""
    edges = np.linspace(0, size, target + 1)
    covered = np.minimum(edges[1:, None], np.arange(size) + 1) - np.maximum(edges[:-1, None], np.arange(size))
    return np.maximum(covered, 0) * target / size


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 48)) -> Examples:
    """PNG files of noise, each of its own brightness, with labels 0, 1, 2, 0, ..."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.fromarray(photograph(*size, seed=number) // 4 + np.uint8(15 * number)).save(path)
        paths.append(str(path))
    return Examples(tuple(paths), np.arange(count, dtype=np.int64) % 3)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return write_images(tmp_path_factory.mktemp("stream"), COUNT)


def number_loader(positions: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
    """A `data.Load` without images: x is [B, 2], the index and the view."""
    return positions.map(lambda index, view: (tf.stack([index, view]), index)).batch(batch_size)


Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def stream(examples: Examples, spec: Preprocessing, first: int, end: int, views: int = 0) -> list[Batch]:
    load = data.image_loader(examples, spec, SEED)
    order = Order(len(examples), BATCH, SEED, views)
    return list(data.train_batches(load, examples.labels, order, first, end).as_numpy_iterator())


def equal_batches(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


# -- the central crop and the resize ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "margin", "side", "top", "left"),
    [
        (60, 100, 10, 40, 10, 30),
        (100, 60, 10, 40, 30, 10),
        (61, 90, 7, 47, 7, 21),
        (50, 50, 0, 50, 0, 0),
        (41, 44, 10, 21, 10, 11),
        (40, 40, 10, 20, 10, 10),
        (20, 30, 10, 10, 5, 10),  # from here on the margin is a quarter of the short side
        (7, 7, 10, 5, 1, 1),
        (2, 250, 10, 2, 0, 124),  # 1:125
        (250, 2, 10, 2, 124, 0),
        (1, 1, 10, 1, 0, 0),
    ],
)
def test_central_crop(height: int, width: int, margin: int, side: int, top: int, left: int) -> None:
    image = coordinates(height, width)
    result = pixels(image, Preprocessing(max(side, 1), margin))  # the resize changes nothing
    assert np.allclose(result, image[top : top + side, left : left + side], atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (3, 1), (2, 2), (10, 1000), (1000, 10), (1, 100)])
@pytest.mark.parametrize("seed", [None, (1, 2)])
def test_tiny_and_very_long_images_come_out_whole(height: int, width: int, seed: tuple[int, int] | None) -> None:
    image = photograph(height, width)
    result = pixels(image, Preprocessing(32, augment=data.AUGMENTATIONS), seed)
    assert result.shape == (32, 32, 3)
    assert np.isfinite(result).all()
    assert result.min() >= -1e-3
    assert result.max() <= 255.001


def test_mean_of_imagenet_is_subtracted_in_rgb_order() -> None:
    image = np.full((50, 50, 3), (200, 100, 0), np.uint8)
    expected = np.float32([200 - 123.68, 100 - 116.78, 0 - 103.94])
    result = preprocess(tf.constant(image), Preprocessing(32, mean_rgb=MEAN_RGB))
    assert result.dtype == tf.float32
    assert np.allclose(result, expected, atol=1e-4)


def test_mean_and_deviation_of_the_network_are_applied_channel_by_channel_and_undone_in_a_picture() -> None:
    image = photograph(32, 32)
    spec = Preprocessing(32, crop_margin=0, mean_rgb=(10.0, 20.0, 30.0), std_rgb=(2.0, 4.0, 0.5))
    x = preprocess(tf.constant(image), spec).numpy()
    assert np.allclose(x, (image.astype(np.float64) - [10, 20, 30]) / [2, 4, 0.5], rtol=1e-5, atol=1e-3)
    assert np.array_equal(data.to_picture(x, spec), image)


def test_area_resize_by_a_whole_number_is_the_block_mean() -> None:
    image = photograph(96, 96)
    expected = skimage.measure.block_reduce(image.astype(np.float64), (3, 3, 1), np.mean)
    result = pixels(image, Preprocessing(32, crop_margin=0))
    assert np.abs(result - expected).max() < 1e-4
    assert np.abs(result - skimage.transform.downscale_local_mean(image, (3, 3, 1))).max() < 1e-4


@pytest.mark.parametrize(("side", "target"), [(100, 32), (331, 224), (33, 32), (225, 224), (20, 32), (7, 64)])
def test_area_resize_by_any_ratio_weighs_pixels_by_the_area_they_cover(side: int, target: int) -> None:
    image = photograph(side, side)
    weights = area_weights(side, target)
    assert np.allclose(weights.sum(axis=1), 1)
    expected = np.stack([weights @ image[..., c].astype(np.float64) @ weights.T for c in range(3)], axis=-1)
    # TensorFlow computes the edges in float32, which at 224 px is worth some thousandths of 255.
    assert np.abs(pixels(image, Preprocessing(target, crop_margin=0)) - expected).max() < 1e-2


# -- random crops -----------------------------------------------------------------------------------------------------


def crop_corners(height: int, width: int, spec: Preprocessing, count: int) -> np.ndarray:
    """Top and left, [count, 2], of the crops of views 0 ... count - 1 in an image of coordinates."""
    image = tf.constant(coordinates(height, width))
    root = tf.constant([SEED, 3], tf.int64)
    seeds = tf.data.Dataset.range(count).map(lambda view: tf.random.experimental.stateless_fold_in(root, view))
    crops = seeds.map(lambda seed: preprocess(image, spec, seed) + tf.constant(spec.mean_rgb), num_parallel_calls=2)
    found = np.stack(list(crops.as_numpy_iterator()))
    corners = np.rint(found[:, 0, 0, :2]).astype(int)
    for crop, (top, left) in zip(found, corners, strict=True):  # each lies inside the image
        side = spec.image_size
        assert np.allclose(crop, coordinates(height, width)[top : top + side, left : left + side], atol=1e-4)
    return corners


def test_random_crops_are_uniform_over_every_position_the_ends_included() -> None:
    corners = crop_corners(40, 44, Preprocessing(image_size=36, crop_margin=2), 2700)  # 5 rows, 9 columns
    counts = Counter(map(tuple, corners.tolist()))
    assert set(counts) == set(itertools.product(range(5), range(9)))
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01


def test_random_crop_ranges_follow_each_side_of_the_image() -> None:
    upright = crop_corners(60, 40, Preprocessing(image_size=32, crop_margin=4), 600)
    lying = crop_corners(40, 60, Preprocessing(image_size=32, crop_margin=4), 600)
    assert upright.min(axis=0).tolist() == lying.min(axis=0).tolist() == [0, 0]
    assert upright.max(axis=0).tolist() == [28, 8]
    assert lying.max(axis=0).tolist() == [8, 28]


def test_an_image_without_room_has_one_crop() -> None:
    assert not crop_corners(36, 36, Preprocessing(image_size=36, crop_margin=0), 20).any()


def test_the_seed_alone_decides_what_is_random() -> None:
    image, spec = photograph(60, 70), Preprocessing(32, augment=data.AUGMENTATIONS)
    assert np.array_equal(pixels(image, spec, (3, 4)), pixels(image, spec, (3, 4)))
    assert not np.array_equal(pixels(image, spec, (3, 4)), pixels(image, spec, (3, 5)))
    assert not np.array_equal(pixels(image, spec, (3, 4)), pixels(image, spec, (4, 4)))
    compiled = tf.function(lambda key: preprocess(tf.constant(image), spec, key))
    assert np.allclose(compiled(tf.constant([3, 4], tf.int64)), pixels(image, spec, (3, 4)), atol=1e-3)


# -- augmentations ----------------------------------------------------------------------------------------------------


def views_of(spec: Preprocessing, count: int, image: np.ndarray) -> np.ndarray:
    root = tf.constant([SEED, 3], tf.int64)
    seeds = tf.data.Dataset.range(count).map(lambda view: tf.random.experimental.stateless_fold_in(root, view))
    crops = seeds.map(lambda seed: preprocess(tf.constant(image), spec, seed) + tf.constant(spec.mean_rgb), 2)
    return np.stack(list(crops.as_numpy_iterator()))


def test_flip_turns_half_the_views_about_the_vertical_axis_whatever_their_crop() -> None:
    image = coordinates(36, 40)
    plain = views_of(Preprocessing(32, crop_margin=2), 1000, image)
    flipped = views_of(Preprocessing(32, crop_margin=2, augment=("flip",)), 1000, image)
    is_flipped = flipped[:, 0, 0, 1] > flipped[:, 0, -1, 1]
    assert np.allclose(flipped[is_flipped], plain[is_flipped][:, :, ::-1])
    assert np.allclose(flipped[~is_flipped], plain[~is_flipped])
    assert scipy.stats.binomtest(int(is_flipped.sum()), 1000).pvalue > 0.01
    assert abs(np.corrcoef(is_flipped, plain[:, 0, 0, 1])[0, 1]) < 0.1
    assert abs(np.corrcoef(is_flipped[1:], is_flipped[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_every_augmentation_changes_random_views_and_not_the_central_one(name: str) -> None:
    image = photograph(50, 60)
    spec, plain = Preprocessing(32, augment=(name,)), Preprocessing(32)
    assert np.array_equal(pixels(image, spec), pixels(image, plain))
    changed = [not np.array_equal(pixels(image, spec, (0, k)), pixels(image, plain, (0, k))) for k in range(8)]
    assert any(changed)


def test_an_augmentation_draws_the_same_whatever_others_are_on() -> None:
    image = coordinates(50, 60)
    alone = views_of(Preprocessing(32, augment=("flip",)), 30, image)
    together = views_of(Preprocessing(32, augment=("flip", "rotate", "zoom")), 30, image)
    direction = [np.sign(batch[:, 16, 20, 1] - batch[:, 16, 12, 1]) for batch in (alone, together)]
    assert np.array_equal(*direction)


def warp(image: np.ndarray, angle: float = 0.0, shear: float = 0.0, scale: float = 1.0) -> np.ndarray:
    values = [tf.constant(value, tf.float32) for value in (angle, shear, scale)]
    return data._warp(tf.constant(image, tf.float32), *values).numpy()


def test_a_warp_by_nothing_is_the_identity() -> None:
    image = photograph(33, 33).astype(np.float32)
    assert np.array_equal(warp(image), image)


@pytest.mark.parametrize("side", [32, 33])
def test_a_rotation_turns_about_the_centre_as_scikit_image_does(side: int) -> None:
    image = scipy.ndimage.gaussian_filter(photograph(side, side).astype(np.float32), (2, 2, 0))
    for degrees in (-15, -4, 4, 15):
        # Rows grow downwards: a positive angle is counterclockwise to the eye.
        expected = skimage.transform.rotate(image, degrees, order=1, mode="symmetric", preserve_range=True)
        assert np.abs(warp(image, angle=math.radians(degrees)) - expected).max() < 0.05
    quarter = warp(image, angle=math.pi / 2)
    assert np.abs(quarter - np.rot90(image)).max() < 0.05


def test_zoom_and_shear_map_output_pixels_to_input_pixels_about_the_centre() -> None:
    image = scipy.ndimage.gaussian_filter(photograph(40, 40).astype(np.float32), (2, 2, 0))
    for angle, shear, scale in ((0, 0, 1.2), (0, 0, 0.8), (0, 0.2, 1), (0, -0.2, 1), (0.26, -0.2, 1.2)):
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        matrix = (np.array([[1, shear], [0, 1]]) @ turn)[::-1, ::-1]  # of (row, column), as SciPy has it
        offset = 19.5 - matrix @ [19.5, 19.5]
        expected = np.stack(
            [scipy.ndimage.affine_transform(image[..., c], matrix, offset, order=1, mode="reflect") for c in range(3)],
            axis=-1,
        )
        assert np.abs(warp(image, angle, shear, scale) - expected).max() < 0.05


def test_color_keeps_values_in_range_and_grey_grey() -> None:
    spec = Preprocessing(32, crop_margin=0, augment=("color",))
    extreme = np.where(photograph(32, 32) < 128, 0, 255).astype(np.uint8)
    views = views_of(spec, 60, extreme)
    assert views.min() >= -1e-3
    assert views.max() <= 255.001
    grey = np.repeat(photograph(32, 32)[..., :1], 3, axis=-1)
    coloured = views_of(spec, 20, grey)
    assert np.ptp(coloured, axis=-1).max() < 0.1  # the luma weights add up to 0.9999
    brightness = coloured.mean(axis=(1, 2, 3)) - grey.mean()
    assert brightness.min() < -10
    assert brightness.max() > 10


# -- order of examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_every_epoch_is_a_permutation(count: int) -> None:
    for epoch in range(3):
        positions = Order(count, BATCH, SEED).positions(tf.constant(epoch, tf.int64), tf.constant(0, tf.int64))
        found = [(int(index), int(view)) for index, view in positions.as_numpy_iterator()]
        assert sorted(index for index, _ in found) == list(range(count))
        assert {view for _, view in found} == {epoch}


def epoch_orders(count: int, seed: int, epochs: list[int], take: int | None = None) -> list[tuple[int, ...]]:
    """The examples of each epoch, or its first `take`, in their order."""
    start, order = tf.constant(0, tf.int64), Order(count, BATCH, seed)

    def of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        return order.positions(epoch, start).map(lambda index, view: index).take(take or count)

    orders = tf.data.Dataset.from_tensor_slices(np.array(epochs, np.int64)).flat_map(of_epoch).batch(take or count)
    return [tuple(row.tolist()) for row in orders.as_numpy_iterator()]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [order for seed in range(4) for order in epoch_orders(30, seed, list(range(50)))]
    assert len(set(orders)) == 200
    assert tuple(range(30)) not in orders


def test_orders_do_not_come_back_after_256_epochs_or_256_seeds() -> None:
    first, later = epoch_orders(30, 0, [0, 256])
    assert later != first
    assert epoch_orders(30, 256, [0]) != [first]


def test_every_example_comes_first_about_equally_often() -> None:
    firsts = [first for (first,) in epoch_orders(6, SEED, list(range(250)), take=1)]
    assert scipy.stats.chisquare(np.bincount(firsts, minlength=6)).pvalue > 1e-3


def test_the_last_batch_of_an_epoch_is_short_and_epochs_do_not_mix() -> None:
    batches = data.train_batches(number_loader, np.arange(COUNT) % 3, Order(COUNT, BATCH, SEED), 0, 9)
    found = list(batches.as_numpy_iterator())
    assert [len(labels) for _, labels, _ in found] == [4, 4, 3] * 3
    for epoch in range(3):
        of_epoch = found[3 * epoch : 3 * epoch + 3]
        assert sorted(np.concatenate([indices for _, _, indices in of_epoch])) == list(range(COUNT))
        assert all((x[:, 1] == epoch).all() for x, _, _ in of_epoch)
    for x, labels, indices in found:
        assert np.array_equal(labels, indices % 3)
        assert np.array_equal(x[:, 0], indices)
        assert labels.dtype == indices.dtype == np.int64


def test_with_cached_views_the_view_is_the_epochs_remainder() -> None:
    batches = data.train_batches(number_loader, np.zeros(COUNT), Order(COUNT, BATCH, SEED, views=2), 0, 15)
    views = [int(x[0, 1]) for x, _, _ in batches.as_numpy_iterator()]
    assert views == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3 + [0] * 3


@pytest.mark.parametrize(("count", "batch_size"), [(11, 4), (12, 4), (3, 8), (5, 1), (1, 1)])
def test_indices_of_a_step_are_those_of_the_stream(count: int, batch_size: int) -> None:
    order = Order(count, batch_size, SEED)
    assert order.epoch_steps == math.ceil(count / batch_size)
    batches = data.train_batches(number_loader, np.zeros(count), order, 0, 3 * order.epoch_steps)
    seen = 0
    for step, (_, _, indices) in enumerate(batches.as_numpy_iterator()):
        assert order.indices(step) == indices.tolist()
        assert order.images_before(step) == seen
        seen += len(indices)
    assert order.images_before(3 * order.epoch_steps) == seen == 3 * count


def test_ordered_batches_visit_every_example_once_in_order_the_short_batch_included() -> None:
    found = list(data.ordered_batches(number_loader, np.arange(COUNT) % 3, BATCH).as_numpy_iterator())
    assert [len(labels) for _, labels, _ in found] == [4, 4, 3]
    assert np.concatenate([indices for _, _, indices in found]).tolist() == list(range(COUNT))
    assert np.concatenate([labels for _, labels, _ in found]).tolist() == [i % 3 for i in range(COUNT)]
    assert all((x[:, 1] == CENTRAL_VIEW).all() for x, _, _ in found)


# -- a stream of images -----------------------------------------------------------------------------------------------


def test_a_stream_started_anywhere_is_the_tail_of_the_whole_stream(examples: Examples) -> None:
    spec = Preprocessing(32, crop_margin=4, augment=("flip", "rotate", "color"))
    whole = stream(examples, spec, 0, 9)
    for first in (1, 3, 4, 8, 9):  # 3 begins an epoch, 9 is the end
        assert equal_batches(stream(examples, spec, first, 9), whole[first:]), first
    assert equal_batches(stream(examples, spec, 4, 6), whole[4:6])  # 6 ends an epoch


def test_views_repeat_in_a_stream_of_two_views(examples: Examples) -> None:
    batches = stream(examples, Preprocessing(32, crop_margin=4), 0, 12, views=2)
    by_epoch = [
        {int(i): image for x, _, indices in batches[3 * e : 3 * e + 3] for image, i in zip(x, indices, strict=True)}
        for e in range(4)
    ]
    for index in range(COUNT):
        assert np.array_equal(by_epoch[0][index], by_epoch[2][index])
        assert np.array_equal(by_epoch[1][index], by_epoch[3][index])
        assert not np.array_equal(by_epoch[0][index], by_epoch[1][index])


def test_every_epoch_sees_other_crops_and_every_example_its_own(tmp_path: Path) -> None:
    path = tmp_path / "coordinates.png"
    Image.fromarray(coordinates(200, 200)).save(path)
    same_file = Examples((str(path),) * 6, np.zeros(6, np.int64))
    load = data.image_loader(same_file, Preprocessing(image_size=32, crop_margin=84), SEED)
    batches = data.train_batches(load, same_file.labels, Order(6, 6, SEED), 0, 5)
    corners = [tuple(crop[0, 0, :2].tolist()) for x, _, _ in batches.as_numpy_iterator() for crop in x]
    assert len(set(corners)) == 30


def test_the_view_seed_decides_the_crops(examples: Examples) -> None:
    positions = tf.data.Dataset.from_tensors((tf.constant(0, tf.int64), tf.constant(0, tf.int64)))
    spec = Preprocessing(32, crop_margin=4)
    one, again, other = (
        data.image_loader(examples, spec, seed)(positions, 1).get_single_element()[0].numpy() for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("cores", [1, 7, None])
def test_images_and_order_do_not_depend_on_the_number_of_cores(
    examples: Examples, monkeypatch: pytest.MonkeyPatch, cores: int | None
) -> None:
    spec = Preprocessing(32, crop_margin=4, augment=("flip", "zoom"))
    expected = stream(examples, spec, 0, 6)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert equal_batches(stream(examples, spec, 0, 6), expected)


@pytest.mark.parametrize("bad", ["text", "missing", "truncated"])
def test_a_bad_file_in_the_stream_is_an_error_that_names_it(tmp_path: Path, bad: str) -> None:
    some = write_images(tmp_path / "images", 5)
    path = tmp_path / "images" / "odd näme 'x'.png"
    if bad == "text":
        path.write_text("no image")
    elif bad == "truncated":
        path.write_bytes(Path(some.paths[0]).read_bytes()[:1000])
    with_bad = Examples((*some.paths[:3], str(path), *some.paths[3:]), np.zeros(6, np.int64))
    batches = data.ordered_batches(data.image_loader(with_bad, Preprocessing(32), SEED), with_bad.labels, 2)
    reason = {"text": "is not an image", "missing": "does not exist", "truncated": "is truncated"}[bad]
    with pytest.raises(tf.errors.OpError) as caught:
        list(batches)
    assert f"ImageError: {path}: {reason}" in caught.value.message


# -- validation and inference -----------------------------------------------------------------------------------------


def odd_images(folder: Path) -> list[str]:
    """Files of every mode and some sizes."""
    colour, rng = photograph(70, 90), np.random.default_rng(1)
    alpha = np.dstack([colour, rng.integers(0, 256, (70, 90), dtype=np.uint8)])
    wide = Image.fromarray(rng.integers(0, 65536, (40, 50)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colour).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(colour).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(colour).convert("P").save(folder / "palette.png")
    Image.fromarray(alpha).save(folder / "alpha.png")
    Image.fromarray(colour[..., 0]).save(folder / "grey.png")
    wide.save(folder / "16 bit.png")
    Image.fromarray(colour).save(folder / "photo.gif")
    Image.fromarray(colour).save(folder / "photo.webp")
    Image.fromarray(photograph(1, 1)).save(folder / "1x1.png")
    Image.fromarray(photograph(5, 500)).save(folder / "long.png")
    Image.fromarray(photograph(500, 5)).save(folder / "tall.bmp")
    return sorted(str(path) for path in folder.iterdir())


@pytest.mark.parametrize(("image_size", "margin"), [(224, 10), (33, 0), (128, 25)])
def test_validation_and_inference_tensors_are_bit_equal(
    sample_images: Path, tmp_path: Path, image_size: int, margin: int
) -> None:
    paths = [str(path) for path in sorted(sample_images.rglob("*.jpg"))[::2]] + odd_images(tmp_path)
    assert len(paths) > 35
    spec = Preprocessing(image_size, margin, augment=("flip", "rotate"))
    examples = Examples(tuple(paths), np.zeros(len(paths), np.int64))
    batches = data.ordered_batches(data.image_loader(examples, spec, SEED), examples.labels, 16)
    validation = np.concatenate([x for x, _, _ in batches.as_numpy_iterator()])

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)])
    def prepare(image: tf.Tensor) -> tf.Tensor:  # as inference.py does
        return preprocess(image, spec)

    for path, expected in zip(paths, validation, strict=True):
        assert np.array_equal(prepare(images.read_image(path)).numpy(), expected), path
