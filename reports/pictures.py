"""The pictures of a run: confusion matrix, curves, grid of images.

Figures are made and drawn without pyplot, so nothing here depends on a display, a chosen backend or global state, and
threads may draw at the same time. Every file is written aside and renamed.
"""

import bisect
import functools
import itertools
import math
import os
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from files import replace_file
from reports.records import Record, number, phase_of, usable_records

DPI = 100
MOST_CELLS = 400  # rows of a confusion picture: with more classes a cell stands for several
LOG_FROM = 20.0  # losses that differ by such a factor are drawn on a logarithmic scale
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"  # Okabe and Ito 2008; blue is dark and orange light in grey
FALLBACK_FONTS = (  # used where installed, for what matplotlib's own DejaVu Sans lacks, which is mainly CJK
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Source Han Sans SC",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC",
    "Hiragino Sans", "Hiragino Sans GB", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip
_drawing = threading.Lock()  # matplotlib's caches of fonts and glyphs are shared by all figures


def draw_confusion(
    path: str | os.PathLike[str],
    confusion: np.ndarray,
    class_names: Sequence[str],
    split: str,
    normalised: bool = False,
    classes_per_cell: int = 1,
) -> None:
    """Draws a confusion matrix, int [C, C]: counts, or per cent of each row.

    With `classes_per_cell` above 1 it is an overview: a row and a column stand for so many classes that follow each
    other, as the title says, and the axes carry class numbers (from 0) instead of names.

    The colour goes with the square root of the value: one mistake in a hundred is then visible beside a full diagonal.
    Cells carry their numbers where the longest fits: counts of three digits up to C of about 50, per cent at 101 too.
    """
    count = len(confusion)
    support = confusion.sum(axis=1, keepdims=True)  # [C, 1]
    values = np.asarray(confusion, np.float64)
    if normalised:
        values = np.where(support > 0, 100 * values / np.maximum(support, 1), np.nan)
    side = max(4.0, min(0.42 * count, 10.0), min(0.15 * count, 30.0) if classes_per_cell == 1 else 0.0)  # inches
    cell, every = side / count, math.ceil(count * 0.13 / side)
    if classes_per_cell == 1:
        of_class, names = "", [fit_text(name, 1.9) for name in picture_names(class_names[::every], every)]  # with room
    else:
        every = math.ceil(count / 10)
        of_class, names = "number of the ", [str(i * classes_per_cell) for i in range(0, count, every)]
    longest = max(map(_text_inches, names))
    upright = longest > cell * every - 0.1
    left, bottom, top, right = longest + 0.5, (longest if upright else 0.15) + 0.5, 0.5, 1.05
    width, height = left + side + right, bottom + side + top
    figure = Figure((width, height), dpi=DPI)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    image = _paint_cells(axes, values, cell, normalised)
    ticks = range(0, count, every)
    axes.set_xticks(ticks, names, rotation=90 if upright else 0, **text_style())
    axes.set_yticks(ticks, names, **text_style())
    axes.set_xlabel(f"{of_class}predicted class")
    axes.set_ylabel(f"{of_class}true class")
    bar_axes = figure.add_axes(((left + side + 0.15) / width, bottom / height, 0.18 / width, side / height))
    bar = figure.colorbar(image, cax=bar_axes, ticks=MaxNLocator(6, integer=True))
    bar.set_label(("per cent of the true class" if normalised else "images") + " (square-root colour scale)")
    absent = "; grey: no examples" if normalised and not support.all() else ""
    title = f"{split}: {int(support.sum())} examples{absent}"
    if classes_per_cell > 1:
        title += f"; a cell is {classes_per_cell} x {classes_per_cell} classes, mistakes among them on the diagonal"
    axes.set_title(fit_text(_drawable(title), side, 10), **text_style(10))
    save_figure(figure, path)


def image_grid(
    path: str | os.PathLike[str], images: Sequence[np.ndarray], titles: Sequence[str], columns: int, title: str = ""
) -> None:
    """Draws images (uint8 [H, W, 3], any sizes) in rows, each under its title of one or more lines; "" for none.

    A line too long for its cell is shortened. Raises ValueError without images.
    """
    if not images or len(images) != len(titles):
        raise ValueError(f"expected images and a title for each, got {len(images)} and {len(titles)}")
    lines = [text.split("\n") for text in titles]
    box, gap, line_height = 2.0, 0.12, 0.15  # inches
    text_height = max(map(len, lines)) * line_height + gap / 2 if any(titles) else 0.0
    shown_heights = [box * min(1.0, image.shape[0] / image.shape[1]) for image in images]
    row_heights = [max(shown_heights[i : i + columns]) for i in range(0, len(images), columns)]
    title, top = _drawable(title), 0.45 if title else gap
    width = max(min(columns, len(images)) * (box + gap), _text_inches(title, 10)) + gap
    height = top + sum(row_heights) + len(row_heights) * (text_height + 1.5 * gap)
    figure = Figure((width, height), dpi=DPI)
    figure.text(gap / width, 1 - 0.28 / height, title, verticalalignment="baseline", **text_style(10))
    for i, image in enumerate(images):
        row = i // columns
        x = gap + (i % columns) * (box + gap)
        y = top + sum(row_heights[:row]) + row * (text_height + 1.5 * gap)
        for j, line in enumerate(lines[i]):
            shown = fit_text(_drawable(line), box)
            figure.text(x / width, 1 - (y + (j + 0.75) * line_height) / height, shown, **text_style())
        y += text_height + row_heights[row]
        area = (x / width, 1 - y / height, box / width, row_heights[row] / height)
        axes = figure.add_axes(area, anchor="NW")
        axes.imshow(image)
        axes.set_axis_off()
    save_figure(figure, path)


def draw_curves(path: str | os.PathLike[str], lines: Iterable[Any]) -> None:
    """Draws loss, accuracy and learning rate against the epoch from the lines of metrics.jsonl; no records, no file.

    A record is {step, epoch, split: train|val, phase, loss, accuracy, learning_rate}; a figure that is missing, null,
    NaN or infinite leaves a gap. Lines that are no records are ignored. A phase with a record that has a `strength` was
    solved and not trained in steps: its records are points without a line, and the title says so. Without a learning
    rate there is no panel for it.
    """
    records = usable_records(lines)
    if not records:
        return
    solved = {phase_of(record) for record in records if math.isfinite(number(record, "strength"))}
    rates = [record for record in records if math.isfinite(number(record, "learning_rate"))]
    heights = (3, 3, 2) if rates else (3, 3)
    figure = Figure((8.0, 1.0 + sum(heights)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    styles = {"train": ("training", BLUE, "-", "."), "val": ("validation", ORANGE, "--", "o")}
    for split, (label, colour, line, marker) in styles.items():
        of_split = [record for record in records if record["split"] == split]
        for is_solved, group in itertools.groupby(of_split, key=lambda record: phase_of(record) in solved):
            part = list(group)
            few = marker if split == "val" or len(part) <= 100 else ""  # a single point has no line
            style = {"linestyle": "", "marker": "o"} if is_solved else {"linestyle": line, "marker": few}
            for axes, key in zip(panels[:2], ("loss", "accuracy"), strict=True):
                axes.plot(_column(part, "epoch"), _column(part, key), **style, color=colour, label=label,
                          markersize=5, linewidth=1.4)  # fmt: skip
    for _, group in itertools.groupby(rates, key=phase_of):  # no line from phase to phase
        of_phase = list(group)
        panels[2].plot(_column(of_phase, "epoch"), _column(of_phase, "learning_rate"), color=GREEN,
                       marker="." if len(rates) <= 100 else "", linewidth=1.4)  # fmt: skip
    for axes, label in zip(panels, ("loss", "accuracy", "learning rate"), strict=False):
        axes.set_ylabel(label)
        axes.grid(color="0.9")
    losses = _column(records, "loss")
    losses = losses[losses > 0]
    if losses.size and losses.max() > LOG_FROM * losses.min():
        panels[0].set_yscale("log", nonpositive="mask")
        panels[0].grid(color="0.95", which="minor")
    for axes in (panels[0], *panels[2:]):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    panels[-1].set_xlabel("epoch")
    _mark_phases(panels, records)
    _add_step_axis(panels[0], records)
    if solved:
        names = ", ".join(sorted(_drawable(str(phase)) for phase in solved))
        title = f"{names}: solved exactly, not in steps; its points are before and after"
        panels[0].set_title(fit_text(title, 7.0, 10), **text_style(10))
    by_label = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))  # each once
    figure.legend(by_label.values(), by_label.keys(), loc="outside upper right", ncols=2, frameon=False)
    save_figure(figure, path)


def draw_strengths(path: str | os.PathLike[str], lines: Iterable[Any]) -> None:
    """Draws how the strength of the head's L2 penalty was chosen, from the lines of metrics.jsonl; none, no file.

    Out-of-fold loss and accuracy ± their standard errors against each strength that was tried, and the chosen one.
    """
    solved = [r for r in usable_records(lines) if isinstance(r.get("out_of_fold"), list) and r["out_of_fold"]]
    if not solved:
        return
    points = [point for point in solved[-1]["out_of_fold"] if isinstance(point, dict)]
    figure = Figure((8.0, 5.0), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, key, label, colour in zip(
        panels, ("log_loss", "accuracy"), ("loss", "accuracy"), (BLUE, ORANGE), strict=True
    ):
        axes.errorbar(_column(points, "strength"), _column(points, key), _column(points, f"{key}_error"),
                      color=colour, marker=".", capsize=3, linewidth=1.4)  # fmt: skip
        axes.axvline(number(solved[-1], "strength"), color="red", linestyle="--", label="chosen")
        axes.set(xscale="log", ylabel=f"out-of-fold {label}")
        axes.grid(color="0.9")
    losses = _column(points, "log_loss")
    if np.nanmax(losses) > LOG_FROM * np.nanmin(losses) > 0:
        panels[0].set_yscale("log", nonpositive="mask")
    panels[0].legend(frameon=False)
    panels[1].set_xlabel("strength of the L2 penalty")
    save_figure(figure, path)


def phase_changes(records: Sequence[Record]) -> list[tuple[float, str]]:
    """(epoch, name) of every phase after the first, from records in the order of their steps.

    A phase begins where the one before left its last record, which is its last validation, not one log interval later.
    """
    known = [(number(record, "epoch"), phase_of(record)) for record in records]
    known = [(epoch, phase) for epoch, phase in known if math.isfinite(epoch) and phase is not None]
    return [(epoch, str(after)) for (epoch, before), (_, after) in itertools.pairwise(known) if before != after]


def _mark_phases(panels: Sequence[Axes], records: Sequence[Record]) -> None:
    """A red vertical line through every panel where a phase begins, with its name beside it in the first."""
    left, right = panels[0].get_xlim()
    for epoch, phase in phase_changes(records):
        for axes in panels:
            axes.axvline(epoch, color="red", linewidth=1.5)
        before = (epoch - left) / (right - left) > 0.6  # keeps the text inside the panel
        panels[0].annotate(
            fit_text(f"{_drawable(phase)} begins", 3.0), (epoch, 0.97), (-5 if before else 5, 0),
            xycoords=("data", "axes fraction"), textcoords="offset points", color="red",
            horizontalalignment="right" if before else "left", verticalalignment="top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}, **text_style(9),
        )  # fmt: skip


def _add_step_axis(axes: Axes, records: Sequence[Record]) -> None:
    """Steps along the top, where every record agrees on the number of steps in an epoch."""
    steps, epochs = _column(records, "step"), _column(records, "epoch")
    steps, epochs = steps[np.isfinite(epochs)], epochs[np.isfinite(epochs)]
    if not epochs.size or not epochs.max() > 0 or not steps.max() > 0:
        return
    rate = steps.max() / epochs.max()
    if np.allclose(steps, epochs * rate, atol=max(1.0, 0.002 * steps.max())):
        top = axes.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        top.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        top.set_xlabel("step")


def _paint_cells(axes: Axes, values: np.ndarray, cell: float, normalised: bool) -> AxesImage:
    """Colours the cells of a confusion matrix, `cell` inches wide, with lines between them and their numbers."""
    maximum = 100.0 if normalised else max(1.0, values.max())
    shades = colormaps["Blues"](np.linspace(0.15, 1, 255))
    colours = ListedColormap([(1, 1, 1, 1), *shades]).with_extremes(bad="0.85")  # white is zero and nothing else
    image = axes.imshow(values, cmap=colours, norm=PowerNorm(0.5, 0, maximum), interpolation="nearest")
    if cell > 0.1:
        edges, limits = np.arange(1, len(values)) - 0.5, (-0.5, len(values) - 0.5)
        axes.vlines(edges, *limits, color="0.8", linewidth=0.4)
        axes.hlines(edges, *limits, color="0.8", linewidth=0.4)
        axes.set(xlim=limits, ylim=limits[::-1])
    _annotate(axes, values, cell, normalised)
    return image


def _annotate(axes: Axes, values: np.ndarray, cell: float, normalised: bool) -> None:
    """Writes the numbers into the cells, `cell` inches wide, in the largest size that fits; none if that is too small.

    Zeros are left out of large matrices, where they would hide the mistakes.
    """
    least = 0 if len(values) < 10 else np.finfo(np.float64).tiny
    cells = np.argwhere(values >= least).tolist()  # no NaN
    texts = [_percent(float(values[i, j])) if normalised else f"{values[i, j]:.0f}" for i, j in cells]
    widest = max(map(_text_inches, set(texts)), default=0.1) / 8  # inches per point of size
    size = min(11.0, 0.9 * cell / widest, 0.7 * cell * 72)
    if size < 6.5:
        return
    for (i, j), text in zip(cells, texts, strict=True):
        dark = values[i, j] > 0.4 * (100 if normalised else values.max())
        colour = "0.6" if values[i, j] == 0 else "white" if dark else "black"
        axes.text(j, i, text, color=colour, fontsize=size, ha="center", va="center_baseline", parse_math=False)


def _percent(value: float) -> str:
    """A whole number, but 0 and 100 are kept for none and all."""
    return "<1" if 0 < value < 0.5 else ">99" if 99.5 <= value < 100 else f"{value:.0f}"


def picture_names(class_names: Sequence[str], every: int = 1) -> list[str]:
    """Names of the classes 0, every, 2 every, ... as pictures show them.

    What no font can draw is a box, and the class number then tells them apart.
    """
    drawn = [_drawable(name) for name in class_names]
    return [f"{i * every} {d}" if d.count("□") > n.count("□") else d
            for i, (d, n) in enumerate(zip(drawn, class_names, strict=True))]  # fmt: skip


def _drawable(text: str) -> str:
    """`text` on one line with "□" for every character that would make matplotlib warn of a missing glyph."""
    known = _fonts()[1]
    composed = unicodedata.normalize("NFC", text)
    return "".join(" " if c.isspace() else c if c.isprintable() and ord(c) in known else "□" for c in composed)


@functools.cache
def _fonts() -> tuple[tuple[str, ...], frozenset[int]]:
    """Font families in the order of preference, and the characters that one of them has."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ("DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed))
    fonts = [font_manager.get_font(font_manager.findfont(FontProperties(family=[name]))) for name in families]
    return families, frozenset().union(*(font.get_charmap() for font in fonts))


def text_style(size: float = 8) -> dict[str, Any]:
    """Keywords for text that a user chose: fonts that have its characters, and `$` is a dollar sign."""
    return {"fontfamily": list(_fonts()[0]), "fontsize": size, "parse_math": False}


@functools.lru_cache(maxsize=4096)
def _text_inches(text: str, size: float = 8) -> float:
    """The width of drawn text."""
    font = FontProperties(family=list(_fonts()[0]), size=size)
    renderer = RendererAgg(1, 1, DPI)
    width, _, _ = renderer.get_text_width_height_descent(text, font, False)
    return float(width) / DPI


def shorten(text: str, limit: int) -> str:
    """`text` in at most `limit` characters (2 or more), an ellipsis in its middle: names often differ in their ends."""
    head = limit // 2
    return text if len(text) <= limit else text[:head] + "…" + text[len(text) - (limit - head - 1) :]


def fit_text(text: str, inches: float, size: float = 8) -> str:
    """`text`, with an ellipsis in its middle where it would be wider than `inches`."""
    text = shorten(text, 200)
    if _text_inches(text, size) <= inches:
        return text
    lengths = range(2, len(text))
    first = bisect.bisect_left(lengths, True, key=lambda length: _text_inches(shorten(text, length), size) > inches)
    return shorten(text, max(first + 1, 2))


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    with _drawing, replace_file(path) as aside:
        FigureCanvasAgg(figure).print_png(aside, metadata={"Software": None})


def _column(records: Sequence[Record], key: str) -> np.ndarray:
    """float64 [len(records)], NaN for what is missing or not finite."""
    return np.array([number(record, key) for record in records], np.float64)
