"""The contract of the commands: what they leave, what they print, and one line and status 2 for a user's mistake."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import evaluate
import inference
import train
from run import Run
from tests.conftest import TINY, call, rows_of, scalars


@pytest.fixture(scope="module")
def trained(sample_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on the sample photographs; not to be changed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert call(train, sample_images, "--run", run, "--epochs", 2, *TINY) == 0
    return run


def test_run_directory_holds_what_the_contract_names(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.json", "classes.txt", "metrics.jsonl", "timing.jsonl", "train", "val", "latest", "best", "curves.png",
        "results-val.json", "results-val.txt", "confusion-val.png", "confusion-val.csv", "predictions-val.csv",
    }  # fmt: skip
    config = json.loads((trained / "config.json").read_text())
    assert config["counts"] == {"train": 36, "val": 24}
    assert config["settings"]["epochs"] == 2
    assert (trained / "classes.txt").read_text().split() == config["class_names"] == sorted(config["class_names"])
    assert len(config["class_names"]) == 12


def test_event_files_repeat_the_metric_log(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for split, tags in (("train", ("loss", "accuracy", "learning_rate")), ("val", ("loss", "accuracy"))):
        events = scalars(trained / split)
        assert set(events) == {*tags, "images_per_second"}
        for tag in tags:
            logged = [(line["step"], line[tag]) for line in lines if line["split"] == split]
            np.testing.assert_allclose(events[tag], logged, rtol=1e-6)
    assert [line["step"] for line in lines if line["split"] == "val"] == [5, 10]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 11))


def test_checkpoints_have_slim_names_and_are_read_by_tensorflow(trained: Path) -> None:
    latest = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(trained / "latest")))
    best = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(trained / "best")))
    assert latest.get_tensor("global_step") == 10
    shapes = best.get_variable_to_shape_map()
    assert shapes["small/conv1/conv1_1/weights"] == [3, 3, 3, 32]
    assert shapes["small/gap/weights"] == [256, 12]
    assert "small/gap/weights/Momentum" in latest.get_variable_to_shape_map()


def test_results_are_those_of_the_predictions(trained: Path) -> None:
    results = json.loads((trained / "results-val.json").read_text())
    rows = rows_of(trained / "predictions-val.csv")
    assert results["examples"] == len(rows) == 24
    assert results["accuracy"] == pytest.approx(np.mean([row["true"] == row["predicted"] for row in rows]))
    best = max(
        (json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines() if '"val"' in line),
        key=lambda line: (line["accuracy"], -line["loss"]),
    )
    assert results["accuracy"] == pytest.approx(best["accuracy"])
    assert results["log_loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_evaluate_scores_a_split_and_another_data_set_by_class_name(
    trained: Path, sample_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run)
    assert call(evaluate, "--run", run, "--split", "train") == 0
    assert json.loads((run / "results-train.json").read_text())["examples"] == 36
    for split in ("train", "val"):  # a few of the classes, so that their positions differ
        for name in ("coffee", "retina"):
            shutil.copytree(sample_images / split / name, other / split / name)
    own = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert call(evaluate, "--run", run, "--data", other, "--split", "val") == 0
    (folder,) = (run / "evaluations").iterdir()
    results = json.loads((folder / "results-val.json").read_text())
    assert results["examples"] == 4
    known = [row for row in rows_of(trained / "predictions-val.csv") if row["true"] in ("coffee", "retina")]
    assert results["accuracy"] == pytest.approx(np.mean([row["correct"] in ("1", "True", "true") for row in known]))
    assert call(evaluate, "--run", run, "--data", other) == 0  # all that it holds
    (file,) = (run / "evaluations").glob("*/results-all.json")
    assert json.loads(file.read_text())["examples"] == 4 + 6
    assert {file: file.read_bytes() for file in own} == own, "the run's own results stay"
    (other / "train" / "coffee").rename(other / "train" / "tea")
    (other / "val" / "coffee").rename(other / "val" / "tea")
    capfd.readouterr()
    assert call(evaluate, "--run", run, "--data", other) == 2
    assert "tea" in capfd.readouterr().err


def test_inference_formats_agree_and_one_bad_image_stops_nothing(
    trained: Path, sample_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my images"
    folder.mkdir()
    shutil.copy(next((sample_images / "val" / "coffee").iterdir()), folder / "a b.jpg")
    shutil.copy(next((sample_images / "val" / "retina").iterdir()), folder / "b.jpg")
    (folder / "bad.jpg").write_text("not an image")
    capfd.readouterr()
    assert call(inference, folder, "--run", trained, "--top", 3, "--format", "json") == 1
    captured = capfd.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a b.jpg", "b.jpg", "bad.jpg"]
    assert "not an image" in lines[2]["error"]
    assert captured.err.count("\n") == 1
    assert "bad.jpg" in captured.err
    for line in lines[:2]:
        probabilities = [p["probability"] for p in line["predictions"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
    output = tmp_path / "out.csv"
    assert (
        call(inference, str(folder / "*.jpg"), "--run", trained, "--top", 3, "--format", "csv", "--output", output) == 1
    )
    rows = rows_of(output)
    assert [row["class"] for row in rows[:3]] == [p["class"] for p in lines[0]["predictions"]]
    assert float(rows[0]["probability"]) == pytest.approx(lines[0]["predictions"][0]["probability"], abs=1e-6)
    assert rows[-1]["error"]


def test_inference_gives_the_probabilities_of_the_evaluation(
    trained: Path, sample_images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert call(inference, sample_images / "val", "--run", trained, "--top", 1, "--format", "json") == 0
    found = {}
    for line in map(json.loads, capfd.readouterr().out.splitlines()):
        found[str(Path(line["image"]).relative_to(sample_images))] = line["predictions"][0]
    for row in rows_of(trained / "predictions-val.csv"):
        prediction = found[row["image"]]
        assert prediction["class"] == row["predicted"]
        names = [name for name in row if "probability" in name]
        assert prediction["probability"] == pytest.approx(float(row[names[0]]), abs=1e-4)


def test_fine_tuning_a_run_on_other_classes_restores_all_but_the_last_layer(
    trained: Path, sample_images: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("cat", "coffee"):
            shutil.copytree(sample_images / split / name, data / split / name)
    arguments = [*TINY, "--pretrained", trained, "--epochs", 1, "--run", tmp_path / "run"]
    assert call(train, data, *arguments, "--train-from", "head", "--cache-dir", tmp_path / "cache") == 0
    report = Run(tmp_path / "run").config().pretrained
    assert len(report.restored) == 10
    assert [name for name, _ in report.new] == ["small/gap/weights", "small/gap/biases"]
    old, new = Run(trained).load("best"), Run(tmp_path / "run").load("best")
    assert old is not None
    assert new is not None
    for name in report.restored:  # frozen: still those of the first run
        np.testing.assert_array_equal(new[0][name], old[0][name])


def make_classes(folder: Path, splits: dict[str, tuple[str, ...]]) -> Path:
    for split, names in splits.items():
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for number in range(3):
                color = (40 * number, 90, 160)
                Image.new("RGB", (40, 48), color).save(folder / split / name / f"{number}.png")
    return folder


MISTAKES = {
    "no such folder": (lambda p: [p / "nowhere"], "nowhere"),
    "an empty folder": (
        lambda p: [make_classes(p / "empty", {"": ()}) if (p / "empty").mkdir() else p / "empty"],
        "empty",
    ),
    "one class": (lambda p: [make_classes(p / "one", {"": ("a",)})], "one"),
    "unknown layout": (lambda p: [(p / "a.txt", (p / "a.txt").write_text("x"))[0]], "a.txt"),
    "classes differ": (lambda p: [make_classes(p / "d", {"train": ("a", "b"), "val": ("a", "c")})], "c"),
    "not a checkpoint": (
        lambda p: [
            make_classes(p / "d", {"": ("a", "b")}),
            "--pretrained",
            (p / "w.ckpt", (p / "w.ckpt").write_text("x"))[0],
        ],
        "w.ckpt",
    ),
    "no checkpoint there": (lambda p: [make_classes(p / "d", {"": ("a", "b")}), "--pretrained", p / "gone"], "gone"),
    "unreadable image": (
        lambda p: [
            make_classes(p / "d", {"": ("a", "b")}),
            (p / "d/a/1.png").write_bytes(b"\0" * 99) and "--pretrained",
            "none",
        ],
        "1.png",
    ),
    "bad flag value": (lambda p: [make_classes(p / "d", {"": ("a", "b")}), "--epochs", "many"], "--epochs"),
    "value out of range": (lambda p: [make_classes(p / "d", {"": ("a", "b")}), "--momentum", "1.5"], "--momentum"),
    "no such stage": (
        lambda p: [
            make_classes(p / "d", {"": ("a", "b")}),
            "--pretrained",
            "none",
            "--train-from",
            "fc7",
            "--head",
            "gap",
        ],
        "fc7",
    ),
    "no weights for the network": (lambda p: [make_classes(p / "d", {"": ("a", "b")}), "--network", "small"], "small"),
    "too small for fc": (
        lambda p: [
            make_classes(p / "d", {"": ("a", "b")}),
            "--head",
            "fc",
            "--image-size",
            "64",
            "--pretrained",
            "none",
        ],
        "--image-size",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2_and_leaves_no_run(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, word = MISTAKES[mistake]
    assert call(train, *arguments(tmp_path)) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert word in captured.err
    assert not (tmp_path / "checkpoints").exists()


def test_mistakes_of_the_other_commands(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_text("x")
    cases: list[tuple[ModuleType, list[object], str]] = [
        (inference, ["bad.jpg"], "train.py"),
        (evaluate, [], "train.py"),
        (inference, ["bad.jpg", "--run", "empty"], "empty"),
        (inference, ["bad.jpg", "--run", trained, "--top", 0], "--top"),
        (inference, ["empty", "--run", trained], "empty"),
        (inference, ["*.gif", "--run", trained], "*.gif"),
        (inference, ["bad.jpg", "--run", trained, "--output", "out.txt"], "bad.jpg"),
        (inference, ["gone.jpg", "--run", trained, "--output", "out.txt"], "gone.jpg"),
        (evaluate, ["--run", trained, "--split", "dev"], "dev"),
        (evaluate, ["--run", trained, "--data", "gone"], "gone"),
    ]
    for module, arguments, word in cases:
        assert call(module, *arguments) == 2, arguments
        error = capfd.readouterr().err
        assert error.startswith("error: "), arguments
        assert error.count("\n") == 1, error
        assert word in error


def test_scripts_are_quiet_in_a_process_of_their_own(run_script, sample_images: Path, tmp_path: Path) -> None:
    failed = run_script("train.py", sample_images, "--pretrained", "nowhere.ckpt", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    assert "nowhere.ckpt" in failed.stderr
    helped = run_script("inference.py", "--help", cwd=tmp_path)
    assert helped.returncode == 0
    assert "--format" in helped.stdout
    assert helped.stderr == ""
