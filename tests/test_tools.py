"""The tools for data sets and runs: their numbers against examples worked out by hand, odd names, users' mistakes."""

import csv
import functools
import io
import json
import os
import re
import shlex
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from console import UserError, exit_status
from dataset import layouts
from tools import check_data, compare, explore_data, explore_pictures, split_data

ODD_NAMES = [
    "a b",
    'q"uo,te',
    "new\nline",
    "car\rriage",
    "größe",
    "-flag",
    "{0}",
    "$x$",
    " space",
    os.fsdecode(b"raw\xff"),
]


def save(
    path: Path, colour: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (8, 6), format: str = "png"
) -> Path:
    """An image of one colour, `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format)
    return path


def make_classes(root: Path, counts: dict[str, int]) -> Path:
    """A folder per class, every file of another content."""
    serial = 0
    for name, count in counts.items():
        for i in range(count):
            serial += 1
            save(root / name / f"{i:03d}.png", (serial % 256, serial // 256, 9))
    return root


def run(tool, *arguments: object) -> int:
    """The exit status of a tool, as the shell sees it."""
    return exit_status(functools.partial(tool.main, [str(argument) for argument in arguments]))


# -- check_data ------------------------------------------------------------------------------------------------------


def test_check_data_finds_each_thing(tmp_path, capsys):
    root = tmp_path / "data"
    a = save(root / "train/cat/a.png", (1, 1, 1))
    save(root / "train/cat/named wrong.jpg", (2, 2, 2))
    (root / "train/cat/bad\nline.png").write_bytes(b"")
    b = save(root / "train/dog/b.png", (3, 3, 3))
    (root / "train/dog/b again.png").write_bytes(b.read_bytes())
    (root / "train/dog/gone.png").symlink_to("nowhere")
    save(root / "train/cat/2023/nested.png", (5, 5, 5))
    save(root / "train/cat/no extension", (6, 6, 6))
    (root / "train/cat/a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    save(root / "spare/cat/d.png", (7, 7, 7))
    save(root / "val/cat/c.png", (4, 4, 4))
    (root / "val/dog").mkdir(parents=True)
    (root / "val/dog/a as a dog.png").write_bytes(a.read_bytes())
    assert run(check_data, root) == 1
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if re.match(r"(cat|dog|all) ", line)}
    assert rows == {"cat": ["5", "1", "6", "1"], "dog": ["3", "1", "4", "1"], "all": ["8", "2", "10", "2"]}
    assert "bad files: 2\n  train/cat/bad\\nline.png: is empty\n  train/dog/gone.png: is a dangling link\n" in out
    assert "all the same): 1\n  train/cat/named wrong.jpg: is PNG\n" in out
    assert "within a split: 1\n  train: train/dog/b again.png = train/dog/b.png\n" in out
    assert "too good): 1\n  train/cat/a.png (train) = val/dog/a as a dog.png (val)\n" in out
    assert "different labels: 1\n  train/cat/a.png (cat) = val/dog/a as a dog.png (dog)\n" in out
    assert out.endswith("no part of the data set): 2\n  train/cat/a.heic\n  spare/\n")


def test_check_data_hashes_only_files_of_equal_size(tmp_path, monkeypatch):
    files = [save(tmp_path / f"{i}.png", size=(w, 4)) for i, w in enumerate((4, 4, 300))]
    (tmp_path / "same size.bmp").write_bytes(b"x" * files[2].stat().st_size)  # bad, so of no interest
    listed = [check_data.Listed(str(path), path.name, "x", "train") for path in sorted(tmp_path.iterdir())]
    hashed = []
    original = vars(check_data)["content_hash"]

    def recorded(path):
        hashed.append(path)
        return original(path)

    monkeypatch.setattr(check_data, "content_hash", recorded)
    groups = check_data.find_duplicates(listed, [check_data.examine(file.path) for file in listed])
    assert sorted(hashed) == [str(files[0]), str(files[1])]
    assert [[file.name for file in group.files] for group in groups] == [["0.png", "1.png"]]


def test_check_data_status(tmp_path, capsys):
    good = make_classes(tmp_path / "good", {"a": 3, "b": 3})
    assert run(check_data, good, "--val-fraction", 0) == 0
    assert "nothing wrong found" in capsys.readouterr().out
    # A flat folder is no data set, and still the files in it are checked.
    flat = tmp_path / "flat"
    save(flat / "x.png")
    assert run(check_data, flat) == 2
    (flat / "y.jpg").write_text("not an image")
    assert run(check_data, flat) == 1
    captured = capsys.readouterr()
    assert "bad files: 1\n  y.jpg: is not an image" in captured.out
    assert captured.err.count("\n") == 2  # the error of the first, the warning of the second
    assert run(check_data, tmp_path / "missing") == 2
    assert run(check_data, good, "--val-fraction", "much") == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_check_data_where_one_class_is_all_broken(tmp_path, capsys):
    root = make_classes(tmp_path, {"a": 2})
    (root / "b").mkdir()
    (root / "b" / "x.png").write_bytes(b"\0" * 100)
    assert run(check_data, root, "--val-fraction", 0) == 1
    assert "  b/x.png: holds only zero bytes" in capsys.readouterr().out


def test_check_data_by_processes_finds_the_same(tmp_path, monkeypatch, capsys):
    root = make_classes(tmp_path, {"a": 3, "b": 3})
    (root / "b" / "002.png").write_bytes((root / "a" / "000.png").read_bytes())
    (root / "a" / "bad.png").write_bytes(b"")
    assert run(check_data, root) == 1
    by_threads = capsys.readouterr().out
    monkeypatch.setattr(check_data, "FILES_FOR_PROCESSES", 1)
    assert run(check_data, root) == 1
    assert capsys.readouterr().out == by_threads


def test_check_data_without_semaphores(tmp_path, monkeypatch, capsys):
    """As on AWS Lambda, where nothing of multiprocessing can be made."""
    root = make_classes(tmp_path, {"a": 3, "b": 3})
    (root / "a" / "bad.png").write_bytes(b"")

    def refuse(*_, **__):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    monkeypatch.setattr(check_data, "FILES_FOR_PROCESSES", 1)
    assert run(check_data, root) == 1
    assert "bad files: 1\n  a/bad.png: is empty" in capsys.readouterr().out


def test_check_data_tells_what_it_does_not_read(tmp_path, capsys):
    root = make_classes(tmp_path, {"a": 3, "b": 3})
    (root / "a" / "x\x1b[31m.heic").write_bytes(b"")
    assert run(check_data, root, "--val-fraction", 0) == 0
    out = capsys.readouterr().out
    assert out.endswith("no part of the data set): 1\n  a/x\\x1b[31m.heic\n")
    assert "nothing wrong found" not in out


def test_check_data_on_odd_files(shared, capsys):
    assert run(check_data, shared / "odd") == 1
    out = capsys.readouterr().out
    assert re.findall(r"^  (\S+): ", out, re.M) == [
        "empty.jpg", "text.jpg", "truncated.jpg", "zero_filled.jpg", "webp_named.jpg",
    ]  # fmt: skip


# -- split_data ------------------------------------------------------------------------------------------------------


def splits_of(list_file: Path, image_root: Path | None = None) -> dict[str, dict[str, str]]:
    """{split: {name: class}} as train.py would see it."""
    found = layouts.find_images(
        str(list_file), val_fraction=0, test_fraction=0, image_root=str(image_root) if image_root else None
    )
    return {
        split: {
            name: found.class_names[label]
            for name, label in zip(found.relative_names(split), examples.labels, strict=True)
        }
        for split, examples in found.splits.items()
    }


def test_split_data_rounds_each_class_and_is_seeded(tmp_path, capsys):
    root = make_classes(tmp_path / "data", {"a": 10, "b": 7, "c": 1, "d": 50})
    out = tmp_path / "list.csv"  # above the images: its paths need no root
    assert run(split_data, root, out, "--val-fraction", 0.25, "--test-fraction", 0.29) == 0
    assert capsys.readouterr().out.endswith(f"python train.py {out}\n")
    splits = splits_of(out)
    # a: 2.5 and 2.9; b: 1.75 and 2.03; c: its one image trains; d: 12.5 and 14.5, which in floats is just less
    expected = {"val": {"a": 3, "b": 2, "d": 13}, "test": {"a": 3, "b": 2, "d": 15}}
    expected["train"] = {"a": 4, "b": 3, "c": 1, "d": 22}
    assert {split: dict(Counter(images.values())) for split, images in splits.items()} == expected
    assert sum(map(len, splits.values())) == len({name for images in splits.values() for name in images}) == 68
    assert all(
        name == f"data/{label}/{Path(name).name}" for images in splits.values() for name, label in images.items()
    )
    first = out.read_bytes()
    assert run(split_data, root, out, "--val-fraction", 0.25, "--test-fraction", 0.29) == 0
    assert out.read_bytes() == first
    assert run(split_data, root, out, "--val-fraction", 0.25, "--test-fraction", 0.29, "--seed", 1) == 0
    assert out.read_bytes() != first
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_split_data_k_fold(tmp_path, capsys):
    root = make_classes(tmp_path / "data", {"a": 7, "b": 5, "c": 2})
    lists = tmp_path / "lists"
    lists.mkdir()
    assert run(split_data, root, lists / "k {0}.csv", "--k-fold", 4) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(command) == ["python", "train.py", str(lists / "k {0}-4.csv"), "--image-root", str(root)]
    folds = [splits_of(lists / f"k {{0}}-{i}.csv", root) for i in range(1, 5)]
    in_val = Counter(name for fold in folds for name in fold["val"])
    assert set(in_val.values()) == {1}
    assert len(in_val) == 14
    assert sorted(len(fold["val"]) for fold in folds) == [3, 3, 4, 4]
    for fold in folds:
        counts = Counter(fold["val"].values())
        assert 1 <= counts["a"] <= 2
        assert 1 <= counts["b"] <= 2
        assert counts["c"] <= 1
        assert not fold["train"].keys() & fold["val"].keys()
        assert len(fold["train"]) + len(fold["val"]) == 14


def test_split_data_keeps_a_test_split(tmp_path, capsys):
    root = tmp_path / "data"
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        make_classes(root / split, {"a": count, "b": count})
    assert run(split_data, root, tmp_path / "x.csv", "--k-fold", 3) == 0
    for i in (1, 2, 3):
        fold = splits_of(tmp_path / f"x-{i}.csv")
        assert sorted(fold["test"]) == [f"data/test/{c}/00{j}.png" for c in "ab" for j in range(3)]
        assert Counter(fold["val"].values()) == {"a": 2, "b": 2}
    assert run(split_data, root, tmp_path / "y.csv", "--test-fraction", 0.5) == 2
    assert "brings a test split" in capsys.readouterr().err


def test_split_data_k_fold_with_a_test_share(tmp_path):
    root = make_classes(tmp_path / "data", {"a": 10, "b": 10})
    assert run(split_data, root, tmp_path / "x.csv", "--k-fold", 2, "--test-fraction", 0.2) == 0
    one, two = (splits_of(tmp_path / f"x-{i}.csv") for i in (1, 2))
    assert one["test"] == two["test"]
    assert Counter(one["test"].values()) == {"a": 2, "b": 2}
    assert one["val"] == two["train"]
    assert one["train"] == two["val"]


@pytest.mark.parametrize("place", ["above", "elsewhere"])
def test_split_data_round_trip_of_odd_names(tmp_path, place):
    root = tmp_path / "da ta"
    labels = [name for name in ODD_NAMES if "\udcff" not in name]
    for label in labels:
        for name in ODD_NAMES:
            save(root / label / f"{name}.png", (len(label), len(name), 0))
    out = tmp_path / "x.csv" if place == "above" else tmp_path / "lists" / "x.csv"
    out.parent.mkdir(exist_ok=True)
    assert run(split_data, root, out) == 0
    above = "da ta/" if place == "above" else ""
    splits = splits_of(out, None if place == "above" else root)
    everything = {name: label for images in splits.values() for name, label in images.items()}
    assert everything == {f"{above}{label}/{name}.png": label.strip() for label in labels for name in ODD_NAMES}
    assert Counter(splits["val"].values()) == dict.fromkeys(map(str.strip, labels), 2)  # 0.2 of 10


def test_split_data_of_a_list_with_a_root(tmp_path):
    root = make_classes(tmp_path / "images", {"a": 4, "b": 4})
    (tmp_path / "in").mkdir()
    listed = tmp_path / "in" / "all.csv"
    listed.write_text("path,label\n" + "".join(f"{c}/00{i}.png,{c}{c}\n" for c in "ab" for i in range(4)))
    out = tmp_path / "in" / "split.csv"
    assert run(split_data, listed, out, "--image-root", root, "--val-fraction", 0.5) == 0
    splits = splits_of(out, root)
    assert Counter(splits["val"].values()) == Counter(splits["train"].values()) == {"aa": 2, "bb": 2}


def test_split_data_mistakes(tmp_path, capsys):
    root = make_classes(tmp_path / "data", {"a": 3, "b": 1})
    out = tmp_path / "x.csv"
    mistakes = [
        ([tmp_path / "none", out], "no such file"),
        ([root, tmp_path / "x.txt"], "ends in .csv"),
        ([root, tmp_path / "no" / "x.csv"], "cannot write"),
        ([root, out, "--val-fraction", 0.6, "--test-fraction", 0.4], "less than 1"),
        ([root, out, "--val-fraction", "nan"], "less than 1"),
        ([root, out, "--k-fold", 1], "at least 2"),
        ([root, out, "--k-fold", 2], "class 'b' has fewer than 2 images"),
        ([root, out, "--k-fold", 2, "--val-fraction", 0.1], "leave out --val-fraction"),
        ([root, out, "--seed", -1], "at least 0"),
    ]
    for arguments, words in mistakes:
        assert run(split_data, *arguments) == 2, arguments
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
    assert run(split_data, root, out) == 0
    before = out.read_bytes()
    assert run(split_data, out, out) == 2  # would overwrite its own source
    assert out.read_bytes() == before
    (root / os.fsdecode(b"raw\xff")).mkdir()
    save(root / os.fsdecode(b"raw\xff") / "x.png")
    assert run(split_data, root, tmp_path / "y.csv") == 2
    assert not (tmp_path / "y.csv").exists()


def write_groups(path: Path, groups: dict[str, list[str]]) -> Path:
    rows = [f"{name},{image}" for name, images in groups.items() for image in images]
    path.write_text("group,image\n" + "\n".join(rows) + "\n")
    return path


def test_split_data_keeps_groups(tmp_path):
    root = make_classes(tmp_path / "data", {"a": 20, "b": 20})
    pairs = {f"p{i}": [f"a/{2 * i:03d}.png", f"a/{2 * i + 1:03d}.png"] for i in range(8)}
    groups = {**pairs, "both": ["a/019.png", "b/000.png", "b/001.png"]}
    listed = write_groups(tmp_path / "groups.csv", groups)
    for seed in range(10):
        out = tmp_path / "x.csv"
        flags = ("--val-fraction", 0.25, "--test-fraction", 0.25, "--seed", seed, "--keep-groups", listed)
        assert run(split_data, root, out, *flags) == 0
        splits = splits_of(out)
        split_of = {name.removeprefix("data/"): split for split, images in splits.items() for name in images}
        assert len(split_of) == 40
        for images in groups.values():
            assert len({split_of[image] for image in images}) == 1
        for split in ("val", "test"):
            assert abs(len(splits[split]) - 10) <= 4
    assert run(split_data, root, tmp_path / "k.csv", "--k-fold", 4, "--keep-groups", listed) == 0
    for i in range(1, 5):
        splits = splits_of(tmp_path / f"k-{i}.csv")
        val = {name.removeprefix("data/") for name in splits["val"]}
        assert 8 <= len(val) <= 12
        assert all(len(val & set(images)) in (0, len(images)) for images in groups.values())


def test_split_data_leaves_out_what_a_test_split_has_a_copy_of(tmp_path, capsys):
    root = tmp_path / "data"
    for split in ("train", "test"):
        make_classes(root / split, {"a": 4, "b": 4})
    listed = write_groups(tmp_path / "g.csv", {"1": ["train/a/000.png", "test/a/003.png", "train/b/001.png"]})
    assert run(split_data, root, tmp_path / "x.csv", "--keep-groups", listed) == 0
    assert "left out 2 images of train and val" in capsys.readouterr().err
    splits = splits_of(tmp_path / "x.csv")
    assert len(splits["test"]) == 8
    names = splits["train"].keys() | splits["val"].keys()
    assert len(names) == 6
    assert not names & {"data/train/a/000.png", "data/train/b/001.png"}


def test_split_data_mistakes_in_groups(tmp_path, capsys):
    root = make_classes(tmp_path / "data", {"a": 4, "b": 2})
    mistakes = [
        ("image\na/000.png\n", "no column 'group'"),
        ("group,image\n1,a/009.png\n", "'a/009.png' is not an image"),
        ("group,image\n1,a/000.png\n2,a/000.png\n", "in group '2' and '1'"),
        ("group,image\n1,a/000.png,x\n", "more cells"),
        ("group,image\n" + "".join(f"1,{i}.png\n" for i in ("a/000", "b/000", "b/001")), ""),
    ]
    for text, words in mistakes:
        (tmp_path / "g.csv").write_text(text)
        status = run(split_data, root, tmp_path / "x.csv", "--keep-groups", tmp_path / "g.csv")
        err = capsys.readouterr().err
        assert words in err
        assert (status, err.count("\n")) == ((2, 1) if words else (0, 0))
    # All images of b are one group, so that one of two folds has none to train on.
    assert run(split_data, root, tmp_path / "x.csv", "--k-fold", 2, "--keep-groups", tmp_path / "g.csv") == 2
    assert "no training image of fold" in capsys.readouterr().err
    assert run(split_data, root, tmp_path / "x.csv", "--keep-groups", tmp_path / "none.csv") == 2


# -- compare ---------------------------------------------------------------------------------------------------------


def make_run(folder: Path, accuracies: list[float], losses: list[float], test: float | None = None, **settings) -> Path:
    """A run directory as train.py leaves it: a validation and two training records an epoch."""
    folder.mkdir(parents=True)
    data = settings.pop("data", {"path": "/data/pets", "root": "/data/pets", "digest": "d1"})
    defaults = {"epochs": len(accuracies), "learning_rate": 0.001, "augment": [], "cache_dir": "features", "seed": 0}
    (folder / "config.json").write_text(json.dumps({"settings": {**defaults, **settings}, "data": data}))
    records: list[dict] = []
    timing: list[dict] = []
    for epoch, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True), 1):
        for split, fraction, speed in (("train", 0.5, 10 * epoch), ("train", 1.0, 30), ("val", 1.0, 999)):
            step = int(10 * (epoch - 1 + fraction))
            scores = {"loss": loss, "accuracy": accuracy if split == "val" else 1.0}
            records.append({"step": step, "epoch": epoch - 1 + fraction, "split": split, "phase": "conv1", **scores})
            timing.append({"step": step, "split": split, "seconds": len(timing) + 2.5, "images_per_second": speed})
    for name, lines in (("metrics.jsonl", records), ("timing.jsonl", timing)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results-val.json").write_text(json.dumps({"accuracy": max(accuracies), "log_loss": min(losses)}))
    if test is not None:
        (folder / "results-test.json").write_text(json.dumps({"accuracy": test}))
    return folder


def compared(*folders: Path, tmp_path: Path) -> list[dict[str, str]]:
    """The rows of the CSV."""
    out = tmp_path / "comparison.csv"
    assert run(compare, *folders, "--format", "csv", "--output", out) == 0
    return list(csv.DictReader(io.StringIO(out.read_text())))


def test_compare_scores(tmp_path):
    # The best is the second, by its loss; the median of the speeds 10, 30, 20, 30, 30, 30 is 30; nine records.
    one = make_run(tmp_path / "one", [0.5, 0.75, 0.75], [1.0, 0.25, 0.5], test=0.625)
    (row,) = compared(one, tmp_path=tmp_path)
    assert row == {
        "kind": "run", "run": "one", "epochs done": "3.0", "best val accuracy": "0.75", "best val loss": "0.25",
        "final val accuracy": "0.75", "test accuracy": "0.625", "seconds": "10.5", "train images/s": "30.0", "note": "",
            "difference from best": "", "difference low": "", "difference high": "", "p": "",
    }  # fmt: skip


def test_compare_shows_what_differs_and_sorts(tmp_path):
    worse = make_run(tmp_path / "worse", [0.5], [1.0], learning_rate=0.01, augment=["flip", "zoom"])
    better = make_run(tmp_path / "better", [0.9], [1.0], new_setting=True)
    other = {"path": "/data/cars", "root": "/data/cars", "digest": "d2"}
    cars = make_run(tmp_path / "cars", [0.7], [1.0], data=other)
    rows = compared(worse, better, cars, tmp_path=tmp_path)
    assert [row["run"] for row in rows] == ["better", "cars", "worse"]
    assert list(rows[0])[:6] == ["kind", "run", "learning_rate", "augment", "new_setting", "data"]
    assert [row["learning_rate"] for row in rows] == ["0.001", "0.001", "0.01"]
    assert [row["augment"] for row in rows] == ["none", "none", "flip zoom"]
    assert [row["new_setting"] for row in rows] == ["True", "", ""]
    assert [row["data"] for row in rows] == ["pets", "cars", "pets"]


def test_compare_groups_by_seed(tmp_path, capsys):
    runs = [
        make_run(tmp_path / f"s{seed}", [best], [1.0], seed=seed, cache_dir=f"features{seed}")
        for seed, best in ((0, 0.5), (2, 0.6), (10, 1.0))
    ]
    runs.append(make_run(tmp_path / "again", [0.5], [1.0], seed=0))  # a repetition is not another seed
    runs.append(make_run(tmp_path / "other", [0.1], [1.0], seed=1, learning_rate=0.5))
    unfinished = make_run(tmp_path / "unfinished", [0.0], [9.0], seed=3, epochs=2)
    (unfinished / "results-val.json").unlink()
    rows = compared(*runs, unfinished, tmp_path=tmp_path)
    mean, spread = rows[-2:]
    assert (mean["kind"], mean["run"], mean["seed"]) == ("mean", "mean of 3 seeds", "0 2 10")
    assert float(mean["best val accuracy"]) == pytest.approx(0.7)
    assert spread["kind"] == "standard deviation"
    assert float(spread["best val accuracy"]) == pytest.approx(np.std([0.5, 0.6, 1.0], ddof=1))
    assert mean["test accuracy"] == ""
    assert [row["note"] for row in rows if row["run"] == "unfinished"] == ["incomplete (2 epochs planned)"]
    assert sum(row["kind"] != "run" for row in rows) == 2
    assert run(compare, *runs, "--format", "markdown") == 0
    table = capsys.readouterr().out.split("\n\n")[2]
    assert table.splitlines()[2].startswith("| mean of 3 seeds |")
    assert "| 0.7000 |" in table
    assert "| 0.2646 |" in table


def test_compare_of_broken_runs(tmp_path, capsys):
    good = make_run(tmp_path / "runs" / "good", [0.5], [1.0])
    (tmp_path / "runs" / "empty").mkdir()
    torn = make_run(tmp_path / "runs" / "torn", [0.25, 0.5], [2.0, 1.0], seed=5)
    (torn / "config.json").write_text('{"settings": {"ep')
    log = (torn / "metrics.jsonl").read_text()
    (torn / "metrics.jsonl").write_text(log.replace('"step": 15', '"step": 15,,') + '{"step": 21, "ep')
    (torn / "results-val.json").write_text("null")
    strange = make_run(tmp_path / "runs" / "strange", [0.75], [1.0])
    (strange / "config.json").write_text('{"settings": 3, "data": []}')
    (strange / "metrics.jsonl").write_text('[]\n{"split": "val", "accuracy": NaN}\n{"split": "val", "accuracy": "x"}\n')
    (tmp_path / "runs" / "notes.txt").write_text("not a run")
    rows = {row["run"]: row for row in compared(*(tmp_path / "runs").iterdir(), tmp_path=tmp_path)}
    assert sorted(rows) == ["empty", "good", "strange", "torn"]
    assert rows["empty"]["note"] == "no config.json; incomplete"
    assert rows["good"]["note"] == ""
    assert rows["torn"]["best val accuracy"] == "0.5"
    assert rows["torn"]["epochs done"] == "2.0"
    assert "config.json is damaged; metrics.jsonl is damaged; results-val.json is damaged" in rows["torn"]["note"]
    assert rows["strange"]["best val accuracy"] == "0.75"  # from results-val.json
    assert run(compare, tmp_path / "runs") == 0  # a folder of runs: those in it
    assert "empty" not in capsys.readouterr().out
    for arguments in ([tmp_path / "none"], [tmp_path / "runs" / "notes.txt"], [good, "--output", tmp_path / "x" / "y"]):
        assert run(compare, *arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_compare_names_equal_folders_by_their_paths(tmp_path):
    runs = [make_run(tmp_path / parent / "run", [best], [1.0]) for parent, best in (("a", 0.1), ("b", 0.2))]
    assert [row["run"] for row in compared(*runs, runs[0], tmp_path=tmp_path)] == [str(runs[1]), str(runs[0])]


def answer(run_folder: Path, right: str, true: str | None = None) -> Path:
    """Gives a run the predictions of a validation split: `right` has a 1 or a 0 for each image."""
    lines = [f"./=x{i}.jpg,{(true or 'a' * len(right))[i]},b,0.5,0.5,{r}" for i, r in enumerate(right)]
    (run_folder / "predictions-val.csv").write_text(
        "image,true,predicted,probability,probability_true,correct\n" + "".join(f"{line}\n" for line in lines)
    )
    return run_folder


def test_compare_says_which_differences_are_real(tmp_path, capsys):
    best = answer(make_run(tmp_path / "best", [0.95], [0.1]), "1" * 95 + "0" * 5)
    near = answer(make_run(tmp_path / "near", [0.93], [0.1]), "0" * 4 + "1" * 91 + "1" * 2 + "0" * 3)
    far = answer(make_run(tmp_path / "far", [0.75], [0.1]), "0" * 20 + "1" * 75 + "0" * 5)
    other = answer(make_run(tmp_path / "other", [0.5], [0.1]), "10" * 50, "b" + "a" * 99)  # of another class
    no_predictions = make_run(tmp_path / "none", [0.4], [0.1])
    damaged = make_run(tmp_path / "damaged", [0.3], [0.1])
    (damaged / "predictions-val.csv").write_text("image,true\nx,y\n")
    rows = {row["run"]: row for row in compared(best, near, far, other, no_predictions, damaged, tmp_path=tmp_path)}
    assert [rows[name]["p"] for name in ("best", "other", "none", "damaged")] == [""] * 4
    assert rows["damaged"]["note"] == "predictions-val.csv is damaged"
    assert float(rows["near"]["difference from best"]) == pytest.approx(-0.02)
    # McNemar by hand: 4 against 2 of 6 (P(X <= 2) = 22 / 64), 20 against 0; Holm: the smaller p twice
    assert float(rows["near"]["p"]) == pytest.approx(2 * 22 / 64)
    assert float(rows["far"]["p"]) == pytest.approx(2 * 2 / 2**20)
    low, high = float(rows["far"]["difference low"]), float(rows["far"]["difference high"])
    assert low < -0.2 < high < 0
    assert run(compare, tmp_path, "--format", "text") == 0
    text = capsys.readouterr().out
    assert "Against best, on the same 100 validation images:" in text
    lines = text.split("Against best")[1].splitlines()
    assert [line.split()[-1] for line in lines if line.startswith(("near", "far"))] == ["no", "yes"]
    assert "Against" not in compare.render([], "text")
    # Two runs on other data, the better of which is the best of all, are compared with each other alone.
    answer(make_run(tmp_path / "first", [0.99], [0.1]), "1" * 50)
    answer(make_run(tmp_path / "second", [0.9], [0.1]), "0" * 10 + "1" * 40)
    assert run(compare, tmp_path) == 0
    text = capsys.readouterr().out
    assert "Against first, on the same 50 validation images:" in text
    assert "Against best, on the same 100 validation images:" in text


# -- explore_data ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags with their attributes, and the cells of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self._open == "td":
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self._open = ""


def test_explore_data_statistics(tmp_path):
    red = save(tmp_path / "red.png", (255, 0, 0), (40, 60))
    grey = save(tmp_path / "grey.png", (100, 100, 104), (50, 50))
    (tmp_path / "bad.png").write_text("x")
    paths = (str(red), str(grey), str(tmp_path / "bad.png"))
    sample = {"train": layouts.Examples(paths, np.array([0, 1, 1]))}
    statistics = explore_data.gather(sample, 2, crop_margin=10)
    assert statistics.labels == [0, 1]
    assert statistics.sizes == [(60, 40), (50, 50)]  # height, width
    assert len(statistics.faults) == 1
    np.testing.assert_array_equal(statistics.mean_image(0)[5, 5], (255, 0, 0))
    np.testing.assert_array_equal(statistics.mean_image()[5, 5], (178, 50, 52))  # 177.5 is rounded to even
    density = statistics.mean_density()  # [3, 64]
    assert density.sum(axis=1) == pytest.approx(1)
    assert density[0, 63] == density[0, 25] == 0.5  # red: 255 and 100, four values a bin
    assert density[2, 0] == density[2, 26] == 0.5  # blue: 0 and 104
    assert statistics.mean_density(1)[1, 25] == 1


def test_explore_data_samples_every_class_and_split_alike(tmp_path):
    train = layouts.Examples(tuple(f"/{i}" for i in range(1000)), np.repeat([0, 1], [900, 100]))
    val = train.subset(np.arange(850, 950))
    found = layouts.LabelledImages("/", "csv", ("a", "b"), {"train": train, "val": val})
    sample = explore_data.choose(found, 110, seed=0)
    assert {split: np.bincount(e.labels).tolist() for split, e in sample.items()} == {"train": [50, 50], "val": [5, 5]}
    assert explore_data.choose(found, 1100, seed=0) == found.splits


def test_explore_data_page(tmp_path, capsys):
    root = make_classes(tmp_path / "data", {"<b>&\n": 6, "größe": 4, os.fsdecode(b"raw\xff"): 3})
    (root / "größe" / "bad.png").write_text("no image")
    out = tmp_path / "out"
    arguments = (root, "--output", out, "--augment", "flip", "color", "--image-size", 32)
    assert run(explore_data, *arguments, "--val-fraction", 0) == 0
    captured = capsys.readouterr()
    assert "13 of 14 images looked at" in captured.out
    assert "left out 1 bad files" in captured.err
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == ["colours.png", "counts.png", "means.png", "samples.png", "sizes.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*pictures, "index.html"])
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(shown) == 5
    for attributes in shown:
        assert str(attributes["src"]).startswith("data:image/png;base64,")
        assert attributes["alt"]
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in page.tags}
    assert page.cells == ["<b>&\\n", "6", "6", "größe", "5", "5", "raw\\udcff", "3", "3", "all", "14", "14"]


def test_explore_data_mistakes(tmp_path, capsys):
    root = make_classes(tmp_path / "data", {"a": 2, "b": 2})
    (tmp_path / "file").write_text("")
    for arguments in (
        [tmp_path / "none"],
        [root, "--augment", "fly"],
        [root, "--image-size", 3],
        [root, "--output", tmp_path / "file"],
    ):
        assert run(explore_data, *arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    assert run(explore_data, root, "--output", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_charts_of_extreme_data(tmp_path):
    """One image; sides of 1 pixel and of a hundred thousand; hundreds of classes."""
    explore_pictures.draw_sizes(tmp_path / "a.png", {"train": np.array([[5, 5]]), "val": np.zeros((0, 2), int)}, 224)
    explore_pictures.draw_sizes(tmp_path / "b.png", {"train": np.array([[1, 100_000], [100_000, 1]])}, 224)
    names = [f"class number {i}" for i in range(300)]
    counts = {"train": np.arange(300) * 1000, "val": np.arange(300)}
    explore_pictures.draw_counts(tmp_path / "c.png", names, counts)
    with Image.open(tmp_path / "c.png") as image:
        assert image.height < 30_000
    explore_pictures.draw_densities(tmp_path / "d.png", ["x"], np.full((1, 3, 64), 1 / 64))
    assert len(list(tmp_path.iterdir())) == 4


def test_user_error_is_the_only_way_out(tmp_path):
    with pytest.raises(UserError):
        compare.main([str(tmp_path / "none")])
