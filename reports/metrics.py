"""Every score of a classifier, from its labels, predictions and probabilities; NumPy only.

Arrays: logits and probabilities float [N, C], labels and predictions integer [N]. N may be 0; a figure that has no
value (no example, a logit that is not a number) is NaN here and None, JSON's null, in `scores`. No score warns, and
none makes an array of [N, C] or [C, C] but `log_softmax`, `softmax` and `confusion_matrix`, which return one.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CALIBRATION_BINS = 15  # as in the tables of Guo et al. 2017


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
    logits = np.asarray(logits)
    labels = _checked_labels(labels, *logits.shape)
    return _mean(np.concatenate([_cross_entropies(logits[rows], labels[rows]) for rows in _row_slices(logits)]))


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
    probabilities = np.asarray(probabilities)
    labels = _checked_labels(labels, *probabilities.shape)
    slices = _row_slices(probabilities)
    return _mean(np.concatenate([_ranks(probabilities[rows], labels[rows]) for rows in slices]) < k)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, class_count: int) -> np.ndarray:
    """Counts, int64 [C, C]: [i, j] examples of class i that were predicted to be class j. 10,000 classes: 800 MB.

    Raises ValueError when the lengths differ or a value lies outside 0..C-1.
    """
    predictions = _checked_labels(predictions, len(predictions), class_count)
    labels = _checked_labels(labels, len(predictions), class_count)
    pairs = labels * class_count + predictions
    return np.bincount(pairs, minlength=class_count**2).reshape(class_count, class_count)


def cohen_kappa(labels: np.ndarray, predictions: np.ndarray, class_count: int) -> float:
    """Agreement beyond chance (Cohen 1960): 1 - observed / expected disagreement.

    NaN when no disagreement is expected, that is when there is no example or when a single class is both the only
    true and the only predicted one: 0 / 0, which scikit-learn leaves undefined too.
    """
    hits, support, predicted = _class_counts(labels, predictions, class_count)
    total = float(len(labels))
    disagreement = total - float(hits.sum())
    expected_times_total = total**2 - float(support @ predicted)  # exact in float64 up to 9e7 examples
    return 1.0 - disagreement * total / expected_times_total if expected_times_total > 0 else math.nan


def per_class_scores(labels: np.ndarray, predictions: np.ndarray, class_count: int) -> dict[str, np.ndarray]:
    """`precision`, `recall`, `f1` (float64 [C]), `support` and `predicted` (int64 [C]: times it is true, predicted).

    A ratio whose denominator is zero is 0, scikit-learn's `zero_division=0`: precision of a class that is never
    predicted, recall of a class that does not occur, F1 of a class that is neither.
    """
    hits, support, predicted = _class_counts(labels, predictions, class_count)
    return {
        "precision": hits / np.maximum(predicted, 1),  # a count of 0 has no hits either, so 0 / 1 = 0
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + predicted, 1),
        "support": support,
        "predicted": predicted,
    }


def confused_pairs(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """int64 [P, 3], a row (true class, predicted class, examples) for every pair that occurs, in that order.

    These are the values of the confusion matrix that are not zero, right predictions included; P is at most N.
    """
    pairs, counts = np.unique(np.stack([labels, predictions], axis=1), axis=0, return_counts=True)
    return np.column_stack([pairs, counts]).astype(np.int64)


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, (low, high) within 0..1; z = 1.96: 95 %. NaN without examples.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference"; it holds for few examples and
    for shares near 0 and 1 too, where the usual share +- z * deviation does not.
    """
    if total == 0:
        return math.nan, math.nan
    share, scale = correct / total, 1 + z**2 / total
    middle = (share + z**2 / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """sum over bins of (n_b / N) |accuracy_b - mean confidence_b|; NaN without examples or with NaN probabilities.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3: confidence is the largest probability,
    the bins ((b - 1) / B, b / B] are of equal width.
    """
    probabilities = np.asarray(probabilities)
    labels = _checked_labels(labels, *probabilities.shape)
    return _calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, bins)


@dataclass(frozen=True)
class Outcomes:
    """All that scores and reports need of the probabilities of N examples over `class_count` classes: arrays [N].

    labels and predictions int64; confidence: the probability of the prediction, of_label: of the label; rank: the
    number of classes that come before the label; loss: the cross entropy in nats.
    """

    class_count: int
    labels: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    of_label: np.ndarray
    rank: np.ndarray
    loss: np.ndarray


def outcomes(probabilities: np.ndarray | Iterable[np.ndarray], labels: np.ndarray) -> Outcomes:
    """Sums up probabilities, float [N, C] or the same in blocks of rows, of which one at a time is held.

    50,000 examples of 10,000 classes take 2 GB as float32 and 3 MB as outcomes. A probability of 0 counts in the loss
    as the smallest normal number of its precision (at most 87 nats in float32, 708 in float64), so it is never
    infinite. Raises ValueError for shapes that do not agree and for "probabilities" outside 0..1.
    """
    parts: list[Outcomes] = []
    labels, start = np.asarray(labels), 0
    for block in [probabilities] if isinstance(probabilities, np.ndarray) else probabilities:
        of_block = _checked_labels(labels[start : start + len(block)], *block.shape)
        parts += [_outcomes(block[rows], of_block[rows]) for rows in _row_slices(block)]
        start += len(block)
    if start != len(labels) or len({part.class_count for part in parts}) != 1:
        raise ValueError(
            f"{len(labels)} labels, {start} rows of {sorted({part.class_count for part in parts})} classes"
        )
    columns = ("labels", "predictions", "confidence", "of_label", "rank", "loss")
    joined = {column: np.concatenate([getattr(part, column) for part in parts]) for column in columns}
    return Outcomes(parts[0].class_count, **joined)


def scores(outcomes: Outcomes, class_names: Sequence[str]) -> dict[str, Any]:
    """Every score as plain numbers that JSON can hold; None stands for "has no value", never NaN or infinity.

    `examples`, `accuracy`, `accuracy_95_interval` [low, high], `top_5_accuracy`, `log_loss`, `cohen_kappa`,
    `balanced_accuracy`, `expected_calibration_error`; `macro` and `weighted`: {precision, recall, f1}; `per_class`: a
    list of {class, precision, recall, f1, support, predicted} in class order.

    - Macro means go over all C classes, absent ones included (scikit-learn with `labels=range(C)`); weighted means
      by support. Both are 0 without examples.
    - Balanced accuracy is the mean recall of the classes that occur (scikit-learn's definition).
    - The interval is Wilson's: where the accuracy lies with 95 % confidence if the examples were drawn at random.

    Raises ValueError where the number of names is not that of classes.
    """
    if len(class_names) != outcomes.class_count:
        raise ValueError(f"{len(class_names)} names for {outcomes.class_count} classes")
    labels, predictions = outcomes.labels, outcomes.predictions
    correct, examples = labels == predictions, len(labels)
    columns = per_class_scores(labels, predictions, len(class_names))
    support, ratios = columns["support"], ("precision", "recall", "f1")
    lists = {name: column.tolist() for name, column in columns.items()}
    return {
        "examples": examples,
        "accuracy": _number(_mean(correct)),
        "accuracy_95_interval": list(wilson_interval(int(correct.sum()), examples)) if examples else None,
        "top_5_accuracy": _number(_mean(outcomes.rank < 5)),
        "log_loss": _number(_mean(outcomes.loss)),
        "cohen_kappa": _number(cohen_kappa(labels, predictions, len(class_names))),
        "balanced_accuracy": _number(_mean(columns["recall"][support > 0])),
        "expected_calibration_error": _number(_calibration_error(outcomes.confidence, correct, CALIBRATION_BINS)),
        "macro": {name: float(columns[name].mean()) for name in ratios},
        "weighted": {name: float(columns[name] @ support / max(examples, 1)) for name in ratios},
        "per_class": [
            {"class": name} | dict(zip(lists, line, strict=True))
            for name, *line in zip(class_names, *lists.values(), strict=True)
        ],
    }


def _outcomes(probabilities: np.ndarray, labels: np.ndarray) -> Outcomes:
    """Of a block that is small beside the memory."""
    predictions, of_example = probabilities.argmax(axis=1), np.arange(len(labels))
    confidence, of_label = probabilities[of_example, predictions], probabilities[of_example, labels]
    if probabilities.min(initial=0) < 0 or confidence.max(initial=0) > 1.01:  # 1.01: rounding in bfloat16
        raise ValueError("probabilities lie outside 0..1: were logits passed?")
    dtype = np.float64 if probabilities.dtype == np.float64 else np.float32  # no less, whatever comes
    precise, smallest = probabilities.astype(dtype, copy=False), np.finfo(dtype).smallest_normal
    # The cross entropy of log-probabilities: log(sum) is 0 but for rounding.
    logs = np.log(np.maximum(precise[of_example, labels], smallest).astype(np.float64))
    loss = np.log(np.maximum(precise, smallest).sum(axis=1, dtype=np.float64)) - logs
    rank = _ranks(probabilities, labels)
    return Outcomes(probabilities.shape[1], labels, predictions, confidence, of_label, rank, loss)


def _row_slices(array: np.ndarray) -> Iterator[slice]:
    """Slices of the rows of [N, C], at least one, whose copies in float64 take at most some 8 MB each."""
    rows = max(1, 2**20 // array.shape[1])
    return (slice(start, start + rows) for start in range(0, max(len(array), 1), rows))


def _cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def _ranks(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The number of classes that come before the label, int64 [N]; see `top_k_accuracy`."""
    if np.isnan(probabilities).any():
        probabilities = np.where(np.isnan(probabilities), np.inf, probabilities)
    of_label = probabilities[np.arange(len(labels)), labels][:, None]  # [N, 1]
    earlier = np.arange(probabilities.shape[1]) < labels[:, None]  # [N, C]
    before = (probabilities > of_label) | ((probabilities == of_label) & earlier)
    return np.asarray(np.count_nonzero(before, axis=1))


def _calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    confidence = np.asarray(confidence, np.float64)
    if not len(correct) or np.isnan(confidence).any():
        return math.nan
    bin_of = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)  # [N], 0..B-1
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)  # n_b (accuracy_b - confidence_b)
    return float(np.abs(gaps).sum() / len(correct))


def _class_counts(
    labels: np.ndarray, predictions: np.ndarray, class_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each class is predicted rightly, is true, is predicted: int64 [C] each."""
    predictions = _checked_labels(predictions, len(predictions), class_count)
    labels = _checked_labels(labels, len(predictions), class_count)
    hits, support, predicted = (
        np.bincount(classes, minlength=class_count).astype(np.int64)
        for classes in (labels[labels == predictions], labels, predictions)
    )
    return hits, support, predicted


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
