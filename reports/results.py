"""What an evaluation leaves for people: the result files of a split.

Every file is written aside and renamed.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from console import one_line
from files import defused, defused_path, write_csv, write_json, write_text
from reports import metrics
from reports.metrics import Outcomes
from reports.pictures import MOST_CELLS, draw_confusion, image_grid, picture_names
from reports.tables import format_cell, table, text_width

MANY = 50  # with more classes, text lists the LISTED most telling lines, and a CSV the pairs that occur
LISTED = 30


def write_results(
    directory: str | os.PathLike[str],
    split: str,
    class_names: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray | Iterable[np.ndarray],
    names: Sequence[str],
    extra: dict[str, Any] | None = None,
    read_image: Callable[[str], np.ndarray] | None = None,
    worst_count: int = 20,
) -> dict[str, Any]:
    """Writes all that is known about `split` into `directory` and returns what `results-<split>.json` holds.

    labels int [N]; probabilities float [N, C], or the same in blocks of rows, of which one at a time is held (for many
    classes); `names` the N images, N at least 1; `extra` (run, step, ...) joins the scores in the JSON and the text.

    Files: results-<split>.json and .txt, confusion-<split>.csv and .png, confusion-<split>-normalised.png,
    predictions-<split>.csv and, with `read_image` (name to uint8 [H, W, 3]), worst-<split>.png. Numbers come before
    pictures: a failure to draw loses none of them. CSV and text are UTF-8 with lone surrogates as backslash escapes.

    The confusion CSV is the matrix, header `true \\ predicted` and the class names; with more than MANY classes it is
    the pairs that occur, header `true,predicted,count`. In CSV files a name that a spreadsheet would run as a formula
    is changed: a class "=x" is "'=x" there and an image "=x.jpg" is "./=x.jpg", the same file; the JSON has class names
    as they are.
    """
    directory, labels = Path(directory), np.asarray(labels)
    if not len(labels) or len(names) != len(labels):
        raise ValueError(f"expected a name for each of at least one example, got {len(names)} for {len(labels)}")
    outcomes = metrics.outcomes(probabilities, labels)
    scores = metrics.scores(outcomes, class_names)
    extra = extra or {}
    if clash := sorted(({"split"} | scores.keys()) & extra.keys()):
        raise ValueError(f"extra would hide the scores {clash}")
    results = {"split": split, **extra, **scores}
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / f"results-{split}.txt", results_text(outcomes, class_names, scores, extra))
    _write_confusion(directory / f"confusion-{split}.csv", class_names, outcomes)
    _write_predictions(directory / f"predictions-{split}.csv", class_names, outcomes, names)
    write_json(directory / f"results-{split}.json", results)
    per_cell = math.ceil(len(class_names) / MOST_CELLS)
    cells = math.ceil(len(class_names) / per_cell)
    confusion = metrics.confusion_matrix(outcomes.labels // per_cell, outcomes.predictions // per_cell, cells)
    for name, normalised in ((f"confusion-{split}.png", False), (f"confusion-{split}-normalised.png", True)):
        draw_confusion(directory / name, confusion, class_names, split, normalised, per_cell)
    if read_image is not None:
        draw_worst(directory / f"worst-{split}.png", split, class_names, outcomes, names, read_image, worst_count)
    return results


def results_text(
    outcomes: Outcomes, class_names: Sequence[str], scores: dict[str, Any], extra: dict[str, Any] | None = None
) -> str:
    """The confusion matrix, the scores, and in the last line the number of examples.

    With more than MANY classes the most confused pairs stand for the matrix, and of the classes only those with the
    lowest F1 are listed.
    """
    names = [f"{i} {one_line(name)}" for i, name in enumerate(class_names)]
    elsewhere = ("macro", "weighted", "per_class", "examples")
    single = {k.replace("_", " ").replace("95", "95 %"): v for k, v in scores.items() if k not in elsewhere}
    single = {k: "{:.4f} to {:.4f}".format(*v) if isinstance(v, list) else v for k, v in single.items()}
    shown = list(range(len(names)))
    title = []
    if len(names) > MANY:
        occurring = [i for i in shown if scores["per_class"][i]["support"]]
        shown = sorted(occurring, key=lambda i: scores["per_class"][i]["f1"])[:LISTED]
        title = [f"The {len(shown)} lowest F1 of the {len(occurring)} classes that occur, of {len(names)}", ""]
    ratios = ("precision", "recall", "f1")
    per_class = [[names[i], *(scores["per_class"][i][key] for key in (*ratios, "support", "predicted"))] for i in shown]
    means = [[f"{mean} mean", *(scores[mean][r] for r in ratios)] for mean in ("macro", "weighted")]
    return "\n".join([
        *(_matrix_text if len(names) <= MANY else _pairs_text)(outcomes, class_names),
        "", table(list(single.items()), ["score", "value"]),
        "", *title, table(per_class + means, ["class", *ratios, "support", "predicted"]),
        "", *(f"{one_line(key)}: {format_cell(value)}" for key, value in (extra or {}).items()),
        f"examples: {scores['examples']}", "",
    ])  # fmt: skip


def _matrix_text(outcomes: Outcomes, class_names: Sequence[str]) -> list[str]:
    column_names, note = [one_line(name) for name in class_names], ""
    row_names = [f"{i} {name}" for i, name in enumerate(column_names)]
    if sum(max(text_width(name), 4) + 2 for name in column_names) > 96:  # wider than a terminal or a printed page
        column_names, note = [str(i) for i in range(len(class_names))], ", numbered as the rows are"
    confusion = metrics.confusion_matrix(outcomes.labels, outcomes.predictions, len(class_names))
    rows = [[row, *line] for row, line in zip(row_names, confusion.tolist(), strict=True)]
    title = f"Confusion matrix: a row per true class, a column per predicted class{note}"
    return [title, "", table(rows, ["", *column_names])]


def _pairs_text(outcomes: Outcomes, class_names: Sequence[str]) -> list[str]:
    pairs = metrics.confused_pairs(outcomes.labels, outcomes.predictions)  # [P, 3]
    wrong = pairs[pairs[:, 0] != pairs[:, 1]]
    if not len(wrong):
        return ["No class is confused with another"]
    most = wrong[np.argsort(-wrong[:, 2], kind="stable")][:LISTED]
    support = np.bincount(outcomes.labels, minlength=len(class_names))
    rows = [[f"{i} {class_names[i]}", f"{j} {class_names[j]}", n, n / int(support[i])] for i, j, n in most.tolist()]
    title = f"The {len(most)} most confused of {len(wrong)} confused pairs; the share is of the true class's examples"
    return [title, "", table(rows, ["true class", "predicted class", "examples", "share"])]


def draw_worst(
    path: str | os.PathLike[str],
    split: str,
    class_names: Sequence[str],
    outcomes: Outcomes,
    names: Sequence[str],
    read_image: Callable[[str], np.ndarray],
    count: int = 20,
) -> None:
    """A contact sheet of mistakes, the highest probability of a wrong class first; without any, the closest calls."""
    chosen, mistakes = worst_examples(outcomes, count)
    title = f"{split}: the {len(chosen)} most confident of {mistakes} mistakes in {len(outcomes.labels)} examples"
    if mistakes == 0:
        title = (
            f"{split}: no mistakes in {len(outcomes.labels)} examples; the {len(chosen)} least confident right answers"
        )
    class_labels, titles, images = picture_names(class_names), [], []
    for i in chosen:
        true, predicted = int(outcomes.labels[i]), int(outcomes.predictions[i])
        of_true = f" (true class {outcomes.of_label[i]:.3f})" if true != predicted else ""
        shares = f"probability {outcomes.confidence[i]:.3f}{of_true}"
        file_name = one_line(os.path.basename(names[i]))
        titles.append(f"true: {class_labels[true]}\npredicted: {class_labels[predicted]}\n{shares}\n{file_name}")
        image = Image.fromarray(read_image(names[i]))
        image.thumbnail((224, 224))  # a sheet of full photographs would take gigabytes
        images.append(np.asarray(image))
    image_grid(path, images, titles, min(5, len(images)), title)


def worst_examples(outcomes: Outcomes, count: int) -> tuple[np.ndarray, int]:
    """Indices (at most `count`, worst first) and the number of mistakes; see `draw_worst`. Ties: the earlier first."""
    confidence = outcomes.confidence
    wrong = np.flatnonzero(outcomes.predictions != outcomes.labels)
    if len(wrong):
        return wrong[np.argsort(-confidence[wrong], kind="stable")][:count], len(wrong)
    return np.argsort(confidence, kind="stable")[:count], 0


def _write_confusion(path: Path, class_names: Sequence[str], outcomes: Outcomes) -> None:
    class_names = [defused(name) for name in class_names]
    if len(class_names) > MANY:
        pairs = metrics.confused_pairs(outcomes.labels, outcomes.predictions).tolist()
        rows = [[class_names[true], class_names[predicted], count] for true, predicted, count in pairs]
        write_csv(path, ["true", "predicted", "count"], rows)
    else:
        confusion = metrics.confusion_matrix(outcomes.labels, outcomes.predictions, len(class_names))
        rows = [[name, *counts] for name, counts in zip(class_names, confusion.tolist(), strict=True)]
        write_csv(path, ["true \\ predicted", *class_names], rows)


def _write_predictions(path: Path, class_names: Sequence[str], outcomes: Outcomes, names: Sequence[str]) -> None:
    header = ["image", "true", "predicted", "probability", "probability_true", "correct"]
    columns = (outcomes.labels, outcomes.predictions, outcomes.confidence, outcomes.of_label)
    class_names, rows = [defused(name) for name in class_names], []
    for name, true, predicted, confidence, of_label in zip(names, *columns, strict=True):
        shares = f"{confidence:.6f}", f"{of_label:.6f}"
        rows.append([defused_path(name), class_names[true], class_names[predicted], *shares, int(true == predicted)])
    write_csv(path, header, rows)
