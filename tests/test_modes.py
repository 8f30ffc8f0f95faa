"""Whole runs in the ways that training can go: the real network and weights, phases, early stopping, the tools."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import data
import train
from dataset import layouts
from model import Network
from networks.vgg import MEAN_RGB
from run import Run
from tests.conftest import TINY, call, event_values, rows_of, scalars
from tools import find_learning_rate, learning_curve
from training import features
from training.settings import Settings

# -- the main job ----------------------------------------------------------------------------------------------------


def test_vgg19_with_its_weights_learns_evaluates_and_predicts(run_script, sample_images: Path, tmp_path: Path) -> None:
    """The README's commands, each in a process of its own, on small pictures so that a CPU does them in seconds."""
    flags = ["--image-size", 64, "--train-from", "head", "--epochs", 20, "--batch-size", 12]
    trained = run_script("train.py", sample_images, "--run", "run", *flags, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "32 restored, 2 new" in trained.stdout
    assert "gap" in trained.stdout
    lines = Run(tmp_path / "run").read_lines("metrics.jsonl")
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.2 * losses[0]
    results = json.loads((tmp_path / "run/results-val.json").read_text(encoding="utf-8"))
    assert results["accuracy"] >= 0.5  # of 12 classes
    assert Run(tmp_path / "run").config().new_variables == ["vgg_19/gap/weights", "vgg_19/gap/biases"]
    evaluated = run_script("evaluate.py", "--run", "run", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"accuracy {results['accuracy']:.4f}" in evaluated.stdout
    image = sample_images / "val/cat/cat_000.jpg"
    predicted = run_script("inference.py", image, "--run", "run", "--format", "json", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    best = json.loads(predicted.stdout)["predictions"][0]
    rows = {Path(row["image"]).name: row for row in rows_of(tmp_path / "run/predictions-val.csv")}
    assert best["class"] == rows["cat_000.jpg"]["predicted"]
    assert best["probability"] == pytest.approx(float(rows["cat_000.jpg"]["probability"]), abs=0.02)


# -- phases and early stopping ---------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of the small network's convolutions to start from: He's initial values of a seed."""
    model = Network("small", "gap", 2, 32, seed=5)
    file = tmp_path / "small.npz"
    np.savez(file, **{name: v.numpy() for name, v in model.variables_by_name.items() if "/conv" in name})
    return file


def test_head_first_then_from_a_stage_on(sample_images: Path, tmp_path: Path, weights: Path) -> None:
    run = tmp_path / "run"
    flags = ["--epochs", 4, "--head-epochs", 3, "--train-from", "conv4", "--head-solver", "sgd"]
    assert call(train, sample_images, "--run", run, *TINY, "--pretrained", weights, *flags) == 0
    lines = Run(run).read_lines("metrics.jsonl")
    epoch_steps = -(-36 // 8)
    assert {line["step"] for line in lines if line["phase"] == "head"} == set(range(1, 3 * epoch_steps + 1))
    assert {line["step"] for line in lines if line["phase"] == "conv4"} == set(
        range(3 * epoch_steps + 1, 4 * epoch_steps + 1)
    )
    rates = [line["learning_rate"] for line in lines if line["split"] == "train"]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[3 * epoch_steps] == pytest.approx(1e-3)  # each phase decays anew
    latest, given = Run(run).load("latest"), np.load(weights)
    assert latest is not None
    for name in given.files:
        moved = not np.array_equal(given[name], latest[0][name])
        assert moved == (name.split("/")[1] in ("conv4", "conv5")), name


def test_patience_ends_a_run_and_a_second_start_leaves_it(
    sample_images: Path, tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a learning rate no epoch is better than the first: two more are waited for."""
    run = tmp_path / "run"
    flags = ["--epochs", 9, "--patience", 2, "--learning-rate", 0, "--end-learning-rate", 0]
    assert call(train, sample_images, "--run", run, *TINY, "--pretrained", weights, *flags) == 0
    validations = [line for line in Run(run).read_lines("metrics.jsonl") if line["split"] == "val"]
    assert [line["epoch"] for line in validations] == [1, 2, 3]
    assert len({line["loss"] for line in validations}) == 1
    capfd.readouterr()
    assert call(train, sample_images, "--run", run, *TINY, "--pretrained", weights, *flags) == 0
    assert "this run is complete" in capfd.readouterr().out


def test_small_network_from_scratch_learns(sample_images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--epochs", 15, "--augment", "flip", "zoom", "color"]
    assert call(train, sample_images, "--run", run, *TINY, *flags) == 0
    losses = [line["loss"] for line in Run(run).read_lines("metrics.jsonl") if line["split"] == "train"]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert np.mean(losses[-5:]) < 0.9 * np.log(12), "better than guessing, and not only than a bad start"


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_gets_inputs_confusion_mistakes_and_settings(sample_images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(train, sample_images, "--run", run, "--epochs", 1, *TINY) == 0
    found: dict[str, list[tuple[str, str]]] = {}
    pictures = {}
    for folder in ("", "train", "val"):
        for plugin, tag, _, value in event_values(run / folder):
            found.setdefault(folder, []).append((plugin, tag))
            if plugin == "images":
                pictures[tag] = value
    assert ("text", "config") in found[""]
    assert ("hparams", "_hparams_/session_start_info") in found[""]
    assert [tag for plugin, tag in found["train"] if plugin == "images"] == ["inputs"]
    assert {tag for plugin, tag in found["val"] if plugin == "images"} == {
        "confusion-val", "confusion-val-normalised", "worst-val", "reliability-val",
    }  # fmt: skip
    config = Run(run).config()
    seed = config.settings["seed"]
    examples = layouts.find_images(str(sample_images)).splits["train"]
    first = data.Order(len(examples), 16, seed).indices(0)[0]
    load = data.image_loader(examples, config.preprocessing, seed)
    positions = tf.data.Dataset.from_tensors((tf.constant(first, tf.int64), tf.constant(0, tf.int64)))
    expected = next(iter(load(positions, 1)))[0].numpy()[0] + MEAN_RGB
    shown = tf.io.decode_png(pictures["inputs"][2]).numpy()  # after its width and height
    assert np.abs(shown - expected).max() <= 0.51
    assert len(pictures["inputs"]) == 2 + 16
    assert set(scalars(run / "val")) >= {"loss", "accuracy"}


# -- tools -----------------------------------------------------------------------------------------------------------


def test_range_test_grows_the_rate_and_ends_where_the_loss_diverges(
    sample_images: Path,
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--pretrained", weights, "--head", "gap", "--train-from", "head"]
    assert call(find_learning_rate, sample_images, "--steps", 40, "--learning-rate", 100, *flags) == 0
    rows = rows_of(Path("learning-rate.csv"))
    rates = np.array([float(row["learning_rate"]) for row in rows])
    losses = np.array([float(row["loss"]) for row in rows])
    assert rates[0] == pytest.approx(1e-6)
    assert rates[1:] / rates[:-1] == pytest.approx((100 / 1e-6) ** (1 / 39), rel=1e-4)
    assert losses[0] == pytest.approx(np.log(12), rel=1e-5)  # the last layer begins at zero
    smooth, mean = [], 0.0
    for count, loss in enumerate(losses, start=1):
        mean = 0.9 * mean + 0.1 * loss
        smooth.append(mean / (1 - 0.9**count))
    assert [float(row["smoothed"]) for row in rows] == pytest.approx(smooth)
    assert len(rows) < 40, "a rate of 100 diverges"
    assert smooth[-1] > 4 * min(smooth) or not np.isfinite(losses[-1])
    assert f"--learning-rate {rates[int(np.argmin(smooth))] / 10:.1e}" in capfd.readouterr().out
    assert Path("learning-rate.png").stat().st_size > 10_000


def test_learning_curve_counts_images_per_class(
    sample_images: Path,
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--pretrained", weights, "--head", "gap", "--cached-views", 1]
    counts = ["--examples-per-class", 3, 1, "--seeds", 2, "--steps", 20]
    assert call(learning_curve, sample_images, *counts, *flags) == 0
    rows = rows_of(Path("learning-curve.csv"))
    assert [(row["images_per_class"], row["seed"]) for row in rows] == [("1", "0"), ("1", "1"), ("3", "0"), ("3", "1")]
    assert all(abs(float(row["accuracy"]) * 24 % 1) < 1e-6 for row in rows), "of 24 validation images"
    assert rows[0]["loss"] != rows[1]["loss"], "each seed draws images of its own"
    text = capfd.readouterr().out
    for count in ("1", "3"):
        accuracies = [float(row["accuracy"]) for row in rows if row["images_per_class"] == count]
        line = next(line.split() for line in text.splitlines() if line.split()[:1] == [count])
        assert line == [count, f"{np.mean(accuracies):.4f}", f"{np.std(accuracies, ddof=1):.4f}"]
    assert Path("learning-curve.png").stat().st_size > 10_000


def test_learning_curve_trains_on_the_drawn_images_with_their_labels(
    sample_images: Path, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[list[tuple[np.ndarray, int]]] = []  # of each run: what enters the head, and the label
    original = data.train_batches

    def train_batches(*args):
        seen.append([])
        for x, labels, indices in original(*args):
            seen[-1].extend(zip(x.numpy(), labels.numpy().tolist(), strict=True))
            yield x, labels, indices

    monkeypatch.setattr(data, "train_batches", train_batches)
    settings = Settings(
        pretrained=str(weights), network="small", head="gap", image_size=32, cached_views=1, precision="float32"
    )
    learning_curve.learning_curve(settings, str(sample_images), [1, 2], 2, 1)
    found = layouts.find_images(str(sample_images))
    draws = {
        (count, seed): layouts.take_per_class(found.splits["train"], count, seed) for count in (1, 2) for seed in (0, 1)
    }
    # The cache holds the union of the draws, and draws the crop of a row by its place there.
    union = sorted({path for draw in draws.values() for path in draw.paths})
    position = {path: index for index, path in enumerate(found.splits["train"].paths)}
    pool = found.splits["train"].subset([position[path] for path in union])
    network = Network("small", "gap", len(found.class_names), 32)
    given = np.load(weights)
    for name in given.files:
        network.variables_by_name[name].assign(given[name])
    load = data.image_loader(pool, data.Preprocessing(32, mean_rgb=MEAN_RGB), features.VIEW_SEED)
    x, *_ = next(iter(data.ordered_batches(load, pool.labels, len(pool), view=0)))
    rows = network.forward(x, last="conv5").numpy()  # [pool, 1, 1, 256]
    assert len(seen) == len(draws)
    for draw, examples in zip(draws.values(), seen, strict=True):
        expected = {(union.index(path), int(label)) for path, label in zip(draw.paths, draw.labels, strict=True)}
        nearest = {(int(np.abs(rows - entered).sum(axis=(1, 2, 3)).argmin()), label) for entered, label in examples}
        assert nearest == expected
