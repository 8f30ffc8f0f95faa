"""Layouts, class order, splits and every mistake that a user can make with DATA; the files are empty or a few bytes."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from console import UserError
from dataset.layouts import Examples, LabelledImages, cut_by_hash, find_images, take_per_class
from dataset.lists import read_food101_lists
from dataset.walk import walk


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def class_folders(root: Path, classes: Iterable[str] = ("cat", "dog"), count: int = 40) -> Path:
    return touch(root, *(f"{name}/{number:04}.jpg" for name in classes for number in range(count)))


def food101(root: Path) -> Path:
    touch(root, *(f"images/{name}/{number}.jpg" for name in ("b", "a") for number in range(4)))
    write_lists(root, classes="b\na\n", train="b/1\nb/0\na/0\na/1\n", test="a/3\na/2\nb/2\n")
    return root


def write_lists(root: Path, **lists: str) -> None:
    (root / "meta").mkdir(parents=True, exist_ok=True)
    for name, text in lists.items():
        (root / "meta" / f"{name}.txt").write_text(text)


def write_csv(root: Path, text: str | bytes, name: str = "list.csv") -> str:
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(root / name)


def placed(found: LabelledImages) -> dict[str, tuple[str, str]]:
    """{relative name: (class name, split)}."""
    return {
        name: (found.class_names[label], split)
        for split, examples in found.splits.items()
        for name, label in zip(found.relative_names(split), examples.labels, strict=True)
    }


def message(data: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        find_images(str(data), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the layouts


def test_real_split_folders(shared: Path) -> None:
    found = find_images(str(shared / "mini_natural_images"))
    assert found.layout == "split folders"
    assert found.class_names == ("airplane", "car", "cat", "dog", "flower", "fruit", "motorbike", "person")
    assert {split: len(examples) for split, examples in found.splits.items()} == {"train": 1022, "val": 695}
    assert all(Path(path).parent.name == found.class_names[label] for path, label in zip(
        found.splits["train"].paths, found.splits["train"].labels, strict=True
    ))  # fmt: skip


def test_real_food101(shared: Path) -> None:
    found = find_images(str(shared / "food-101-mini"))
    assert found.layout == "food-101"
    assert found.class_names == ("apple_pie", "baby_back_ribs", "beet_salad", "bibimbap")
    assert {split: len(examples) for split, examples in found.splits.items()} == {"train": 300, "val": 100}
    assert all(map(os.path.isfile, found.splits["val"].paths))


def test_real_food101_lists(shared: Path) -> None:
    class_names, rows = read_food101_lists(str(shared / "food-101-meta"))
    splits = [split for _, _, _, split in rows]
    assert (len(class_names), splits.count("train"), splits.count("val")) == (101, 75750, 25250)
    assert class_names[0] == "apple_pie"
    assert rows[0][1].startswith("images/apple_pie/")


def test_food101_has_the_classes_in_listed_order(tmp_path: Path) -> None:
    found = find_images(str(food101(tmp_path)))
    assert found.class_names == ("b", "a")  # not sorted: what a published checkpoint counts by
    assert found.relative_names("train") == ["images/b/0.jpg", "images/b/1.jpg", "images/a/0.jpg", "images/a/1.jpg"]
    assert found.relative_names("val") == ["images/b/2.jpg", "images/a/2.jpg", "images/a/3.jpg"]
    assert found.splits["val"].labels.tolist() == [0, 1, 1]
    assert found.splits["val"].labels.dtype == np.int64


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    touch(tmp_path, "train/b/1.jpg", "train/a/1.jpg", f"{val}/a/2.jpg", f"{val}/b/2.jpg", "test/a/3.jpg", "test/b/x.md")
    touch(tmp_path, "annotations/list.txt", "README.md")
    found = find_images(str(tmp_path))
    assert (found.layout, found.class_names, list(found.splits)) == (
        "split folders",
        ("a", "b"),
        ["train", "val", "test"],
    )
    assert found.relative_names("train") == ["train/a/1.jpg", "train/b/1.jpg"]
    assert found.relative_names("val") == [f"{val}/a/2.jpg", f"{val}/b/2.jpg"]
    assert found.splits["test"].paths == (str(tmp_path / "test/a/3.jpg"),)


def test_val_is_cut_from_train_when_there_is_no_val_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", count=100)
    class_folders(tmp_path / "test", count=5)
    found = find_images(str(tmp_path), test_fraction=0.3)  # there is a test split: its fraction is not used
    assert found.layout == "split folders"
    assert len(found.splits["train"]) + len(found.splits["val"]) == 200
    assert 20 <= len(found.splits["val"]) <= 60
    assert len(found.splits["test"]) == 10


def test_class_folders_are_sorted_by_code_point(tmp_path: Path) -> None:
    found = find_images(str(class_folders(tmp_path, ["é", "b", "a", "Z", "10", "9", ".hidden"], count=3)))
    assert found.layout == "class folders"
    assert found.class_names == ("10", "9", "Z", "a", "b", "é")
    assert found.root == str(tmp_path)
    assert list(found.splits) == ["train", "val"]


def test_train_can_be_a_class(tmp_path: Path) -> None:
    assert find_images(str(class_folders(tmp_path, ["train", "car", "bus"]))).class_names == ("bus", "car", "train")


JPEG = b"\xff\xd8\xff\xe0"  # how every JPEG begins


def test_what_counts_as_an_image(tmp_path: Path) -> None:
    images = [
        "a.jpg",
        "b.JPEG",
        "c.jpe",
        "d.jfif",
        "e.PnG",
        "f.gif",
        "g.bmp",
        "h.webp",
        "i.tif",
        "j.TIFF",
        "two.dots.jpg",
    ]
    silent = ["Thumbs.db", "desktop.ini", ".DS_Store", ".hidden.jpg", "._a.jpg", "__MACOSX/x.jpg", "@eaDir/a.jpg"]
    ignored = ["a.heic", "list.txt", "a.zip", "jpg", "a.jpg.part", "a.csv", "z.cr2"]
    touch(tmp_path, *(f"{c}/{name}" for c in ("x", "y") for name in images + silent + ignored), "stray.jpg", "read.me")
    (tmp_path / "x" / "dangling.jpg").symlink_to("nowhere")  # reported by whoever checks the files: an example here
    (tmp_path / "x" / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "x" / "fifo")
    for name in ("by content", "k.jpg_large", "raw.nef"):  # a raw file is TIFF by content, of a small preview
        (tmp_path / "y" / name).write_bytes(b"II*\0" if name == "raw.nef" else JPEG)
    found = find_images(str(tmp_path), val_fraction=0)
    assert found.relative_names("train") == [f"x/{n}" for n in sorted([*images, "dangling.jpg"])] + [
        f"y/{n}" for n in sorted([*images, "by content", "k.jpg_large"])
    ]
    assert len(found.splits["val"]) == 0
    more = ["stray.jpg", "read.me", "x/dangling", "x/fifo", "y/raw.nef"]
    assert sorted(found.ignored) == sorted([f"{c}/{name}" for c in ("x", "y") for name in ignored] + more)
    assert "ignored 19 files (4 without extension, 2 .csv" in found.remarks()
    assert "\n" not in found.remarks()


def test_folders_below_class_folders(tmp_path: Path) -> None:
    for name in ("2022/01/a.jpg", "2023/a.jpg", "2023/a.txt", "b.jpg"):
        touch(tmp_path, *(f"{c}/{name}" for c in ("cat", "dog")))
    touch(tmp_path, "cat/2022/.hidden/c.jpg", "cat/empty/x/.keep")
    found = find_images(str(tmp_path), val_fraction=0)
    assert found.class_names == ("cat", "dog")
    names = ["cat/2022/01/a.jpg", "cat/2023/a.jpg", "cat/b.jpg", "dog/2022/01/a.jpg", "dog/2023/a.jpg", "dog/b.jpg"]
    assert found.relative_names("train") == names
    assert found.splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.remarks() == "ignored 2 files (2 .txt), first 'cat/2023/a.txt'"


def test_nothing_to_remark(tmp_path: Path) -> None:
    assert find_images(str(class_folders(tmp_path))).remarks() == ""


def test_remarks_are_one_line_of_bearable_length(tmp_path: Path) -> None:
    class_folders(tmp_path)
    touch(tmp_path, *(f"cat/bad\nname\x1b[31m{n}.x{n % 9}" for n in range(2000)), "cat/one.\x1b[0m")
    remarks = find_images(str(tmp_path)).remarks()
    assert remarks.isprintable()
    assert "ignored 2001 files" in remarks
    assert len(remarks) < 300


@pytest.mark.parametrize("place", ["", "cat/", "train/"])
def test_our_own_folders_are_no_data(tmp_path: Path, place: str) -> None:
    """A run and its cache in the data, as `train.py .` makes them."""
    class_folders(tmp_path / place if place == "train/" else tmp_path, count=5)
    expected = find_images(str(tmp_path)).digest()
    for run in ("checkpoints/2026-1", "checkpoints/2026-2", "run"):
        touch(
            tmp_path / place, *(f"{run}/{name}" for name in ("config.json", "classes.txt", "curves.png", "val/a.png"))
        )
        (tmp_path / place / run / "config.json").write_text('{"format": 2, "class_names": ["cat", "dog"]}')
    touch(tmp_path / place, "features/0123/cache.json", "features/0123/a.npy")
    (tmp_path / place / "features/0123/cache.json").write_text('{"view_seed": 0}')
    # Of other programs, beside images or above them: no reason to leave out a class.
    touch(tmp_path / place, *(() if place == "cat/" else ("cat/cache.json", "cat/config.json", "cat/classes.txt")))
    found = find_images(str(tmp_path))
    assert found.digest() == expected
    ours = ["checkpoints/2026-1/", "checkpoints/2026-2/", "features/0123/", "run/"]
    theirs = [] if place == "cat/" else ["cat/cache.json", "cat/classes.txt", "cat/config.json"]
    assert sorted(found.ignored) == [f"{place}{name}" for name in (*theirs, *ours)]
    assert "ignored folders" in found.remarks()


def test_folders_that_are_no_split_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    touch(tmp_path, "holdout/cat/1.jpg", "annotations/a.xml", "notes.txt", "train/stray.jpg")
    found = find_images(str(tmp_path))
    assert sorted(found.ignored) == ["annotations/", "holdout/", "notes.txt", "train/stray.jpg"]
    assert "ignored folders 'annotations/', 'holdout/'" in found.remarks()


def test_links_to_folders_and_files(tmp_path: Path) -> None:
    class_folders(tmp_path / "store", count=3)
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "store/cat/link.jpg").symlink_to(tmp_path / "store/dog/0000.jpg")
    (tmp_path / "data" / "loop").symlink_to("loop")
    found = find_images(str(tmp_path / "data"))
    assert found.class_names == ("cat", "dog")
    assert "cat/link.jpg" in placed(found)
    assert str(tmp_path / "data/cat/link.jpg") in sum((examples.paths for examples in found.splits.values()), ())


def test_linked_folders_are_listed_once_and_loops_end(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", count=3)
    touch(tmp_path, "more/a.jpg", "more/deep/b.jpg")
    (tmp_path / "data/cat/0 more").symlink_to(tmp_path / "more")
    (tmp_path / "more/deep/up").symlink_to(tmp_path / "more")  # a loop through a link
    (tmp_path / "data/cat/again").symlink_to("../dog")  # would give dogs the label of cats
    (tmp_path / "data/self").symlink_to(".")
    (tmp_path / "data/cat/root").symlink_to("/")
    found = find_images(str(tmp_path / "data"), val_fraction=0)
    assert found.class_names == ("cat", "dog")
    assert [n for n in found.relative_names("train") if "more" in n] == ["cat/0 more/a.jpg", "cat/0 more/deep/b.jpg"]
    assert len(found.splits["train"]) == 8
    assert sorted(found.ignored) == ["cat/0 more/deep/up/", "cat/again/", "cat/root/", "self/"]


def test_names_of_a_walk(tmp_path: Path) -> None:
    """What inference.py predicts of a folder: the images of the folder itself too."""
    touch(tmp_path, "data/b.jpg", "data/sub/a.jpg", "data/.hidden/x.jpg", "data/a.txt", "linked/c.jpg", "linked/.d.jpg")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "linked")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    listing = walk(str(tmp_path / "data"))
    assert listing.names() == ["b.jpg", "link/c.jpg", "sub/a.jpg"]
    assert listing.ignored == ["a.txt", "loop/"]


ODD_NAMES = [
    b"with space.jpg",
    b"'quote'\".jpg",
    "süß 猫.jpg".encode(),
    b"line\nbreak.jpg",
    b"x" * 251 + b".jpg",
    b"\xff\xfe.jpg",
]


def test_odd_names(tmp_path: Path) -> None:
    for class_name in (b"plain", b"not utf-8 \xe9"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), class_name))
        for name in ODD_NAMES:
            with open(os.path.join(os.fsencode(tmp_path), class_name, name), "wb"):
                pass
    found = find_images(str(tmp_path), val_fraction=0.5)
    assert sorted(map(os.fsencode, placed(found))) == sorted(
        c + b"/" + name for c in (b"plain", b"not utf-8 \xe9") for name in ODD_NAMES
    )
    assert all(os.path.isfile(path) for examples in found.splits.values() for path in examples.paths)
    assert len(found.digest()) == 64


# ---- order, splits, choices


def test_order_of_the_directory_listing_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path / "folders")
    class_folders(tmp_path / "split" / "train")
    food101(tmp_path / "food")
    before = [find_images(str(tmp_path / name)) for name in ("folders", "split", "food")]
    scandir, listdir = os.scandir, os.listdir

    @contextmanager
    def reversed_scandir(folder: str) -> Iterator[list["os.DirEntry[str]"]]:
        with scandir(folder) as listing:
            yield sorted(listing, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", reversed_scandir)
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listdir(folder), reverse=True))
    after = [find_images(str(tmp_path / name)) for name in ("folders", "split", "food")]
    for one, other in zip(before, after, strict=True):
        assert one.class_names == other.class_names
        assert one.digest() == other.digest()
        assert one.splits["train"].paths == other.splits["train"].paths


def test_files_never_change_split_when_others_come_or_go(tmp_path: Path) -> None:
    class_folders(tmp_path, count=100)
    before = placed(find_images(str(tmp_path), test_fraction=0.1))
    touch(tmp_path, *(f"{name}/new{number}.png" for name in ("cat", "dog", "emu") for number in range(50)))
    more = placed(find_images(str(tmp_path), test_fraction=0.1))
    assert len(more) == 350
    assert {name: more[name] for name in before} == before
    for name in list(before)[::3]:
        (tmp_path / name).unlink()
    fewer = placed(find_images(str(tmp_path), test_fraction=0.1))
    assert len(fewer) < len(more)
    assert fewer == {name: more[name] for name in fewer}
    without_test = placed(find_images(str(tmp_path)))
    assert {n for n in fewer if fewer[n][1] == "val"} == {n for n in fewer if without_test[n][1] == "val"}


def test_fractions_are_kept_in_every_class() -> None:
    for class_name in "abc":
        cut = cut_by_hash([f"{class_name}/{number}.jpg" for number in range(2000)], 0.2, 0.1)
        assert 340 < len(cut["val"]) < 460
        assert 150 < len(cut["test"]) < 250
        assert len(set().union(*cut.values())) == 2000


def test_split_is_the_same_on_every_machine_and_in_every_version() -> None:
    cut = cut_by_hash([f"cat/{number}.jpg" for number in range(12)], 0.2, 0.1)
    numbers = {split: [int(Path(name).stem) for name in names] for split, names in cut.items()}
    assert numbers == {"train": [0, 4, 6, 10, 11, 7, 9], "val": [8, 3, 1, 5], "test": [2]}


@pytest.mark.parametrize("fractions", [(0.2, 0.0), (0.01, 0.0), (0.98, 0.01), (0.01, 0.98), (0.3, 0.3)])
def test_small_classes_have_train_and_val(fractions: tuple[float, float]) -> None:
    for count in range(1, 6):
        for salt in range(20):
            names = [f"{salt}/{number}.jpg" for number in range(count)]
            cut = cut_by_hash(names, *fractions)
            assert sorted(name for part in cut.values() for name in part) == sorted(names)
            assert cut["train"]
            assert bool(cut["val"]) == (count > 1)


def test_no_fraction_no_split(tmp_path: Path) -> None:
    found = find_images(str(class_folders(tmp_path)), val_fraction=0)
    assert len(found.splits["train"]) == 80
    assert len(found.splits["val"]) == 0
    assert list(found.splits) == ["train", "val"]
    assert list(find_images(str(tmp_path), test_fraction=0.2).splits) == ["train", "val", "test"]


def test_digest(tmp_path: Path) -> None:
    here, there = (class_folders(tmp_path / name, count=5) for name in ("here", "there"))
    digest = find_images(str(here)).digest()
    assert digest == find_images(str(there)).digest() == find_images(os.path.relpath(here)).digest()
    assert digest != find_images(str(there), val_fraction=0.9).digest()
    (there / "cat/0000.jpg").rename(there / "cat/0000.png")
    assert digest != find_images(str(there)).digest()


def test_take_per_class() -> None:
    labels = np.repeat([0, 1, 2], [50, 3, 20])
    examples = Examples(tuple(f"/d/{number}.jpg" for number in range(73)), labels)
    chosen = [take_per_class(examples, count, seed=7) for count in range(1, 60)]
    assert np.bincount(chosen[4].labels).tolist() == [5, 3, 5]
    assert len(chosen[-1]) == 73
    assert all(set(fewer.paths) <= set(more.paths) for fewer, more in pairwise(chosen))
    assert chosen[4].paths == take_per_class(examples, 5, seed=7).paths != take_per_class(examples, 5, seed=8).paths
    assert all(labels[int(path[3:-4])] == label for path, label in zip(chosen[9].paths, chosen[9].labels, strict=True))
    assert len(take_per_class(examples.subset([]), 5, seed=7)) == 0
    with pytest.raises(UserError, match="at least 1"):
        take_per_class(examples, 0, seed=7)


def test_subset() -> None:
    examples = Examples(("/a", "/b", "/c"), np.array([0, 1, 2]))
    assert examples.subset([2, 0]).paths == ("/c", "/a")
    assert examples.subset(np.array([2, 0])).labels.tolist() == [2, 0]


def test_every_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path, [f"c{number}" for number in range(30)], count=20)
    listed: list[str] = []
    scandir = os.scandir

    def counted(folder: str) -> Any:
        listed.append(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counted)
    assert sum(map(len, find_images(str(tmp_path)).splits.values())) == 600
    assert len(listed) == 32  # the top twice: for its layout, and for its images
    assert len(set(listed)) == 31


# ---- CSV


def test_csv(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "sub/b.jpg", "line\nbreak, \"x\".jpg", "é.jpg")  # fmt: skip
    path = write_csv(
        tmp_path,
        b"\xef\xbb\xbfSplit,note,label,path\r\ntrain,,dog,./sub/../a.jpg\r\n\r\nvalid,x,cat,sub/b.jpg\r\n"
        b'test,"a,b",cat,"line\nbreak, ""x"".jpg"\r\ntrain,, cat ,\xc3\xa9.jpg\r\ntrain,again,dog,a.jpg,\r\n',
    )
    found = find_images(path)
    assert (found.layout, found.root, found.class_names) == ("csv", str(tmp_path), ("cat", "dog"))
    assert list(found.splits) == ["train", "val", "test"]
    assert placed(found) == {
        "é.jpg": ("cat", "train"),
        "a.jpg": ("dog", "train"),
        "sub/b.jpg": ("cat", "val"),
        'line\nbreak, "x".jpg': ("cat", "test"),
    }


def test_csv_names_that_are_not_utf8(tmp_path: Path) -> None:
    for name in (b"\xe9.jpg", b"b.jpg"):
        open(os.path.join(os.fsencode(tmp_path), name), "wb").close()
    found = find_images(write_csv(tmp_path, b"path,label\n\xe9.jpg,a\nb.jpg,b\n"))
    assert [os.fsencode(name) for name in found.relative_names("train")] == [b"\xe9.jpg", b"b.jpg"]
    error = message(write_csv(tmp_path, b"path,label\n\xe9.jpg,a\nb.jpg,\xe9\n"))
    assert "line 3" in error
    assert "UTF-8" in error


def test_csv_without_splits_is_cut_like_folders(tmp_path: Path) -> None:
    folders = find_images(str(class_folders(tmp_path)))
    rows = "".join(f"{name},{label}\n" for name, (label, _) in reversed(placed(folders).items()))
    listed = find_images(write_csv(tmp_path, "path,label\n" + rows))
    assert listed.digest() == folders.digest()
    assert len(listed.splits["val"]) > 0
    rows = "".join(f"{name},{label},train\n" for name, (label, _) in placed(folders).items())
    assert find_images(write_csv(tmp_path, "path,label,split\n" + rows)).digest() == folders.digest()


def test_csv_repeated_rows_count_once_and_are_told(tmp_path: Path) -> None:
    path = write_csv(touch(tmp_path, "a.jpg", "b.jpg"), "path,label\na.jpg,x\nb.jpg,y\na.jpg,x\n./a.jpg,x\n")
    found = find_images(path, val_fraction=0)
    assert found.relative_names("train") == ["a.jpg", "b.jpg"]
    assert found.remarks() == f"2 rows repeat an earlier one and count once, first {path!r} line 4"


def test_csv_spaces_after_commas(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b, c.jpg", " d.jpg")
    text = 'label, path\nx, a.jpg\ny, "b, c.jpg"\ny, " d.jpg"\n'
    assert placed(find_images(write_csv(tmp_path, text), val_fraction=0)) == {
        "a.jpg": ("x", "train"),
        "b, c.jpg": ("y", "train"),
        " d.jpg": ("y", "train"),
    }


def test_digest_of_an_earlier_version(tmp_path: Path) -> None:
    """What the first version gave, so that its runs can be resumed."""
    assert find_images(str(class_folders(tmp_path / "a", count=7))).digest()[:16] == "6de8530a625677ab"
    assert find_images(str(food101(tmp_path / "b"))).digest()[:16] == "f9caa8022c1e9fcf"


def test_csv_elsewhere_and_absolute_paths(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", count=1)
    (tmp_path / "lists").mkdir()
    (tmp_path / "link").symlink_to("images")
    absolute = tmp_path / "images" / "dog" / "0000.jpg"
    path = write_csv(tmp_path / "lists", f"path,label\ncat/0000.jpg,cat\n{absolute},dog\n")
    for image_root in ("images", "link"):  # through a link, the CSV may name the place that it leads to
        found = find_images(path, image_root=str(tmp_path / image_root))
        assert found.root == str(tmp_path / image_root)
        assert found.relative_names("train") == ["cat/0000.jpg", "dog/0000.jpg"]
    assert "line 3" in message(path)
    assert str(absolute) in message(path)


@pytest.mark.parametrize("name", ["../x.jpg", "sub/../../x.jpg", "/etc/x.jpg", "..", ".", "sub/.."])
def test_csv_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "x.jpg", "data/a.jpg", "data/sub/b.jpg")
    error = message(write_csv(tmp_path / "data", f'path,label\n"a.jpg",a\n\n{name},b\n'))
    assert "line 4" in error
    assert repr(name) in error
    assert str(tmp_path / "data") in error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no column 'path'"),
        ("path,class\na.jpg,a\n", "no column 'label'"),
        ("path;label\na.jpg;a\n", "no column 'path'.*comma"),
        ("path,label\n", "lists no images"),
        ("path,label\n\n\n", "lists no images"),
        ("path,label\na.jpg,\n", "line 2 lacks a path or a label"),
        ("path,label\na.jpg\n", "line 2 lacks"),
        ("path,label\n,a\n", "line 2 lacks"),
        ("path,label\nx, y.jpg,a\n", "line 2 has more cells.*double quotes"),
        ('path,label\na.jpg,a\n"b.jpg,b\n', "line 3 is not CSV"),
        ("path,label,split\na.jpg,a,train\nb.jpg,b,dev\n", "line 3: unknown split 'dev'.*validation"),
        ('path,label,split\n"a\n.jpg",a,train\nb.jpg,b,\n', "line 4: unknown split ''"),
        ("path,label\na.jpg,a\nb.jpg,b\n./a.jpg,b\n", "line 4: 'a.jpg' is listed as 'b' in train.* as 'a' in train"),
        ("path,label,split\na.jpg,a,train\na.jpg,a,val\n", "line 3: 'a.jpg' is listed .* in val .* in train"),
        ("path,label\na.jpg,a\nc.jpg,b\nd/e.jpg,b\n", "lists 2 of 3 files that are not in .*, first 'c.jpg'"),
        ("path,label\na.jpg,a\nb.jpg,a\n", "only one class, 'a'"),
        ("path,label,split\na.jpg,a,train\nb.jpg,b,val\n", "no images in train of class 'b'"),
        ("path,label\na\0.jpg,a\nb.jpg,b\n", "NUL|not in"),
        ("path,label,label\na.jpg,a,a\n", "has 2 columns 'label': keep one"),
        ("path,path,label\na.jpg,a,a\n", "has 2 columns 'path'"),
        ("path,label\ncat\\a.jpg,a\nC:\\b.jpg,b\n", "lists 2 of 2 files .*forward slashes"),
    ],
)
def test_csv_mistakes(tmp_path: Path, text: str, says: str) -> None:
    path = write_csv(touch(tmp_path, "a.jpg", "b.jpg"), text)
    error = message(path)
    assert re.search(says, error)
    assert path in error


def test_csv_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_csv(tmp_path, "path,label\n")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert "cannot read" in message(path)
    assert "Permission denied" in message(path)


def test_image_root_mistakes(tmp_path: Path) -> None:
    path = write_csv(class_folders(tmp_path), "path,label\ncat/0000.jpg,a\n")
    assert "for a CSV only" in message(tmp_path, image_root=str(tmp_path))
    assert "is not a folder" in message(path, image_root=str(tmp_path / "nope"))


# ---- for scoring


def counts(found: LabelledImages) -> dict[str, int]:
    return {split: len(examples) for split, examples in found.splits.items()}


def test_scoring_class_folders_takes_all(tmp_path: Path) -> None:
    class_folders(tmp_path / "hold", ["cat", "dog", "emu"], count=5)
    touch(tmp_path, "hold/fox/notes.txt")
    found = find_images(str(tmp_path / "hold"), scoring=True)
    assert (counts(found), found.class_names) == ({"all": 15}, ("cat", "dog", "emu"))
    assert found.splits["all"].labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert found.relative_names("all")[5] == "dog/0000.jpg"
    assert found.remarks().endswith("no images of class 'fox'")


def test_scoring_takes_the_splits_that_are_there(tmp_path: Path) -> None:
    class_folders(tmp_path / "test", ["cat"], count=4)
    assert counts(find_images(str(tmp_path), scoring=True)) == {"test": 4}
    class_folders(tmp_path / "valid", ["dog"], count=3)
    found = find_images(str(tmp_path), scoring=True)
    assert (counts(found), found.class_names) == ({"val": 3, "test": 4}, ("cat", "dog"))
    assert placed(found)["valid/dog/0000.jpg"] == ("dog", "val")
    class_folders(tmp_path / "train", ["cat", "dog"], count=20)
    assert counts(find_images(str(tmp_path), scoring=True)) == {"train": 40, "val": 3, "test": 4}
    assert counts(find_images(str(food101(tmp_path / "food")), scoring=True)) == {"train": 4, "val": 3}


def test_scoring_a_list(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    assert counts(find_images(write_csv(tmp_path, "path,label\na.jpg,x\nb.jpg,x\n"), scoring=True)) == {"all": 2}
    for split, rows in (("test", 2), ("val", 2), ("train", 2)):
        path = write_csv(tmp_path, f"path,label,split\na.jpg,x,{split}\nb.jpg,y,{split}\n")
        assert counts(find_images(path, scoring=True)) == {split: rows}


def test_scoring_without_images(tmp_path: Path) -> None:
    assert "1 .heic" in message(touch(tmp_path, "cat/a.heic"), scoring=True)
    assert "has no images" in message(touch(tmp_path / "split", "test/cat/a.txt"), scoring=True)


# ---- mistakes with folders


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["Training/cat", "Training/dog", "Testing/cat", "Testing/dog"], "'Testing', 'Training'"),
        (["seg_train/cat", "seg_train/dog", "seg_test/cat", "seg_pred"], "'seg_test', 'seg_train'"),
        (["train_set", "val_set"], "'train_set', 'val_set'"),
    ],
)
def test_splits_under_other_names(tmp_path: Path, folders: list[str], named: str) -> None:
    class_folders(tmp_path, folders, count=3)
    for scoring in (False, True):
        error = message(tmp_path, scoring=scoring)
        assert f"{named} are named like splits: rename them to train/ and val/" in error
        assert "one level too high" not in error


def test_classes_with_words_of_splits_in_their_names(tmp_path: Path) -> None:
    class_folders(tmp_path, ["freight train", "test tube", "car/2023"])
    assert find_images(str(tmp_path)).class_names == ("car", "freight train", "test tube")


def test_one_level_too_high_is_not_said_where_another_folder_holds_images(tmp_path: Path) -> None:
    class_folders(tmp_path, ["dog/a", "dog/b", "cat"], count=3)
    assert find_images(str(tmp_path)).class_names == ("cat", "dog")
    touch(tmp_path, "emu/x.txt")
    assert "no images in train of class 'emu'" in message(tmp_path)


def test_one_level_too_high_within_train(tmp_path: Path) -> None:
    class_folders(tmp_path / "train" / "train_images", count=3)
    class_folders(tmp_path / "val", ["cat/2023"], count=3)
    assert "named like splits" in message(tmp_path)
    (tmp_path / "train" / "train_images").rename(tmp_path / "train" / "images")
    assert "if that is the data set, this is one level too high" in message(tmp_path)
    class_folders(tmp_path / "train", count=3)
    (tmp_path / "train" / "images").rename(tmp_path / "spare")
    assert counts(find_images(str(tmp_path))) == {"train": 6, "val": 3}


def test_a_class_that_a_split_lacks_or_has_empty_is_accepted(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ["cat", "dog", "emu"])
    class_folders(tmp_path / "val", ["cat"])
    touch(tmp_path, "val/dog/.keep", "val/unknown/.keep")
    found = find_images(str(tmp_path))
    assert np.bincount(found.splits["val"].labels, minlength=3).tolist() == [40, 0, 0]
    assert found.remarks() == "no images in val of class 'dog', 'emu'"
    touch(tmp_path, "train/fox/.keep")
    assert "no images in train of class 'fox'" in message(tmp_path)


def test_spellings_that_look_the_same(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ["caf\u00e9", "dog"])
    class_folders(tmp_path / "val", ["cafe\u0301", "dog"])
    error = message(tmp_path)
    assert r"'cafe\u0301' and 'caf\xe9' differ only in Unicode normalisation" in error
    class_folders(tmp_path / "train", ["cafe\u0301"])
    assert "differ only in Unicode normalisation" in find_images(str(tmp_path)).remarks()


def test_no_such_path(tmp_path: Path) -> None:
    assert "no such file or folder" in message(tmp_path / "nope")
    assert "nope" in message(tmp_path / "nope")
    assert "no such file or folder" in message("")
    assert "no such file or folder" in message("a\0b")


@pytest.mark.parametrize("name", ["a.jpg", "train.txt", "data.zip"])
def test_a_file_that_is_not_a_csv(tmp_path: Path, name: str) -> None:
    error = message(touch(tmp_path, name) / name)
    assert "single file" in error
    assert "folder" in error


def test_folders_without_a_data_set(tmp_path: Path) -> None:
    assert "is empty" in message(tmp_path)
    assert "has no folders in it" in message(touch(tmp_path, "notes.txt"))
    assert "put them into one folder per class" in message(touch(tmp_path, "a.jpg", "b.jpg"))
    assert "unknown layout" in message(touch(tmp_path, "docs/x.txt", "src/y.py"))


def test_one_class(tmp_path: Path) -> None:
    assert "only one class, 'cat'" in message(class_folders(tmp_path, ["cat", ".dog"]))
    assert "only one class, 'cat'" in message(class_folders(tmp_path / "split" / "train", ["cat"]).parent)


def test_class_without_images(tmp_path: Path) -> None:
    assert "no images in train of class 'emu'" in message(touch(class_folders(tmp_path), "emu/list.txt"))
    many = touch(class_folders(tmp_path / "many"), *(f"e{number}/x.txt" for number in range(9)))
    assert "'e0', 'e1', 'e2' and 6 more" in message(many)


def test_split_without_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    assert "val split has no images" in message(touch(tmp_path, "val/cat/x.txt", "val/dog/x.txt"))


def test_classes_that_differ_between_splits(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ["cat", "dog", "emu"])
    class_folders(tmp_path / "valid", ["cat", "dog", "fox"])
    assert "'emu' only in train/, 'fox' only in valid/" in message(tmp_path)


def test_split_folders_mistakes(tmp_path: Path) -> None:
    class_folders(tmp_path / "a" / "val")
    assert "no train folder" in message(tmp_path / "a")
    class_folders(tmp_path / "a" / "train")
    class_folders(tmp_path / "a" / "valid")
    assert "both 'val' and 'valid'" in message(tmp_path / "a")
    touch(tmp_path, "flat/train/a.jpg", "flat/val/b.jpg", "kaggle/test/1.jpg")
    assert "train' has images but no classes" in message(tmp_path / "flat")
    class_folders(tmp_path / "kaggle" / "train")
    assert "test' has images but no classes" in message(tmp_path / "kaggle")
    assert "move the folder elsewhere" in message(tmp_path / "kaggle")


@pytest.mark.parametrize("kind", ["split", "classes", "food"])
def test_one_level_too_high(tmp_path: Path, kind: str) -> None:
    inner = tmp_path / "unzipped" / "flowers"
    touch(tmp_path / "unzipped", "__MACOSX/._x.jpg", "readme.txt")
    {
        "split": lambda: class_folders(inner / "train"),
        "classes": lambda: class_folders(inner),
        "food": lambda: food101(inner),
    }[kind]()
    error = message(tmp_path / "unzipped")
    assert "one level too high" in error
    assert repr(str(inner)) in error
    find_images(str(inner))


@pytest.mark.parametrize("fractions", [(-0.1, 0), (1, 0), (0.2, 1.5), (0.2, -1), (0.5, 0.5), (float("nan"), 0)])
def test_fractions_out_of_range(tmp_path: Path, fractions: tuple[float, float]) -> None:
    error = message(class_folders(tmp_path), val_fraction=fractions[0], test_fraction=fractions[1])
    assert f"--val-fraction {fractions[0]}" in error
    assert f"--test-fraction {fractions[1]}" in error


def test_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path)
    scandir = os.scandir

    def refuse(folder: str) -> Any:
        if folder.endswith("dog"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "cannot read" in message(tmp_path)
    assert "dog" in message(tmp_path)


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ({"test": "a/0\n"}, "test.txt' line 1: 'images/a/0.jpg' is listed .* in val .* in train"),
        ({"train": "b/0\n../../x\n"}, r"train.txt' line 2: '../../x' is not <class>/<id>"),
        ({"train": "b/../../x\n"}, "train.txt' line 1: .* is not <class>/<id>"),
        ({"train": "b/0\na/0\n\nc/0\n"}, "train.txt' line 4: 'c/0' is not <class>/<id> with a class of classes.txt"),
        ({"train": "b/0\nb/9\na/0\nb/8\n"}, "lists 2 of 7 files that are not in .*, first 'images/b/9.jpg'"),
        ({"train": "b/0\n"}, "no images in train of class 'a'"),
        ({"classes": "b\na\nb\n"}, "classes.txt has 'b' twice"),
        ({"classes": "b\na\n..\n"}, r"classes.txt has '\.\.'"),
        ({"train": "", "test": ""}, "lists no images"),
    ],
)
def test_food101_mistakes(tmp_path: Path, lists: dict[str, str], says: str) -> None:
    write_lists(food101(tmp_path), **lists)
    assert re.search(says, message(tmp_path))


def test_food101_without_one_of_its_lists(tmp_path: Path) -> None:
    (food101(tmp_path) / "meta" / "test.txt").unlink()
    assert "test.txt" in message(tmp_path)
    assert "cannot read" in message(tmp_path)
