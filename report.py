"""What an evaluation leaves for people: result files, tables, and, with `pictures.py` behind it, every picture.

Every file is written aside and renamed.
"""

import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import metrics
from files import write_csv, write_json, write_text
from pictures import draw_confusion, draw_curves, image_grid, picture_names

__all__ = [
    "draw_confusion", "draw_curves", "draw_worst", "format_cell", "image_grid", "markdown_table", "picture_names",
    "printable", "results_text", "table", "text_width", "worst_examples", "write_results",
]  # fmt: skip


def write_results(
    directory: str | os.PathLike[str],
    split: str,
    class_names: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    extra: dict[str, Any] | None = None,
    read_image: Callable[[str], np.ndarray] | None = None,
    worst_count: int = 20,
) -> dict[str, Any]:
    """Writes all that is known about `split` into `directory` and returns what `results-<split>.json` holds.

    labels int [N], probabilities float [N, C], `names` the N images, N at least 1; `extra` (run, step, ...) joins the
    scores in the JSON and the text. Files: results-<split>.json and .txt, confusion-<split>.csv and .png,
    confusion-<split>-normalised.png, predictions-<split>.csv and, with `read_image` (name to uint8 [H, W, 3]),
    worst-<split>.png. Numbers come before pictures: a failure to draw loses none of them. CSV and text are UTF-8 with
    lone surrogates as backslash escapes.
    """
    directory, labels, probabilities = Path(directory), np.asarray(labels), np.asarray(probabilities)
    if not len(labels) or len(names) != len(labels):
        raise ValueError(f"expected a name for each of at least one example, got {len(names)} for {len(labels)}")
    predictions = probabilities.argmax(axis=1)  # [N]
    confusion = metrics.confusion_matrix(labels, predictions, len(class_names))
    scores = metrics.scores(confusion, probabilities, labels, class_names)
    extra = extra or {}
    if clash := sorted(({"split"} | scores.keys()) & extra.keys()):
        raise ValueError(f"extra would hide the scores {clash}")
    results = {"split": split, **extra, **scores}
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / f"results-{split}.txt", results_text(confusion, class_names, scores, extra))
    header = ["true \\ predicted", *class_names]
    rows = [[name, *counts] for name, counts in zip(class_names, confusion.tolist(), strict=True)]
    write_csv(directory / f"confusion-{split}.csv", header, rows)
    _write_predictions(directory / f"predictions-{split}.csv", class_names, labels, probabilities, names)
    write_json(directory / f"results-{split}.json", results)
    draw_confusion(directory / f"confusion-{split}.png", confusion, class_names, split)
    draw_confusion(directory / f"confusion-{split}-normalised.png", confusion, class_names, split, normalised=True)
    if read_image is not None:
        path = directory / f"worst-{split}.png"
        draw_worst(path, split, class_names, labels, probabilities, names, read_image, worst_count)
    return results


def results_text(
    confusion: np.ndarray, class_names: Sequence[str], scores: dict[str, Any], extra: dict[str, Any] | None = None
) -> str:
    """The confusion matrix, the scores, and in the last line the number of examples."""
    names = [printable(name) for name in class_names]
    row_names = [f"{i} {name}" for i, name in enumerate(names)]
    column_names, note = names, ""
    if sum(max(text_width(name), 4) + 2 for name in names) > 96:  # wider than a terminal or a printed page
        column_names, note = [str(i) for i in range(len(names))], ", numbered as the rows are"
    counts = [[row, *line] for row, line in zip(row_names, confusion.tolist(), strict=True)]
    ratios = ("precision", "recall", "f1")
    per_class = [[name, *(line[r] for r in ratios), line["support"], line["predicted"]]
                 for name, line in zip(row_names, scores["per_class"], strict=True)]  # fmt: skip
    means = [[f"{mean} mean", *(scores[mean][r] for r in ratios)] for mean in ("macro", "weighted")]
    single = {k.replace("_", " "): v for k, v in scores.items() if not isinstance(v, list | dict) and k != "examples"}
    return "\n".join([
        f"Confusion matrix: a row per true class, a column per predicted class{note}",
        "", table(counts, ["", *column_names]),
        "", table(list(single.items()), ["score", "value"]),
        "", table(per_class + means, ["class", *ratios, "support", "predicted"]),
        "", *(f"{printable(key)}: {format_cell(value)}" for key, value in (extra or {}).items()),
        f"examples: {scores['examples']}", "",
    ])  # fmt: skip


def draw_worst(
    path: str | os.PathLike[str],
    split: str,
    class_names: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    read_image: Callable[[str], np.ndarray],
    count: int = 20,
) -> None:
    """A contact sheet of mistakes, the highest probability of a wrong class first; without any, the closest calls."""
    chosen, mistakes = worst_examples(labels, probabilities, count)
    title = f"{split}: the {len(chosen)} most confident of {mistakes} mistakes in {len(labels)} examples"
    if mistakes == 0:
        title = f"{split}: no mistakes in {len(labels)} examples; the {len(chosen)} least confident right answers"
    class_labels, titles, images = picture_names(class_names), [], []
    for i in chosen:
        true, predicted = int(labels[i]), int(probabilities[i].argmax())
        of_true = f" (true class {probabilities[i, true]:.3f})" if true != predicted else ""
        shares = f"probability {probabilities[i, predicted]:.3f}{of_true}"
        file_name = printable(os.path.basename(names[i]))
        titles.append(f"true: {class_labels[true]}\npredicted: {class_labels[predicted]}\n{shares}\n{file_name}")
        image = Image.fromarray(read_image(names[i]))
        image.thumbnail((224, 224))  # a sheet of full photographs would take gigabytes
        images.append(np.asarray(image))
    image_grid(path, images, titles, min(5, len(images)), title)


def worst_examples(labels: np.ndarray, probabilities: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """Indices (at most `count`, worst first) and the number of mistakes; see `draw_worst`. Ties: the earlier first."""
    labels, predictions = np.asarray(labels), probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)  # [N]
    wrong = np.flatnonzero(predictions != labels)
    if len(wrong):
        return wrong[np.argsort(-confidence[wrong], kind="stable")][:count], len(wrong)
    return np.argsort(confidence, kind="stable")[:count], 0


def printable(text: object) -> str:
    r"""`text` on one line: line breaks, other control characters and lone surrogates as escapes such as `\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def table(rows: Sequence[Sequence[Any]], header: Sequence[Any]) -> str:
    """An aligned table: header, a rule, a line per row; columns of numbers to the right, others to the left.

    Floats get four decimals (three digits below 0.001), None is "-". Rows may be shorter than the header. Widths are
    a terminal's: two cells for a CJK character, none for a combining mark. No line ends in spaces or a line break.
    """
    columns = range(len(header))
    numeric = _numeric_columns(rows, len(header))
    cells = [[printable(cell) for cell in header]] + [_cells(row, len(header)) for row in rows]
    widths = [max(text_width(line[i]) for line in cells) for i in columns]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for line in cells:
        padding = [" " * (widths[i] - text_width(line[i])) for i in columns]
        lines.append("  ".join(padding[i] + line[i] if numeric[i] else line[i] + padding[i] for i in columns).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[Any]], header: Sequence[Any]) -> str:
    """The same table in GitHub's Markdown; `|` in a cell is escaped."""
    rule = ["---:" if right else "---" for right in _numeric_columns(rows, len(header))]
    lines = [[printable(cell) for cell in header], *(_cells(row, len(header)) for row in rows)]
    escaped = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in line] for line in lines]
    escaped.insert(1, rule)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def format_cell(value: Any) -> str:
    """How a table shows one value."""
    if value is None:
        return "-"
    if isinstance(value, float):  # NumPy's float64 is one too
        return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.3g}"
    return printable(value)


def text_width(text: str) -> int:
    """The number of terminal cells that `text` takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)


def _cells(row: Sequence[Any], count: int) -> list[str]:
    return [format_cell(row[i]) if i < len(row) else "" for i in range(count)]


def _numeric_columns(rows: Sequence[Sequence[Any]], count: int) -> list[bool]:
    """For each column whether it holds numbers only (None is neither here nor there)."""
    columns = [[row[i] for row in rows if i < len(row) and row[i] is not None] for i in range(count)]
    return [bool(column) and all(hasattr(value, "__float__") for value in column) for column in columns]


def _write_predictions(
    path: Path, class_names: Sequence[str], labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]
) -> None:
    header = ["image", "true", "predicted", "probability", "probability_true", "correct"]
    rows = []
    for name, row, true, predicted in zip(names, probabilities, labels, probabilities.argmax(axis=1), strict=True):
        shares = f"{row[predicted]:.6f}", f"{row[true]:.6f}"
        rows.append([name, class_names[true], class_names[predicted], *shares, int(true == predicted)])
    write_csv(path, header, rows)
