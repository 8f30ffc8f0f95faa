"""The pictures of tools.clean_data and the HTML page that holds them."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from console import one_line
from dataset.images import read_image
from reports.pictures import BLUE, ORANGE, image_grid, save_figure
from tools.clean_findings import Findings, Images
from tools.explore_page import figure, write_html

SHOWN = 60  # images of a contact sheet
COLUMNS = 5  # of a sheet at most
GROUPS_SHOWN = 30
SIDE = 300  # pixels, of a picture in a sheet
BLANK = np.full((1, 1, 3), 255, np.uint8)

Cell = tuple[int, str]  # a row of `Images`, or -1 for none, and its title


def write_pages(folder: Path, data: str, images: Images, found: Findings) -> Path:
    """Writes the contact sheets, the picture of the thresholds, and `index.html` that holds them all."""
    draw_thresholds(folder / "thresholds.png", found)
    names = [one_line(name) for name in images.class_names]
    title = escape(one_line(f"What to look at in {data}"))
    issues = [
        (i.index, f"{names[i.given]} → {names[i.suggested]}?\nscore {i.score:.2f}\n{one_line(images.names[i.index])}")
        for i in found.issues[:SHOWN]
    ]
    outliers = [
        (int(i), f"{names[images.labels[i]]}\ndistance {found.distances[i]:.3f}\n{one_line(images.names[i])}")
        for i in found.outliers[:SHOWN]
    ]
    columns = min(COLUMNS, max(map(len, found.groups[:GROUPS_SHOWN]), default=1))
    copies = _group_cells(images, found, names, columns)
    body = [
        f"<h1>{title}</h1>",
        f"<p>{len(images.names)} images, {len(names)} classes. A linear head on the features of the pretrained network "
        f"is right for {100 * found.accuracy:.2f} ± {100 * found.accuracy_error:.2f} % of them, out of fold.</p>",
        "<p>Nothing was changed. Write <code>drop</code> or another class into the column <code>action</code> of "
        "<code>label-issues.csv</code>, for the rows that are wrong (rows for other images may be added), and train "
        "with <code>--relabel</code> and that file.</p>",
        f"<h2>Labels that are probably wrong: {len(found.issues)}</h2>",
        "<p>The surest first. The score is by how much likelier the suggested class is, as a difference of "
        "probabilities, to a head that did not train on the image.</p>",
        *_sheet(folder / "label-issues.png", images, issues, len(found.issues) - SHOWN),
        f"<h2>Groups of near-duplicates: {len(found.groups)}</h2>",
        "<p>A row for each group. First those with images in several splits, which make scores too good, then those "
        f"of several classes. In 12 × 12 pixels their similarity is {found.duplicates.threshold:.4f} or more.</p>",
        *_sheet(folder / "duplicates.png", images, copies, len(found.groups) - GROUPS_SHOWN, columns),
        f"<h2>Outliers: {len(found.outliers)}</h2>",
        "<p>The farthest first, by the distance to the tenth nearest image, whatever the class. One image in a hundred "
        "is always listed: most of them are only unusual.</p>",
        *_sheet(folder / "outliers.png", images, outliers, len(found.outliers) - SHOWN),
        "<h2>The limits</h2>",
        "<p>Both come from the distances themselves: the median of their logarithms, and several times their usual "
        "deviation from it; or, for outliers, the farthest one in a hundred.</p>",
        figure(
            folder / "thresholds.png", "Histograms of the distances, with the limits of near-duplicates and outliers"
        ),
    ]
    write_html(folder / "index.html", title, body)
    return folder / "index.html"


def _sheet(path: Path, images: Images, cells: Sequence[Cell], more: int, columns: int = COLUMNS) -> list[str]:
    """Draws a contact sheet; what the page says of it and shows."""
    if not cells:
        path.unlink(missing_ok=True)  # of an earlier call
        return ["<p>None found.</p>"]
    image_grid(path, [_small(images, row) for row, _ in cells], [title for _, title in cells], columns)
    note = [f"<p>{more} more are in the CSV.</p>"] if more > 0 else []
    return [figure(path, path.stem.replace("-", " ")), *note]


def _group_cells(images: Images, found: Findings, names: Sequence[str], columns: int) -> list[Cell]:
    """A line of cells for each group, the last ones empty."""
    cells: list[Cell] = []
    for number, group in enumerate(found.groups[:GROUPS_SHOWN], 1):
        more = f" ({len(group) - columns} more)" if len(group) > columns else ""
        shown = [
            (
                int(i),
                f"group {number}{more}: {images.splits[i]}\n{names[images.labels[i]]}\n{one_line(images.names[i])}",
            )
            for i in group[:columns]
        ]
        cells += shown + [(-1, "\n\n")] * (columns - len(shown))
    return cells


def _small(images: Images, row: int) -> np.ndarray:
    """An image of the data set as the sheets show it."""
    if row < 0:
        return BLANK
    picture = Image.fromarray(read_image(images.paths[row]))
    picture.thumbnail((SIDE, SIDE))
    return np.asarray(picture)


def draw_thresholds(path: Path, found: Findings) -> None:
    """Draws the distances that near-duplicates and outliers are told by, each with its limit."""
    drawing = Figure(figsize=(10, 3.6), layout="constrained")
    nearest, threshold = np.asarray(found.duplicates.nearest, np.float64), found.duplicates.threshold
    panels = [
        (np.sqrt(np.maximum(2 - 2 * nearest, 0)), np.sqrt(2 - 2 * threshold),
         "log", "distance to the nearest image, of 12 × 12 pixels", "near-duplicates: left of"),
        (found.distances, found.distances[found.outliers].min(initial=np.inf),
         "linear", "distance to the tenth nearest image, of features", "outliers: from"),
    ]  # fmt: skip
    for axes, (distances, limit, scale, label, name) in zip(drawing.subplots(1, 2), panels, strict=True):
        values = np.maximum(np.asarray(distances, np.float64), 1e-3)  # exact copies at the left end of a log axis
        limits = [limit] if np.isfinite(limit) else []
        if len(values):
            low, high = min([values.min(), *limits]), max([values.max(), *limits])
            axes.hist(values, np.geomspace(low / 1.05, high * 1.05, 60), color=BLUE)
        for value in limits:
            axes.axvline(value, color=ORANGE, linestyle="--", label=f"{name} {value:.3f}")
            axes.legend()
        axes.set(xscale=scale, xlabel=label, ylabel="images")
    save_figure(drawing, path)
