"""The sample data set: real files, reproducible, validation cut from elsewhere than training."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from console import UserError, exit_status
from tools import sample_data
from tools.sample_data import PHOTOGRAPHS, make_sample, photograph_folder, plan, region


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(box: sample_data.Box, width: int, height: int) -> np.ndarray:
    """The mask [height, width] of what a box covers."""
    left, top, right, bottom = box
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def test_layout_counts_and_decoding(sample_images):
    classes = sorted(PHOTOGRAPHS)
    assert len(classes) >= 8
    assert sorted(path.name for path in sample_images.iterdir()) == ["sample.json", "train", "val"]
    for split, count in (("train", 3), ("val", 2)):
        assert sorted(path.name for path in (sample_images / split).iterdir()) == classes
        for class_name in classes:
            files = sorted((sample_images / split / class_name).iterdir())
            assert len(files) == count
            for file in files:
                with Image.open(file) as image:
                    image.load()
                    assert image.format == "JPEG"
                    assert np.asarray(image).std() > 2, f"{file} is blank"


def test_sizes_and_aspect_ratios_vary():
    pictures = list(plan(photograph_folder(), 100, 100, seed=0))
    short_sides = [min(picture.size) for picture in pictures]
    assert min(short_sides) >= 60
    assert max(short_sides) <= 300
    assert max(short_sides) > 2 * min(short_sides)
    aspects = [width / height for width, height in (picture.size for picture in pictures)]
    assert min(aspects) < 0.7
    assert max(aspects) > 1.4
    for picture in pictures:  # neither enlarged nor distorted by more than the rounding to whole pixels
        left, top, right, bottom = picture.box
        assert picture.size[0] <= right - left
        assert picture.size[1] <= bottom - top
        width, height = picture.size
        assert abs(width - height * (right - left) / (bottom - top)) <= 1 + width / height


@pytest.mark.parametrize("seed", [0, 7])
def test_no_validation_pixel_is_cut_for_training(seed):
    folder = photograph_folder()
    pictures = list(plan(folder, 30, 30, seed))
    for source in PHOTOGRAPHS.values():
        with Image.open(folder / source.file) as image:
            width, height = image.size
        seen = {split: np.zeros((height, width), dtype=bool) for split in ("train", "val")}
        for picture in pictures:
            if picture.photograph == source.file:
                left, top, right, bottom = picture.box
                assert 0 <= left < right <= width
                assert 0 <= top < bottom <= height
                seen[picture.path.split("/")[0]] |= pixels(picture.box, width, height)
        assert seen["train"].any()
        assert seen["val"].any()
        assert not (seen["train"] & seen["val"]).any(), source.file


@pytest.mark.parametrize(
    ("area", "val_first", "train", "val"),
    [
        ((0, 0, 100, 50), False, (0, 0, 60, 50), (64, 0, 100, 50)),
        ((0, 0, 50, 100), False, (0, 0, 50, 60), (0, 64, 50, 100)),
        ((10, 20, 110, 70), True, (50, 20, 110, 70), (10, 20, 46, 70)),
        ((10, 20, 60, 120), True, (10, 60, 60, 120), (10, 20, 60, 56)),
    ],
)
def test_regions_are_the_ends_of_the_longer_side(area, val_first, train, val):
    assert region(area, "train", val_first) == train
    assert region(area, "val", val_first) == val


def test_same_seed_same_bytes_and_another_seed_others(sample_images, tmp_path):
    make_sample(tmp_path / "again", train=3, val=2)
    assert contents(tmp_path / "again") == contents(sample_images)
    make_sample(tmp_path / "other", train=3, val=2, seed=1)
    same = contents(tmp_path / "other").items() & contents(sample_images).items()
    assert not same


def test_a_picture_does_not_depend_on_how_many_there_are():
    few = {picture.path: picture for picture in plan(photograph_folder(), 2, 1, seed=3)}
    many = {picture.path: picture for picture in plan(photograph_folder(), 5, 4, seed=3)}
    assert few.items() <= many.items()


def test_a_complete_folder_is_left_alone(tmp_path, capsys):
    arguments = [str(tmp_path / "sample"), "--train", "1", "--val", "1"]
    assert sample_data.main(arguments) == 0
    assert "left alone" not in capsys.readouterr().out
    before = {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*")}
    assert sample_data.main(arguments) == 0
    assert "left alone" in capsys.readouterr().out
    assert {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]  # nothing of the work aside is left


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path / "sample", train=1, val=1)
    assert list(tmp_path.iterdir()) == []


def damage_nothing_but_the_arguments(folder: Path) -> None:
    """The folder is complete, but made with other counts."""


def remove_a_picture(folder: Path) -> None:
    (folder / "val" / "cat" / "cat_000.jpg").unlink()


def remove_the_manifest(folder: Path) -> None:
    (folder / "sample.json").unlink()


@pytest.mark.parametrize(
    ("train", "damage", "message"),
    [
        (2, damage_nothing_but_the_arguments, "was made with"),
        (1, remove_a_picture, "lacks 1 of its pictures"),
        (1, remove_the_manifest, "not a sample data set"),
    ],
)
def test_any_other_folder_is_refused_untouched(tmp_path, capsys, train, damage, message):
    folder = tmp_path / "sample"
    make_sample(folder, train=1, val=1)
    damage(folder)
    before = contents(folder)
    status = exit_status(lambda: sample_data.main([str(folder), "--train", str(train), "--val", "1"]))
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]
    assert str(folder) in error
    assert contents(folder) == before


@pytest.mark.parametrize(("name", "message"), [("file", "file exists"), ("file/sample", "cannot make")])
def test_a_place_that_cannot_be_a_folder_is_one_line(tmp_path, capsys, name, message):
    (tmp_path / "file").write_text("in the way")
    assert exit_status(lambda: sample_data.main([str(tmp_path / name), "--train", "1", "--val", "1"])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("flags", [["--train", "0"], ["--val", "-1"], ["--seed", "-1"], ["--train", "many"]])
def test_a_bad_flag_is_refused(tmp_path, flags):
    with pytest.raises(UserError, match=flags[0]):
        sample_data.main([str(tmp_path / "sample"), *flags])
    assert list(tmp_path.iterdir()) == []
