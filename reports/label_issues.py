"""Labels that are probably wrong, by confident learning; NumPy only.

Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels" (arXiv 1911.00068).
Probabilities must be out of fold: those of a model that did not train on the image.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelIssue:
    """An image whose label is probably wrong.

    index: its row; given: its label's class; suggested: the likeliest other class; score: probability
    of the suggested minus that of the given class, more than 0, at most 1.
    """

    index: int
    given: int
    suggested: int
    score: float


def class_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean probability of class j among the images labelled j, float64 [C]; infinite where there is none.

    Equation 2. A class that the model is often unsure of asks for less.
    """
    count = np.bincount(labels, minlength=probabilities.shape[1])
    total = np.bincount(labels, probabilities[np.arange(len(labels)), labels], probabilities.shape[1])
    return np.where(count > 0, total / np.maximum(count, 1), np.inf)


def confident_classes(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class that each image confidently belongs to, int64 [N]: the likeliest of those at or over their threshold.

    -1 where no class reaches its threshold: such an image counts for nothing.
    """
    reached = probabilities >= class_thresholds(probabilities, labels)
    return np.where(reached.any(axis=1), np.where(reached, probabilities, -1.0).argmax(axis=1), -1)


def confident_joint(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts, int64 [C, C]: [i, j] images that are labelled i and confidently belong to j (equation 1)."""
    class_count = probabilities.shape[1]
    confident = confident_classes(probabilities, labels)
    counted = confident >= 0
    pairs = labels[counted] * class_count + confident[counted]
    return np.bincount(pairs, minlength=class_count**2).reshape(class_count, class_count)


def estimate_joint(confident: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The share of all images with label i and true class j, float64 [C, C], that sums to 1 (equation 3).

    Each row of the confident joint is scaled to the number of images with that label; a row without a confident image
    is taken to be right. 1 minus the trace is the estimated share of wrong labels.
    """
    rows = np.where(confident.sum(axis=1, keepdims=True) > 0, confident, np.eye(len(confident)))
    given = np.bincount(labels, minlength=len(confident))[:, None]
    return rows / rows.sum(axis=1, keepdims=True) * given / max(len(labels), 1)


def find_label_issues(probabilities: np.ndarray, labels: np.ndarray) -> list[LabelIssue]:
    """Images whose label is probably wrong, the surest first.

    They are taken in the order of score among the images that have a likelier class than their label's: as many as the
    joint estimates to be wrong, and one standard deviation of that count (its root) more. The paper's "prune by noise
    rate" takes an estimated number of each pair of classes; of all together, rounding does not lose what is rare. Its
    other way, what lies off the diagonal of the confident joint, misses the quarter or so of wrong labels whose image
    is less sure of its class than the mean image of that class.

    Args:
        probabilities: out of fold, float [N, C], a row for each image (the mean over its views); labels: integer [N].
    """
    probabilities = np.asarray(probabilities, np.float64)
    if not len(labels):
        return []
    rows = np.arange(len(labels))
    others = probabilities.copy()
    others[rows, labels] = -1.0
    suggested = others.argmax(axis=1)
    score = probabilities[rows, suggested] - probabilities[rows, labels]
    joint = estimate_joint(confident_joint(probabilities, labels), labels)
    wrong = max(0, round(len(labels) * (1 - float(np.trace(joint)))))
    ranked = np.argsort(-score, kind="stable")[: wrong + round(math.sqrt(wrong))]
    return [LabelIssue(int(i), int(labels[i]), int(suggested[i]), float(score[i])) for i in ranked if score[i] > 0]
