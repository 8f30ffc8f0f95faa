"""The numbers in the result files, and pictures whose texts neither leave the figure nor touch each other."""

import csv
import io
import json
import os
import resource
import signal
import threading
import unicodedata
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorflow.core.util import event_pb2

import files
from console import UserError
from reports import metrics, pictures, tables
from reports.events import SUFFIX, EventWriter
from reports.results import draw_worst, results_text, worst_examples, write_results
from tools.compare import render
from tools.run_summary import RunSummary

pytestmark = pytest.mark.filterwarnings("error")  # a missing glyph is a warning in matplotlib
ODD_NAMES = ["$x_1$ and $", "日本語", "a\tb\nc", "\udcff.d", "🙂", "x" * 300, "عربى", ""]


def example(class_count=3, per_class=4, seed=0):
    """(labels [N], probabilities [N, C], names) with some mistakes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(class_count), per_class)
    logits = rng.normal(size=(len(labels), class_count))
    logits[np.arange(len(labels)), labels] += 1
    return labels, metrics.softmax(logits), [f"image {i}.jpg" for i in range(len(labels))]


def read_image(name):
    return np.full((30, 40, 3), len(name), np.uint8)


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def png_size(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


@pytest.fixture
def figures(monkeypatch):
    """The figures that `pictures` would save, drawn; `drawn_texts` of each: (text, its box in pixels)."""
    figures = []

    def keep(figure, path):
        figure.drawn_texts = []
        renderer = FigureCanvasAgg(figure).get_renderer()
        draw_text = renderer.draw_text

        def record_and_draw(gc, x, y, s, prop, angle, ismath=False, mtext=None):
            figure.drawn_texts.append((s, mtext.get_window_extent(renderer)))
            draw_text(gc, x, y, s, prop, angle, ismath, mtext)

        renderer.draw_text = record_and_draw
        figure.draw(renderer)
        figures.append(figure)

    monkeypatch.setattr(pictures, "save_figure", keep)
    return figures


def check_texts(figure):
    """The texts of a figure, in the order of drawing, after a check that none is cut off and no two overlap."""
    texts, boxes = zip(*figure.drawn_texts, strict=True)
    low, high = np.array([box.min for box in boxes]), np.array([box.max for box in boxes])  # [N, 2]
    outside = ((low < 0) | (high > figure.bbox.max)).any(axis=1)
    assert not outside.any(), np.array(texts)[outside]
    low, high = low + 1, high - 1  # the boxes are rounded up to whole pixels
    touching = ((low[:, None] < high) & (low < high[:, None])).all(axis=2)  # [N, N]
    pairs = [(texts[i], texts[j]) for i, j in np.argwhere(touching) if i < j]
    assert not pairs
    return list(texts)


# Result files


def test_write_results_numbers(tmp_path):
    labels = np.array([0, 0, 1, 1, 2])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.6, 0.1], [0.4, 0.35, 0.25], [0, 0.1, 0.9]])
    names = ["a, b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    classes = ["cat", "dog", "eel"]
    folder, extra = tmp_path / "new", {"step": 7, "best": np.float32("nan")}
    results = write_results(folder, "val", classes, labels, probabilities, names, extra, read_image)
    assert sorted(os.listdir(folder)) == [
        "confusion-val-normalised.png", "confusion-val.csv", "confusion-val.png", "predictions-val.csv",
        "results-val.json", "results-val.txt", "worst-val.png",
    ]  # fmt: skip
    saved = json.loads((folder / "results-val.json").read_text("utf-8"))
    assert saved == {**results, "best": None}
    assert (saved["split"], saved["step"], saved["examples"], saved["accuracy"]) == ("val", 7, 5, 0.6)
    assert saved["log_loss"] == pytest.approx(-np.log([0.8, 0.2, 0.6, 0.35, 0.9]).mean())
    assert saved["per_class"][0]["precision"] == 0.5
    assert read_csv(folder / "confusion-val.csv") == [
        ["true \\ predicted", "cat", "dog", "eel"],
        ["cat", "1", "1", "0"], ["dog", "1", "1", "0"], ["eel", "0", "0", "1"],
    ]  # fmt: skip
    predictions = read_csv(folder / "predictions-val.csv")
    assert predictions[0] == ["image", "true", "predicted", "probability", "probability_true", "correct"]
    assert predictions[1] == ["a, b.jpg", "cat", "cat", "0.800000", "0.800000", "1"]
    assert predictions[2] == ["c.jpg", "cat", "dog", "0.700000", "0.200000", "0"]
    assert len(predictions) == 6
    lines = (folder / "results-val.txt").read_text("utf-8").splitlines()
    assert [line.split() for line in lines[2:7:2]] == [["cat", "dog", "eel"], ["0", "cat", "1", "1", "0"],
                                                       ["2", "eel", "0", "0", "1"]]  # fmt: skip
    text = "\n".join(lines)
    assert text.index("Confusion") < text.index("0 cat") < text.index("accuracy") < text.index("step: 7")
    assert ["accuracy", "0.6000"] in [line.split() for line in lines]
    assert "accuracy 95 % interval      0.2307 to 0.8824" in lines  # 3 of 5, by the formula
    assert lines[-1] == "examples: 5"
    width, height = png_size(folder / "confusion-val.png")
    assert 400 < width < 800 and 400 < height < 800  # noqa: PT018
    png_size(folder / "confusion-val-normalised.png")
    png_size(folder / "worst-val.png")


def test_text_of_many_classes_numbers_its_columns():
    labels, probabilities, _ = example(30, 1)
    confusion = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), 30)
    names, outcomes = [f"class_{i}" for i in range(30)], metrics.outcomes(probabilities, labels)
    lines = results_text(outcomes, names, metrics.scores(outcomes, names)).splitlines()
    assert "numbered as the rows are" in lines[0]
    assert lines[2].split() == [str(i) for i in range(30)]
    assert [int(cell) for cell in lines[4 + 12].split()[2:]] == confusion[12].tolist()
    assert len({len(line) for line in lines[2 : 4 + 30]}) == 1  # aligned


def test_odd_names_go_through(tmp_path):
    labels, probabilities, names = example(len(ODD_NAMES), 2)
    names[0] = "folder/\udcff$\n.jpg"
    write_results(tmp_path, "val", ODD_NAMES, labels, probabilities, names, {"note": "\udc80"}, read_image)
    for path in tmp_path.iterdir():
        if path.suffix != ".png":
            path.read_bytes().decode("utf-8")
    saved = json.loads((tmp_path / "results-val.json").read_text("utf-8"))
    assert [line["class"] for line in saved["per_class"]] == ODD_NAMES  # surrogates too
    assert saved["note"] == "\udc80"
    assert read_csv(tmp_path / "predictions-val.csv")[1][0] == "folder/\\udcff$\n.jpg"


def test_write_results_refuses_what_does_not_fit(tmp_path):
    labels, probabilities, names = example()
    with pytest.raises(ValueError, match="accuracy"):
        write_results(tmp_path, "val", list("abc"), labels, probabilities, names, {"accuracy": 1})
    with pytest.raises(ValueError, match="got 11 for 12"):
        write_results(tmp_path, "val", list("abc"), labels, probabilities, names[1:])
    with pytest.raises(ValueError, match="at least one example"):
        write_results(tmp_path, "val", list("abc"), labels[:0], probabilities[:0], [])
    assert not list(tmp_path.iterdir())


# Many classes


def many_classes(class_count=1000, mistakes=((7, 3), (7, 3), (7, 3), (7, 9), (0, 999))):
    """(labels, probabilities, names of images): two right examples of each even class, and the mistakes."""
    right = np.repeat(np.arange(0, class_count, 2), 2)
    true, predicted = np.concatenate([np.column_stack([right, right]), mistakes]).T
    probabilities = np.zeros((len(true), class_count), np.float32)
    probabilities[np.arange(len(true)), predicted] = 1
    return true, probabilities, [f"{i}.jpg" for i in range(len(true))]


def test_many_classes_give_a_short_text_and_the_pairs_that_occur(tmp_path):
    labels, probabilities, names = many_classes()
    classes = [f"class {i}" for i in range(1000)]
    results = write_results(tmp_path, "val", classes, labels, probabilities, names)
    assert len(results["per_class"]) == 1000
    text = (tmp_path / "results-val.txt").read_text("utf-8")
    lines = text.splitlines()
    assert len(text) < 5000
    assert lines[0].startswith("The 3 most confused of 3 confused pairs")
    assert [line.split("  ")[-1].strip() for line in lines[4:7]] == ["0.7500", "0.3333", "0.2500"]
    assert [line.split()[:7] for line in lines[4:7]] == [
        ["7", "class", "7", "3", "class", "3", "3"],
        ["0", "class", "0", "999", "class", "999", "1"],
        ["7", "class", "7", "9", "class", "9", "1"],
    ]
    assert lines[lines.index("The 30 lowest F1 of the 501 classes that occur, of 1000") + 4].split()[:6] == [
        "7", "class", "7", "0.0000", "0.0000", "0.0000",
    ]  # fmt: skip
    assert lines[-1] == "examples: 1005"
    rows = read_csv(tmp_path / "confusion-val.csv")
    assert rows[:3] == [["true", "predicted", "count"], ["class 0", "class 0", "2"], ["class 0", "class 999", "1"]]
    matrix = np.zeros((1000, 1000), np.int64)
    for true, predicted, count in rows[1:]:
        matrix[classes.index(true), classes.index(predicted)] = count
    assert np.array_equal(matrix, metrics.confusion_matrix(labels, probabilities.argmax(axis=1), 1000))
    assert png_size(tmp_path / "confusion-val.png") < (1400, 1400)


@pytest.mark.parametrize("class_count", [50, 51])
def test_the_header_of_the_confusion_csv_says_what_it_is(tmp_path, class_count):
    labels, probabilities, names = many_classes(class_count, [(1, 2)])
    write_results(tmp_path, "val", list(map(str, range(class_count))), labels, probabilities, names)
    header = read_csv(tmp_path / "confusion-val.csv")[0]
    assert header == (
        ["true", "predicted", "count"] if class_count == 51 else ["true \\ predicted", *map(str, range(50))]
    )


def test_many_classes_without_a_mistake(tmp_path):
    labels, probabilities, _ = many_classes(60, [(1, 1)])
    outcomes, classes = metrics.outcomes(probabilities, labels), list(map(str, range(60)))
    assert results_text(outcomes, classes, metrics.scores(outcomes, classes)).startswith("No class is confused")


def test_results_of_blocks_are_those_of_the_whole(tmp_path):
    labels, probabilities, names = example(7, 5)
    whole = write_results(tmp_path / "a", "val", list("abcdefg"), labels, probabilities, names)
    blocks = write_results(tmp_path / "b", "val", list("abcdefg"), labels, np.array_split(probabilities, 4), names)
    assert whole == blocks
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("normalised", [False, True])
def test_overview_of_many_classes(figures, normalised):
    """1,001 classes in cells of three: the last cell holds two."""
    labels, predictions = np.array([0, 5, 5, 1000]), np.array([2, 0, 4, 3])
    confusion = metrics.confusion_matrix(labels // 3, predictions // 3, 334)
    pictures.draw_confusion("unused", confusion, [f"name {i}" for i in range(1001)], "val", normalised, 3)
    texts = check_texts(figures[0])
    assert figures[0].axes[0].get_title() == (
        f"val: 4 examples{'; grey: no examples' if normalised else ''}; a cell is 3 x 3 classes, mistakes among them "
        "on the diagonal"
    )
    assert not any("name" in text for text in texts)
    assert {"0", "102", "918", "number of the true class", "number of the predicted class"} <= set(texts)
    drawn = figures[0].axes[0].images[0].get_array()
    assert (drawn[0, 0], drawn[1, 0], drawn[1, 1], drawn[333, 1]) == ((100, 50, 50, 100) if normalised else (1,) * 4)


# Formulas


FORMULAS = [
    "=1+1",
    "-2+3",
    "-1\n",
    "-inf",
    "+-1",
    "\t1",
    "+1 cat",
    "-cat",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1+1",
    '=cmd|" /C calc"!A0',
]


def test_csv_cells_are_no_formulas(tmp_path):
    """Class names get an apostrophe; a file name still names its file."""
    labels, probabilities, _ = example(len(FORMULAS), 1)
    for name in FORMULAS:
        (tmp_path / name.replace("/", "_")).touch()
    names = [name.replace("/", "_") for name in FORMULAS]
    write_results(tmp_path / "run", "val", FORMULAS, labels, probabilities, names)
    for name in ("predictions-val.csv", "confusion-val.csv"):
        cells = [cell for row in read_csv(tmp_path / "run" / name) for cell in row]
        assert not [cell for cell in cells if cell.startswith(tuple("=+-@\t\r\n＝＋－＠"))]
    rows = read_csv(tmp_path / "run/predictions-val.csv")[1:]
    assert [row[1] for row in rows] == ["'" + name for name in FORMULAS]
    assert all((tmp_path / row[0]).samefile(tmp_path / name) for row, name in zip(rows, names, strict=True))
    saved = json.loads((tmp_path / "run/results-val.json").read_text("utf-8"))
    assert [line["class"] for line in saved["per_class"]] == FORMULAS


def test_compared_runs_are_no_formulas():
    runs = [RunSummary("=run", {"note": "@a"}, scores={"epochs done": 1.0}, notes=["-x"]), RunSummary("b", {"note": 1})]
    rows = list(csv.reader(io.StringIO(render(runs, "csv"))))
    assert [(row[1], row[2], row[-1]) for row in rows[1:]] == [("'=run", "'@a", "'-x"), ("b", "1", "")]


def test_only_formulas_are_defused(tmp_path):
    cells = ["-1", "+1.5e-5", "-.5", -1, -0.5, None, "cat=dog", "a-b", "'=x", "1 - 1", ""]
    assert [files.defused(cell) for cell in cells] == cells
    assert files.defused_path("folder/=x.jpg") == "folder/=x.jpg"
    files.write_csv(tmp_path / "list.csv", ["path"], [["=x"]])  # a list for programs stays as it is
    assert read_csv(tmp_path / "list.csv") == [["path"], ["=x"]]


# Confusion pictures


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("class_count", [1, 2, 8, 20])
def test_confusion_picture_is_legible(figures, class_count, normalised):
    labels, probabilities, _ = example(class_count, 30)
    confusion = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), class_count)
    names = [f"strawberry_shortcake_{i}" for i in range(class_count)]
    pictures.draw_confusion("unused", confusion, names, "val", normalised)
    texts = check_texts(figures[0])
    assert {"predicted class", "true class"} <= set(texts)
    assert all(texts.count(name) == 2 for name in names)
    box = figures[0].axes[0].get_window_extent()
    assert box.width == pytest.approx(box.height)


def test_confusion_picture_shows_the_counts(figures):
    pictures.draw_confusion("unused", np.array([[5, 0], [996, 4]]), ["cat", "dog"], "val")
    pictures.draw_confusion("unused", np.array([[5, 0], [996, 4]]), ["cat", "dog"], "val", normalised=True)
    cells = [[text.get_text() for text in figure.axes[0].texts] for figure in figures]
    assert cells == [["5", "0", "996", "4"], ["100", "0", ">99", "<1"]]


@pytest.mark.parametrize("class_count", [40, 101])
def test_confusion_picture_of_many_classes_names_each(figures, class_count):
    labels, probabilities, _ = example(class_count, 10)
    confusion = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), class_count)
    names = [f"grilled_cheese_sandwich_{i}" for i in range(class_count)]
    pictures.draw_confusion("unused", confusion, names, "val")
    texts = check_texts(figures[0])
    assert all(texts.count(name) == 2 for name in names)
    assert min(box.height for _, box in figures[0].drawn_texts) >= 8  # pixels
    assert max(figures[0].bbox.size) < 2000


def test_confusion_picture_of_400_classes_stays_a_picture(figures):
    pictures.draw_confusion("unused", np.eye(400, dtype=np.int64), [f"class {i}" for i in range(400)], "val")
    assert check_texts(figures[0]).count("class 398") == 2
    assert max(figures[0].bbox.size) < 3500


def test_absent_classes_are_grey_and_no_division_by_zero(figures):
    pictures.draw_confusion("unused", np.array([[0, 0], [1, 2]]), ["cat", "dog"], "val", normalised=True)
    assert "grey: no examples" in figures[0].axes[0].get_title()
    assert np.ma.getmaskarray(figures[0].axes[0].images[0].get_array()).tolist() == [[True, True], [False, False]]


# Contact sheets


def test_worst_mistakes_come_with_the_most_confident_first(figures):
    labels = np.array([0, 1, 0, 1])
    probabilities = np.array([[0.4, 0.6], [0.9, 0.1], [0.7, 0.3], [0.6, 0.4]])
    outcomes = metrics.outcomes(probabilities, labels)
    chosen, mistakes = worst_examples(outcomes, 2)
    assert (chosen.tolist(), mistakes) == ([1, 0], 3)
    draw_worst("unused", "val", ["cat", "dog"], outcomes, list("abcd"), read_image, 2)
    assert check_texts(figures[0]) == [
        "val: the 2 most confident of 3 mistakes in 4 examples",
        "true: dog", "predicted: cat", "probability 0.900 (true class 0.100)", "b",
        "true: cat", "predicted: dog", "probability 0.600 (true class 0.400)", "a",
    ]  # fmt: skip


def test_without_mistakes_the_least_confident_are_shown(figures):
    outcomes = metrics.outcomes(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 1]))
    draw_worst("unused", "val", ["cat", "dog"], outcomes, ["a", "b"], read_image, 1)
    texts = check_texts(figures[0])
    assert texts[0] == "val: no mistakes in 2 examples; the 1 least confident right answers"
    assert texts[1:] == ["true: dog", "predicted: dog", "probability 0.600", "b"]


def test_image_grid(tmp_path, figures, monkeypatch):
    images = [np.full(shape, 200, np.uint8) for shape in ((50, 100, 3), (300, 10, 3), (1, 1, 3))]
    pictures.image_grid("unused", images, ["long " * 40, "two\nlines", ""], 2, "title")
    texts = check_texts(figures[0])
    assert "…" in texts[1]
    assert texts[2:] == ["two", "lines"]
    shapes = [axes.images[0].get_array().shape for axes in figures[0].axes]
    assert shapes == [image.shape for image in images]
    monkeypatch.undo()
    pictures.image_grid(tmp_path / "grid.png", images, ["", "", ""], 3)
    width, height = png_size(tmp_path / "grid.png")
    assert 600 < width < 700 and 200 < height < 260  # noqa: PT018
    with pytest.raises(ValueError, match="got 0"):
        pictures.image_grid(tmp_path / "none.png", [], [], 3)


# Curves


def records_of(steps, steps_per_epoch=10, change_after=None):
    lines = []
    for step in steps:
        stage = "head" if change_after is None or step <= change_after else "$conv5_1$"
        line = {"step": step, "epoch": step / steps_per_epoch, "phase": stage, "loss": 1 / step, "accuracy": 0.9}
        lines.append({**line, "split": "train", "learning_rate": 1e-3})
        if step % steps_per_epoch == 0:
            lines.append({**line, "split": "val"})
    return lines


def test_curves_show_what_the_records_say(figures):
    pictures.draw_curves("unused", records_of(range(5, 101, 5), change_after=30))
    texts = check_texts(figures[0])
    assert {"loss", "accuracy", "learning rate", "epoch", "step", "training", "validation"} <= set(texts)
    assert "$conv5_1$ begins" in texts
    loss, accuracy, rate = figures[0].axes
    training, validation, stage = loss.lines
    assert training.get_xdata() == pytest.approx(np.arange(0.5, 10.1, 0.5))
    assert training.get_ydata() == pytest.approx(1 / np.arange(5, 101, 5))
    assert validation.get_xdata() == pytest.approx(np.arange(1, 11))
    assert training.get_linestyle() != validation.get_linestyle()  # told apart in grey
    for axes in (loss, accuracy, rate):
        line = axes.lines[-1]
        assert (list(line.get_xdata()), line.get_color()) == ([3.0, 3.0], "red")
    assert stage is loss.lines[-1]
    assert rate.lines[0].get_ydata() == pytest.approx(1e-3)


def test_the_path_of_strengths_shows_errors_and_the_chosen_one(figures, tmp_path):
    point = {"log_loss_error": 0.1, "accuracy_error": 0.01}
    path = [{"strength": 10.0**-i, "log_loss": 2.0 / (i + 1), "accuracy": 0.5 + i / 10, **point} for i in range(4)]
    solved = {"step": 20, "split": "train", "strength": 1e-2, "out_of_fold": path}
    odd: list[object] = [{"step": 30, "split": "train", "out_of_fold": value} for value in (3, "", None)]
    pictures.draw_strengths("unused", [*records_of(range(5, 21, 5)), *odd, solved])
    loss, accuracy = figures[0].axes
    assert loss.lines[0].get_ydata() == pytest.approx([2, 1, 2 / 3, 0.5])
    assert accuracy.lines[0].get_ydata() == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert accuracy.lines[0].get_xdata() == pytest.approx([1, 0.1, 0.01, 0.001])
    segments = loss.collections[0].get_segments()
    assert [tuple(segment[:, 1]) for segment in segments[:2]] == [pytest.approx((1.9, 2.1)), pytest.approx((0.9, 1.1))]
    for axes in (loss, accuracy):
        assert list(axes.lines[-1].get_xdata()) == [1e-2, 1e-2]
    pictures.draw_strengths(tmp_path / "none.png", [*records_of([5]), *odd])
    assert not list(tmp_path.iterdir())


SOLVED = [  # as a run writes it whose head was solved, before and after
    {"step": 0, "epoch": 0.0, "split": "train", "phase": "head", "loss": 2.5, "accuracy": 0.1},
    {"step": 20, "epoch": 2.0, "split": "train", "phase": "head", "loss": 0.2, "accuracy": 0.97, "strength": 0.01},
    {"step": 20, "epoch": 2.0, "split": "val", "phase": "head", "loss": 0.4, "accuracy": 0.9},
]


def test_a_solved_head_has_points_without_lines_and_no_panel_of_learning_rates(figures):
    pictures.draw_curves("unused", SOLVED)
    texts = check_texts(figures[0])
    assert "head: solved exactly, not in steps; its points are before and after" in texts
    assert "learning rate" not in texts
    loss, accuracy = figures[0].axes
    for axes, training, validation in ((loss, [2.5, 0.2], [0.4]), (accuracy, [0.1, 0.97], [0.9])):
        assert [list(line.get_ydata()) for line in axes.lines] == [training, validation]
        assert all((line.get_linestyle(), line.get_marker()) == ("None", "o") for line in axes.lines)


def test_steps_after_a_solved_head_are_a_line_of_their_own(figures):
    after = [{**record, "phase": "conv5"} for record in records_of(range(25, 41, 5))]
    pictures.draw_curves("unused", [*SOLVED, *after])
    texts = check_texts(figures[0])
    assert {"learning rate", "conv5 begins"} <= set(texts)
    assert (texts.count("training"), texts.count("validation")) == (1, 1)
    loss, _, rate = figures[0].axes
    lines = {(line.get_label(), line.get_linestyle()): list(line.get_xdata()) for line in loss.lines[:4]}
    assert lines == {
        ("training", "None"): [0, 2], ("training", "-"): [2.5, 3, 3.5, 4],
        ("validation", "None"): [2], ("validation", "--"): [3, 4],
    }  # fmt: skip
    assert list(rate.lines[0].get_xdata()) == [2.5, 3, 3.5, 4]


def test_a_resumed_run_repeats_no_point(figures):
    records = records_of(range(5, 61, 5))
    repeated = [{**record, "loss": 7.0} for record in records_of(range(45, 81, 5))]
    pictures.draw_curves("unused", records + repeated)
    training = figures[0].axes[0].lines[0]
    assert training.get_xdata() == pytest.approx(np.arange(0.5, 8.1, 0.5))
    assert training.get_ydata()[8:] == pytest.approx(7)


def test_curves_of_next_to_nothing(tmp_path):
    path = tmp_path / "curves.png"
    pictures.draw_curves(path, [])
    assert not list(tmp_path.iterdir())
    one = {"step": 0, "epoch": 0.0, "split": "val", "phase": "head", "loss": float("nan"), "accuracy": None}
    infinite = {**one, "loss": float("inf")}
    for records, height in (([one], 700), (records_of([1]), 900), ([infinite, *records_of([3], change_after=1)], 900)):
        pictures.draw_curves(path, records)
        assert png_size(path) == (800, height)  # without a learning rate there is no panel for it


def test_curves_leave_a_gap_for_nan(figures):
    records = records_of([1, 2, 3])
    records[1]["loss"] = float("nan")
    pictures.draw_curves("unused", records)
    assert np.isnan(figures[0].axes[0].lines[0].get_ydata()).tolist() == [False, True, False]


ODD_LINES = [
    3, None, "text", [1], {}, {"split": "val"}, {"step": 5}, {"split": "test", "step": 1},
    {"split": "val", "step": "1"}, {"split": "val", "step": None}, {"split": "val", "step": True},
    {"split": ["val"], "step": 1}, {"split": "val", "step": -1}, {"split": "val", "step": 2**70},
    {"split": "val", "step": 1.5},
]  # fmt: skip
ODD_RECORDS = [
    {"step": 61, "split": "train"},
    {"step": 62, "split": "train", "epoch": "6", "phase": 3, "loss": "nan", "accuracy": [], "learning_rate": {}},
    {"step": 63, "split": "val", "epoch": None, "phase": None, "loss": 10**400, "accuracy": True},
    {"step": 64, "split": "val", "epoch": float("inf"), "phase": [], "loss": 1e308, "accuracy": -1e308},
]


def test_curves_ignore_what_is_no_record(figures):
    records = records_of(range(5, 61, 5), change_after=30)
    pictures.draw_curves("unused", records)
    pictures.draw_curves("unused", [*ODD_LINES, *records, *ODD_LINES])
    pictures.draw_curves("unused", [*ODD_RECORDS, *ODD_LINES, *records])
    clean, with_lines, with_records = figures
    assert check_texts(with_lines) == check_texts(clean)
    for axes, expected in zip(with_records.axes, clean.axes, strict=True):
        for line, expected_line in zip(axes.lines, expected.lines, strict=True):
            points = np.array([line.get_xdata(), line.get_ydata()], np.float64)
            whole = np.isfinite(points).all(axis=0)  # the odd ones are gaps
            assert points[:, whole] == pytest.approx(np.array([expected_line.get_xdata(), expected_line.get_ydata()]))
    pictures.draw_curves("unused", ODD_RECORDS)
    check_texts(figures[3])


def test_phases_go_by_either_name(figures):
    """Earlier versions wrote "stage"; a record without a phase changes nothing."""
    lines = [
        {"step": step, "split": "val", "epoch": step / 10, "loss": 1.0, **phase}
        for step, phase in [(10, {"stage": "head"}), (20, {}), (30, {"stage": "head"}), (40, {"phase": "conv5"})]
    ]
    assert pictures.phase_changes(lines) == [(3.0, "conv5")]


def test_threads_may_draw(tmp_path):
    errors = []

    def draw(i):
        try:
            pictures.draw_curves(tmp_path / f"{i}.png", records_of(range(5, 51, 5)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(4)}) == 1  # same picture, same bytes


# Event files

SETTINGS = {"seed": 3, "dropout": 0.5, "augment": ["flip", "color"], "stages": [], "note": "a|b", "limit": None}


def read_events(folder):
    """{tag: [(step, value)]} of all event files in a folder, and the settings in the HParams tab."""
    values: dict[str, list] = {}
    settings: dict[str, Any] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(file)):
            event = event_pb2.Event.FromString(record.numpy())
            for value in event.summary.value:
                values.setdefault(value.tag, []).append((event.step, tf.make_ndarray(value.tensor).tolist()))
                if value.metadata.plugin_data.plugin_name == "hparams":
                    data = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    settings |= data.session_start_info.hparams
    return values, settings


def close_events(folder, metrics=(), timing=(), **keywords):
    writer = EventWriter(folder, SETTINGS, metrics, timing, **keywords)
    writer.close()


def test_events_join_the_logs_by_split_and_step(tmp_path, capsys):
    """timing.jsonl may be shorter or in another order; lines that are no records are counted and ignored."""
    metrics = [{"step": s, "split": p, "loss": s + (p == "val") / 2} for s in (5, 10) for p in ("train", "val")]
    timing = [
        {"step": s, "split": p, "images_per_second": s * 10.0} for s, p in [(10, "val"), (10, "train"), (99, "val")]
    ]
    close_events(tmp_path, [*ODD_LINES, *metrics[::-1]], [*timing, *ODD_LINES])
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: ignored {2 * len(ODD_LINES)} odd lines of metrics.jsonl or timing.jsonl\n"
    )
    assert read_events(tmp_path / "train")[0] == {"loss": [(5, 5), (10, 10)], "images_per_second": [(10, 100)]}
    assert read_events(tmp_path / "val")[0] == {"loss": [(5, 5.5), (10, 10.5)], "images_per_second": [(10, 100)]}
    close_events(tmp_path, ODD_RECORDS)
    assert capsys.readouterr().err == ""
    assert read_events(tmp_path / "train")[0] == {}


def test_every_setting_is_in_the_hparams_tab(tmp_path):
    close_events(tmp_path)
    values, settings = read_events(tmp_path)
    assert settings["augment"].string_value == "flip color"
    assert settings["stages"].string_value == "none"
    assert settings["seed"].number_value == 3
    assert set(settings) == set(SETTINGS)
    [(_, text)] = values["config"]
    assert '| note | "a\\|b" |' in text.decode().splitlines()


def test_only_event_files_of_our_own_are_replaced(tmp_path):
    for folder in (tmp_path, tmp_path / "train", tmp_path / "val"):
        folder.mkdir(exist_ok=True)
        for name in ("events.out.tfevents.1.host.2.0", "events.out.tfevents.1.host.2.3.v2", "events.txt"):
            (folder / name).write_text("another program's")
        (folder / f"events.out.tfevents.folder{SUFFIX}").mkdir()
    for _ in range(2):
        close_events(tmp_path)
    for folder in (tmp_path, tmp_path / "train", tmp_path / "val"):
        ours = [file for file in folder.glob(f"*{SUFFIX}") if file.is_file()]
        assert len(ours) == 1
        assert [file.read_text() for file in folder.iterdir() if file.is_file() and file not in ours] == [
            "another program's"
        ] * 3
    close_events(tmp_path, adopt_unmarked=True)
    assert not list(tmp_path.rglob("*.v2"))  # TensorFlow's own mark, which earlier versions left
    assert (tmp_path / "val/events.out.tfevents.1.host.2.0").exists()


@pytest.mark.parametrize("name", ["train", "val"])
def test_events_are_not_written_through_a_link(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f"events.out.tfevents.1{SUFFIX}").touch()
    (tmp_path / "run" / name).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=f"{name} is a link"):
        close_events(tmp_path / "run")
    assert len(list((tmp_path / "other").iterdir())) == 1


def test_events_that_cannot_be_written_are_a_user_error(tmp_path):
    (tmp_path / "val").write_text("no folder")
    with pytest.raises(UserError, match="the event files can't be written"):
        close_events(tmp_path)
    (tmp_path / "val").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(UserError, match="the event files can't be written"):
            close_events(tmp_path, [{"step": s, "split": "train", "loss": 1.0} for s in range(100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


# Tables and files


def test_table_aligns():
    rows = [["cat", 1, 0.5, None], ["日本", 20, 1e-7, 3], ["a\nb", 3]]
    assert tables.table(rows, ["name", "n", "score", "x"]).split("\n") == [
        "name   n   score  x",
        "----  --  ------  -",
        "cat    1  0.5000  -",
        "日本  20   1e-07  3",
        "a\\nb   3",
    ]
    assert tables.table([], ["a", "bc"]) == "a  bc\n-  --"


@pytest.mark.parametrize(
    ("text", "cells"),  # of a terminal, as wcwidth counts them
    [
        ("日本", 4),
        ("한국어", 6),
        (unicodedata.normalize("NFD", "한국어"), 6),
        ("e\u0301", 1),
        ("ไทยที่", 4),
        ("🙂", 2),
        ("ｱﾊﾟ", 3),
    ],
)
def test_width_of_text(text, cells):
    assert tables.text_width(text) == cells


def test_markdown_table():
    assert tables.markdown_table([["a|b", 0.25]], ["run", "accuracy"]).split("\n") == [
        "| run | accuracy |", "| --- | ---: |", "| a\\|b | 0.2500 |",
    ]  # fmt: skip


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")

    def interrupted():
        with files.replace_file(path) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with files.replace_file(path) as aside:
        assert (aside.parent, aside.suffix) == (tmp_path, ".txt")
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_json(tmp_path / "written", {"a": [np.int64(1), np.inf, np.arange(2)], "p": tmp_path})
    assert os.stat(tmp_path / "written").st_mode == os.stat(tmp_path / "plain").st_mode
    assert json.loads((tmp_path / "written").read_text()) == {"a": [1, None, [0, 1]], "p": str(tmp_path)}
