"""The networks against Keras' own and passes written out here, and what all of them promise."""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf

import data
import devices
import model
from console import UserError
from model import Network, variable_shapes
from networks.layers import Architecture, Convolution, Norm, PooledLinear, Residual, Sequential, Variables, convolve_3x3
from networks.vgg import MEAN_RGB, vgg
from tests.tiny_networks import filled, random_values, tiny_inception, tiny_resnet
from weights import names_inception, names_resnet

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.NETWORKS, "tiny_resnet", tiny_resnet())
    monkeypatch.setitem(model.NETWORKS, "tiny_inception", tiny_inception())


def photographs(size: int) -> np.ndarray:
    """Two photographs, float32 [2, size, size, 3] RGB in 0..255."""
    spec = data.Preprocessing(size)
    both = [data.preprocess(tf.constant(image), spec) for image in (skimage.data.chelsea(), skimage.data.coffee())]
    return np.stack(both) + np.array(MEAN_RGB, np.float32)


def as_input(pixels: np.ndarray, network: str) -> tf.Tensor:
    row = model.NETWORKS[network]
    return tf.constant((pixels - np.array(row.mean_rgb, np.float32)) / np.array(row.std_rgb, np.float32))


def assign(network: Network, arrays: Arrays) -> None:
    """Every variable from the array of its name, and every array used."""
    assert set(arrays) == set(network.variables_by_name)
    for name, variable in network.variables_by_name.items():
        variable.assign(arrays[name])


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * np.abs(expected).max()  # the photographs are told apart
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# -- against Keras' own networks --------------------------------------------------------------------------------------


def keras_network(build: Callable[..., keras.Model], seed: int = 3) -> keras.Model:
    """With a top of 7 classes, without softmax; random weights, statistics included."""
    theirs = build(weights=None, classes=7, classifier_activation=None)
    rng = np.random.default_rng(seed)
    for layer in theirs.layers:
        layer.set_weights([random_values(rng, w.name, tuple(w.shape)) for w in layer.weights])
    return theirs


def keras_arrays(theirs: keras.Model) -> Arrays:
    return {f"{layer.name}/{w.name}": w.numpy() for layer in theirs.layers for w in layer.weights}


def keras_outputs(theirs: keras.Model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Last features, [2, H, W, C], and logits, [2, 7]."""
    features = next(layer.output for layer in reversed(theirs.layers) if len(layer.output.shape) == 4)
    both = keras.Model(theirs.input, [features, theirs.output])(x, training=False)
    return both[0].numpy(), both[1].numpy()


def check_equal(network: Network, pixels: np.ndarray, expected: tuple[np.ndarray, np.ndarray]) -> None:
    last = network.stages[network.stages.index(network.head_stages[0]) - 1]
    features = network.forward(as_input(pixels, network.network), last=last)
    assert relative_error(features.numpy(), expected[0]) < 1e-4
    assert relative_error(network.forward(features, first=network.head_stages[0]).numpy(), expected[1]) < 1e-4


def old_resnet_name(name: str) -> str:
    """The name that Keras had before 2019 for one of today's."""
    name = re.sub(r"^conv1_(conv|bn)/", lambda m: {"conv": "conv1/", "bn": "bn_conv1/"}[m[1]], name)
    name = name.replace("predictions/", "fc1000/")

    def block(m: re.Match) -> str:
        branch = ("branch1", "branch2a", "branch2b", "branch2c")[int(m[3])]
        return f"{'res' if m[4] == 'conv' else 'bn'}{m[1]}{'abcdef'[int(m[2]) - 1]}_{branch}/"

    return re.sub(r"^conv(\d)_block(\d)_(\d)_(conv|bn)/", block, name)


def test_resnet_50_equals_keras_own_on_photographs_from_today_s_names_and_old_ones() -> None:
    theirs = keras_network(keras.applications.ResNet50)
    arrays = keras_arrays(theirs)
    ours = Network("resnet_50", "fc", 7)
    converted = names_resnet.from_keras(arrays, "resnet_50")
    assign(ours, converted)
    pixels = photographs(224)
    check_equal(ours, pixels, keras_outputs(theirs, keras.applications.resnet.preprocess_input(pixels.copy())))
    old = {old_resnet_name(name): array for name, array in arrays.items()}
    assert {"conv1/kernel", "bn_conv1/moving_mean", "res2a_branch2a/bias", "bn5c_branch2c/beta"} <= set(old)
    again = names_resnet.from_keras(old, "resnet_50")
    assert again.keys() == converted.keys()
    assert all(np.array_equal(again[name], converted[name]) for name in again)


def test_inception_v3_equals_keras_own_on_photographs() -> None:
    theirs = keras_network(keras.applications.InceptionV3)
    ours = Network("inception_v3", "fc", 7, 299)
    assign(ours, names_inception.from_keras(keras_arrays(theirs), "inception_v3"))
    pixels = photographs(299)
    expected = keras_outputs(theirs, keras.applications.inception_v3.preprocess_input(pixels.copy()))
    check_equal(ours, pixels, expected)


def test_vgg_16_with_its_top_equals_keras_own_on_photographs() -> None:
    theirs = keras_network(keras.applications.VGG16)
    ours = Network("vgg_16", "fc", 7)
    in_order = list(keras_arrays(theirs).values())
    in_order[0] = in_order[0][:, :, ::-1]  # for RGB
    for variable, array in zip(ours.variables_by_name.values(), in_order, strict=True):
        variable.assign(array.reshape(variable.shape))
    pixels = photographs(224)
    check_equal(ours, pixels, keras_outputs(theirs, keras.applications.vgg16.preprocess_input(pixels.copy())))


# -- ResNet-18 and -34 against a pass written out ---------------------------------------------------------------------


def torchvision_arrays(blocks: tuple[int, ...], classes: int) -> Arrays:
    """Random weights under torchvision's names and in its form, kernels [out, in, h, w]."""
    rng = np.random.default_rng(4)
    arrays: Arrays = {}

    def convolution(name: str, norm: str, inputs: int, outputs: int, side: int) -> None:
        kernel = random_values(rng, "kernel", (side, side, inputs, outputs))
        arrays[f"{name}.weight"] = kernel.transpose(3, 2, 0, 1)
        for ours, theirs in (
            ("gamma", "weight"),
            ("beta", "bias"),
            ("mean", "running_mean"),
            ("variance", "running_var"),
        ):
            arrays[f"{norm}.{theirs}"] = random_values(rng, ours, (outputs,))
        arrays[f"{norm}.num_batches_tracked"] = np.array(5, np.int64)

    convolution("conv1", "bn1", 3, 64, 7)
    channels = 64
    for layer, count in enumerate(blocks):
        width = 64 * 2**layer
        for block in range(count):
            name = f"layer{layer + 1}.{block}"
            convolution(f"{name}.conv1", f"{name}.bn1", channels, width, 3)
            convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            if channels != width:
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", channels, width, 1)
            channels = width
    arrays["fc.weight"] = random_values(rng, "kernel", (channels, classes)).T
    arrays["fc.bias"] = random_values(rng, "bias", (classes,))
    return arrays


def torchvision_forward(arrays: Arrays, blocks: tuple[int, ...], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits, with PyTorch's symmetric padding and its formula of batch normalisation."""

    def convolution(x: np.ndarray, name: str, norm: str, stride: int) -> np.ndarray:
        kernel = arrays[f"{name}.weight"].transpose(2, 3, 1, 0)
        side = kernel.shape[0] // 2
        x = np.pad(x, [(0, 0), (side, side), (side, side), (0, 0)])
        x = np.asarray(keras.ops.conv(x, kernel, strides=stride, padding="valid", data_format="channels_last"))
        weight, bias, mean, variance = (
            arrays[f"{norm}.{p}"] for p in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias

    x = np.maximum(convolution(x, "conv1", "bn1", 2), 0)
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    x = np.asarray(keras.ops.max_pool(x, 3, 2, "valid", data_format="channels_last"))
    for layer, count in enumerate(blocks):
        for block in range(count):
            name = f"layer{layer + 1}.{block}"
            stride = 2 if layer and not block else 1
            y = np.maximum(convolution(x, f"{name}.conv1", f"{name}.bn1", stride), 0)
            y = convolution(y, f"{name}.conv2", f"{name}.bn2", 1)
            if f"{name}.downsample.0.weight" in arrays:
                x = convolution(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = np.maximum(x + y, 0)
    return x, x.mean(axis=(1, 2)) @ arrays["fc.weight"].T + arrays["fc.bias"]


@pytest.mark.parametrize(("network", "blocks"), [("resnet_18", (2, 2, 2, 2)), ("resnet_34", (3, 4, 6, 3))])
@pytest.mark.parametrize("size", [64, 75])  # an odd size tells the paddings apart too
def test_torchvision_resnets_equal_a_pass_written_out(network: str, blocks: tuple[int, ...], size: int) -> None:
    arrays = torchvision_arrays(blocks, 7)
    ours = Network(network, "fc", 7, size)
    converted = names_resnet.from_torch(arrays, network)
    counters = {name for name in arrays if name.endswith("num_batches_tracked")}
    assert counters <= set(converted)  # no name of ours: theirs is kept, for the report
    assign(ours, {name: array for name, array in converted.items() if name not in counters})
    pixels = photographs(size)
    x = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]  # torchvision's own numbers
    check_equal(ours, pixels, torchvision_forward(arrays, blocks, x.astype(np.float32)))


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_and_shapes_of_inception_v3_are_those_of_tf_slim() -> None:
    shapes = variable_shapes("inception_v3")
    assert sum(name.endswith("/weights") for name in shapes) == 95
    assert len(shapes) == 94 * 4 + 2  # weights, beta, moving_mean, moving_variance; weights and biases of the logits
    irregular = {
        "Conv2d_1a_3x3": (3, 3, 3, 32),
        "Mixed_5c/Branch_1/Conv2d_0b_1x1": (1, 1, 256, 48),
        "Mixed_5c/Branch_1/Conv_1_0c_5x5": (5, 5, 48, 64),
        "Mixed_6a/Branch_0/Conv2d_1a_1x1": (3, 3, 288, 384),
        "Mixed_6a/Branch_1/Conv2d_1a_1x1": (3, 3, 96, 96),
        "Mixed_6e/Branch_2/Conv2d_0e_1x7": (1, 7, 192, 192),
        "Mixed_7b/Branch_1/Conv2d_0b_1x3": (1, 3, 384, 384),
        "Mixed_7b/Branch_1/Conv2d_0b_3x1": (3, 1, 384, 384),
        "Mixed_7c/Branch_1/Conv2d_0c_3x1": (3, 1, 384, 384),
        "Mixed_7c/Branch_2/Conv2d_0d_3x1": (3, 1, 384, 384),
        "Logits/Conv2d_1c_1x1": (1, 1, 2048, 1),
    }
    assert irregular.items() <= {n[len("InceptionV3/") : -len("/weights")]: s for n, s in shapes.items()}.items()
    # Of the variables, in order, that the code of tf-slim 1.1.0 makes for one class, its auxiliary logits left out.
    digest = hashlib.sha256(repr(list(shapes.items())).encode()).hexdigest()
    assert digest == "370787cd9eaca85df4f4fa367e5a14d786a09b2c4a6c824e81311af2ccd21dbe"


def keras_inception(first: int = 0) -> Arrays:
    """Arrays of their place as value under Keras' names for tiny_inception, numbered from `first` on."""
    shapes = [s for n, s in variable_shapes("tiny_inception").items() if n.endswith("/weights") and "Logits" not in n]
    arrays: Arrays = {}
    for place, shape in enumerate(shapes):
        suffix = f"_{first + place}" if first + place else ""
        arrays[f"conv2d{suffix}/kernel"] = np.full(shape, place, np.float32)
        for parameter in ("beta", "moving_mean", "moving_variance"):
            arrays[f"batch_normalization{suffix}/{parameter}"] = np.full(shape[-1:], place, np.float32)
    return arrays


def test_inception_is_matched_by_number_whatever_the_first_one_and_the_order_in_the_file() -> None:
    expected = names_inception.from_keras(keras_inception(), "tiny_inception")
    backwards = dict(reversed(keras_inception(first=189).items()))
    again = names_inception.from_keras({**backwards, "dense/kernel": np.zeros((2, 2))}, "tiny_inception")
    assert again.keys() == expected.keys() | {"dense/kernel"}
    assert all(np.array_equal(again[name], expected[name]) for name in expected)
    assert expected["InceptionV3/Mixed_7b/Branch_3/Conv2d_0b_1x1/weights"].max() == 40
    assert expected["InceptionV3/Mixed_7b/Branch_3/Conv2d_0b_1x1/BatchNorm/moving_mean"].max() == 40


def without(arrays: Arrays, part: str) -> Arrays:
    return {name: array for name, array in arrays.items() if not name.startswith(part)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: without(a, "conv2d_40/"), "40 layers called conv2d and not 41"),
        (lambda a: {**a, "conv2d_41/kernel": a["conv2d/kernel"]}, "42 layers called conv2d"),
        (lambda a: {**without(a, "conv2d/"), "conv2d_99/kernel": a["conv2d/kernel"]}, "not 41 in a row"),
        (lambda a: {**a, "conv2d_7/kernel": a["conv2d_6/kernel"]}, "conv2d_7 has the shape"),
        (lambda a: {**a, "conv2d_7/bias": np.zeros(64)}, "conv2d_7 has a bias"),
        (lambda a: {**a, "batch_normalization_3/gamma": np.zeros(5)}, "batch_normalization_3 has a gamma"),
        (lambda a: without(a, "batch_normalization_3/beta"), "batch_normalization_3 has no beta"),
        (lambda a: without(a, "batch_normalization"), "0 layers called batch_normalization"),
    ],
)
def test_inception_is_refused_on_any_doubt(change: Callable[[Arrays], Arrays], message: str) -> None:
    with pytest.raises(UserError, match=message):
        names_inception.from_keras(change(keras_inception()), "tiny_inception")


def test_a_file_of_another_resnet_is_refused() -> None:
    deeper = torchvision_arrays((3, 4, 6, 3), 7)
    with pytest.raises(UserError, match="has conv2/block3/conv1/weights, which resnet_18 has not"):
        names_resnet.from_torch(deeper, "resnet_18")
    with pytest.raises(UserError, match="conv4/block7/conv1/weights, which resnet_50 has not"):
        names_resnet.from_keras({"conv4_block7_1_conv/kernel": np.zeros((1, 1, 1024, 256))}, "resnet_50")
    with pytest.raises(UserError, match="give a file of Keras"):
        names_resnet.from_torch(deeper, "resnet_50")


# -- what all networks promise ----------------------------------------------------------------------------------------

SIZES = {"tiny_resnet": 32, "tiny_inception": 75}


@pytest.mark.parametrize("head", model.HEADS)
@pytest.mark.parametrize("network", SIZES)
@pytest.mark.parametrize("more", [0, 13])
def test_a_forward_cut_anywhere_equals_the_whole_and_has_the_declared_shapes(
    network: str, head: str, more: int
) -> None:
    size = SIZES[network] + more
    built = filled(Network(network, head, 3, size))
    x = as_input(photographs(size), network)
    whole = built.forward(x).numpy()
    assert whole.shape == (2, 3)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3
    for before, after in itertools.pairwise(built.stages):
        cut = built.forward(x, last=before)
        assert tuple(cut.shape) == (2, *built.input_shape(after))
        assert cut.numpy().min() >= 0  # as caches of activations and the gap head rely on
        assert np.array_equal(built.forward(cut, first=after).numpy(), whole), after


@pytest.mark.parametrize("network", SIZES)
def test_statistics_are_variables_that_are_never_trained(network: str) -> None:
    built = Network(network, "gap", 3, SIZES[network])
    trained = built.variables_from(built.stages[0])
    fixed = built.variables_by_name.keys() - trained.keys()
    assert {name.rpartition("/")[2] for name in fixed} == {"moving_mean", "moving_variance"}
    assert {name.rpartition("/")[2] for name in trained} <= {"weights", "biases", "gamma", "beta"}
    stages = [built.stage_of(name) for name in built.variables_by_name]
    assert list(dict.fromkeys(stages)) == list(built.stages)
    assert stages == sorted(stages, key=built.stages.index)
    last_conv = built.stages[-2]
    assert {built.stage_of(name) for name in built.variables_from(last_conv)} == set(built.stages[-2:])


@pytest.mark.parametrize("network", SIZES)
def test_an_image_has_the_same_logits_in_any_batch(network: str) -> None:
    built = filled(Network(network, "gap", 3, SIZES[network]))
    x = as_input(photographs(SIZES[network]), network)
    alone = [built.forward(x[i : i + 1]).numpy()[0] for i in range(2)]
    assert np.allclose(built.forward(x).numpy(), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", SIZES)
def test_bfloat16_is_close_to_float32(network: str) -> None:
    size = SIZES[network]
    exact, rounded = (filled(Network(network, "gap", 3, size, compute_dtype=d)) for d in (tf.float32, tf.bfloat16))
    x = as_input(photographs(size), network)
    assert rounded.forward(x, last=rounded.stages[-2]).dtype == tf.bfloat16
    logits, expected = rounded.forward(x), exact.forward(x).numpy()
    assert logits.dtype == tf.float32
    assert 0 < np.abs(logits.numpy() - expected).max() < 0.05 * np.abs(expected).max()


def test_folded_normalisation_has_the_values_and_gradients_of_the_formula() -> None:
    variables = Variables("x", seed=0)
    layer = Convolution(variables, "conv", (3, 3), 2, 5, norm=Norm(1e-3))
    rng = np.random.default_rng(6)
    for name, variable in variables.by_name.items():
        variable.assign(random_values(rng, name, tuple(variable.shape)))
    v = {name.rpartition("/")[2]: variable for name, variable in variables.by_name.items()}
    x = tf.constant(rng.normal(0, 1, (4, 6, 6, 2)).astype(np.float32))
    aim = tf.constant(rng.normal(0, 1, (4, 6, 6, 5)).astype(np.float32))
    trained = [v[name] for name in ("weights", "biases", "gamma", "beta")]
    with tf.GradientTape(persistent=True) as tape:
        folded = layer(x)
        plain = tf.nn.conv2d(x, v["weights"], 1, "SAME") + v["biases"]
        plain = (plain - v["moving_mean"]) / tf.sqrt(v["moving_variance"] + 1e-3) * v["gamma"] + v["beta"]
        plain = tf.nn.relu(plain)
        losses = [tf.reduce_sum(aim * y) for y in (folded, plain)]
    assert np.allclose(folded, plain, atol=1e-5)
    for actual, expected in zip(*(tape.gradient(loss, trained) for loss in losses), strict=True):
        assert np.abs(expected).max() > 0.1
        assert np.allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", SIZES)
def test_a_saved_model_of_a_network_computes_the_same(network: str, tmp_path: Path) -> None:
    size = SIZES[network]
    module = tf.Module()
    module.network = filled(Network(network, "gap", 3, size))
    module.forward = tf.function(module.network.forward, input_signature=[tf.TensorSpec([None, size, size, 3])])
    tf.saved_model.save(module, str(tmp_path / "saved"))
    x = as_input(photographs(size), network)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert np.array_equal(loaded.forward(x).numpy(), module.forward(x).numpy())


@pytest.mark.parametrize(("network", "size"), [("inception_v3", 74), ("resnet_50", 31), ("resnet_18", 16)])
def test_too_small_an_image_is_refused(network: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"image size {size} is too small"):
        Network(network, "fc", 3, size)


def test_every_row_has_what_preprocessing_and_settings_take_from_it() -> None:
    means = {name: row.mean_rgb for name, row in model.NETWORKS.items()}
    assert means["vgg_19"] == means["vgg_16"] == means["small"] == MEAN_RGB
    assert means["vgg_face"] == (129.1863, 104.7624, 93.5940)
    assert means["resnet_50"] == (123.68, 116.779, 103.939)
    assert {name for name, row in model.NETWORKS.items() if row.from_scratch} == {
        "vgg_19",
        "vgg_16",
        "vgg_face",
        "small",
    }
    assert model.NETWORKS["inception_v3"].image_size == 299
    assert all(row.min_size <= row.fc_min_size <= row.image_size for row in model.NETWORKS.values())


def test_a_network_is_added_by_its_own_code_and_a_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands here is all that a new network needs: a function for each stage, the classifier and a row."""

    def stem(variables: Variables, shape: tuple[int, ...]) -> Convolution:
        return Convolution(variables, "stem/conv", (3, 3), shape[-1], 8, stride=2, padding=1, norm=Norm(1e-5))

    def body(variables: Variables, shape: tuple[int, ...]) -> Sequential:
        conv = functools.partial(Convolution, variables, kernel=(3, 3), inputs=8, outputs=8)
        return Sequential([Residual(conv(f"body/{n}", norm=Norm(1e-5)), None, 8) for n in ("first", "second")])

    def classifier(classes: int) -> dict[str, Callable[..., PooledLinear]]:
        return {"top": lambda variables, shape: PooledLinear(variables, "top", (shape[-1], classes))}

    row = Architecture({"stem": stem, "body": body}, classifier, mean_rgb=(100.0, 100.0, 100.0), from_scratch=False)
    monkeypatch.setitem(model.NETWORKS, "mine", row)
    for head, last in (("fc", "top"), ("gap", "gap"), ("linear", "linear")):
        built = filled(Network("mine", head, 5, 40))
        assert built.stages == ("stem", "body", last)
        assert built.input_shape(last) == (20, 20, 8)
        x = as_input(photographs(40), "mine")
        cut = built.forward(built.forward(x, last="stem"), first="body").numpy()
        assert np.array_equal(cut, built.forward(x).numpy())
        assert set(built.variables_from(last)) == {f"mine/{last}/weights", f"mine/{last}/biases"}
    assert "mine/body/second/BatchNorm/moving_mean" in built.variables_by_name


# -- VGG is bit for bit what it was before there were other families ---------------------------------------------------


@pytest.mark.parametrize("head", model.HEADS)
def test_initial_values_of_vgg_are_a_known_function_of_seed_and_place(
    monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """Runs of earlier versions resume: names, order and bits of the initial values may not change."""
    monkeypatch.setitem(model.NETWORKS, "narrow", vgg((4,), (4,), (6, 6), (8,), (8,), fc_units=16))
    convolutions = [("conv1/conv1_1", 3, 4), ("conv2/conv2_1", 4, 4), ("conv3/conv3_1", 4, 6), ("conv3/conv3_2", 6, 6)]
    convolutions += [("conv4/conv4_1", 6, 8), ("conv5/conv5_1", 8, 8)]
    heads: dict[str, dict[str, tuple[int, ...]]] = {
        "fc": {"fc6": (7, 7, 8, 16), "fc7": (1, 1, 16, 16), "fc8": (1, 1, 16, 3)},
        "gap": {"gap": (8, 3)},
        "linear": {"linear": (7 * 7 * 8, 3)},
    }
    shapes: dict[str, tuple[int, ...]] = {n: (3, 3, inputs, outputs) for n, inputs, outputs in convolutions}
    expected: Arrays = {}
    for name, shape in (shapes | heads[head]).items():
        deviation = np.sqrt(2.0 / np.prod(shape[:-1]))
        deviation = deviation / 64 if name.endswith("conv1_1") else deviation
        deviation = 0.0 if name in ("fc8", "gap", "linear") else deviation
        normal = tf.random.stateless_normal(shape, seed=(5, len(expected)))
        expected[f"narrow/{name}/weights"] = (np.float32(deviation) * normal).numpy()
        expected[f"narrow/{name}/biases"] = np.zeros(shape[-1], np.float32)
    built = Network("narrow", head, 3, seed=5)
    assert list(built.variables_by_name) == list(expected)
    for name, variable in built.variables_by_name.items():
        assert variable.numpy().tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("head", ["gap", "fc"])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_the_forward_pass_of_vgg_is_bit_for_bit_the_formula(
    monkeypatch: pytest.MonkeyPatch, head: str, dtype: tf.DType
) -> None:
    monkeypatch.setitem(model.NETWORKS, "narrow", vgg((4,), (4,), (6, 6), (8,), (8,), fc_units=16))
    built = filled(Network("narrow", head, 3, compute_dtype=dtype))
    values = {name.removeprefix("narrow/"): variable for name, variable in built.variables_by_name.items()}
    images = as_input(photographs(224), "narrow")
    x = tf.cast(images, dtype)
    for layer in ("conv1/conv1_1", "conv2/conv2_1", "conv3/conv3_1", "conv3/conv3_2", "conv4/conv4_1", "conv5/conv5_1"):
        weights, biases = (tf.cast(values[f"{layer}/{kind}"], dtype) for kind in ("weights", "biases"))
        x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, weights, 1, "SAME"), biases))
        x = x if layer == "conv3/conv3_1" else tf.nn.max_pool2d(x, 2, 2, "VALID")
    if head == "gap":
        pooled = tf.reduce_mean(tf.cast(x, tf.float32), axis=[1, 2])
        share = pooled / (tf.reduce_sum(pooled, axis=1, keepdims=True) + 1e-6)
        rooted = 87.0 * tf.sqrt((1.0 - 0.05) * share + 0.05 / 8)
        x = tf.nn.bias_add(tf.matmul(rooted, values["gap/weights"]), values["gap/biases"])
    else:
        for layer in ("fc6", "fc7", "fc8"):
            x = tf.cast(x, tf.float32 if layer == "fc8" else dtype)
            weights, biases = (tf.cast(values[f"{layer}/{kind}"], x.dtype) for kind in ("weights", "biases"))
            x = tf.matmul(tf.reshape(x, [2, -1]), tf.reshape(weights, [-1, weights.shape[-1]]))
            x = tf.nn.bias_add(x, biases)
            x = x if layer == "fc8" else tf.nn.relu(x)
    assert np.array_equal(built.forward(images).numpy(), x.numpy())


# -- the gradient of 3x3 filters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "height", "width"), [(2, 5, 7), (3, 7, 5), (1, 1, 1), (2, 1, 4), (1, 2, 2), (0, 4, 4)]
)
def test_the_gradients_of_a_3x3_convolution_are_those_of_tensorflow(batch: int, height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    x, weights, factor = (
        tf.constant(rng.normal(size=shape).astype(np.float32))
        for shape in ((batch, height, width, 16), (3, 3, 16, 8), (batch, height, width, 8))
    )

    def results(convolve: Callable[[], tf.Tensor]) -> list[tf.Tensor]:
        @tf.function(autograph=False)
        def differentiate() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch([x, weights])
                y = convolve()
            return [y, *tape.gradient(y, [x, weights], output_gradients=factor)]

        return differentiate()

    ours = results(lambda: convolve_3x3(x, weights))
    theirs = results(lambda: tf.nn.conv2d(x, weights, strides=1, padding="SAME"))
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(("network", "convolutions", "plain"), [("vgg_19", 16, 13), ("resnet_50", 53, 13)])
def test_a_step_has_the_gradient_of_filters_that_is_faster_on_the_cpu(
    network: str, convolutions: int, plain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3x3 filters of 128 channels and more; other kernels, few channels and bfloat16 keep TensorFlow's."""

    def gradients_by_tensorflow(dtype: tf.DType) -> int:
        net = Network(network, "gap", 3, 32, compute_dtype=dtype)

        @tf.function(autograph=False)
        def gradients(x: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                logits = net.forward(x)
            return tape.gradient(logits, list(net.variables_from(net.stages[0]).values()))

        graph = gradients.get_concrete_function(tf.TensorSpec([2, 32, 32, 3])).graph
        return sum(op.type == "Conv2DBackpropFilter" for op in graph.get_operations())

    monkeypatch.setattr(devices, "slow_filter_gradients", lambda: True)
    assert gradients_by_tensorflow(tf.float32) == convolutions - plain
    assert gradients_by_tensorflow(tf.bfloat16) == convolutions
    monkeypatch.setattr(devices, "slow_filter_gradients", lambda: False)
    assert gradients_by_tensorflow(tf.float32) == convolutions
