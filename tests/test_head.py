"""The exact head inside a run: what is solved, logged, kept, resumed and calibrated."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

import data
import evaluate
import train
from console import Stopped, StopSignals, UserError
from model import Network
from reports import metrics
from reports.pictures import draw_strengths
from run import Run
from tests.conftest import TINY, call
from training import evaluation, features, head, log, loop, plan, preparation
from training.settings import Settings

SOLVED = ("--train-from", "head", "--cached-views", 2, "--cache-dir", "cache")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolution weights of the small network to start from: its initial values."""
    network = Network("small", "gap", 2, 32, seed=5)
    file = tmp_path_factory.mktemp("weights") / "small.npz"
    np.savez(file, **{name: v.numpy() for name, v in network.variables_by_name.items() if "/conv" in name})
    return file


@pytest.fixture
def solved(tmp_path: Path, sample_images: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert call(train, sample_images, "--run", "run", *TINY, "--pretrained", weights, *SOLVED) == 0
    return tmp_path / "run"


def head_problem(run: Path, images: Path, weights: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features of both views from the pictures themselves, without a cache, and labels."""
    config = Run(run).config()
    settings = Settings.from_dict(config.settings)
    examples = plan.list_images(settings, str(images)).splits["train"]
    network = preparation.prepare(settings, str(images)).network
    load = data.image_loader(examples, config.preprocessing, features.VIEW_SEED)
    rows = []
    for view in (0, 1):
        for x, *_ in data.ordered_batches(load, examples.labels, 64, view):
            entering = tf.cast(network.forward(x, last="conv5"), tf.float32)
            rows.append(head._linear(network).features(entering).numpy())
    return np.concatenate(rows), np.tile(examples.labels, 2)


def test_the_solved_head_is_the_optimum_that_scikit_learn_finds(solved, sample_images, weights):
    x, labels = head_problem(solved, sample_images, weights)
    lines = Run(solved).read_lines("metrics.jsonl")
    record = next(line for line in lines if "strength" in line)
    theirs = LogisticRegression(C=1 / (record["strength"] * len(x)), tol=1e-9, max_iter=10_000).fit(x, labels)
    loaded = Run(solved).load("best")
    assert loaded is not None
    logits = x @ loaded[0]["small/gap/weights"] + loaded[0]["small/gap/biases"]
    ours = np.exp(log_softmax(logits, axis=1))
    assert np.abs(ours - theirs.predict_proba(x)).max() < 2e-3
    assert record["loss"] == pytest.approx(metrics.log_loss(logits, labels), abs=1e-5)


def test_the_path_of_strengths_is_logged_and_the_best_of_it_taken(solved):
    lines = Run(solved).read_lines("metrics.jsonl")
    assert [line["split"] for line in lines] == ["train", "train", "val"]
    assert lines[0]["loss"] == pytest.approx(np.log(12))
    path = lines[1]["out_of_fold"]
    strengths = [point["strength"] for point in path]
    assert strengths == sorted(strengths, reverse=True)
    best = min(path, key=lambda point: point["log_loss"])
    (chosen,) = (point for point in path if point["strength"] == lines[1]["strength"])
    assert chosen["log_loss"] - best["log_loss"] < 1e-3
    assert lines[1]["step"] == lines[2]["step"] == Run(solved).config().phases[-1].end_step


def test_two_runs_and_a_run_that_was_stopped_while_it_solved_are_the_same(
    solved, tmp_path, sample_images, weights, monkeypatch
):
    calls = []

    def stopped_once(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 1:
            raise session_stop
        return original(*arguments, **keywords)

    session_stop, original = Stopped(signal.SIGTERM), vars(head)["cross_validate"]
    monkeypatch.setattr(head, "cross_validate", stopped_once)
    arguments = (sample_images, "--run", "again", *TINY, "--pretrained", weights, *SOLVED)
    assert call(train, *arguments) == 128 + signal.SIGTERM
    assert call(train, *arguments) == 0
    for name in ("metrics.jsonl", "results-val.json", "calibration.json", "predictions-val.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (solved / name).read_bytes(), name


def test_a_second_stage_starts_from_the_optimum_and_the_strengths_are_drawn_once(
    tmp_path, sample_images, weights, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def draw(path, lines):
        drawn.append(os.path.basename(path))
        draw_strengths(path, lines)

    monkeypatch.setattr(log, "draw_strengths", draw)
    monkeypatch.setattr(log, "draw_curves", lambda path, lines: drawn.append(os.path.basename(path)))
    monkeypatch.setattr(log.Pacer, "due", lambda self: True)
    seen = {}
    original = loop.Loop.run_phase

    def run_phase(self, phase, *arguments):
        seen[phase.name] = {name: v.numpy() for name, v in self.trainer.model.variables_from("gap").items()}
        return original(self, phase, *arguments)

    monkeypatch.setattr(loop.Loop, "run_phase", run_phase)
    flags = ("--train-from", "conv5", "--head-epochs", 1, "--epochs", 2, "--cached-views", 2, "--cache-dir", "cache")
    assert call(train, sample_images, "--run", "run", *TINY, "--pretrained", weights, *flags) == 0
    assert drawn == ["curves.png", "head-strengths.png", "curves.png", "curves.png"]  # each phase, and in the end
    assert (tmp_path / "run/head-strengths.png").is_file()
    assert list(seen) == ["conv5"]
    assert np.abs(seen["conv5"]["small/gap/weights"]).max() > 1e-3
    phases = Run(tmp_path / "run").config().phases
    assert [(phase.name, phase.solver) for phase in phases] == [("head", "lbfgs"), ("conv5", "sgd")]


@pytest.mark.parametrize(
    ("flags", "solver"),
    [
        ((), "lbfgs"),
        (("--head-solver", "sgd"), "sgd"),
        (("--learning-rate", "0.01"), "sgd"),
        (("--patience", "2"), "sgd"),
        (("--cached-views", "0"), "sgd"),
        (("--head-solver", "lbfgs", "--learning-rate", "0.01"), "lbfgs"),
    ],
)
def test_auto_solves_a_linear_head_unless_sgd_is_adjusted(sample_images, weights, flags, solver):
    settings = train.parse_arguments(
        [str(sample_images), *map(str, TINY), "--pretrained", str(weights), *map(str, SOLVED), *flags]
    )[2]
    assert preparation.prepare(settings, str(sample_images)).config.phases[-1].solver == solver


def test_a_solver_without_a_head_to_solve_is_refused(sample_images, weights):
    settings = Settings(pretrained=str(weights), network="small", image_size=32, head_solver="lbfgs")
    with pytest.raises(UserError, match="no phase trains a linear head alone"):
        preparation.prepare(settings, str(sample_images))


def test_features_that_do_not_fit_in_memory_are_left_to_sgd(monkeypatch):
    network = Network("small", "linear", 3, 32)
    assert head.can_solve(network, 1000)
    monkeypatch.setattr(head, "MOST_BYTES", 1000 * 256 * 4 - 1)
    assert not head.can_solve(network, 1000)
    assert head.feature_count(network) == 256


# -- calibration -----------------------------------------------------------------------------------------------------


def test_few_images_leave_probabilities_as_they_are(solved):
    assert json.loads((solved / "calibration.json").read_text())["temperature"] == 1.0
    assert json.loads((solved / "results-val.json").read_text())["temperature"] == 1.0


def test_every_run_ends_with_a_temperature_that_changes_no_answer(tmp_path, sample_images, weights, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "LEAST_TO_CALIBRATE", 1)
    assert call(train, sample_images, "--run", "run", *TINY, "--pretrained", weights, *SOLVED) == 0
    solved = tmp_path / "run"
    record = json.loads((solved / "calibration.json").read_text())
    assert record["temperature"] != 1
    assert record["after"]["log_loss"] < record["before"]["log_loss"]
    results = json.loads((solved / "results-val.json").read_text())
    assert results["temperature"] == record["temperature"] == Run(solved).temperature()
    assert results["log_loss"] == pytest.approx(record["after"]["log_loss"], abs=1e-6)
    assert call(evaluate, "--run", solved, "--raw") == 0
    (folder,) = (solved / "evaluations").iterdir()
    raw = json.loads((folder / "results-val.json").read_text())
    assert raw["accuracy"] == results["accuracy"]
    assert raw["log_loss"] == pytest.approx(record["before"]["log_loss"], abs=1e-5)
    assert call(evaluate, "--run", solved) == 0
    again = json.loads((solved / "results-val.json").read_text())
    assert again["log_loss"] == pytest.approx(results["log_loss"], abs=1e-5)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"temperature": 0}', '{"temperature": "x"}', '{"temperature": NaN}']
)
def test_a_damaged_calibration_is_one_line(solved, capfd, content):
    copy = shutil.copytree(solved, solved.with_name("copy"))
    (copy / "calibration.json").write_text(content)
    assert call(evaluate, "--run", copy) == 2
    assert "calibration.json: damaged" in capfd.readouterr().err
    (copy / "calibration.json").unlink()
    assert Run(copy).temperature() == 1.0


def test_features_come_from_the_cache_view_by_view(solved, sample_images, weights):
    settings = Settings.from_dict(Run(solved).config().settings)
    prepared = preparation.prepare(settings, str(sample_images))
    stop = StopSignals()
    train_split = {"train": prepared.examples["train"]}
    load = prepared.cached_loads(prepared.config.phases, train_split, stop)["gap"]["train"]
    rows = head.read_features(prepared.network, load, len(prepared.examples["train"]), (0, 1), stop)
    expected, _ = head_problem(solved, sample_images, weights)
    assert np.abs(rows - expected).max() < 1e-3
