"""The optimiser, loss and step against TensorFlow 1's own optimiser, Keras' losses and NumPy."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

import model as model_module
from dataset.layouts import Examples
from model import Network
from networks.vgg import vgg
from run_config import Phase
from training import plan
from training.settings import Settings
from training.step import (
    Optimisation,
    Trainer,
    compiled_forward,
    decay_over,
    polynomial_decay,
    predict,
    stateless_dropout,
)

CLASSES = 3
Batches = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of a few channels: `tiny`, and `deep` with two layers in its last stages."""
    monkeypatch.setitem(model_module.NETWORKS, "tiny", vgg((4,), (6,), (6,), (8,), (8,), fc_units=16))
    monkeypatch.setitem(model_module.NETWORKS, "deep", vgg((4,), (4,), (6,), (6, 6), (8, 8), fc_units=16))


def build(network: str = "tiny", head: str = "gap", size: int = 32, **options: Any) -> Network:
    """A network whose every variable is random, biases and last layer too."""
    built = Network(network, head, CLASSES, size, **options)
    rng = np.random.default_rng(1)
    for name, variable in built.variables_by_name.items():
        scale = math.sqrt(2 / math.prod(variable.shape[:-1])) if name.endswith("weights") else 0.1
        scale /= 50 if variable.shape[-1] == CLASSES else 1
        variable.assign(rng.normal(0, scale, variable.shape))
    return built


def make_trainer(
    network: Network, settings: Optimisation, phase: Phase | Sequence[Phase] = (), **options: Any
) -> Trainer:
    phases = [phase] if isinstance(phase, Phase) else list(phase) or [end_to_end()]
    return Trainer(network, settings, phases, options.get("new", frozenset()), options.get("seed", 0))


def end_to_end(steps: int = 20) -> Phase:
    return Phase("conv1", "conv1", "conv1", 0, 0, steps)


def random_batches(count: int, batch_size: int, shape: tuple[int, ...] = (32, 32, 3)) -> Batches:
    """Inputs of variance 1: with pixels as they are, a last bit can grow through 20 steps."""
    rng = np.random.default_rng(2)
    return [
        (
            rng.normal(0, 1, (batch_size, *shape)).astype(np.float32),
            rng.integers(0, CLASSES, batch_size).astype(np.int64),
        )
        for _ in range(count)
    ]


def run_steps(trainer: Trainer, batches: Batches, phase: Phase | None = None) -> None:
    phase = phase or trainer.phases[0]
    step = trainer.train_step(phase, decay_over(phase, trainer.settings))
    for x, labels in batches:
        step(tf.constant(x), tf.constant(labels))


def values(network: Network) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in network.variables_by_name.items()}


def largest_difference(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


# -- TensorFlow 1 as the oracle ---------------------------------------------------------------------------------------


def train_in_tensorflow_1(
    start: dict[str, np.ndarray], batches: Batches, settings: Optimisation, decay_steps: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float]]:
    """Variables, momenta and learning rates after training the gap head's network as a TensorFlow 1 program does."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        placeholder = v1.placeholder(tf.float32, [None, 32, 32, 3])
        labels = v1.placeholder(tf.int64, [None])
        variables = {name: v1.get_variable(name, initializer=array) for name, array in start.items()}
        layers = [name.removesuffix("/weights") for name in start if name.endswith("/weights")]
        x = placeholder
        for layer in layers[:-1]:
            x = tf.nn.relu(tf.nn.conv2d(x, variables[f"{layer}/weights"], 1, "SAME") + variables[f"{layer}/biases"])
            x = tf.nn.max_pool2d(x, 2, 2, "VALID")
        pooled = tf.reduce_mean(x, [1, 2])
        shares = pooled / (tf.reduce_sum(pooled, 1, keepdims=True) + 1e-6)
        rooted = tf.sqrt(0.95 * shares + 0.05 / pooled.shape[1]) * model_module.FEATURE_NORM
        logits = rooted @ variables[f"{layers[-1]}/weights"] + variables[f"{layers[-1]}/biases"]
        loss = v1.losses.sparse_softmax_cross_entropy(labels, logits)
        penalty = tf.add_n([tf.nn.l2_loss(v) for name, v in variables.items() if name.endswith("/weights")])
        global_step = v1.train.get_or_create_global_step()
        rate = v1.train.polynomial_decay(
            settings.learning_rate, global_step, decay_steps, settings.end_learning_rate, power=1.0
        )
        optimiser = v1.train.MomentumOptimizer(rate, settings.momentum)
        train = optimiser.minimize(loss + settings.weight_decay * penalty, global_step)
        session.run(v1.global_variables_initializer())
        rates = []
        for images, of_batch in batches:
            rates.append(session.run(rate))
            session.run(train, {placeholder: images, labels: of_batch})
        momenta = {name: optimiser.get_slot(variable, "momentum") for name, variable in variables.items()}
        return session.run(variables), session.run(momenta), rates


@pytest.mark.parametrize(
    "settings",
    [
        Optimisation(),
        Optimisation(learning_rate=5e-4, end_learning_rate=1e-4, momentum=0.5, weight_decay=0.1),
    ],
)
def test_twenty_steps_equal_tensorflow_1s_momentum_optimizer_with_decay_and_l2(settings: Optimisation) -> None:
    network, batches = build(), random_batches(20, 5)
    start = values(network)
    trainer = make_trainer(network, settings, end_to_end(20))
    expected, momenta, rates = train_in_tensorflow_1(start, batches, settings, decay_steps=20)
    schedule = decay_over(trainer.phases[0], settings)
    ours = [float(schedule(tf.constant(s, tf.int64))) for s in range(20)]
    run_steps(trainer, batches)
    assert largest_difference(start, expected) > 5e-3  # it did train
    assert np.allclose(ours, rates, rtol=3e-7, atol=1e-10)  # a graph divides by multiplying
    assert largest_difference(values(network), expected) < 1e-6
    largest = max(np.abs(momentum).max() for momentum in momenta.values())
    assert largest_difference({n: v.numpy() for n, v in trainer.momenta.items()}, momenta) < 2e-5 * largest
    assert int(trainer.step.numpy()) == 20


@pytest.mark.parametrize(("steps", "start", "end"), [(20, 1e-3, 1e-7), (7, 0.1, 0.02), (1, 1e-3, 0.0), (3, 0.01, 0.01)])
def test_polynomial_decay_is_that_of_tensorflow_1(steps: int, start: float, end: float) -> None:
    for step in range(steps + 3):  # the end rate holds after the last step
        expected = tf.compat.v1.train.polynomial_decay(start, tf.constant(step, tf.int64), steps, end, power=1.0)()
        actual = polynomial_decay(tf.constant(step, tf.int64), steps, start, end)
        assert actual.dtype == tf.float32
        assert float(actual) == float(expected)


def test_every_phase_decays_from_the_start_to_the_end_rate() -> None:
    phases = [Phase("head", "gap", "conv1", 0, 0, 4), Phase("conv5", "conv5", "conv1", 0, 4, 14)]
    schedules = [decay_over(phase, Optimisation(learning_rate=0.1, end_learning_rate=0.0)) for phase in phases]
    rates = [
        [float(schedule(tf.constant(s, tf.int64))) for s in range(phase.first_step, phase.end_step)]
        for phase, schedule in zip(phases, schedules, strict=True)
    ]
    assert np.allclose(rates[0], 0.1 * (1 - np.arange(4) / 4))
    assert np.allclose(rates[1], 0.1 * (1 - np.arange(10) / 10))


def test_decay_pulls_weights_by_the_factor_and_leaves_biases() -> None:
    after = []
    for decay in (0.0, 0.1):
        network = build()
        start = values(network)
        run_steps(make_trainer(network, Optimisation(learning_rate=0.01, weight_decay=decay)), random_batches(1, 4))
        after.append(values(network))
    for name, before in start.items():
        pulled = after[0][name] - after[1][name]
        if name.endswith("/biases"):
            assert not pulled.any(), name
        else:
            assert np.allclose(pulled, 0.01 * 0.1 * before, rtol=1e-3, atol=2e-8), name


# -- phases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_from", ["conv1", "conv2", "conv4", "conv5", "gap"])
def test_training_from_a_stage_leaves_all_below_bit_unchanged_and_without_momentum(train_from: str) -> None:
    network = build("deep")
    start = values(network)
    phase = Phase(train_from, train_from, "conv1", 0, 0, 3)
    trainer = make_trainer(network, Optimisation(learning_rate=0.01), phase)
    run_steps(trainer, random_batches(3, 4))
    trained = network.variables_from(train_from)
    assert set(trainer.momenta) == set(trained)
    for name, value in values(network).items():
        assert np.array_equal(value, start[name]) == (name not in trained), name
    kept = {name.removesuffix("/Momentum") for name in trainer.state() if name.endswith("/Momentum")}
    assert kept == set(trained)


def test_gradients_of_a_later_stage_do_not_depend_on_what_else_is_trained() -> None:
    results = []
    for train_from in ("conv1", "conv5"):
        network = build()
        phase = Phase(train_from, train_from, "conv1", 0, 0, 1)
        run_steps(make_trainer(network, Optimisation(), phase), random_batches(1, 4))
        results.append({n: v for n, v in values(network).items() if "conv5" in n or "gap" in n})
    assert largest_difference(*results) < 1e-7


@pytest.mark.parametrize("stage", ["conv3", "conv5", "gap"])
def test_a_phase_fed_with_activations_takes_the_same_step_as_one_fed_with_images(stage: str) -> None:
    results = []
    (x, labels), *_ = random_batches(1, 5)
    for input_stage in ("conv1", stage):
        network = build()
        below = network.stages[network.stages.index(stage) - 1]
        fed = x if input_stage == "conv1" else network.forward(tf.constant(x), last=below).numpy()
        trainer = make_trainer(network, Optimisation(learning_rate=0.01), Phase(stage, stage, input_stage, 0, 0, 1))
        run_steps(trainer, [(fed, labels)])
        results.append(values(network))
    assert largest_difference(*results) < 1e-7


def test_momentum_of_the_first_phase_is_carried_into_the_second() -> None:
    network, batches = build(), random_batches(4, 4)
    phases = [Phase("head", "gap", "conv1", 0, 0, 2), Phase("conv5", "conv5", "conv1", 0, 2, 4)]
    trainer = make_trainer(network, Optimisation(), phases)
    assert set(trainer.momenta) == set(network.variables_from("conv5"))
    run_steps(trainer, batches[:2], phases[0])
    assert not trainer.momenta["tiny/conv5/conv5_1/weights"].numpy().any()
    head = trainer.momenta["tiny/gap/weights"].numpy()
    assert head.any()
    run_steps(trainer, batches[2:], phases[1])
    assert trainer.momenta["tiny/conv5/conv5_1/weights"].numpy().any()
    assert not np.array_equal(trainer.momenta["tiny/gap/weights"].numpy(), head)


# -- a batch in parts, dropout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["gap", "fc"])
@pytest.mark.parametrize(("batch_size", "parts"), [(7, 2), (9, 2), (7, 3), (9, 7)])
def test_accumulating_parts_equals_the_whole_batch(head: str, batch_size: int, parts: int) -> None:
    """Of `fc`, whose dropout is on, only the head is run: what enters fc6 are the activations of 224 px."""
    stage, size, shape = ("conv1", 32, (32, 32, 3)) if head == "gap" else ("fc6", 224, (7, 7, 8))
    batches = random_batches(3, batch_size, shape)
    settings = {"learning_rate": 0.01, "label_smoothing": 0.1, "class_weights": (0.5, 1.0, 2.0), "clip_norm": 5.0}
    results = []
    for accumulate in (1, parts):
        network = build(head=head, size=size)
        trainer = make_trainer(
            network, Optimisation(**settings, accumulate=accumulate), Phase(stage, stage, stage, 0, 0, 20)
        )
        run_steps(trainer, batches)
        results.append((values(network), trainer.sums.numpy()))
    (whole, whole_sums), (in_parts, part_sums) = results
    assert largest_difference(whole, in_parts) < 1e-6
    assert np.allclose(whole_sums, part_sums, rtol=1e-5)
    assert part_sums[2] == 3 * batch_size


def test_more_parts_than_the_last_short_batch_has_rows() -> None:
    results = []
    for accumulate in (1, 7):
        network = build()
        run_steps(make_trainer(network, Optimisation(accumulate=accumulate)), random_batches(1, 3))
        results.append(values(network))
    assert largest_difference(*results) < 1e-7


def test_dropout_of_rows_is_the_mask_of_the_whole_batch() -> None:
    x = tf.constant(np.random.default_rng(0).normal(0, 1, (7, 1, 1, 500)), tf.float32)
    seed, rows = tf.constant([3, 4], tf.int64), tf.constant(7)
    whole = stateless_dropout(x, 0.3, seed, tf.constant(0), rows).numpy()
    for first, last in ((0, 3), (3, 6), (6, 7)):
        part = stateless_dropout(x[first:last], 0.3, seed, tf.constant(first), rows).numpy()
        assert np.array_equal(part, whole[first:last])
    kept = whole != 0
    assert np.allclose(whole[kept], (x.numpy() / 0.7)[kept], rtol=1e-6)
    assert kept.mean() == pytest.approx(0.7, abs=0.03)
    assert not np.array_equal(kept[0], kept[1])  # each row has a mask of its own


def test_dropout_masks_differ_by_step_stage_and_seed_and_by_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen through fc6 and fc7 that give ones: their outputs are then the masks."""
    masks: list[np.ndarray] = []
    original = stateless_dropout

    def recorded(x: tf.Tensor, *arguments: Any) -> tf.Tensor:
        mask = original(tf.ones_like(x), *arguments)
        tf.py_function(lambda m: masks.append(m.numpy().ravel()), [mask], [])
        return original(x, *arguments)

    monkeypatch.setattr("training.step.stateless_dropout", recorded)
    batches = random_batches(1, 4, (7, 7, 8))
    for seed in (0, 0, 1):
        trainer = make_trainer(
            build(head="fc", size=224), Optimisation(), Phase("fc6", "fc6", "fc6", 0, 0, 9), seed=seed
        )
        run_steps(trainer, batches * 2)
    first, again, other = masks[:4], masks[4:8], masks[8:]
    assert len(other) == 4
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    different = [*first, *other]
    assert len({mask.tobytes() for mask in different}) == 8
    assert set(np.unique(np.concatenate(different))) == {0.0, 2.0}


def test_no_dropout_outside_training() -> None:
    network = build(head="fc", size=224)
    x = random_batches(1, 4, (7, 7, 8))[0][0]
    forward = compiled_forward(network, "fc6")
    assert np.array_equal(forward(x), forward(x))
    assert np.allclose(forward(x), network.forward(tf.constant(x), first="fc6"), atol=1e-5)


# -- the loss ---------------------------------------------------------------------------------------------------------


def gradient_of_one_step(settings: Optimisation, batch: tuple[np.ndarray, np.ndarray], **options: Any) -> Trainer:
    """A trainer after one step of the head; its momenta, which began at zero, are the gradient."""
    trainer = make_trainer(build(), settings, Phase("head", "gap", "gap", 0, 0, 9), **options)
    run_steps(trainer, [batch])
    return trainer


def head_batch(count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """What enters the gap head, and labels of which each class has some."""
    x = np.abs(np.random.default_rng(4).normal(0, 1, (count, 1, 1, 8))).astype(np.float32)
    return x, (np.arange(count) % CLASSES).astype(np.int64)


def head_gradient(x: np.ndarray, of_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of weights and biases for the gradient of the loss by the logits, [B, classes]."""
    pooled = x.mean(axis=(1, 2)).astype(np.float64)
    shares = pooled / (pooled.sum(axis=1, keepdims=True) + 1e-6)
    rooted = np.sqrt(0.95 * shares + 0.05 / pooled.shape[1]) * model_module.FEATURE_NORM
    return rooted.T @ of_logits, of_logits.sum(axis=0)


def assert_head_gradient(trainer: Trainer, expected: tuple[np.ndarray, np.ndarray]) -> None:
    for kind, gradient in zip(("weights", "biases"), expected, strict=True):
        assert np.allclose(trainer.momenta[f"tiny/gap/{kind}"].numpy(), gradient, rtol=1e-4, atol=1e-5), kind


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_that_of_keras(smoothing: float) -> None:
    x, labels = head_batch()
    trainer = gradient_of_one_step(Optimisation(weight_decay=0, label_smoothing=smoothing), (x, labels))
    logits = tf.Variable(build().forward(tf.constant(x), first="gap"))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    with tf.GradientTape() as tape:
        value = loss(tf.one_hot(labels, CLASSES), logits)
    assert_head_gradient(trainer, head_gradient(x, tape.gradient(value, logits).numpy()))


def test_class_weights_scale_the_loss_of_each_example() -> None:
    x, labels = head_batch(7)
    weights = np.array([0.25, 1.0, 3.0])
    trainer = gradient_of_one_step(Optimisation(weight_decay=0, class_weights=tuple(weights)), (x, labels))
    logits = build().forward(tf.constant(x), first="gap").numpy().astype(np.float64)
    by_hand = (scipy.special.softmax(logits, axis=1) - np.eye(CLASSES)[labels]) * weights[labels][:, None] / 7
    assert_head_gradient(trainer, head_gradient(x, by_hand))


def test_balanced_classes_weigh_the_same_in_all() -> None:
    examples = Examples(tuple("abcdef"), np.array([0, 2, 0, 1, 0, 1]))
    weights = plan.optimisation(Settings(class_weights="balanced"), examples).class_weights
    assert weights is not None
    assert weights == pytest.approx((6 / 9, 6 / 6, 6 / 3))
    assert sum(weights[label] for label in examples.labels) == pytest.approx(6)


def test_the_curve_shows_the_plain_loss_whatever_is_minimised() -> None:
    x, labels = head_batch()
    logits = build().forward(tf.constant(x), first="gap").numpy().astype(np.float64)
    plain = -scipy.special.log_softmax(logits, axis=1)[np.arange(6), labels]
    for settings in (Optimisation(), Optimisation(label_smoothing=0.3, class_weights=(1.0, 2.0, 5.0), accumulate=2)):
        loss, accuracy = gradient_of_one_step(settings, (x, labels)).take_sums()
        assert loss == pytest.approx(plain.mean(), rel=1e-5)
        assert accuracy == pytest.approx((logits.argmax(axis=1) == labels).mean())


def test_sums_are_means_over_examples_since_the_last_call() -> None:
    """Over batches of different sizes the mean of examples is not the mean of batches."""
    network = build()
    trainer = make_trainer(network, Optimisation(0.0, 0.0), Phase("head", "gap", "conv1", 0, 0, 9))
    batches = random_batches(1, 5) + random_batches(1, 2)
    run_steps(trainer, batches)
    x, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    logits = network.forward(tf.constant(x)).numpy().astype(np.float64)
    loss, accuracy = trainer.take_sums()
    assert loss == pytest.approx(-scipy.special.log_softmax(logits, axis=1)[np.arange(7), labels].mean(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(axis=1) == labels).mean())
    run_steps(trainer, batches[1:])
    assert trainer.sums.numpy()[2] == 2


# -- the update -------------------------------------------------------------------------------------------------------


def test_new_layers_learn_at_their_own_rate() -> None:
    batches = random_batches(1, 4)
    new = frozenset({"tiny/gap/weights", "tiny/gap/biases"})
    moved = []
    for factor in (1.0, 10.0):
        network = build()
        start = values(network)
        run_steps(make_trainer(network, Optimisation(new_layer_rate=factor), new=new), batches)
        moved.append({name: value - start[name] for name, value in values(network).items()})
    for name in moved[0]:
        factor = 10.0 if name in new else 1.0
        assert np.allclose(moved[1][name], factor * moved[0][name], rtol=1e-2, atol=5e-8), name


@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_clipping_scales_the_whole_gradient_the_penalty_included(clip_norm: float) -> None:
    batches = random_batches(1, 4)
    gradients = []
    for clip in (0.0, clip_norm):
        trainer = make_trainer(build(), Optimisation(weight_decay=0.5, clip_norm=clip))
        run_steps(trainer, batches)
        gradients.append({name: v.numpy().astype(np.float64) for name, v in trainer.momenta.items()})
    norm = math.sqrt(sum(np.sum(g**2) for g in gradients[0].values()))
    assert 0.05 < norm < 1e6
    for name, gradient in gradients[0].items():
        assert np.allclose(gradients[1][name], gradient * min(1.0, clip_norm / norm), rtol=1e-5, atol=1e-9), name


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_after_a_step_that_is_not_finite_nothing_changes_any_more(bad: float, clip_norm: float) -> None:
    network, batches = build(), random_batches(5, 4)
    batches[2][0][1, 5, 5, 0] = bad
    trainer = make_trainer(network, Optimisation(clip_norm=clip_norm))
    run_steps(trainer, batches[:2])
    assert int(trainer.bad_step.numpy()) == -1
    before = values(network), {name: v.numpy() for name, v in trainer.momenta.items()}
    run_steps(trainer, batches[2:])
    assert int(trainer.bad_step.numpy()) == 2
    assert largest_difference(values(network), before[0]) == 0
    assert largest_difference({name: v.numpy() for name, v in trainer.momenta.items()}, before[1]) == 0
    assert all(np.isfinite(v).all() for v in values(network).values())


def test_an_infinite_gradient_behind_a_finite_loss_is_found_too() -> None:
    """A weight that no image excites, and a penalty that overflows."""
    network = build()
    network.variables_by_name["tiny/conv5/conv5_1/weights"][0, 0, 0, 0].assign(3e38)
    labels = head_batch()[1]
    start = values(network)
    trainer = make_trainer(network, Optimisation(weight_decay=100.0), Phase("conv5", "conv5", "conv5", 0, 0, 9))
    run_steps(trainer, [(np.zeros((6, 2, 2, 8), np.float32), labels)])
    assert int(trainer.bad_step.numpy()) == 0
    assert math.isfinite(trainer.take_sums()[0])
    assert largest_difference(values(network), start) == 0


# -- prediction, precision, repeatability -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_predictions_in_batches_of_any_size_equal_one_batch(batch_size: int) -> None:
    network = build()
    x = np.concatenate([images for images, _ in random_batches(1, 7)])
    batches = tf.data.Dataset.from_tensor_slices((x, np.arange(7), np.arange(7))).batch(batch_size)
    logits = predict(compiled_forward(network), batches)
    assert logits.shape == (7, CLASSES)
    assert logits.dtype == np.float32
    assert np.allclose(logits, network.forward(tf.constant(x)), rtol=1e-4, atol=1e-4)


def test_bfloat16_compute_keeps_variables_momenta_and_logits_in_float32() -> None:
    moved = []
    for dtype in (tf.float32, tf.bfloat16):
        network = build(compute_dtype=dtype)
        start = values(network)
        trainer = make_trainer(network, Optimisation(learning_rate=1e-3))
        run_steps(trainer, random_batches(1, 32))
        state = trainer.state()
        names = [n for n in state if n not in ("global_step", "sums", "bad_step")]
        assert all(state[name].dtype == tf.float32 for name in names)
        assert compiled_forward(network)(random_batches(1, 2)[0][0]).dtype == tf.float32
        moved.append(np.concatenate([(v - start[n]).ravel() for n, v in values(network).items()]))
    exact, rounded = moved
    assert 0 < np.linalg.norm(rounded - exact) < 0.1 * np.linalg.norm(exact)
    # Updates smaller than bfloat16's step of the variable are not lost.
    assert np.mean(rounded != 0) > 0.9 * np.mean(exact != 0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_same_steps_give_the_same_bits_and_a_restored_trainer_continues_as_if_never_stopped(
    accumulate: int,
) -> None:
    batches = random_batches(6, 7, (7, 7, 8))
    phase = Phase("fc6", "fc6", "fc6", 0, 0, 6)

    def fresh() -> Trainer:
        return make_trainer(build(head="fc", size=224), Optimisation(learning_rate=0.01, accumulate=accumulate), phase)

    whole = fresh()
    run_steps(whole, batches)
    stopped = fresh()
    run_steps(stopped, batches[:4])
    resumed = fresh()
    for name, variable in resumed.state().items():
        variable.assign(stopped.state()[name].numpy())
    run_steps(resumed, batches[4:])
    for name, variable in whole.state().items():
        assert np.array_equal(variable.numpy(), resumed.state()[name].numpy()), name
