"""Heat maps: what a map adds up to, for every head and network, and where picture and box lie on the photograph."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import data
import model
from attribution import class_maps, head_input, last_convolution
from model import EVEN_SHARE, FEATURE_NORM, Network
from networks.vgg import vgg
from reports.heatmap import draw_heatmap, strongest_box
from tests.tiny_networks import filled, tiny_inception, tiny_resnet


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_vgg = vgg((4,), (6, 6), (8,), (8,), (8, 8), fc_units=16)
    for name, row in (("tiny_vgg", tiny_vgg), ("tiny_resnet", tiny_resnet()), ("tiny_inception", tiny_inception())):
        monkeypatch.setitem(model.NETWORKS, name, row)


def maps_of(network: Network, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(maps of the classes 0, 1, 2 in turn, those classes, what enters the head, logits)"""
    activations = last_convolution(network, tf.constant(x))
    entering = head_input(network, activations)
    classes = np.arange(len(x)) % 3
    return class_maps(network, activations, classes).numpy(), classes, entering.numpy(), network.forward(x).numpy()


def photos(side: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 60, (4, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize(("name", "side"), [("tiny_vgg", 64), ("tiny_resnet", 32), ("tiny_inception", 75)])
@pytest.mark.parametrize("head", ["gap", "linear"])
def test_a_map_of_a_rooted_head_and_the_parts_of_no_position_are_the_logit(name: str, side: int, head: str) -> None:
    network = filled(Network(name, head, 3, side))
    maps, classes, entering, logits = maps_of(network, photos(side))
    assert maps.shape[1] == (4 if name == "tiny_vgg" else entering.shape[1])  # VGG's: before the pool
    weights = network.variables_by_name[f"{name if name != 'tiny_inception' else 'InceptionV3'}/{head}/weights"].numpy()
    biases = network.variables_by_name[f"{name if name != 'tiny_inception' else 'InceptionV3'}/{head}/biases"].numpy()
    features = entering.mean(axis=(1, 2)) if head == "gap" else entering.reshape(len(entering), -1)
    features = features.astype(np.float64)
    share = features / features.sum(axis=1, keepdims=True)
    root = np.sqrt((1 - EVEN_SHARE) * share + EVEN_SHARE / share.shape[1])
    even = FEATURE_NORM * EVEN_SHARE / share.shape[1] * (weights[:, classes].T / root).sum(axis=1)
    expected = logits[np.arange(4), classes] - biases[classes] - even
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), expected, rtol=1e-4, atol=1e-3)
    # Position by position, where no pool comes between.
    if name != "tiny_vgg":
        part = entering / entering.sum(axis=(1, 2, 3), keepdims=True)  # of a share
        each = weights[:, classes].T / root  # [B, features]
        each = each[:, None, None] if head == "gap" else each.reshape(entering.shape)
        of_position = FEATURE_NORM * (1 - EVEN_SHARE) * (part * each).sum(axis=-1)
        np.testing.assert_allclose(maps, of_position, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "side"), [("tiny_resnet", 32), ("tiny_inception", 75)])
def test_a_map_of_a_published_pooled_head_is_the_class_activation_map(name: str, side: int) -> None:
    network = filled(Network(name, "fc", 3, side))
    maps, classes, entering, logits = maps_of(network, photos(side))
    weights, biases = (v.numpy() for v in network.variables_from(network.stages[-1]).values())
    weights = weights.reshape(-1, 3)
    positions = entering.shape[1] * entering.shape[2]
    expected = np.einsum("bhwc,cb->bhw", entering, weights[:, classes]) / positions
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        maps.sum(axis=(1, 2)), logits[np.arange(4), classes] - biases[classes], rtol=1e-3, atol=1e-4
    )


def test_a_map_of_the_fc_head_of_vgg_is_the_logit_where_hidden_biases_are_zero() -> None:
    network = filled(Network("tiny_vgg", "fc", 3, 224))
    for stage in ("fc6", "fc7"):
        network.variables_by_name[f"tiny_vgg/{stage}/biases"].assign(np.zeros(16))
    maps, classes, _, logits = maps_of(network, photos(224)[:2])
    assert maps.shape == (2, 14, 14)
    expected = logits[np.arange(2), classes] - network.variables_by_name["tiny_vgg/fc8/biases"].numpy()[classes]
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), expected, rtol=1e-3, atol=1e-4)


def test_the_map_of_an_object_lies_on_the_object() -> None:
    """A network whose last convolution answers to brightness, and a class that asks for it."""
    network = filled(Network("tiny_vgg", "gap", 2, 64))
    x = np.full((1, 64, 64, 3), -100, np.float32)
    x[0, 32:, 32:] = 150
    activations = last_convolution(network, tf.constant(x)).numpy()
    change = (activations[0] - activations[0, :2, :2].mean(axis=(0, 1))).sum(axis=(0, 1))  # [C]
    network.variables_by_name["tiny_vgg/gap/weights"].assign(np.stack([change, -change], axis=1))
    values = class_maps(network, tf.constant(activations), np.array([0])).numpy()[0]
    assert values[2:, 2:].sum() > values[:2, :2].sum()


@pytest.mark.parametrize(("height", "width"), [(40, 61), (300, 200), (20, 90), (7, 5), (1, 1)])
def test_the_crop_is_the_one_that_preprocess_takes(height: int, width: int) -> None:
    (top, left), side = data.central_crop(tf.constant([height, width]), 10)
    rows, columns = np.meshgrid(np.arange(height) % 256, np.arange(width) % 256, indexing="ij")
    image = np.stack([rows, columns, rows], axis=-1).astype(np.uint8)
    seen = data.preprocess(tf.constant(image), data.Preprocessing(image_size=int(side))).numpy()
    np.testing.assert_array_equal(seen, image[top : top + side, left : left + side])


def test_the_box_is_around_the_strongest_region_in_pixels_of_the_photograph() -> None:
    values = np.zeros((14, 14), np.float32)
    values[2:5, 8:12] = 10  # the strongest
    values[9:13, 1:3] = 7  # another one
    box = strongest_box(values, (100, 50, 1400))
    # Rows 2 to 4 and columns 8 to 11 of positions of 100 pixels; smoothing moves an edge by less than half a position.
    assert box is not None
    np.testing.assert_allclose(box, (850, 300, 1250, 600), atol=50)
    values[9:13, 1:3] = 20
    other = strongest_box(values, (100, 50, 1400))
    assert other is not None
    assert other[2] < 450
    assert strongest_box(-values, (0, 0, 14)) is None
    assert strongest_box(np.zeros((7, 7)), (0, 0, 14)) is None
    whole = strongest_box(np.ones((7, 7)), (3, 4, 10))
    assert whole == (4, 3, 14, 13)


def test_the_picture_is_the_whole_photograph_with_the_map_on_its_crop(tmp_path) -> None:
    photo = np.full((60, 100, 3), 100, np.uint8)  # shown at half its size of 120 x 200
    values = np.zeros((14, 14), np.float32)
    values[1:4, 1:4], values[10:, 10:] = 5, -5
    draw_heatmap(tmp_path / "a.png", photo, values, (120, 200), (10, 50, 100), box=(50, 10, 90, 40))
    shown = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert shown.shape == photo.shape
    assert (shown[:, :24] == shown[0, 0]).all()  # outside: pale
    assert shown[0, 0, 0] > 150
    np.testing.assert_array_equal(shown[50, 70], [100, 100, 100])  # inside and against the class: as it was
    green = np.argwhere((shown == [0, 255, 0]).all(axis=-1))
    np.testing.assert_array_equal([green.min(axis=0), green.max(axis=0)], [[5, 25], [19, 44]])
    glowing = np.argwhere(np.abs(shown[6:19, 26:44] - 100).sum(axis=-1) > 60)
    assert len(glowing) > 50
    draw_heatmap(tmp_path / "b.png", photo, -np.ones((7, 7)), (120, 200), (10, 50, 100))  # nothing speaks for it
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png"))[30, 50], [100, 100, 100])
