"""A run knows what it began with, and touches nothing that is not its own: images, settings, other people's files."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import xxhash
from PIL import Image

import evaluate
import export
import inference
import train
from console import exit_status
from dataset.contents import content_hash, fingerprints
from predictor import Predictor
from run import Run, newest_run
from run_config import RunConfig
from training import loop, plan, preparation, session
from training.settings import Settings

SMALL = ("--network", "small", "--pretrained", "none", "--image-size", 32, "--batch-size", 8, "--epochs", 2)


def call(script, *arguments: object) -> int:
    """A script's main in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        return exit_status(script.main)


def make_images(folder: Path, per_class: int = 8, classes: int = 2, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 128, (40, 50, 3)).astype(np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.jpg")
    return folder


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, Path]:
    """Images and a finished run on them; tests change copies."""
    folder = tmp_path_factory.mktemp("runs")
    images = make_images(folder / "images")
    assert call(train, images, "--run", folder / "run", *SMALL) == 0
    return images, folder / "run"


@pytest.fixture
def copies(begun, tmp_path) -> tuple[Path, Path]:
    return shutil.copytree(begun[0], tmp_path / "images"), shutil.copytree(begun[1], tmp_path / "run")


def line_of(capfd: pytest.CaptureFixture[str]) -> str:
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


# -- images of a resumed run -----------------------------------------------------------------------------------------


def test_fingerprints_read_again_only_what_has_been_touched(tmp_path, monkeypatch):
    paths = [str(tmp_path / name) for name in ("a", "b", "gone")]
    for path in paths[:2]:
        Path(path).write_bytes(b"content of " + path[-1].encode())
    first = fingerprints(paths, {}, threads=2)
    assert first[paths[0]].content == content_hash(paths[0]) != first[paths[1]].content
    assert first[paths[2]].content == ""
    times = os.stat(paths[1]).st_mtime_ns
    Path(paths[1]).write_bytes(b"kontent of b")  # the same size, and then the same time of modification
    os.utime(paths[1], ns=(times, times))
    read: list[str] = []

    def hashed(path: str, like: str) -> str:
        read.append(path)
        return content_hash(path, like)

    monkeypatch.setattr("dataset.contents.content_hash", hashed)
    second = fingerprints(paths[:2], first, threads=1)
    assert read == [paths[1]]
    assert second[paths[0]] is first[paths[0]]
    assert second[paths[1]].content == content_hash(paths[1])


def test_hashes_are_xxh3_or_what_they_are_compared_with(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(contents := bytes(range(256)) * 5000)  # more than one chunk
    assert content_hash(str(path)) == f"xxh3:{xxhash.xxh3_128(contents).hexdigest()}"
    assert content_hash(str(path), like="xxh3:0") == content_hash(str(path))
    of_earlier_versions = hashlib.blake2b(contents, digest_size=16).hexdigest()
    assert content_hash(str(path), like="0" * 32) == content_hash(str(path), like="") == of_earlier_versions


@pytest.fixture
def of_an_earlier_version(copies) -> tuple[Path, Path]:
    """Copies of the images and a run, as that of a version whose hashes were BLAKE2b."""
    images, run = copies
    was, contents = plan.read_images(Run(run)), []
    assert all(image.fingerprint.content.startswith("xxh3:") for image in was.values())
    rows = (run / "images.csv").read_text(encoding="utf-8")
    for name, image in was.items():
        contents.append(hashlib.blake2b((images / name).read_bytes(), digest_size=16).hexdigest())
        rows = rows.replace(image.fingerprint.content, contents[-1])
    (run / "images.csv").write_text(rows, encoding="utf-8")
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["content"].startswith("xxh3:")
    config["data"]["content"] = hashlib.sha256("\n".join(contents).encode()).hexdigest()
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return images, run


@pytest.mark.parametrize("listed", [True, False])
def test_images_of_a_run_of_an_earlier_version_are_compared_by_its_hashes(of_an_earlier_version, capfd, listed):
    images, run = of_an_earlier_version
    if not listed:
        (run / "images.csv").unlink()
    for image in images.rglob("*.jpg"):
        os.utime(image, ns=(1, 1))
    before = snapshot(run)
    assert call(train, images, "--run", run, *SMALL) == 0
    assert "this run is complete" in capfd.readouterr().out
    assert call(evaluate, "--run", run, "--data", images) == 0
    assert not (run / "evaluations").exists()  # they are the run's own
    assert {
        name: snapshot(run)[name] for name in (Path("images.csv"), Path("config.json")) if name in before
    }.items() <= (before.items())
    image = images / "class0" / "1.jpg"
    contents = bytearray(image.read_bytes())
    contents[-20] ^= 1
    image.write_bytes(contents)
    os.utime(image, ns=(1, 1))
    assert call(train, images, "--run", run, *SMALL) == 2
    expected = "1 of other content (first 'class0/1.jpg')" if listed else "some are of other content"
    assert expected in line_of(capfd)


def test_a_run_begins_with_one_reading_of_each_image(begun, tmp_path, monkeypatch):
    """Also of those that --relabel drops; with --examples-per-class only of the ends, and of those that it takes."""
    images, _ = begun
    paths = sorted(map(str, images.rglob("*.jpg")))
    original, opened = os.open, list[str]()

    def recorded(path, *arguments, **named):
        if str(path).endswith(".jpg"):
            opened.append(str(path))
        return original(path, *arguments, **named)

    monkeypatch.setattr(os, "open", recorded)
    dropped = os.path.relpath(paths[0], images)
    (tmp_path / "drop.csv").write_text(f"image,action\n{dropped},drop\n", encoding="utf-8")
    settings = Settings(network="small", pretrained="none", image_size=32, relabel=str(tmp_path / "drop.csv"))
    for skip in ("fail", "skip"):
        prepared = preparation.prepare(dataclasses.replace(settings, on_bad_image=skip), str(images))
        assert sorted(opened) == paths
        assert sorted(prepared.prints) == paths
        assert prepared.prints == fingerprints(paths, {}, threads=1)
        assert sorted(prepared.images) == [os.path.relpath(path, images) for path in paths[1:]]
        opened.clear()
    prepared = preparation.prepare(dataclasses.replace(settings, relabel="", examples_per_class=1), str(images))
    taken = [path for of_split in prepared.examples.values() for path in of_split.paths]
    assert sorted(prepared.prints) == sorted(taken)
    assert sorted(opened) == sorted(paths + taken)


@pytest.mark.parametrize("change", ["content", "gone", "new", "moved"])
def test_other_images_of_the_same_names_are_refused_and_named(copies, capfd, change):
    images, run = copies
    names = sorted(plan.read_images(Run(run)))
    (image,) = [name for name in names if plan.read_images(Run(run))[name].split == "train"][:1]
    if change == "content":
        status = os.stat(images / image)
        contents = bytearray((images / image).read_bytes())
        contents[-20] ^= 1
        (images / image).write_bytes(contents)
        os.utime(images / image, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "gone":
        (images / image).unlink()
    elif change == "new":
        shutil.copy(images / image, images / "class0" / "added.jpg")
    else:
        (images / image).rename(images / "class1" / "from0.jpg")
    before = snapshot(run)
    assert call(train, images, "--run", run, *SMALL) == 2
    line = line_of(capfd)
    expected = {
        "content": f"1 of other content (first '{image}')",
        "gone": f"1 gone (first '{image}')",
        "new": "1 new (first 'class0/added.jpg')",
        "moved": "1 new (first 'class1/from0.jpg'), 1 gone",
    }
    assert expected[change] in line
    assert snapshot(run) == before


def test_copied_and_touched_images_are_the_same(copies, tmp_path, capfd):
    images, run = copies
    moved = shutil.copytree(images, tmp_path / "elsewhere")
    for image in moved.rglob("*.jpg"):
        os.utime(image, ns=(1, 1))
    assert call(train, moved, "--run", run, *SMALL) == 0
    assert "this run is complete" in capfd.readouterr().out


def test_a_lost_or_damaged_list_of_images_still_leaves_one_hash_of_all(copies, capfd):
    images, run = copies
    (run / "images.csv").write_text("image,class\n", encoding="utf-8")
    assert call(train, images, "--run", run, *SMALL) == 0
    Image.new("RGB", (40, 50)).save(images / "class0" / "1.jpg")
    capfd.readouterr()
    assert call(train, images, "--run", run, *SMALL) == 2
    assert "some are of other content" in line_of(capfd)


def test_settings_are_checked_again_under_the_lock(copies, tmp_path, monkeypatch, capfd):
    """Another process may create the run after this one found none."""
    images, run = copies
    target = tmp_path / "new"
    original = preparation.prepare

    def meanwhile(*arguments):
        prepared = original(*arguments)
        shutil.copytree(run, target)
        return prepared

    monkeypatch.setattr(session, "prepare", meanwhile)
    assert call(train, images, "--run", target, *SMALL, "--seed", 5) == 2
    assert "--seed was 0, now 5" in line_of(capfd)
    assert snapshot(target).items() >= snapshot(run).items()


# -- scores ----------------------------------------------------------------------------------------------------------


def test_results_on_other_data_have_a_folder_of_their_own(copies, tmp_path, capfd):
    images, run = copies
    before = snapshot(run)
    other = make_images(tmp_path / "other", per_class=3, seed=9)
    assert call(evaluate, "--run", run, "--data", other) == 0
    assert {name: content for name, content in snapshot(run).items() if "evaluations" not in name.parts} == before
    (folder,) = (run / "evaluations").iterdir()
    assert folder.name.startswith("other-all-")
    assert json.loads((folder / "results-all.json").read_text())["examples"] == 6
    own = json.loads((run / "results-val.json").read_text())
    capfd.readouterr()
    assert call(train, images, "--run", run, *SMALL) == 0
    assert f"loss {own['log_loss']:.4f}" in capfd.readouterr().out


def test_other_data_of_the_same_names_do_not_replace_the_runs_results(copies, tmp_path):
    _, run = copies
    other = make_images(tmp_path / "other", seed=5)
    before = (run / "results-val.json").read_bytes()
    assert call(evaluate, "--run", run, "--data", other) == 0
    assert (run / "results-val.json").read_bytes() == before
    assert [path.name[:10] for path in (run / "evaluations").iterdir()] == ["other-all-"]


def test_moved_data_are_the_runs_own_and_changed_data_are_not(copies, tmp_path, capfd):
    _, run = copies
    recorded = json.loads((run / "config.json").read_text())
    images = shutil.copytree(recorded["data"]["path"], tmp_path / "moved")
    (run / "results-val.json").unlink()
    assert call(evaluate, "--run", run, "--data", images) == 0
    assert (run / "results-val.json").is_file()
    assert not (run / "evaluations").exists()
    recorded["data"]["path"] = str(images)
    (run / "config.json").write_text(json.dumps(recorded), encoding="utf-8")
    Image.new("RGB", (40, 50)).save(images / "class1" / "1.jpg")
    capfd.readouterr()
    assert call(evaluate, "--run", run) == 2
    assert "1 of other content (first 'class1/1.jpg')" in line_of(capfd)
    shutil.rmtree(images)
    assert call(evaluate, "--run", run) == 2
    assert "name their new place with --data" in line_of(capfd)


def test_a_csv_with_its_image_root_from_another_working_directory(tmp_path, monkeypatch):
    images = make_images(tmp_path / "pictures")
    rows = [f"{path.relative_to(images)},{path.parent.name}\n" for path in sorted(images.rglob("*.jpg"))]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "all.csv").write_text("path,label\n" + "".join(rows), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call(train, "lists/all.csv", "--image-root", "pictures", "--run", tmp_path / "run", *SMALL) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call(evaluate, "--run", tmp_path / "run") == 0
    moved = shutil.move(tmp_path / "pictures", tmp_path / "albums")
    arguments = ("--run", tmp_path / "run", "--data", tmp_path / "lists" / "all.csv", "--image-root", moved)
    assert call(evaluate, *arguments) == 0
    assert not (tmp_path / "run" / "evaluations").exists()
    # Another data set is not forced under that root.
    assert call(evaluate, "--run", tmp_path / "run", "--data", make_images(tmp_path / "other", seed=3)) == 0


def test_bad_images_of_other_data_are_skipped_when_asked(copies, tmp_path, capfd):
    _, run = copies
    other = make_images(tmp_path / "other", per_class=3)
    (other / "class0" / "0.jpg").write_bytes(b"\xff\xd8\xff no picture")
    assert call(evaluate, "--run", run, "--data", other) == 2
    assert call(evaluate, "--run", run, "--data", other, "--on-bad-image", "skip") == 0
    assert "class0/0.jpg: is a damaged" in capfd.readouterr().out
    (folder,) = (run / "evaluations").iterdir()
    assert json.loads((folder / "results-all.json").read_text())["examples"] == 5


def test_a_validation_that_is_not_finite_ends_the_run_and_leaves_the_best(begun, tmp_path, monkeypatch, capfd):
    images, whole = begun
    calls = []

    def predict(forward, batches):
        calls.append(1)
        logits = original(forward, batches)
        return np.full_like(logits, np.nan) if len(calls) == 2 else logits

    original = vars(loop)["predict"]
    monkeypatch.setattr(loop, "predict", predict)
    run = tmp_path / "run"
    assert call(train, images, "--run", run, *SMALL) == 2
    line = line_of(capfd)
    assert "the outputs are not finite numbers" in line
    assert "best is the checkpoint of step 2" in line
    best = Run(run).load("best")
    assert best is not None
    assert int(best[0]["global_step"]) == 2
    monkeypatch.setattr(loop, "predict", original)
    assert call(train, images, "--run", run, *SMALL) == 0
    assert (run / "results-val.json").read_bytes() == (whole / "results-val.json").read_bytes()


# -- which run -------------------------------------------------------------------------------------------------------


def test_the_newest_run_is_the_one_created_last_that_has_a_checkpoint(begun, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    config = json.loads((begun[1] / "config.json").read_text())
    dates = {
        "older": "2026-11-27T10:00:00.000000+0000",
        "newest": "2026-11-27T12:30:00.000001+0200",
        "before": "2026-11-27T10:15:00+0000",  # as the first version wrote it
        "empty": "2027-01-01T00:00:00.000000+0000",
    }
    for name, created in dates.items():
        folder = shutil.copytree(begun[1], tmp_path / "checkpoints" / name)
        (folder / "config.json").write_text(json.dumps({**config, "created": created}), encoding="utf-8")
    for kind in ("best", "latest"):
        shutil.rmtree(tmp_path / "checkpoints" / "empty" / kind)
    (tmp_path / "checkpoints" / "broken").mkdir()
    (tmp_path / "checkpoints" / "broken" / "config.json").write_text("{}", encoding="utf-8")
    os.utime(tmp_path / "checkpoints" / "older" / "config.json")
    assert newest_run().path.name == "newest"
    assert capfd.readouterr().err == "run checkpoints/newest\n"
    image = next(begun[0].rglob("*.jpg"))
    assert call(inference, image, "--format", "json") == 0
    captured = capfd.readouterr()
    assert captured.err == "run checkpoints/newest\n"
    assert len(captured.out.splitlines()) == 1


# -- other people's files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["events.out.tfevents.1.other", "curves.png", "train", "config.json"])
def test_a_folder_that_is_no_run_is_refused_and_left_alone(begun, tmp_path, capfd, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    if name == "train":
        (folder / "train").mkdir()
        (folder / "train" / "events.out.tfevents.1.other").write_text("mine")
    elif name == "config.json":
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text("mine")
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    assert call(train, begun[0], "--run", folder, *SMALL) == 2
    assert "not empty and no run" in line_of(capfd)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


@pytest.mark.parametrize("name", [".lock", "latest", "train", "metrics.jsonl", "config.json"])
def test_links_inside_a_run_are_not_followed(copies, tmp_path, capfd, name):
    images, run = copies
    (run / "results-val.json").unlink()  # so that there is something to do
    target = tmp_path / "target"
    if (run / name).is_dir():
        shutil.move(run / name, target)
        (target / "checkpoint-000001.index").write_text("precious")
        (target / "events.out.tfevents.7").write_text("precious")
    else:
        target.write_text("precious")
        (run / name).unlink(missing_ok=True)
    before = snapshot(tmp_path / "target") if target.is_dir() else target.read_bytes()
    (run / name).symlink_to(target)
    assert call(train, images, "--run", run, *SMALL) == 2
    assert "is a link" in line_of(capfd)
    assert (snapshot(target) if target.is_dir() else target.read_bytes()) == before


def test_a_fifo_in_a_run_does_not_hang(copies, capfd):
    images, run = copies
    for name in (".lock", "config.json"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        assert call(inference, next(images.rglob("*.jpg")), "--run", run) == (0 if name == ".lock" else 2)
        assert call(train, images, "--run", run, *SMALL) == 2
        assert "Traceback" not in capfd.readouterr().err


def test_nothing_is_written_among_the_images(begun, tmp_path, monkeypatch, capfd):
    images = shutil.copytree(begun[0], tmp_path / "images")
    before = snapshot(images)
    assert call(train, images, "--run", images / "run", *SMALL) == 2
    assert "lies inside DATA" in line_of(capfd)
    monkeypatch.chdir(images)
    assert call(train, ".", *SMALL) == 2
    assert "lies inside DATA" in line_of(capfd)
    monkeypatch.chdir(tmp_path)
    assert call(train, "images", "--cache-dir", "images/features", "--run", "run", *SMALL) == 2
    assert snapshot(images) == before
    assert not (tmp_path / "run").exists()
    assert call(train, "images", "--run", "run", *SMALL) == 0
    assert not (tmp_path / "features").exists()  # nothing was cached


# -- places that people name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["missing/p.csv", "folder", "/proc/p.csv"])
def test_an_output_that_cannot_be_written_is_said_before_the_work(begun, tmp_path, monkeypatch, capfd, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(inference, "Predictor", lambda *_, **__: pytest.fail("worked first"))
    image = next(begun[0].rglob("*.jpg"))
    assert call(inference, image, "--run", begun[1], "--output", place) == 2
    assert f"--output {place}: can't be written" in line_of(capfd)


def test_predictions_are_not_lost_when_the_output_fails_in_the_end(begun, tmp_path, monkeypatch, capfd):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("files.os.replace", full)
    image = next(begun[0].rglob("*.jpg"))
    assert call(inference, image, "--run", begun[1], "--output", tmp_path / "p.json", "--format", "json") == 2
    captured = capfd.readouterr()
    assert json.loads(captured.out)["image"] == str(image)
    assert "No space left on device; the results are on standard output" in captured.err


def test_a_cache_folder_that_cannot_be_made_leaves_no_run(begun, tmp_path, capfd):
    flags = ("--train-from", "conv4", "--cached-views", 1, "--cache-dir", "/proc/features")
    assert call(train, begun[0], "--run", tmp_path / "run", *SMALL, *flags) == 2
    assert "--cache-dir /proc/features: can't be written" in line_of(capfd)
    assert not (tmp_path / "run").exists()


# -- damaged files of a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "command is missing"),
        ("[]", "not RunConfig"),
        ("{", "config.json"),
        ("[" * 100_000, "config.json"),
        ('{"format": 99}', "a later version"),
        ("\0\0\0", "config.json"),
    ],
)
def test_a_damaged_config_is_one_line(copies, capfd, text, expected):
    images, run = copies
    (run / "config.json").write_text(text, encoding="utf-8")
    for arguments in ((inference, next(images.rglob("*.jpg"))), (evaluate,), (train, images, *SMALL)):
        assert call(*arguments, "--run", run) == 2
        assert expected in line_of(capfd)


def test_a_config_with_a_value_of_another_type_names_it(begun):
    config = json.loads((begun[1] / "config.json").read_text())
    for change, expected in (
        ({"class_names": [1]}, r"class_names\[0\] is 1, not str"),
        ({"class_names": None}, "class_names is None"),
        ({"phases": [{"name": "x"}]}, r"phases\[0\].train_from is missing"),
        ({"model": {**config["model"], "image_size": True}}, "model.image_size is True, not int"),
        ({"preprocessing": {**config["preprocessing"], "mean_rgb": [1, 2]}}, "mean_rgb has 2 values, not 3"),
        ({"format": 3}, "later version"),
        ({"threads": -5}, "threads can't be so"),
        ({"threads": 10**9}, "threads can't be so"),
        ({"precision": "float99"}, "precision can't be so"),
        ({"class_names": ["a", "a"]}, "class_names can't be so"),
        ({"model": {**config["model"], "network": "zork"}}, "model.network can't be so"),
        ({"preprocessing": {**config["preprocessing"], "std_rgb": [0, 0, 0]}}, "std_rgb can't be so"),
    ):
        with pytest.raises(ValueError, match=expected):
            RunConfig.from_json({**config, **change})
    assert RunConfig.from_json({**config, "unknown": 1}) == RunConfig.from_json(config)
    assert json.loads(json.dumps(dataclasses.asdict(RunConfig.from_json(config)))) == config


def test_a_config_of_the_first_version_is_read(begun):
    """As that version wrote it: no format, threads or content, phases with `last_step`, no deviation of channels."""
    config = json.loads((begun[1] / "config.json").read_text())
    first = {k: v for k, v in config.items() if k not in ("format", "threads")}
    first["phases"] = [
        {**{k: v for k, v in phase.items() if k != "end_step"}, "last_step": phase["end_step"]}
        for phase in config["phases"]
    ]
    first["preprocessing"] = {k: v for k, v in config["preprocessing"].items() if k != "std_rgb"}
    first["data"] = {k: v for k, v in config["data"].items() if k != "content"}
    first["pretrained"] = {**config["pretrained"], "wrong_shape": [], "refused": []}
    read = RunConfig.from_json(first)
    assert read.phases == RunConfig.from_json(config).phases
    assert read.preprocessing == RunConfig.from_json(config).preprocessing
    assert (read.format, read.threads, read.data.content) == (1, 0, "")


def test_raw_scores_and_other_image_roots_replace_nothing(copies, tmp_path):
    images, run = copies
    before = (run / "results-val.json").read_bytes()
    assert call(evaluate, "--run", run, "--raw") == 0
    assert (run / "results-val.json").read_bytes() == before
    rows = [f"{path.relative_to(images)},{path.parent.name}\n" for path in sorted(images.rglob("*.jpg"))]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(rows), encoding="utf-8")
    for seed, name in enumerate(("one", "two")):
        root = make_images(tmp_path / name, seed=seed + 20)
        assert call(evaluate, "--run", run, "--data", tmp_path / "list.csv", "--image-root", root) == 0
    assert len(list((run / "evaluations").iterdir())) == 3
    shutil.rmtree(run / "evaluations")
    (tmp_path / "victim").mkdir()
    (run / "evaluations").symlink_to(tmp_path / "victim")
    assert call(evaluate, "--run", run, "--data", tmp_path / "one") == 2
    assert list((tmp_path / "victim").iterdir()) == []


def test_results_that_are_damaged_are_computed_again(copies, capfd):
    images, run = copies
    whole = (run / "results-val.json").read_bytes()
    for content in (whole[:40], b"", b"[]", b'{"accuracy": null, "log_loss": 1}'):
        (run / "results-val.json").write_bytes(content)
        assert call(train, images, "--run", run, *SMALL) == 0
        assert (run / "results-val.json").read_bytes() == whole
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("line", ["3", "null", '{"step": "x", "split": "train"}', '{"loss": 1}', "\0"])
def test_odd_lines_of_a_log_end_it(copies, line):
    _, run = copies
    whole = Run(run).read_lines("metrics.jsonl")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    assert Run(run).read_lines("metrics.jsonl") == whole[:2]


def test_a_checkpoint_that_lacks_a_variable_is_one_line(copies, capfd):
    images, run = copies
    loaded = Run(run).load("best")
    assert loaded is not None
    del loaded[0]["small/conv3/conv3_1/weights"]
    Run(run).save("best", loaded[0], keep=1)
    assert call(inference, next(images.rglob("*.jpg")), "--run", run) == 2
    assert "small/conv3/conv3_1/weights is missing" in line_of(capfd)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(copies, monkeypatch, capfd):
    images, run = copies

    def refused(prefix: str) -> None:
        raise PermissionError(13, "Permission denied", f"{prefix}.index")

    monkeypatch.setattr("weights.checkpoint._check_v2", refused)
    assert call(inference, next(images.rglob("*.jpg")), "--run", run) == 2
    line = line_of(capfd)
    assert "cannot be read (Permission denied)" in line
    assert "damaged" not in line


# -- the same bits on other numbers of cores -------------------------------------------------------------------------


def test_one_core_gives_the_bits_of_two(run_script, begun, tmp_path):
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core only, or no way to choose one")
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})  # inherited by the script
        done = run_script("train.py", begun[0], "--run", "run", *SMALL, cwd=tmp_path)
    finally:
        os.sched_setaffinity(0, cores)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (begun[1] / "metrics.jsonl").read_bytes()


def test_all_that_uses_a_run_divides_its_work_among_the_threads_that_the_run_began_with(copies, monkeypatch, tmp_path):
    images, run = copies
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "threads": 3}), encoding="utf-8")
    asked: list[int] = []
    monkeypatch.setattr(tf.config.threading, "set_intra_op_parallelism_threads", asked.append)
    export_npz = (export, "--format", "npz", tmp_path / "run.npz")
    for command in ((train, images, *SMALL), (evaluate,), (inference, next(images.rglob("*.jpg"))), export_npz):
        assert call(*command, "--run", run) == 0
        assert set(asked) == {3}, command[0]
        asked.clear()
    Predictor(run)
    assert asked == [3]
