"""Probabilities that mean what they say: one temperature for all logits, and how far confidence is from accuracy."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from matplotlib.figure import Figure

from reports import metrics
from reports.pictures import BLUE, DPI, ORANGE, save_figure, text_style

TEMPERATURES = (0.05, 20.0)  # the least and the largest


@dataclass(frozen=True)
class Reliability:
    """What each of B bins of confidence holds, all [B]; `edges` is [B + 1].

    count: int64, examples whose largest probability lies in (edges[b], edges[b + 1]]; confidence: its mean there;
    accuracy: the share that is right. Both are NaN in an empty bin.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T of the least log loss of softmax(logits / T): more than 1 where the logits are too sure.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2. Log loss is convex in 1 / T, so its slope
    there, mean(sum_c p_c z_c - z_label), has one root. The largest logit stays the largest: no prediction changes.

    1 where the examples say nothing of T: there is none, or every one is right, and the loss falls for ever as T goes
    to 0. Otherwise within `TEMPERATURES`.

    Args:
        logits: [N, C], finite, of examples that were not trained on; labels: integer [N].
    """
    logits = np.asarray(logits, np.float64)
    if not np.isfinite(logits).all():
        raise ValueError("the logits hold values that are not finite numbers")
    if not len(logits) or metrics.accuracy(logits, labels) == 1:
        return 1.0
    of_label = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        return float(((metrics.softmax(inverse * logits) * logits).sum(axis=1) - of_label).mean())

    least, largest = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if slope(least) >= 0:
        return TEMPERATURES[1]
    if slope(largest) <= 0:
        return TEMPERATURES[0]
    return 1 / float(scipy.optimize.brentq(slope, least, largest, xtol=1e-9))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> Reliability:
    """Accuracy in bins of confidence, those of `metrics.expected_calibration_error`: [N, C] and integer [N]."""
    probabilities = np.asarray(probabilities, np.float64)
    confidence = probabilities.max(axis=1)  # [N]
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.digitize(confidence, edges[1:-1], right=True)  # [N], 0..B-1
    count = np.bincount(bin_of, minlength=bins)
    divisor = np.where(count > 0, count, np.nan)
    right = probabilities.argmax(axis=1) == labels
    return Reliability(
        edges,
        count,
        np.bincount(bin_of, weights=confidence, minlength=bins) / divisor,
        np.bincount(bin_of, weights=right, minlength=bins) / divisor,
    )


def draw_reliability(path: str | os.PathLike[str], parts: Mapping[str, Reliability], title: str = "") -> None:
    """Draws accuracy against confidence, and how many examples have which confidence, of one or two sets.

    Args:
        parts: {name in the legend: reliability}, such as as trained and at a temperature; at least one example each.
    """
    figure = Figure((6.0, 7.0), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="perfectly calibrated")
    for (name, part), colour, marker in zip(parts.items(), (BLUE, ORANGE), ("o", "s"), strict=False):
        used = part.count > 0
        total = part.count.sum()
        error = float((part.count * np.abs(part.accuracy - part.confidence))[used].sum() / total)
        upper.plot(part.confidence[used], part.accuracy[used], color=colour, linewidth=1.2)
        areas = 15 + 150 * part.count[used] / total  # a bin of two examples must not look like one of two hundred
        label = f"{name}: calibration error {error:.3f}"
        upper.scatter(part.confidence[used], part.accuracy[used], areas, colour, marker=marker, label=label, alpha=0.8)
        lower.stairs(part.count, part.edges, color=colour, linewidth=1.4)
    upper.set(xlim=(0, 1.02), ylim=(-0.03, 1.03), ylabel="accuracy")
    lower.set(xlabel="confidence (the largest probability)", ylabel="examples")
    lower.set_yscale("symlog", linthresh=10)  # nearly all lie in the last bin; those that do not are of interest
    highest = max(int(part.count.max()) for part in parts.values())
    ticks = [0, 5, *(10**power for power in range(1, math.ceil(math.log10(highest + 1)) + 1))]
    lower.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    lower.set_ylim(0, 1.5 * highest)
    for axes in (upper, lower):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    upper.legend(loc="upper left", frameon=False, prop={"size": 9})
    upper.set_title(title, **text_style(10))
    save_figure(figure, path)
