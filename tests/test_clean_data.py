"""tools.clean_data on images with planted faults, and training with --relabel on a corrected list."""

import csv
import dataclasses
import functools
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data as data_module
import evaluate
import train
from console import StopSignals, UserError, exit_status
from dataset import layouts
from dataset.corrections import DROP, Correction, apply_corrections, read_corrections
from tests.conftest import TINY, call, rows_of
from tools import clean_data
from training.preparation import prepare
from training.settings import Settings

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}


def picture(colour: tuple[int, int, int], rng: np.random.Generator) -> Image.Image:
    """Smooth patches of about one colour, no two alike."""
    coarse = np.clip(rng.normal(colour, 20, (5, 5, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


def make_data(root: Path, train_count: int = 16, val_count: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", train_count), ("val", val_count)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(colour, rng).save(root / split / name / f"{i:02d}.png")
    return root


def write_list(path: Path, rows: list[tuple[str, str]]) -> Path:
    """A CSV with the columns image and action."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "action"), *rows])
    return path


@pytest.fixture
def run_clean(tmp_path, weights):
    """Runs the tool on a folder; the flags are those of a small network."""

    def run(data: Path, *flags: object) -> int:
        arguments = [data, "--output", tmp_path / "out", "--cache-dir", tmp_path / "features", "--network", "small",
                     "--pretrained", weights, "--image-size", 32, *flags]  # fmt: skip
        return exit_status(functools.partial(clean_data.main, [str(argument) for argument in arguments]))

    return run


class Pictures(HTMLParser):
    """Counts the pictures of a page and collects addresses that are not in the page itself."""

    def __init__(self):
        super().__init__()
        self.count, self.outside = 0, []

    def handle_starttag(self, tag, attrs):
        self.count += tag == "img"
        addresses = [value for name, value in attrs if name in ("src", "href")]
        self.outside += [address for address in addresses if not address.startswith("data:")]


def test_planted_faults_are_found_and_the_cache_serves_training(tmp_path, run_clean, weights, capsys):
    data = make_data(tmp_path / "data")
    (data / "train/red/03.png").rename(data / "train/blue/red03.png")  # a wrong label in each split
    (data / "val/green/02.png").rename(data / "val/red/green02.png")
    copied = Image.open(data / "train/green/05.png")
    copied.resize((37, 37), Image.Resampling.LANCZOS).save(data / "val/green/copy.jpg", quality=70)
    stripes = np.zeros((48, 48, 3), np.uint8)
    stripes[::2] = 255
    Image.fromarray(stripes).save(data / "train/red/stripes.png")

    assert run_clean(data) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    issues = rows_of(out / "label-issues.csv")
    assert list(issues[0]) == ["image", "label", "suggested", "score", "action"]
    found = {row["image"]: (row["label"], row["suggested"]) for row in issues}
    assert found["train/blue/red03.png"] == ("blue", "red")
    assert found["val/red/green02.png"] == ("red", "green")
    assert len(set(found) - {"train/blue/red03.png", "val/red/green02.png", "train/red/stripes.png"}) <= 2
    scores = [float(row["score"]) for row in issues]
    assert scores == sorted(scores, reverse=True)
    assert [(row["group"], row["image"], row["split"], row["label"]) for row in rows_of(out / "duplicates.csv")] == [
        ("1", "train/green/05.png", "train", "green"),
        ("1", "val/green/copy.jpg", "val", "green"),
    ]
    assert rows_of(out / "outliers.csv")[0]["image"] == "train/red/stripes.png"
    assert "1 groups of near-duplicates, 1 of them in several splits" in printed
    assert f"train.py {data} --relabel {out / 'label-issues.csv'}" in printed
    assert f"--keep-groups {out / 'duplicates.csv'}" in printed
    page = Pictures()
    page.feed((out / "index.html").read_text())
    assert page.count == 4
    assert page.outside == []
    for name in ("label-issues", "duplicates", "outliers", "thresholds"):
        assert Image.open(out / f"{name}.png").size[0] > 200

    # train.py --train-from head finds every activation.
    command = [data, "--run", tmp_path / "run", *TINY, "--pretrained", weights, "--head", "gap", "--train-from", "head"]
    command += ["--epochs", "1", "--cache-dir", tmp_path / "features"]
    assert call(train, *command) == 0
    assert "caching" not in capsys.readouterr().out
    listed = write_list(tmp_path / "list.csv", [("train/blue/red03.png", "red")])  # images keep their order
    command[2] = tmp_path / "corrected"
    assert call(train, *command, "--relabel", listed) == 0
    assert "caching" not in capsys.readouterr().out

    # A second call with decisions in a list must not lose them.
    rows = (out / "label-issues.csv").read_text().replace("\n", "drop\n", 2).replace("actiondrop", "action", 1)
    (out / "label-issues.csv").write_text(rows)
    assert run_clean(data) == 2
    assert "holds decisions" in capsys.readouterr().err
    assert (out / "label-issues.csv").read_text() == rows


def test_nothing_to_find(tmp_path, run_clean, capsys):
    data = make_data(tmp_path / "data")
    assert run_clean(data) == 0
    assert rows_of(tmp_path / "out" / "duplicates.csv") == []
    assert "None found." in (tmp_path / "out" / "index.html").read_text()
    assert not (tmp_path / "out" / "duplicates.png").exists()
    assert "--keep-groups" not in capsys.readouterr().out


def test_mistakes(tmp_path, run_clean, capsys):
    data = make_data(tmp_path / "data", 2, 1)
    for flags, words in [
        (("--pretrained", "none"), "pretrained network"),
        (("--cached-views", 0), "pretrained network"),
        (("--output", data / "out"), "lies inside DATA"),
        (("--cache-dir", data / "features"), "lies inside DATA"),
    ]:
        assert run_clean(data, *flags) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    assert sorted(path.name for path in data.iterdir()) == ["train", "val"]


def test_one_image_a_class_can_not_be_judged(tmp_path, run_clean, capsys):
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        picture(colour, rng).save(tmp_path / "data" / "train" / name / "x.png")
    (tmp_path / "data" / "val" / "red").mkdir(parents=True)
    picture(COLOURS["red"], rng).save(tmp_path / "data" / "val" / "red" / "y.png")
    assert run_clean(tmp_path / "data") == 0  # of red there are two
    capsys.readouterr()
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "blue")
    assert run_clean(tmp_path / "data", "--output", tmp_path / "other") == 0


def corrected(data: Path, path: Path) -> dict[str, dict[str, str]]:
    """{split: {name: class}} after the corrections of a list."""
    found = layouts.find_images(str(data))
    found = apply_corrections(found, read_corrections(str(path), found))
    return {
        split: dict(
            zip(found.relative_names(split), np.array(found.class_names)[examples.labels].tolist(), strict=True)
        )
        for split, examples in found.splits.items()
    }


def test_corrections_change_the_list_alone(tmp_path):
    data = make_data(tmp_path / "data", 3, 1)
    before = layouts.find_images(str(data))
    rows = [("train/red/00.png", "blue"), ("train/red/01.png", " DROP "), ("val/blue/00.png", ""),
            ("./val/green/00.png", "drop"), ("train/blue/02.png", "blue")]  # fmt: skip
    listed = write_list(tmp_path / "list.csv", rows)
    after = corrected(data, listed)
    expected = {
        split: {name: name.split("/")[1] for name in before.relative_names(split)} for split in ("train", "val")
    }
    expected["train"]["train/red/00.png"] = "blue"
    del expected["train"]["train/red/01.png"], expected["val"]["val/green/00.png"]
    assert after == expected
    assert list(after["train"]) == list(expected["train"])  # in the order that they had
    assert [c.action for c in read_corrections(str(listed), before)] == ["blue", DROP, DROP]


def test_a_name_that_looks_like_a_formula_is_read_as_clean_data_writes_it(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("=a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            picture((9, 9, 9), rng).save(tmp_path / "data" / name / f"{i}.png")
    found = layouts.find_images(str(tmp_path / "data"))
    (tmp_path / "x.csv").write_text("image,label,action\n./=a/0.png,'=a,b\nb/1.png,b,'=a\nb/2.png,b,=a\n")
    assert read_corrections(str(tmp_path / "x.csv"), found) == [
        Correction("=a/0.png", "=a", "b"), Correction("b/1.png", "b", "=a"), Correction("b/2.png", "b", "=a"),
    ]  # fmt: skip


def test_mistakes_in_a_list(tmp_path):
    found = layouts.find_images(str(make_data(tmp_path / "data", 2, 1)))
    for text, words in [
        ("image,label\ntrain/red/00.png,red\n", "no column 'action'"),
        ("", "no column 'image'"),
        ("image,action\ntrain/red/09.png,drop\n", "'train/red/09.png' is not an image"),
        ("image,action\ntrain/red/00.png,yellow\n", "line 2: 'yellow' is no class of the data"),
        ("image,label,action\ntrain/red/00.png,blue,drop\n", "is of class 'red' and not 'blue'"),
        ("image,action\ntrain/red/00.png,drop\ntrain/red/00.png,blue\n", "corrected twice"),
        ('image,action\n"train/red/00.png,drop\n', "not CSV"),
        ("image,action\ntrain/red/00.png,drop,more\n", "more cells"),
    ]:  # fmt: skip
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(UserError, match=words):
            read_corrections(str(tmp_path / "list.csv"), found)
    with pytest.raises(UserError, match="cannot read"):
        read_corrections(str(tmp_path / "none.csv"), found)
    with pytest.raises(UserError, match="not there"):
        apply_corrections(found, [Correction("train/red/09.png", "red", DROP)])
    with pytest.raises(UserError, match="any more"):
        apply_corrections(found, [Correction("train/red/00.png", "blue", DROP)])


def test_training_on_a_corrected_list(tmp_path, capsys):
    data, run = make_data(tmp_path / "data", 5, 2), tmp_path / "run"
    listed = write_list(tmp_path / "list.csv", [("train/red/00.png", "blue"), ("val/green/01.png", "drop")])
    command = [data, "--run", run, *TINY, "--relabel", listed]
    assert call(train, *command, "--epochs", "1") == 0
    assert "corrected: 1 images with another label, 1 dropped" in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    assert config["counts"] == {"train": 15, "val": 5}
    assert config["corrections"] == [
        {"image": "train/red/00.png", "label": "red", "action": "blue"},
        {"image": "val/green/01.png", "label": "green", "action": "drop"},
    ]
    classes = {row["image"]: row["class"] for row in rows_of(run / "images.csv")}
    assert classes["train/red/00.png"] == "blue"
    assert "val/green/01.png" not in classes
    assert "val/green/01.png" not in {row["image"] for row in rows_of(run / "predictions-val.csv")}

    # The same decisions under another name are the same run; others, and none, are another run.
    other = write_list(tmp_path / "other.csv", [("val/green/01.png", "Drop"), ("train/red/00.png", "blue")])
    assert call(train, *command[:-1], other, "--epochs", "1") == 0
    assert "this run is complete" in capsys.readouterr().out
    write_list(listed, [("train/red/00.png", "green"), ("val/green/01.png", "drop")])
    for arguments, words in ((command, "now other ones"), (command[:-2], "now 0")):
        assert call(train, *arguments, "--epochs", "1") == 2
        assert f"--relabel corrected 2 images when it began, {words}" in capsys.readouterr().err

    # The run needs the list no more.
    before = (run / "predictions-val.csv").read_bytes()
    listed.unlink()
    assert call(evaluate, "--run", run) == 0
    assert (run / "predictions-val.csv").read_bytes() == before


def test_what_is_cached_serves_before_and_after_images_are_dropped(tmp_path, capsys):
    data = make_data(tmp_path / "data", 5, 2)
    listed = write_list(tmp_path / "list.csv", [("train/red/00.png", "blue"), ("train/green/01.png", "drop")])
    flags = [*TINY, "--head", "gap", "--train-from", "head", "--cached-views", "2", "--head-solver", "sgd"]
    command = [data, *flags, "--epochs", "1", "--cache-dir", tmp_path / "cache"]
    assert call(train, *command, "--run", tmp_path / "all") == 0
    assert "caching" in capsys.readouterr().out
    assert call(train, *command, "--run", tmp_path / "cleaned", "--relabel", listed) == 0
    assert "caching" not in capsys.readouterr().out
    # The same run from a cache that it makes itself, in which the dropped image can't be decoded and has no place.
    (data / "train/green/01.png").write_bytes((data / "train/green/01.png").read_bytes()[:60])
    own = [*command[:-1], tmp_path / "own", "--run", tmp_path / "broken", "--relabel", listed]
    assert call(train, *own) == 0
    assert json.loads((tmp_path / "broken/config.json").read_text())["excluded"] == ["train/green/01.png"]
    counts = [json.loads((tmp_path / name / "config.json").read_text())["counts"] for name in ("cleaned", "broken")]
    assert counts[0] == counts[1] == {"train": 14, "val": 6}


def test_a_cache_gives_the_rows_of_the_images_that_are_left(tmp_path):
    data = make_data(tmp_path / "data", 5, 2)
    listed = write_list(tmp_path / "list.csv", [("train/green/01.png", "drop")])
    fixed = {"network": "small", "pretrained": "none", "image_size": 32, "head": "gap", "train_from": "head"}
    settings = Settings(**fixed, cached_views=2, cache_dir=str(tmp_path / "cache"))
    rows = []
    for relabel in ("", str(listed)):
        prepared = prepare(dataclasses.replace(settings, relabel=relabel), str(data))
        with StopSignals() as stop:
            phases, train_split = prepared.config.phases, {"train": prepared.examples["train"]}
            load = prepared.cached_loads(phases, train_split, stop, listed=prepared.listed)["gap"]["train"]
        batches = data_module.ordered_batches(load, prepared.examples["train"].labels, 4, view=1)
        paths = prepared.examples["train"].paths
        rows.append(dict(zip(paths, np.concatenate([x for x, *_ in batches]), strict=True)))
    assert len(rows[0]) == 15
    assert len(rows[1]) == 14
    for path, row in rows[1].items():
        assert np.array_equal(row, rows[0][path])
