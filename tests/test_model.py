"""The network against TF-Slim's published table, Keras' own VGG19 and formulas written out in NumPy."""

import itertools
import math
import os
from pathlib import Path

import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf

import console
import data
import devices
import model
from console import UserError
from devices import compute_dtype
from model import Network
from networks.vgg import MEAN_RGB, vgg
from weights.names import find_imagenet, load_pretrained
from weights.restore import restore

# slim/nets/vgg.py: repeat(conv2d, [3, 3]) by stage; then fc6 [7, 7], fc7 [1, 1] and fc8 [1, 1] as convolutions.
SLIM_CONVOLUTIONS = {
    "vgg_16": [(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)],
    "vgg_19": [(2, 64), (2, 128), (4, 256), (4, 512), (4, 512)],
}
HEAD_TABLE: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "fc": [("fc6", (7, 7, 512, 4096)), ("fc7", (1, 1, 4096, 4096)), ("fc8", (1, 1, 4096, 11))],
    "gap": [("gap", (512, 11))],
    "linear": [("linear", (7 * 7 * 512, 11))],
}
STAGES = ("conv1", "conv2", "conv3", "conv4", "conv5")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> str:
    """A network of few channels, so that the fc head at 224 px is a matter of milliseconds."""
    monkeypatch.setitem(model.NETWORKS, "narrow", vgg((4,), (4,), (6, 6), (8,), (8,), fc_units=16))
    return "narrow"


def fill(network: Network, seed: int = 1) -> Network:
    """Random values in every variable, biases and the last layer too, whose initial values are zero."""
    rng = np.random.default_rng(seed)
    for name, variable in network.variables_by_name.items():
        scale = 0.1 if name.endswith("biases") else math.sqrt(2.0 / math.prod(variable.shape[:-1]))
        variable.assign(rng.normal(0.0, scale, variable.shape))
    return network


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    """What `preprocess` gives for noise: float32 [count, size, size, 3]."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(0, 255, (count, size, size, 3)) - MEAN_RGB).astype(np.float32)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# -- names, shapes, initial values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fc", "gap", "linear"])
@pytest.mark.parametrize("network", ["vgg_16", "vgg_19"])
def test_names_and_shapes_are_those_of_tf_slim(monkeypatch: pytest.MonkeyPatch, network: str, head: str) -> None:
    monkeypatch.setattr(tf.random, "stateless_normal", lambda shape, seed: tf.zeros(shape))  # 140 million take seconds
    expected: dict[str, tuple[int, ...]] = {}
    channels = 3
    for stage, (count, width) in enumerate(SLIM_CONVOLUTIONS[network], start=1):
        for number in range(1, count + 1):
            expected[f"{network}/conv{stage}/conv{stage}_{number}"] = (3, 3, channels, width)
            channels = width
    expected |= {f"{network}/{layer}": shape for layer, shape in HEAD_TABLE[head]}
    built = Network(network, head, 11)
    assert list(built.variables_by_name) == [f"{layer}/{kind}" for layer in expected for kind in ("weights", "biases")]
    for layer, shape in expected.items():
        assert tuple(built.variables_by_name[f"{layer}/weights"].shape) == shape
        assert tuple(built.variables_by_name[f"{layer}/biases"].shape) == shape[-1:]
    for name, variable in built.variables_by_name.items():
        assert variable.name == f"{name}:0"
        assert variable.dtype == tf.float32
    assert built.stages == (*STAGES, *(layer for layer, _ in HEAD_TABLE[head]))


def test_tf_module_finds_every_variable() -> None:
    small = Network("small", "gap", 3, 32)
    assert {v.name.removesuffix(":0") for v in small.trainable_variables} == set(small.variables_by_name)


def test_initial_values_have_he_variance_and_the_last_layer_is_zero(narrow: str) -> None:
    deviations = {
        f"small/conv{n}/conv{n}_1": math.sqrt(2 / (9 * inputs)) for n, inputs in enumerate((3, 32, 64, 128, 256), 1)
    }
    deviations["small/conv1/conv1_1"] /= 64  # pixels are of the order of 64, not of 1
    small = Network("small", "gap", 5, 32)
    for layer, deviation in deviations.items():
        values = small.variables_by_name[f"{layer}/weights"].numpy()
        tolerance = 5 / math.sqrt(2 * values.size)  # five standard errors of a standard deviation
        assert values.std() == pytest.approx(deviation, rel=tolerance)
        assert abs(values.mean()) < 5 * deviation / math.sqrt(values.size)
        assert np.abs(values).max() > 3 * deviation  # normal, not uniform
    with_fc = Network(narrow, "fc", 5)
    fc6 = with_fc.variables_by_name["narrow/fc6/weights"].numpy()
    assert fc6.std() == pytest.approx(math.sqrt(2 / (7 * 7 * 8)), rel=5 / math.sqrt(2 * fc6.size))
    for network, last in ((small, "small/gap"), (with_fc, "narrow/fc8")):
        assert not network.variables_by_name[f"{last}/weights"].numpy().any()
        assert not any(v.numpy().any() for n, v in network.variables_by_name.items() if n.endswith("biases"))


def test_activations_keep_their_scale_through_all_stages_of_vgg_19_from_scratch() -> None:
    network = Network("vgg_19", "gap", 3, 32)
    pool5 = network.forward(tf.constant(pictures(2, 32)), last="conv5").numpy()
    assert 0.05 < np.sqrt(np.mean(pool5**2)) < 50


def test_the_seed_decides_the_initial_values() -> None:
    def values(seed: int) -> list[np.ndarray]:
        return [
            v.numpy() for n, v in Network("small", "linear", 3, 32, seed=seed).variables_by_name.items() if "conv" in n
        ]

    assert all(np.array_equal(a, b) for a, b in zip(values(7), values(7), strict=True))
    weights = [v for v in values(7) if v.ndim == 4]
    others = [v for v in values(8) if v.ndim == 4]
    assert not any(np.array_equal(a, b) for a, b in zip(weights, others, strict=True))
    flat = [np.sort(w.ravel()[:100] / w.std()) for w in weights]  # layers do not share their random numbers
    assert not any(np.allclose(a, b, rtol=1e-3) for a, b in itertools.combinations(flat, 2))


def test_pool5_of_the_initial_values_does_not_depend_on_the_head() -> None:
    x = tf.constant(pictures(1, 64))
    by_head = [Network("small", head, 3, 64, seed=3).forward(x, last="conv5").numpy() for head in ("gap", "linear")]
    assert np.array_equal(*by_head)


@pytest.mark.parametrize(("head", "size", "least"), [("gap", 31, 32), ("linear", 16, 32), ("fc", 223, 224)])
def test_too_small_an_image_size_is_refused(head: str, size: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"image size {size} is too small for the {head} head: it takes {least}"):
        Network("small", head, 3, size)


# -- the whole network against other implementations ------------------------------------------------------------------


def test_pool5_equals_keras_own_vgg19_on_real_photographs() -> None:
    try:
        file = find_imagenet("vgg_19")
    except UserError as error:
        pytest.skip(f"the package with the convolution weights is not installed: {error}")
    if not file.endswith(".h5"):
        pytest.skip(f"{file} comes first here, and Keras can't read it")
    ours = Network("vgg_19", "gap", 2)
    restore(ours.variables_by_name, load_pretrained(file, "vgg_19"), exclude=["vgg_19/gap"])
    theirs = keras.applications.VGG19(include_top=False, weights=None, input_shape=(224, 224, 3))
    theirs.load_weights(file)
    spec = data.Preprocessing(mean_rgb=MEAN_RGB)
    photographs = [skimage.data.astronaut(), skimage.data.coffee()]
    x = np.stack([data.preprocess(tf.constant(photograph), spec).numpy() for photograph in photographs])
    expected = theirs(keras.applications.vgg19.preprocess_input((x + MEAN_RGB).astype(np.float32))).numpy()
    pool5 = ours.forward(tf.constant(x), last="conv5").numpy()
    assert pool5.shape == expected.shape == (2, 7, 7, 512)
    assert np.count_nonzero(expected) > 1000
    assert relative_error(pool5, expected) < 1e-4
    assert np.linalg.norm(pool5 - expected) < 1e-4 * np.linalg.norm(expected)


def plain_forward(network: Network, x: tf.Tensor) -> tf.Tensor:
    """The fc network written out, all of it as convolutions; the last layer's output is averaged over positions."""
    values = {name: v.numpy() for name, v in network.variables_by_name.items()}
    for layer in (name.removesuffix("/weights") for name in values if name.endswith("/weights")):
        is_fc = "/fc" in layer
        x = tf.nn.conv2d(x, values[f"{layer}/weights"], 1, "VALID" if is_fc else "SAME") + values[f"{layer}/biases"]
        x = x if layer.endswith("fc8") else tf.nn.relu(x)
        ends_stage = not is_fc and layer != "narrow/conv3/conv3_1"
        x = tf.nn.max_pool2d(x, 2, 2, "VALID") if ends_stage else x
    return tf.reduce_mean(x, axis=[1, 2])


@pytest.mark.parametrize("size", [224, 230, 288])
def test_fc_head_as_matrix_product_and_as_convolution_equals_plain_convolutions(narrow: str, size: int) -> None:
    network = fill(Network(narrow, "fc", 5, size))
    x = tf.constant(pictures(2, size))
    expected = plain_forward(network, x).numpy()
    assert expected.std() > 0.1
    assert relative_error(network.forward(x).numpy(), expected) < 1e-5


def test_fc_logits_of_a_larger_image_are_the_mean_over_its_windows(narrow: str) -> None:
    network = fill(Network(narrow, "fc", 5, 256))
    pool5 = tf.constant(np.random.default_rng(2).uniform(0, 3, (2, 8, 8, 8)).astype(np.float32))
    windows = [
        network.forward(pool5[:, row : row + 7, column : column + 7], first="fc6")
        for row in range(2)
        for column in range(2)
    ]
    expected = np.mean(windows, axis=0)
    assert relative_error(network.forward(pool5, first="fc6").numpy(), expected) < 1e-5


@pytest.mark.parametrize("head", ["gap", "linear"])
def test_linear_heads_are_softmax_regression_on_rooted_features_of_fixed_length(head: str) -> None:
    network = fill(Network("small", head, 4, 64))
    pool5 = np.maximum(np.random.default_rng(3).normal(0, 2, (3, 2, 2, 256)), 0)
    pool5[2] = 0  # an image that excites nothing
    weights = network.variables_by_name[f"small/{head}/weights"].numpy().astype(np.float64)
    biases = network.variables_by_name[f"small/{head}/biases"].numpy().astype(np.float64)
    features = pool5.mean(axis=(1, 2)) if head == "gap" else pool5.reshape(3, -1)
    logits = network.forward(tf.constant(pool5.astype(np.float32)), first=head).numpy()
    shares = features / (features.sum(axis=1, keepdims=True) + 1e-6)
    rooted = np.sqrt(0.95 * shares + 0.05 / shares.shape[1])
    assert np.linalg.norm(rooted[:2], axis=1) == pytest.approx(1.0)
    assert relative_error(logits, model.FEATURE_NORM * rooted @ weights + biases) < 1e-5


@pytest.mark.parametrize("head", ["gap", "linear"])
def test_gradients_of_the_linear_heads_stay_finite_where_features_are_zero(head: str) -> None:
    network = fill(Network("small", head, 4, 32))
    pool5 = tf.zeros([2, 1, 1, 256])
    with tf.GradientTape() as tape:
        tape.watch(pool5)
        loss = tf.reduce_sum(network.forward(pool5, first=head) ** 2)
    assert np.isfinite(tape.gradient(loss, pool5).numpy()).all()


# -- cutting between stages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "size"), [("gap", 32), ("gap", 70), ("linear", 32), ("linear", 100), ("fc", 224), ("fc", 260)]
)
def test_a_forward_cut_anywhere_equals_the_whole_and_has_the_declared_shapes(narrow: str, head: str, size: int) -> None:
    network = fill(Network(narrow, head, 3, size))
    x = tf.constant(pictures(2, size))
    assert network.input_shape("conv1") == (size, size, 3)
    whole = network.forward(x).numpy()
    assert whole.shape == (2, 3)
    for before, after in itertools.pairwise(network.stages):
        cut = network.forward(x, last=before)
        assert tuple(cut.shape) == (2, *network.input_shape(after))
        assert np.array_equal(network.forward(cut, first=after).numpy(), whole), after
    step_by_step = x
    for stage in network.stages:
        step_by_step = network.forward(step_by_step, first=stage, last=stage)
    assert np.array_equal(step_by_step.numpy(), whole)


def test_variables_from_a_stage_are_those_of_it_and_all_later_ones(narrow: str) -> None:
    network = Network(narrow, "fc", 3)
    assert network.variables_from("conv1") == network.variables_by_name
    assert {network.stage_of(name) for name in network.variables_from("conv5")} == {"conv5", "fc6", "fc7", "fc8"}
    assert list(network.variables_from("fc8")) == ["narrow/fc8/weights", "narrow/fc8/biases"]


def test_dropout_acts_on_the_outputs_of_fc6_and_fc7_only(narrow: str) -> None:
    network = fill(Network(narrow, "fc", 3))
    seen: list[tuple[str, tuple[int, ...]]] = []

    def dropout(activations: tf.Tensor, stage: str) -> tf.Tensor:
        seen.append((stage, tuple(activations.shape)))
        return tf.zeros_like(activations)

    logits = network.forward(tf.constant(pictures(2, 224)), dropout=dropout).numpy()
    assert seen == [("fc6", (2, 1, 1, 16)), ("fc7", (2, 1, 1, 16))]
    assert np.array_equal(logits, np.tile(network.variables_by_name["narrow/fc8/biases"].numpy(), (2, 1)))


# -- precision --------------------------------------------------------------------------------------------------------


def test_bfloat16_computes_the_convolutions_only(narrow: str) -> None:
    for head, size in (("gap", 64), ("linear", 64), ("fc", 224)):
        exact, rounded = (fill(Network(narrow, head, 3, size, compute_dtype=d)) for d in (tf.float32, tf.bfloat16))
        x = tf.constant(pictures(2, size))
        assert rounded.forward(x, last="conv5").dtype == tf.bfloat16
        logits = rounded.forward(x)
        assert logits.dtype == tf.float32
        assert all(v.dtype == tf.float32 for v in rounded.variables_by_name.values())
        error = relative_error(logits.numpy(), exact.forward(x).numpy())
        assert 0 < error < 0.05


def test_compute_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert compute_dtype("float32") == tf.float32
    assert compute_dtype("bfloat16") == tf.bfloat16
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["gpu"])
    for capability, expected in (((7, 5), tf.float32), ((8, 0), tf.bfloat16), ((9, 0), tf.bfloat16)):
        details = {"compute_capability": capability}
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu, details=details: details)
        assert compute_dtype("auto") == expected
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    for flags, expected in (("avx2 avx512f", tf.float32), ("avx512f avx512_bf16", tf.bfloat16)):
        use_cpu(flags, tmp_path, monkeypatch)
        assert compute_dtype("auto") == expected


def use_cpu(flags: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Linux tell of a CPU with these instruction sets."""
    (folder / "cpuinfo").write_text(f"flags\t: fpu {flags} sse\n")
    monkeypatch.setattr(console, "Path", lambda _: folder / "cpuinfo")
    uncached = getattr(console.cpu_flags, "__wrapped__", console.cpu_flags)
    for module in (console, devices):
        monkeypatch.setattr(module, "cpu_flags", uncached)


@pytest.mark.parametrize(
    ("flags", "gpus", "chosen", "onednn", "expected"),
    [
        ("avx2 fma", [], None, "1", True),
        ("avx2 fma", [], "0", "0", False),
        ("avx2 fma", ["gpu"], None, "1", False),
        ("avx2 avx512f avx512_vnni", [], None, None, False),
        ("avx2 avx512f avx512_vnni", [], "1", "1", False),
        ("asimd", [], None, None, False),
    ],
)
def test_onednn_and_our_gradients_of_filters_are_for_avx2_alone(
    flags: str,
    gpus: list[str],
    chosen: str | None,
    onednn: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    use_cpu(flags, tmp_path, monkeypatch)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if chosen:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", chosen)
    console.set_tensorflow_defaults()
    assert os.environ.get("TF_ENABLE_ONEDNN_OPTS") == onednn
    assert devices.slow_filter_gradients() == expected
