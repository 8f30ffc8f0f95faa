"""The pictures of tools.explore_data that are charts: counts, sizes, densities of colour, mean images."""

import itertools
import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from reports.pictures import BLUE, DPI, GREEN, ORANGE, fit_text, picture_names, save_figure, text_style

# Okabe and Ito 2008, which colour-blind readers can tell apart; line styles tell them apart in black and white.
SPLIT_STYLES = {"train": (BLUE, "o"), "val": (ORANGE, "^"), "test": (GREEN, "s")}
CHANNEL_STYLES = (("red", "#D55E00", "-"), ("green", GREEN, "--"), ("blue", BLUE, ":"))
MOST_PANELS = 120  # classes with a panel of their own in one picture
# Tick labels of a logarithmic axis, and their tenfolds, by how many times its least value its greatest is at least.
LOG_STEPS: tuple[tuple[float, tuple[float, ...]], ...] = ((500, (1,)), (10, (1, 2, 5)), (2.5, (1, 1.5, 2, 3, 4, 6, 8)))


def draw_counts(path: str | os.PathLike[str], class_names: Sequence[str], counts: dict[str, np.ndarray]) -> None:
    """Images per class, the largest class on top; `counts`: int [C] for each split, drawn one after the other."""
    total = np.sum(list(counts.values()), axis=0)  # [C]
    order = np.argsort(-total, kind="stable")
    names = picture_names(class_names)
    bar = 0.24 if len(order) <= 40 else 0.16  # inches
    figure = Figure((8.0, 1.2 + bar * len(order)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(order))
    for split, of_class in counts.items():
        axes.barh(range(len(order)), of_class[order], 0.8, left, color=SPLIT_STYLES[split][0], label=split)
        left += of_class[order]
    for y, number in enumerate(left):
        axes.annotate(f"{number:.0f}", (number, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(order)), [fit_text(names[i], 2.2) for i in order], **text_style(8 if bar > 0.2 else 7))
    axes.set(xlabel="images", ylim=(len(order) - 0.4, -0.6))
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    save_figure(figure, path)


def draw_sizes(path: str | os.PathLike[str], sizes: dict[str, np.ndarray], image_size: int) -> None:
    """Width against height, aspect ratios and shorter sides; `sizes`: int [N, 2] of (height, width) by split."""
    sizes = {split: pairs for split, pairs in sizes.items() if len(pairs)}
    figure = Figure((10.0, 6.4), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    scatter, aspects, shorts = (figure.add_subplot(place) for place in (grid[:, 0], grid[0, 1], grid[1, 1]))
    for split, pairs in sizes.items():
        colour, marker = SPLIT_STYLES[split]
        scatter.scatter(pairs[:, 1], pairs[:, 0], 16, c=colour, marker=marker, alpha=0.35, linewidths=0, label=split)
    everything = np.concatenate(list(sizes.values()))
    low, high = 0.85 * everything.min(), 1.15 * everything.max()
    scatter.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
    scatter.annotate("square", (high, high), (-6, -14), textcoords="offset points", ha="right", color="0.4", fontsize=8,
                     rotation=45, rotation_mode="anchor")  # fmt: skip
    scatter.set(xlabel="width, pixels", ylabel="height, pixels", xlim=(low, high), ylim=(low, high), aspect="equal")
    ratios = {split: pairs[:, 1] / pairs[:, 0] for split, pairs in sizes.items()}
    _histograms(aspects, ratios, "width / height")
    aspects.axvline(1, color="0.6", linewidth=1, zorder=0)
    short_sides = {split: pairs.min(axis=1) for split, pairs in sizes.items()}
    _histograms(shorts, short_sides, "shorter side, pixels (line: the network's input)")
    shorts.axvline(image_size, color="black", linewidth=1, linestyle="--")
    for axes, both in ((scatter, True), (aspects, False), (shorts, False)):
        _logarithmic(axes, both)
    handles, labels = scatter.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    save_figure(figure, path)


def _histograms(axes: Axes, values: dict[str, np.ndarray], label: str) -> None:
    """An outline for each split, in logarithmic bins: the share of its images."""
    everything = np.concatenate(list(values.values()))
    low, high = everything.min(), everything.max()
    if high < 1.3 * low:  # all alike: still a bar of some width
        low, high = low / 1.3, high * 1.3
    edges = np.geomspace(low, high * 1.0001, 31).tolist()
    for (split, of_split), line in zip(values.items(), itertools.cycle(("-", "--", ":"))):
        weights = np.full(len(of_split), 100 / len(of_split))
        axes.hist(of_split, edges, weights=weights, histtype="step", color=SPLIT_STYLES[split][0],
                  linestyle=line, linewidth=1.6)  # fmt: skip
    axes.set(xlabel=label, ylabel="per cent of the split")
    axes.grid(color="0.9")


def _logarithmic(axes: Axes, both: bool) -> None:
    """Logarithmic axes with plain numbers on them."""
    axes.set_xscale("log")
    if both:
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis) if both else (axes.xaxis,):
        low, high = axis.get_view_interval()
        steps = next((steps for least, steps in LOG_STEPS if high / low >= least), None)
        if steps is None:  # hardly curved: ticks as on a linear axis
            axis.set_major_locator(MaxNLocator(6))
        else:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            decades = range(first, last + 1, max(1, (last - first) // 5))
            axis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def draw_densities(path: str | os.PathLike[str], titles: Sequence[str], densities: np.ndarray) -> None:
    """How often each value of red, green and blue occurs: a panel each of `densities`, [P, 3, bins] that sum to 1.

    Only the first `MOST_PANELS` are drawn.
    """
    densities, names = densities[:MOST_PANELS], picture_names(titles)
    bins = densities.shape[-1]
    per_level = densities * (100 * bins / 256)  # per cent of the pixels at each of the 256 levels
    columns = min(5, len(densities))
    rows = math.ceil(len(densities) / columns)
    figure = Figure((2.3 * columns + 0.6, 1.7 * rows + 0.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    centres = (np.arange(bins) + 0.5) * 256 / bins
    # Pure black or white can be far more frequent than all else, and would press every curve flat.
    top = 1.15 * max(float(np.quantile(per_level, 0.995)), 0.4)
    for axes, title, of_panel in zip(panels, names, per_level, strict=False):
        for (label, colour, line), values in zip(CHANNEL_STYLES, of_panel, strict=True):
            axes.plot(centres, values, line, color=colour, linewidth=1.3, label=label)
        axes.set_title(fit_text(title, 2.1), **text_style(8))
        axes.grid(color="0.9")
        axes.set(xlim=(0, 256), ylim=(0, top), xticks=(0, 128, 255))
        axes.tick_params(labelsize=7)
    for axes in panels[len(densities) :]:
        axes.set_axis_off()
    figure.supxlabel("value of the channel, 0 to 255", fontsize=9)
    figure.supylabel("per cent of pixels per value", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)
