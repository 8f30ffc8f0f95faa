"""What an evaluation leaves for people: the result files of a split.

Every file is written aside and renamed.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from console import one_line
from files import write_csv, write_json, write_text
from reports import metrics
from reports.pictures import draw_confusion, image_grid, picture_names
from reports.tables import format_cell, table, text_width


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
    names = [one_line(name) for name in class_names]
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
        "", *(f"{one_line(key)}: {format_cell(value)}" for key, value in (extra or {}).items()),
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
        file_name = one_line(os.path.basename(names[i]))
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


def _write_predictions(
    path: Path, class_names: Sequence[str], labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]
) -> None:
    header = ["image", "true", "predicted", "probability", "probability_true", "correct"]
    rows = []
    for name, row, true, predicted in zip(names, probabilities, labels, probabilities.argmax(axis=1), strict=True):
        shares = f"{row[predicted]:.6f}", f"{row[true]:.6f}"
        rows.append([name, class_names[true], class_names[predicted], *shares, int(true == predicted)])
    write_csv(path, header, rows)
