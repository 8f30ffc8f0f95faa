"""What can be known of a GPU without one: every op has a kernel for it, and XLA compiles the step.

The Linux wheel of TensorFlow registers its CUDA kernels whether or not there is a card.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels

import devices
from console import UserError
from model import NETWORKS, Network
from run_config import Phase
from training.features import _activations
from training.settings import Settings
from training.step import Optimisation, Trainer, compiled_forward, decay_over, stateless_dropout

ON_CPU_ALONE = not tf.test.is_built_with_cuda()
# Nodes that stand for something and compute nothing; nothing is registered for them on any device.
NOT_COMPUTED = {"Placeholder", "_Arg", "_Retval"}


def built(network: str, head: str, dtype: tf.DType) -> Network:
    return Network(network, head, 3, 224, compute_dtype=dtype)


def small(dtype: tf.DType = tf.float32) -> Network:
    return Network("small", "gap", 3, 32, compute_dtype=dtype)


def step_of(network: Network, settings: Optimisation, first: str | None = None):
    stage = first or network.stages[0]
    phase = Phase("all", stage, stage, 0, 0, 20)
    trainer = Trainer(network, settings, [phase], frozenset(), 0)
    return trainer, trainer.train_step(phase, decay_over(phase, settings))


def nodes_of(function) -> Iterator[tuple[str, dict]]:
    """(op, attributes) of every node of a compiled function and of the functions that it calls (loops, branches)."""
    definition = function.get_concrete_function().graph.as_graph_def()
    yield from ((node.op, dict(node.attr)) for node in definition.node)
    for called in definition.library.function:
        yield from ((node.op, dict(node.attr)) for node in called.node_def)


def without_gpu_kernel(function) -> set[str]:
    """The ops, with their types, of a function that TensorFlow has no kernel for on a GPU."""
    missing = set()
    for op, attributes in nodes_of(function):
        if op in NOT_COMPUTED:
            continue
        for kernel in kernels.get_registered_kernels_for_op(op).kernel:
            if kernel.device_type in ("GPU", "DEFAULT") and all(
                attributes[rule.name].type in rule.allowed_values.list.type
                for rule in kernel.constraint
                if attributes[rule.name].type
            ):
                break
        else:
            types = sorted(tf.dtypes.as_dtype(value.type).name for value in attributes.values() if value.type)
            missing.add(f"{op} {' '.join(types)}")
    return missing


@pytest.mark.skipif(ON_CPU_ALONE, reason="a build of TensorFlow without CUDA")
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
@pytest.mark.parametrize(
    ("network", "head"),
    [
        ("small", "fc"),
        *((name, "gap") for name in ("small", "resnet_18", "resnet_50", "inception_v3") if name in NETWORKS),
    ],
)
def test_every_op_of_training_prediction_and_caching_has_a_gpu_kernel(network: str, head: str, dtype: tf.DType) -> None:
    model = built(network, head, dtype)
    everything = Optimisation(
        label_smoothing=0.1, clip_norm=1.0, class_weights=(1.0, 2.0, 3.0), new_layer_rate=10.0, compile="off"
    )
    in_parts = Optimisation(accumulate=2, compile="off")
    functions = [
        *(step_of(model, settings)[1] for settings in (everything, in_parts)),
        compiled_forward(model),
        _activations(model, [(stage, model.pools(stage)) for stage in model.stages[-2:]]),
    ]
    ops = {op for function in functions for op, _ in nodes_of(function)}
    assert {"Conv2DBackpropFilter", "ResourceApplyMomentum", "While", "ArgMax", "Cast"} <= ops
    assert set().union(*map(without_gpu_kernel, functions)) == set()


@pytest.mark.skipif(ON_CPU_ALONE, reason="a build of TensorFlow without CUDA")
def test_the_search_for_kernels_finds_what_has_none() -> None:
    """Text, and the area resize of the input, which `tf.data` keeps on the host."""

    @tf.function(input_signature=[tf.TensorSpec([2], tf.float32)], autograph=False)
    def text(x: tf.Tensor) -> tf.Tensor:
        return tf.strings.as_string(x)

    @tf.function(input_signature=[tf.TensorSpec([1, 8, 8, 3], tf.float32)], autograph=False)
    def area(x: tf.Tensor) -> tf.Tensor:
        return tf.image.resize(x, [4, 4], method="area")

    assert without_gpu_kernel(text) == {"AsString float32"}
    assert {name.split()[0] for name in without_gpu_kernel(area)} == {"ResizeArea"}


# -- XLA -------------------------------------------------------------------------------------------------------------


def test_a_step_compiled_by_xla_does_what_the_plain_one_does() -> None:
    """A last batch that is shorter included."""
    rng = np.random.default_rng(0)
    starts = [
        rng.normal(0, math.sqrt(2 / math.prod(v.shape[:-1])), v.shape) for v in small().variables_by_name.values()
    ]
    results = []
    for compile in ("off", "on"):
        network = small()
        for variable, start in zip(network.variables_by_name.values(), starts, strict=True):
            variable.assign(start)
        settings = Optimisation(compile=compile, clip_norm=1.0, label_smoothing=0.1, learning_rate=1e-4)
        trainer, step = step_of(network, settings)
        batches = np.random.default_rng(1)
        for rows in (5, 5, 3):
            x = batches.normal(0, 1, (rows, 32, 32, 3)).astype(np.float32)
            step(tf.constant(x), tf.constant(batches.integers(0, 3, rows), tf.int64))
        results.append(({name: v.numpy() for name, v in trainer.momenta.items()}, trainer.take_sums()))
    (plain, plain_sums), (compiled, compiled_sums) = results
    assert compiled_sums == pytest.approx(plain_sums, rel=1e-4)
    for name, momentum in plain.items():
        assert momentum.any(), name
        assert np.allclose(compiled[name], momentum, rtol=1e-3, atol=1e-4 * np.abs(momentum).max()), name


def test_xla_compiles_the_step_in_bfloat16() -> None:
    trainer, step = step_of(small(tf.bfloat16), Optimisation(compile="on"))
    x, labels = np.ones((2, 32, 32, 3), np.float32), np.array([0, 2])
    hlo = step.experimental_get_compiler_ir(tf.constant(x), tf.constant(labels))(stage="hlo")
    # Five forward, for the filters and for the activations; that of the images is not used, and XLA removes it.
    assert hlo.count("convolution(") == 15
    assert hlo.count("bf16") > hlo.count("f64")
    step(tf.constant(x), tf.constant(labels))
    loss, _ = trainer.take_sums()
    assert loss == pytest.approx(math.log(3), rel=1e-5)


def test_dropout_compiled_by_xla_is_a_function_of_its_seed() -> None:
    """Its masks are other ones than those of the plain op: XLA's generator gives its numbers in another order."""
    x = tf.ones([8, 1, 1, 500])

    @tf.function(input_signature=[tf.TensorSpec([None, 1, 1, 500]), tf.TensorSpec([2], tf.int64)], jit_compile=True)
    def compiled(x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return stateless_dropout(x, 0.3, seed, tf.constant(0), tf.shape(x)[0])

    first, again, other = (compiled(x, tf.constant(seed, tf.int64)).numpy() for seed in ([3, 4], [3, 4], [3, 5]))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first != 0).mean() == pytest.approx(0.7, abs=0.03)
    assert len({row.tobytes() for row in first}) == 8


def test_after_a_bad_step_a_compiled_one_changes_nothing_either() -> None:
    network = small()
    trainer, step = step_of(network, Optimisation(compile="on"), "gap")
    start = {name: v.numpy() for name, v in trainer.state().items() if name not in ("global_step", "sums")}
    labels = tf.constant([0, 2], tf.int64)
    step(tf.constant(np.full((2, 1, 1, 256), np.nan, np.float32)), labels)
    step(tf.constant(np.ones((2, 1, 1, 256), np.float32)), labels)
    assert int(trainer.bad_step.numpy()) == 0
    for name, before in start.items():
        assert np.array_equal(trainer.state()[name].numpy(), before), name


def test_compile_is_automatic_on_a_gpu_alone_and_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus: list[str] = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: gpus if kind == "GPU" else [])
    assert not devices.use_xla("auto", deterministic=False)
    gpus.append("GPU:0")
    assert devices.use_xla("auto", deterministic=False)
    assert not devices.use_xla("auto", deterministic=True)
    assert not devices.use_xla("off", deterministic=False)
    with pytest.raises(UserError, match="--accumulate 4"):
        Settings(compile="on", accumulate=4)
    with pytest.raises(UserError, match="--deterministic"):
        Settings(compile="on", deterministic=True)


@pytest.mark.parametrize(
    ("capability", "built_for", "said"),
    [
        ((9, 0), ["sm_89", "compute_90"], None),
        ((12, 0), ["sm_89", "compute_90"], "RTX 5090 has compute capability 12.0"),
        ((12, 0), ["sm_89", "sm_120"], None),
    ],
)
def test_a_gpu_that_tensorflow_fails_on_is_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built_for: list[str], said: str | None
) -> None:
    details = {"device_name": "NVIDIA GeForce RTX 5090", "compute_capability": capability}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["/physical_device:GPU:0"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: {"cuda_compute_capabilities": built_for})
    problem = devices.gpu_problem()
    assert (said in problem and "\n" not in problem) if said and problem else problem is said
