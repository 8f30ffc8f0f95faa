"""The best linear head on fixed features: softmax regression solved to its optimum.

The problem is convex, so there is one answer, and a quasi-Newton method reaches it in some tens of passes over the
features. Two changes of variables, both exact, make them few: features are centred (the biases are free, so they take
up what that shifts) and turned to the axes of their covariance (the penalty is the same in every orthonormal basis),
where each variable is scaled by its approximate curvature.

Threads are ours and BLAS gets one: results then do not depend on the number of cores, and small products do not wait
for threads that other programs keep from running.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import scipy.linalg
import scipy.optimize
from threadpoolctl import threadpool_limits

from console import cores

# The largest component of the gradient, in variables scaled to a curvature of about 1, at which a fit ends. Measured:
# the objective is then within 1e-10 nats of its minimum and probabilities within 1e-4 of theirs.
TOLERANCE = 1e-7
MOST_ITERATIONS = 2000
BLOCK_ROWS = 2048  # of features at a time: bounds the memory of logits, and is what a thread does
MOST_TURNED = 4096  # more features than these stay in their own axes: eigenvectors would take longer than they save


def solve(
    features: np.ndarray,
    labels: np.ndarray,
    class_count: int,
    strength: float,
    *,
    class_weights: Sequence[float] | None = None,
    sample_weights: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    tolerance: float = TOLERANCE,
    each: Callable[[], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The weights [D, C] and biases [C], float32, that minimise the penalised loss of softmax regression.

    sum_i w_i loss_i / sum_i w_i + strength / 2 * ||weights||^2, where w_i is the sample's weight times its class's and
    loss_i = (1 - s) * cross entropy + s * (logsumexp(logits) - mean(logits)) with label smoothing s, as in training.
    With equal weights and no smoothing it is scikit-learn's LogisticRegression(C=1 / (strength * N)).

    Args:
        features: float32 [N, D]; labels: integer [N], 0..C-1.
        strength: of the L2 penalty, more than 0 (without it separable data have no optimum); biases are free.
        class_weights: [C]; sample_weights: [N]; default 1 each.
        start: weights and biases to begin from; they change the time, and the answer within the tolerance only.
        tolerance: see `TOLERANCE`.
        each: called after every pass over the features; it may raise to stop.

    Raises:
        ValueError: for shapes that do not agree, features that are not finite and a strength that is not positive.
        RuntimeError: where the tolerance was not reached.
    """
    strength = positive(strength)
    weights = row_weights(labels, len(features), class_count, class_weights, sample_weights)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores()) as pool:
        axes = Axes(features)
        ranges = [(0, len(features))]
        problem = Problem(axes.turn(features), labels, class_count, weights, label_smoothing, ranges, np.float64, pool)
        begin = axes.enter(*start) if start else zeros(features.shape[1], class_count)
        turned, reached = minimise(problem, axes.variances, strength, begin, tolerance, each)
    if not reached:
        raise RuntimeError(
            f"the head's optimum at strength {strength:g} was not reached to a tolerance of {tolerance:g}"
        )
    return axes.leave(*turned)


class Axes:
    """The axes of the features' covariance around their mean; `variances` [K] are the features' variances along them.

    For more than `MOST_TURNED` features they are the features' own.
    """

    def __init__(self, features: np.ndarray):
        if features.ndim != 2 or not len(features):
            raise ValueError(f"expected features [N, D] with N of 1 or more, got {features.shape}")
        self._mean = features.mean(axis=0, dtype=np.float64)  # [D]
        if not np.isfinite(self._mean).all():
            raise ValueError("the features hold values that are not finite numbers")
        self._vectors: np.ndarray | None = None  # [D, D], float64
        if features.shape[1] > MOST_TURNED:
            self.variances = np.var(features, axis=0, dtype=np.float64)
            return
        covariance = np.zeros((features.shape[1],) * 2)
        for start in range(0, len(features), BLOCK_ROWS):
            x = self._centred(features[start : start + BLOCK_ROWS])
            covariance += (x.T @ x) / len(features)  # sums of a block in float32: the axes need not be exact
        values, self._vectors = scipy.linalg.eigh(covariance)
        self.variances = np.maximum(values, 0.0)

    def _centred(self, features: np.ndarray) -> np.ndarray:
        return (features - self._mean).astype(np.float32)

    def turn(self, features: np.ndarray) -> np.ndarray:
        """Features in these axes, float32 [N, K]."""
        turned = np.empty(features.shape, np.float32)
        for start in range(0, len(features), BLOCK_ROWS):
            x = self._centred(features[start : start + BLOCK_ROWS])
            turned[start : start + BLOCK_ROWS] = x if self._vectors is None else x @ self._vectors.astype(np.float32)
        return turned

    def enter(self, weights: np.ndarray, biases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights and biases for features as given -> those for turned features, float64."""
        weights = np.asarray(weights, np.float64)
        return weights if self._vectors is None else self._vectors.T @ weights, biases + self._mean @ weights

    def leave(self, weights: np.ndarray, biases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `enter`, in float32."""
        weights = weights if self._vectors is None else self._vectors @ weights
        biases = biases - self._mean @ weights
        return weights.astype(np.float32), (biases - biases.mean()).astype(np.float32)  # a common shift has no effect


class Problem:
    """The loss of softmax regression on some ranges of rows, and its gradient.

    Args:
        features: float32 [N, K]; labels: [N]; weights: of the rows, float64 [N]; ranges: (start, stop) of rows.
        dtype: of the products and exponentials; sums are float64.
        pool: computes blocks of rows side by side, and their sum is always taken in the same order.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        class_count: int,
        weights: np.ndarray,
        label_smoothing: float,
        ranges: Sequence[tuple[int, int]],
        dtype: type[np.floating],
        pool: Executor | None = None,
    ):
        self._features, self._labels, self._smoothing, self._dtype = features, labels, label_smoothing, dtype
        self._map = pool.map if pool else map
        self.shape = (features.shape[1], class_count)
        self._blocks = [
            slice(i, min(i + BLOCK_ROWS, stop)) for start, stop in ranges for i in range(start, stop, BLOCK_ROWS)
        ]
        total = sum(float(weights[block].sum()) for block in self._blocks)
        if not total > 0:
            raise ValueError("no row has a weight above 0")
        self._weights = weights / total  # [N]

    def evaluate(self, weights: np.ndarray, biases: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Loss, its gradients [K, C] and [C], and the mean of p (1 - p) for each class [C]; float64."""
        w, b = weights.astype(self._dtype), biases.astype(self._dtype)
        loss, gradient = 0.0, np.zeros(self.shape)
        bias_gradient, spread = np.zeros(self.shape[1]), np.zeros(self.shape[1])
        for part in self._map(self._evaluate_block, self._blocks, itertools.repeat(w), itertools.repeat(b)):
            loss += part[0]
            gradient += part[1]
            bias_gradient += part[2]
            spread += part[3]
        return loss, gradient, bias_gradient, spread

    def _evaluate_block(
        self, rows: slice, w: np.ndarray, b: np.ndarray
    ) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """What `rows` add to each result of `evaluate`."""
        x = self._features[rows].astype(self._dtype, copy=False)
        of_label = (np.arange(len(x)), self._labels[rows])
        weights = self._weights[rows].astype(self._dtype)  # [n]
        p = x @ w + b  # [n, C], logits until they are exponentiated
        p -= p.max(axis=1, keepdims=True)
        fit = (1 - self._smoothing) * p[of_label] + self._smoothing * p.mean(axis=1)
        np.exp(p, out=p)
        sums = p.sum(axis=1)
        loss = float(self._weights[rows] @ (np.log(sums) - fit))
        p /= sums[:, None]
        spread = weights @ (p * (1 - p))
        p -= self._smoothing / self.shape[1]
        p[of_label] -= 1 - self._smoothing
        p *= weights[:, None]
        return loss, x.T @ p, p.sum(axis=0), spread


def minimise(
    problem: Problem,
    variances: np.ndarray,
    strength: float,
    start: tuple[np.ndarray, np.ndarray],
    tolerance: float,
    each: Callable[[], None] | None,
) -> tuple[tuple[np.ndarray, np.ndarray], bool]:
    """Weights and biases of the least penalised loss, float64, and whether the tolerance was reached.

    L-BFGS (Liu and Nocedal 1989) in variables divided by the square root of their approximate curvature at `start`:
    that of class c along axis j is mean(p_c (1 - p_c)) * variance_j + strength.
    """
    spread = np.maximum(problem.evaluate(*start)[3], 1e-6)  # [C]
    scale = np.vstack([1 / np.sqrt(np.outer(variances, spread) + strength), 1 / np.sqrt(spread)])  # [K + 1, C]

    def objective(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        both = scaled.reshape(scale.shape) * scale
        weights = both[:-1]
        loss, gradient, bias_gradient, _ = problem.evaluate(weights, both[-1])
        gradient += strength * weights
        if each:
            each()
        value = loss + 0.5 * strength * float(np.vdot(weights, weights))
        return value, (np.vstack([gradient, bias_gradient]) * scale).ravel()

    result = scipy.optimize.minimize(
        objective,
        (np.vstack(start) / scale).ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": tolerance, "ftol": 0.0, "maxcor": 20, "maxiter": MOST_ITERATIONS, "maxfun": MOST_ITERATIONS},
    )
    both = result.x.reshape(scale.shape) * scale
    return (both[:-1], both[-1]), float(np.abs(result.jac).max()) <= tolerance


def row_weights(
    labels: np.ndarray,
    row_count: int,
    class_count: int,
    class_weights: Sequence[float] | None,
    sample_weights: np.ndarray | None,
) -> np.ndarray:
    """Sample weight times class weight, float64 [N]; ValueError for labels or weights that can't be right."""
    if labels.shape != (row_count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"expected {row_count} integer labels, got {labels.dtype} {labels.shape}")
    if not 0 <= labels.min() <= labels.max() < class_count:
        raise ValueError(f"labels {labels.min()}..{labels.max()} lie outside the {class_count} classes")
    weights = np.ones(row_count) if sample_weights is None else np.asarray(sample_weights, np.float64)
    of_class = np.ones(class_count) if class_weights is None else np.asarray(class_weights, np.float64)
    if weights.shape != (row_count,) or of_class.shape != (class_count,):
        raise ValueError(f"expected {row_count} sample and {class_count} class weights")
    if not (weights.min() >= 0 and of_class.min() >= 0):
        raise ValueError("weights of samples and classes must be 0 or more")
    return weights * of_class[labels]


def zeros(features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((features, classes)), np.zeros(classes)


def positive(strength: float) -> float:
    if not 0 < strength < float("inf"):
        raise ValueError(f"the strength of the penalty must be more than 0, got {strength}")
    return float(strength)
