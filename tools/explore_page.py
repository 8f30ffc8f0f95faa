"""The HTML page of tools.explore_data: one file that holds its pictures and asks nothing of the network."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from console import one_line
from data import Preprocessing
from dataset.layouts import LabelledImages
from files import write_text

FAULTS_SHOWN = 20
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }
figure { margin: 1rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { font-weight: bold; border-bottom: 0; }
"""


def write_page(
    folder: Path,
    data: str,
    found: LabelledImages,
    sizes: Sequence[tuple[int, int]],
    faults: Sequence[str],
    spec: Preprocessing,
) -> Path:
    """Writes `index.html` beside the pictures, which it holds too; `sizes`: (height, width) of the sampled images."""
    total = sum(map(len, found.splits.values()))
    title = escape(one_line(f"Data set {data}"))
    looked_at = len(sizes) + len(faults)
    which = "All images were looked at"
    if looked_at < total:
        which = f"A sample of {looked_at} was looked at, with equal numbers of each class as far as there are so many"
    changes = ", ".join(spec.augment) or "none"
    median = np.median(np.array(sizes), axis=0)
    figures = [
        ("Images per class", "counts.png", "Stacked bars: images per class and split, the largest class first", ""),
        ("Sizes", "sizes.png", "Scatter of width against height; histograms of aspect ratio and of the shorter side",
         f"The median image is {median[1]:.0f} pixels wide and {median[0]:.0f} high. "
         f"Crops of less than {spec.image_size} pixels, left of the dashed line, are enlarged for the network."),
        ("What the network sees", "samples.png", "Rows of training images, each followed by four random views of it",
         f"Random square crops (margin {spec.crop_margin}) at {spec.image_size} × {spec.image_size} pixels; "
         f"other changes: {changes}. The mean that the network's input lacks is added back."),
        ("Colours", "colours.png", "Density of the red, green and blue values, for all images and for each class",
         "How often each value occurs; each image counts the same, whatever its size. Peaks at pure black and white "
         "(plain backgrounds) may go beyond the top."),
        ("Mean images", "means.png", "Mean of the central crops, of all images and of each class",
         "What still shows in a mean is where the images of a class agree."),
    ]  # fmt: skip
    body = [
        f"<h1>{title}</h1>",
        f"<p>{total} images, {len(found.class_names)} classes, layout: {escape(found.layout)}. {which}; "
        f"{len(faults)} could not be read{' and are left out' if faults else ''}. The counts are of all files.</p>",
        *_faults(faults),
    ]
    for heading, name, alternative, text in figures:
        body += [
            f"<h2>{heading}</h2>",
            *([f"<p>{escape(text)}</p>"] if text else []),
            figure(folder / name, alternative),
        ]
        if name == "counts.png":
            body.append(_counts(found))
    write_html(folder / "index.html", title, body)
    return folder / "index.html"


def write_html(path: Path, title: str, body: Sequence[str]) -> None:
    """Writes a page; `title` and `body` are HTML."""
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n",
    )


def figure(picture: Path, alternative: str) -> str:
    """A picture as HTML that holds it."""
    encoded = base64.b64encode(picture.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{encoded}" alt="{escape(alternative)}"></figure>'


def _faults(faults: Sequence[str]) -> list[str]:
    if not faults:
        return []
    items = "".join(f"<li>{escape(one_line(fault))}</li>" for fault in faults[:FAULTS_SHOWN])
    more = f"; the first {FAULTS_SHOWN}" if len(faults) > FAULTS_SHOWN else ""
    return [f"<p>Bad files{more} (<code>python -m tools.check_data</code> lists all):</p><ul>{items}</ul>"]


def _counts(found: LabelledImages) -> str:
    """The table of counts; a row per class and their sums last."""
    splits = [split for split, examples in found.splits.items() if len(examples)]
    classes = len(found.class_names)
    columns = [np.bincount(found.splits[split].labels, minlength=classes) for split in splits]
    numbers = np.stack([*columns, np.sum(columns, axis=0)], axis=1)  # [C, splits + 1]
    rows = [[one_line(name), *line] for name, line in zip(found.class_names, numbers.tolist(), strict=True)]
    rows.append(["all", *numbers.sum(axis=0).tolist()])
    head = "".join(f'<th scope="col">{name}</th>' for name in ("class", *splits, "all"))
    lines = ["<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>\n<thead><tr>" + head + "</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
