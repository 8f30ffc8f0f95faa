"""Whether a difference between two models on the same images is more than chance."""

from typing import NamedTuple

import numpy as np
import scipy.special


class McNemar(NamedTuple):
    """only_first, only_second: images that one model alone gets right; p_value: of such a difference by chance."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """McNemar's exact test of two models' answers, bool [N] (right or wrong) for the same images.

    Images that both or neither get right say nothing of the difference; of the others each model would win half
    (McNemar 1947): a two-sided binomial test, exact for any number of them, and 1 without any.
    """
    first, second = _pairs(first, second)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    tail = scipy.special.bdtr(min(only_first, only_second), only_first + only_second, 0.5)  # P(X <= the fewer)
    return McNemar(only_first, only_second, min(1.0, 2 * float(tail)))


def accuracy_difference_interval(
    first: np.ndarray, second: np.ndarray, level: float = 0.95, draws: int = 20_000, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap interval of accuracy(second) - accuracy(first), bool [N] each (right or wrong) for the same images.

    The percentile interval of Efron 1979 over images drawn with replacement, each with both its answers. An image is
    won, lost or drawn, so that one multinomial draw counts what N draws of images would.
    """
    first, second = _pairs(first, second)
    if not len(first):
        raise ValueError("a difference needs at least one image")
    shares = np.array([(second & ~first).mean(), (first & ~second).mean(), (first == second).mean()])
    won, lost, _ = np.random.default_rng(seed).multinomial(len(first), shares / shares.sum(), draws).T
    low, high = np.quantile((won - lost) / len(first), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if first.shape != second.shape or first.ndim != 1 or first.dtype != bool or second.dtype != bool:
        raise ValueError(f"expected two bool [N], got {first.dtype} {first.shape} and {second.dtype} {second.shape}")
    return first, second
