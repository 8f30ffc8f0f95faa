"""The strength of the head's penalty by cross-validation over images, and what each image's fold says of it."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from console import cores
from reports import metrics
from training.solver import Axes, Problem, minimise, positive, row_weights, zeros

FOLD_TOLERANCE = 1e-4  # of fits in float32: moves log loss by a small part of its standard error
PATIENCE = 2  # strengths in a row that do not improve the out-of-fold loss, after which weaker ones are left out
LEAST_GAIN = 5e-4  # nats: where classes are told apart without a mistake, the loss falls for ever, and means nothing


@dataclass(frozen=True)
class StrengthRecord:
    """What cross-validation found for one strength; the standard errors take an image, not a view, as the unit."""

    strength: float
    log_loss: float
    log_loss_error: float
    accuracy: float
    accuracy_error: float


@dataclass(frozen=True)
class CrossValidation:
    """The path of strengths and the out-of-fold answer of the best.

    records: one for each strength that was tried, strong to weak.
    best: the strength of the least log loss.
    at_edge: whether `best` is the first or the last strength of the whole grid, so that the optimum may lie outside.
    logits: float32 [N, C], those of `best`, each row from the fold that did not train on it.
    scored: bool [N], False where no other image has the label: no fold could learn it, and no figure counts the row.
    start: weights [D, C] and biases [C], the mean over the folds at `best`: where `solve` on all rows begins.
    """

    records: tuple[StrengthRecord, ...]
    best: float
    at_edge: bool
    logits: np.ndarray
    scored: np.ndarray
    start: tuple[np.ndarray, np.ndarray]


def strength_grid(features: np.ndarray) -> np.ndarray:
    """Strengths from strong to weak, float64 [17]: the features' total variance times 10^-1, 10^-1.5, ... 10^-9.

    The loss curves by half of that variance at most. At the first of them the head is therefore close to the class
    frequencies alone, whatever the scale of the features. At the last it is close to unpenalised, which is the best for
    classes that are told apart without a mistake.
    """
    return np.var(features, axis=0, dtype=np.float64).sum() * 10.0 ** (-1 - np.arange(17) / 2)


def cross_validate(
    features: np.ndarray,
    labels: np.ndarray,
    class_count: int,
    groups: np.ndarray,
    strengths: Sequence[float] | np.ndarray,
    *,
    folds: int = 5,
    seed: int = 0,
    class_weights: Sequence[float] | None = None,
    sample_weights: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    tolerance: float = FOLD_TOLERANCE,
    each: Callable[[], None] | None = None,
    report: Callable[[StrengthRecord], None] | None = None,
) -> CrossValidation:
    """Out-of-fold log loss and accuracy along a path of strengths, strong to weak, each fit begun at the one before.

    The path ends early after `PATIENCE` strengths without a better loss. The loss that chooses is plain cross entropy,
    weighted as the objective is. A fold whose training rows lack a class gives that class the least of the other
    logits of each row, so that it stays finite and is never the answer.

    Args:
        features, labels, class_count, class_weights, sample_weights, label_smoothing, each: as for `solve`.
        groups: integer [N], the image of each row; all rows of an image lie in one fold and have one label.
        strengths: more than 0; see `strength_grid`.
        folds: at most; there are no more than images.
        seed: of the folds.
        report: called with the record of each strength as soon as it is known.

    Raises:
        ValueError: as `solve`; where no class has two images; for fewer than two folds; for an image with two labels.
    """
    weights = row_weights(labels, len(features), class_count, class_weights, sample_weights)
    path = sorted(map(positive, strengths), reverse=True)
    fold_of = stratified_folds(labels, groups, folds, seed)
    scored = np.bincount(labels[_first_rows(groups)], minlength=class_count)[labels] > 1  # [N]
    if not scored.any():
        raise ValueError("no class has two images: there is nothing to learn from and to be judged by")
    records: list[StrengthRecord] = []
    best, best_logits, start = 0, np.zeros((0, class_count), np.float32), zeros(features.shape[1], class_count)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores()) as pool:
        fits = _FoldFits(features, labels, weights, fold_of, class_count, label_smoothing, pool)
        for strength in path:
            logits = fits.solve(strength, tolerance, each)
            records.append(_record(strength, logits, labels, groups, weights, scored))
            if report:
                report(records[-1])
            if len(records) == 1 or records[-1].log_loss < records[best].log_loss - LEAST_GAIN:
                best, best_logits, start = len(records) - 1, logits, fits.mean()
            if len(records) - 1 - best >= PATIENCE:
                break
    return CrossValidation(tuple(records), path[best], best in (0, len(path) - 1), best_logits, scored, start)


def stratified_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each row, int64 [N]: a group lies in one fold; folds differ by one group at most, in a class too.

    Raises ValueError for fewer than two groups or folds, and for a group with two labels.
    """
    first = _first_rows(groups)
    inverse = np.unique(groups, return_inverse=True)[1]
    group_labels = labels[first]  # [groups]
    if (group_labels[inverse] != labels).any():
        raise ValueError("rows of one image have different labels")
    count = min(folds, len(first))
    if count < 2:
        raise ValueError(f"cross-validation needs two images and folds, got {len(first)} and {folds}")
    shuffled = np.random.default_rng(seed).permutation(len(first))
    dealt = shuffled[np.argsort(group_labels[shuffled], kind="stable")]  # class by class
    fold_of_group = np.empty(len(first), np.int64)
    fold_of_group[dealt] = np.arange(len(first)) % count
    return fold_of_group[inverse]


class _FoldFits:
    """The fits of all folds, side by side on the threads of `pool`; `fold_of` [N] is the fold that holds out a row."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        weights: np.ndarray,
        fold_of: np.ndarray,
        class_count: int,
        label_smoothing: float,
        pool: Executor,
    ):
        self._axes, self._pool, self._class_count = Axes(features), pool, class_count
        self._order = np.argsort(fold_of, kind="stable")  # a fold's rows lie together, so that no fold needs a copy
        edges = np.searchsorted(fold_of[self._order], np.arange(fold_of.max() + 2)).tolist()
        rows = (self._axes.turn(features[self._order]), labels[self._order], weights[self._order])
        self._fits = [
            _FoldFit(*rows, held_out, class_count, label_smoothing, self._axes.variances)
            for held_out in itertools.pairwise(edges)
        ]

    def solve(self, strength: float, tolerance: float, each: Callable[[], None] | None) -> np.ndarray:
        """Logits of every row at this strength, float32 [N, C], from the fold that did not train on it."""
        solved = self._pool.map(_FoldFit.solve, self._fits, *map(itertools.repeat, (strength, tolerance, each)))
        logits = np.empty((len(self._order), self._class_count), np.float32)
        logits[self._order] = np.concatenate(list(solved))
        return logits

    def mean(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean over the folds at the last strength, for features as given: weights [D, C] and biases [C]."""
        weights, biases = (np.mean(parts, axis=0) for parts in zip(*(fit.fitted() for fit in self._fits), strict=True))
        return self._axes.leave(weights, biases)


class _FoldFit:
    """The fits of one fold, each begun at the one before; rows `start` to `stop` are held out."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        weights: np.ndarray,
        held_out: tuple[int, int],
        class_count: int,
        label_smoothing: float,
        variances: np.ndarray,
    ):
        start, stop = held_out
        self._held_out, self._class_count, self._variances = features[start:stop], class_count, variances
        self._present = np.unique(np.delete(labels, slice(start, stop)))
        mapped = np.searchsorted(self._present, labels)  # of held-out rows too, which are not looked at
        ranges = [(0, start), (stop, len(features))]
        self._problem = Problem(features, mapped, len(self._present), weights, label_smoothing, ranges, np.float32)
        self._fitted = zeros(*self._problem.shape)

    def solve(self, strength: float, tolerance: float, each: Callable[[], None] | None) -> np.ndarray:
        """Logits of the held-out rows at this strength, float32 [rows, C]."""
        self._fitted, _ = minimise(self._problem, self._variances, strength, self._fitted, tolerance, each)
        weights, biases = (part.astype(np.float32) for part in self._fitted)
        known = self._held_out @ weights + biases  # [rows, classes present]
        logits = np.repeat(known.min(axis=1, keepdims=True), self._class_count, axis=1)
        logits[:, self._present] = known
        return logits

    def fitted(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights [K, C] and biases [C] of the last strength; 0 for a class that the training rows lack."""
        both = zeros(len(self._fitted[0]), self._class_count)
        for of_all, of_present in zip(both, self._fitted, strict=True):
            of_all[..., self._present] = of_present
        return both


def _record(
    strength: float,
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray,
    scored: np.ndarray,
) -> StrengthRecord:
    """The figures of the scored rows; an image's is the mean of its rows."""
    inverse = np.unique(groups[scored], return_inverse=True)[1]
    rows = np.arange(len(logits))
    losses = -metrics.log_softmax(logits)[rows, labels][scored]
    right = (logits.argmax(axis=1) == labels)[scored].astype(np.float64)

    def mean_and_error(values: np.ndarray, of_row: np.ndarray) -> tuple[float, float]:
        of_group = np.bincount(inverse, of_row)  # [images]
        means = np.bincount(inverse, of_row * values) / np.maximum(of_group, np.finfo(np.float64).tiny)
        mean = float(of_group @ means / of_group.sum())
        return mean, float(np.sqrt(of_group**2 @ (means - mean) ** 2) / of_group.sum())

    loss = mean_and_error(losses, weights[scored])
    return StrengthRecord(strength, *loss, *mean_and_error(right, np.ones(len(right))))


def _first_rows(groups: np.ndarray) -> np.ndarray:
    """The first row of each group, in the order of the groups' numbers."""
    return np.unique(groups, return_index=True)[1]
