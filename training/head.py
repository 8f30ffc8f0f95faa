"""The exact head: the last linear layer as the optimum of a convex problem, instead of many steps towards it.

Where the new layer is trained alone on cached activations, its loss with an L2 penalty is multinomial logistic
regression. The strength of the penalty is chosen by cross-validation over the training images.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

import data
from console import StopSignals, UserError
from dataset.layouts import Examples
from model import Network, RootedLinear
from training.cross_validation import StrengthRecord, cross_validate, strength_grid
from training.solver import solve
from training.step import Optimisation

MOST_BYTES = 2**31  # of features in memory
BATCH_SIZE = 256


@dataclass(frozen=True)
class SolvedHead:
    """What `solve_head` found.

    path: cross-validation of each strength, strong to weak; strength: the best of them.
    loss, accuracy: of the optimum on the training rows.
    """

    path: tuple[StrengthRecord, ...]
    strength: float
    loss: float
    accuracy: float


def can_solve(network: Network, rows: int) -> bool:
    """Whether the head is linear and its features of so many rows fit in memory."""
    return network.head in ("gap", "linear") and rows * feature_count(network) * 4 <= MOST_BYTES


def feature_count(network: Network) -> int:
    """Numbers that the last layer weighs."""
    return int(_linear(network).weights.shape[0])


def read_features(network: Network, load: data.Load, count: int, views: Sequence[int], stop: StopSignals) -> np.ndarray:
    """What the last layer weighs, float32 [views * count, D], view by view; `load` gives what enters that layer."""
    compute = tf.function(
        _linear(network).features, input_signature=[network.input_spec(network.stages[-1])], autograph=False
    )
    result = np.empty((len(views) * count, feature_count(network)), np.float32)
    done = 0
    for view in views:
        for x, *_ in data.ordered_batches(load, np.zeros(count, np.int64), BATCH_SIZE, view):
            result[done : done + len(x)] = compute(x).numpy()
            done += len(x)
            stop.check()
    return result


def solve_head(
    network: Network,
    load: data.Load,
    examples: Examples,
    views: int,
    optimisation: Optimisation,
    seed: int,
    stop: StopSignals,
) -> SolvedHead:
    """Gives the last layer its optimum on all views of the training images, class weights and smoothing included.

    Prints a line for each strength that is tried. Deterministic; raises Stopped after a signal, with nothing assigned.
    """
    x = read_features(network, load, len(examples), range(views), stop)
    labels = np.tile(examples.labels, views)
    groups = np.tile(np.arange(len(examples)), views)
    class_weights, label_smoothing = optimisation.class_weights, optimisation.label_smoothing

    def report(record: StrengthRecord) -> None:
        print(
            f"head       strength {record.strength:.2e}: out-of-fold loss {record.log_loss:.4f} "
            f"± {record.log_loss_error:.4f}, accuracy {record.accuracy:.4f} ± {record.accuracy_error:.4f}",
            flush=True,
        )

    try:
        found = cross_validate(
            x,
            labels,
            network.class_count,
            groups,
            strength_grid(x),
            seed=seed,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            each=stop.check,
            report=report,
        )
    except ValueError as error:
        raise UserError(f"--head-solver lbfgs: {error}; add images, or take --head-solver sgd") from None
    weights, biases = solve(
        x,
        labels,
        network.class_count,
        found.best,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        start=found.start,
        each=stop.check,
    )
    _linear(network).weights.assign(weights)
    _linear(network).biases.assign(biases)
    logits = x @ weights + biases
    loss = float(np.mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)))
    accuracy = float(np.mean(logits.argmax(axis=1) == labels))
    return SolvedHead(found.records, found.best, loss, accuracy)


def as_records(path: Sequence[StrengthRecord]) -> list[dict[str, float]]:
    """The path for metrics.jsonl."""
    return [dataclasses.asdict(record) for record in path]


def _linear(network: Network) -> RootedLinear:
    layer = network.layer(network.stages[-1])
    assert isinstance(layer, RootedLinear)
    return layer
