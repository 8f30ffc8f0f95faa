"""Every score of a classifier, from its confusion matrix and its probabilities; NumPy only.

Arrays: logits and probabilities float [N, C], labels and predictions integer [N], a confusion matrix int64 [C, C]
with a row per true class and a column per predicted class. N may be 0; a figure that has no value (no example, a
logit that is not a number) is NaN here and None, JSON's null, in `scores`. No score warns.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log(softmax(logits)) in float64, [N, C]: finite wherever the logits are, however far apart they lie."""
    logits = np.asarray(logits, np.float64)  # [N, C]
    with np.errstate(invalid="ignore"):  # inf - inf in a run that has diverged: NaN is the answer, not a warning
        shifted = logits - logits.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64, [N, C], rows that sum to one; a row with a NaN or +inf logit is NaN."""
    return np.asarray(np.exp(log_softmax(logits)))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross entropy in nats, never infinite for finite logits; NaN without examples.

    The log of a probability is a logit too: `log_loss(np.log(probabilities), labels)` is what scikit-learn computes.
    """
    log_probabilities = log_softmax(logits)
    labels = _checked_labels(labels, *log_probabilities.shape)
    return _mean(-log_probabilities[np.arange(len(labels)), labels])


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The share of examples whose largest probability (or logit) is the label's; NaN without examples."""
    return top_k_accuracy(probabilities, labels, 1)


def top_k_accuracy(probabilities: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The share of examples whose label is among the k largest probabilities (or logits); NaN without examples.

    Of equal values the lower class index comes first, as in np.argmax, and NaN ranks highest, as there, so k = 1 is
    the accuracy of argmax and a constant output scores chance, not 100 %. k above C gives 1. Raises ValueError for
    k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    probabilities = np.asarray(probabilities, np.float64)
    probabilities = np.where(np.isnan(probabilities), np.inf, probabilities)  # [N, C]
    labels = _checked_labels(labels, *probabilities.shape)
    of_label = probabilities[np.arange(len(labels)), labels][:, None]  # [N, 1]
    earlier = np.arange(probabilities.shape[1]) < labels[:, None]  # [N, C]
    rank = ((probabilities > of_label) | ((probabilities == of_label) & earlier)).sum(axis=1)  # [N]
    return _mean(rank < k)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, class_count: int) -> np.ndarray:
    """Counts, int64 [C, C]: [i, j] examples of class i that were predicted to be class j.

    Raises ValueError when the lengths differ or a value lies outside 0..C-1.
    """
    predictions = _checked_labels(predictions, len(predictions), class_count)
    labels = _checked_labels(labels, len(predictions), class_count)
    pairs = labels * class_count + predictions
    return np.bincount(pairs, minlength=class_count**2).astype(np.int64).reshape(class_count, class_count)


def cohen_kappa(confusion: np.ndarray) -> float:
    """Agreement beyond chance (Cohen 1960): 1 - observed / expected disagreement.

    NaN when no disagreement is expected, that is when there is no example or when a single class is both the only
    true and the only predicted one: 0 / 0, which scikit-learn leaves undefined too.
    """
    confusion = np.asarray(confusion, np.float64)
    total = confusion.sum()
    disagreement = total - np.trace(confusion)
    rows, columns = confusion.sum(axis=1), confusion.sum(axis=0)
    expected_times_total = total**2 - float(rows @ columns)  # exact in float64 up to 9e7 examples
    return 1.0 - float(disagreement * total / expected_times_total) if expected_times_total > 0 else math.nan


def per_class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """`precision`, `recall`, `f1` (float64 [C]), `support` and `predicted` (int64 [C], row and column sums).

    A ratio whose denominator is zero is 0, scikit-learn's `zero_division=0`: precision of a class that is never
    predicted, recall of a class that does not occur, F1 of a class that is neither.
    """
    confusion = np.asarray(confusion)
    hits, support, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return {
        "precision": hits / np.maximum(predicted, 1),  # a count of 0 has no hits either, so 0 / 1 = 0
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + predicted, 1),
        "support": support,
        "predicted": predicted,
    }


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """sum over bins of (n_b / N) |accuracy_b - mean confidence_b|; NaN without examples or with NaN probabilities.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3: confidence is the largest probability,
    the bins ((b - 1) / B, b / B] are of equal width, 15 as in that paper's tables.
    """
    probabilities = np.asarray(probabilities, np.float64)
    labels = _checked_labels(labels, *probabilities.shape)
    confidence = probabilities.max(axis=1)  # [N]
    if not len(labels) or np.isnan(confidence).any():
        return math.nan
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)  # [N], 0..B-1
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)  # n_b (accuracy_b - confidence_b)
    return float(np.abs(gaps).sum() / len(labels))


def scores(
    confusion: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Every score as plain numbers that JSON can hold; None stands for "has no value", never NaN or infinity.

    `examples`, `accuracy`, `top_5_accuracy`, `log_loss`, `cohen_kappa`, `balanced_accuracy`,
    `expected_calibration_error`; `macro` and `weighted`: {precision, recall, f1}; `per_class`: a list of {class,
    precision, recall, f1, support, predicted} in class order.

    - Macro means go over all C classes, absent ones included (scikit-learn with `labels=range(C)`); weighted means
      by support. Both are 0 without examples.
    - Balanced accuracy is the mean recall of the classes that occur (scikit-learn's definition).
    - Log loss is computed from log-probabilities; a probability of 0 counts as the smallest normal number of its
      precision (at most 87 nats in float32, 708 in float64), so it is never infinite.

    Raises ValueError for shapes that do not agree and for "probabilities" outside 0..1.
    """
    probabilities = np.asarray(probabilities)
    if len(class_names) != len(confusion) or probabilities.shape[1] != len(confusion):
        raise ValueError(f"{len(class_names)} names, {len(confusion)} classes, probabilities {probabilities.shape}")
    if confusion.sum() != len(labels):
        raise ValueError(f"the confusion matrix counts {confusion.sum()} examples, there are {len(labels)} labels")
    if ((probabilities < 0) | (probabilities > 1.01)).any():  # 1.01: rounding in bfloat16
        raise ValueError("probabilities lie outside 0..1: were logits passed?")
    smallest = np.finfo(np.float64 if probabilities.dtype == np.float64 else np.float32).smallest_normal
    logits = np.log(np.maximum(probabilities.astype(np.float64), smallest))
    columns = per_class_scores(confusion)
    support, ratios = columns["support"], ("precision", "recall", "f1")
    examples = int(support.sum())
    return {
        "examples": examples,
        "accuracy": _number(np.trace(confusion) / examples if examples else math.nan),
        "top_5_accuracy": _number(top_k_accuracy(probabilities, labels, 5)),
        "log_loss": _number(log_loss(logits, labels)),
        "cohen_kappa": _number(cohen_kappa(confusion)),
        "balanced_accuracy": _number(_mean(columns["recall"][support > 0])),
        "expected_calibration_error": _number(expected_calibration_error(probabilities, labels)),
        "macro": {name: float(columns[name].mean()) for name in ratios},
        "weighted": {name: float(columns[name] @ support / max(examples, 1)) for name in ratios},
        "per_class": [
            {"class": class_name} | {name: column[i].item() for name, column in columns.items()}
            for i, class_name in enumerate(class_names)
        ],
    }


def _checked_labels(labels: np.ndarray, example_count: int, class_count: int) -> np.ndarray:
    """`labels` as int64 [N], or a ValueError: NumPy would read a label of -1 as the last class without a word."""
    labels = np.asarray(labels)
    if labels.shape != (example_count,) or (labels.size and labels.dtype.kind not in "iu"):
        raise ValueError(f"expected {example_count} integer labels, got {labels.dtype} {labels.shape}")
    if labels.size and not 0 <= labels.min() <= labels.max() < class_count:
        raise ValueError(f"labels {labels.min()}..{labels.max()} lie outside the {class_count} classes")
    return labels.astype(np.int64)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
