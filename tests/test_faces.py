"""The face tools: on photographs with marked eyes and noses, against hand computation, killed, and with wrong input."""

import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import skimage.data
import skimage.exposure
import tensorflow as tf
from PIL import Image
from skimage.transform import SimilarityTransform, warp

from console import exit_status
from dataset.images import read_image
from dataset.layouts import find_images
from tests.conftest import ROOT, RunScript
from tools import align_faces, import_fer2013, prepare_faces

needs_detector = pytest.mark.skipif(
    importlib.util.find_spec("mtcnn") is None, reason="pip install -r requirements-faces.txt"
)
# Left eye, right eye (the pupils) and tip of the nose, marked by hand in enlarged pictures.
MARKS = {
    "astronaut": np.array([[203.0, 101.0], [246.5, 103.0], [223.0, 127.0]]),
    "hopper": np.array([[222.0, 190.0], [305.0, 186.0], [267.5, 237.0]]),
}
# For --size 224 --margin 0.2, by hand from the formula of --help: (0.342 + 0.2) / 1.4 * 224 - 0.5 and so on.
PLACES = np.array([[86.22, 105.26], [136.78, 105.26], [111.50, 133.98]])
EYE_DISTANCE = 50.56
Change = Callable[[np.ndarray], tuple[SimilarityTransform, np.ndarray]]


def photograph(name: str) -> np.ndarray:
    if name == "astronaut":
        return skimage.data.astronaut()
    return np.asarray(Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")).convert("RGB"))


def turned(degrees: float) -> Change:
    """Turns a photograph about its centre."""

    def change(image: np.ndarray) -> tuple[SimilarityTransform, np.ndarray]:
        centre = np.array([image.shape[1], image.shape[0]]) / 2
        transform = SimilarityTransform(translation=-centre) + SimilarityTransform(rotation=np.deg2rad(degrees))
        transform += SimilarityTransform(translation=centre)
        return transform, warp(image, transform.inverse, mode="edge", preserve_range=True).astype(np.uint8)

    return change


def scaled(scale: float) -> Change:
    def change(image: np.ndarray) -> tuple[SimilarityTransform, np.ndarray]:
        size = [round(side * scale) for side in image.shape[1::-1]]
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        return SimilarityTransform(scale=scale, translation=(scale - 1) / 2), np.asarray(resized)

    return change


def grey(image: np.ndarray) -> tuple[SimilarityTransform, np.ndarray]:
    return SimilarityTransform(), np.asarray(Image.fromarray(image).convert("L"))


CHANGES: dict[str, Change] = {
    **{f"turned{degrees:+d}": turned(degrees) for degrees in (-30, -15, 0, 15, 30)},
    **{f"scaled{scale}": scaled(scale) for scale in (0.5, 1.5, 3.0)},
    "grey": grey,
}


def run_tool(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def points(row: dict[str, str]) -> np.ndarray:
    names = ("left_eye", "right_eye", "nose")
    return np.array([[float(row[f"{name}_x"]), float(row[f"{name}_y"])] for name in names])


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rows [a, -b, x], [b, a, y] that take `source` to `target` with the least squares: a linear system by hand."""
    system = [row for x, y in source for row in ([x, -y, 1, 0], [y, x, 0, 1])]
    a, b, x, y = np.linalg.lstsq(np.array(system), target.ravel(), rcond=None)[0]
    return np.array([[a, -b, x], [b, a, y]])


def moved(transform: np.ndarray, source: np.ndarray) -> np.ndarray:
    return source @ transform[:, :2].T + transform[:, 2]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Class folders of the changed photographs and of pictures without a face, and where the marks lie in each."""
    folder = tmp_path_factory.mktemp("changed")
    marks = {}
    for name, known in MARKS.items():
        (folder / name).mkdir()
        for change_name, change in CHANGES.items():
            transform, image = change(photograph(name))
            Image.fromarray(image).save(folder / name / f"{change_name}.png")
            marks[f"{name}/{change_name}.png"] = transform(known)
        exif = Image.Exif()
        exif[0x0112] = 6  # stored turned to the left: upright when turned to the right
        stored = Image.fromarray(np.rot90(photograph(name)).copy())
        stored.save(folder / name / "exif.jpg", exif=exif, quality=95)
        marks[f"{name}/exif.jpg"] = known
    (folder / "nobody").mkdir()
    Image.fromarray(skimage.data.chelsea()).save(folder / "nobody" / "cat.png")
    Image.fromarray(skimage.data.coffee()).save(folder / "nobody" / "coffee.png")
    Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(folder / "nobody" / "tiny.png")
    (folder / "nobody" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder, marks


@pytest.fixture(scope="module")
def aligned(changed: tuple[Path, dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("aligned") / "out"
    assert exit_status(lambda: align_faces.main([str(changed[0]), str(out)])) == 0
    return out


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Split folders: one face, two faces side by side, none."""
    one, other = photograph("astronaut"), photograph("hopper")
    two = np.concatenate([one, other[:512]], axis=1)
    for name, image in {
        "train/x/one.png": one,
        "train/y/two.png": two,
        "val/x/none.png": skimage.data.coffee(),
    }.items():
        (tmp_path / "people" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "people" / name)
    (tmp_path / "people/val/y").mkdir()
    shutil.copy(tmp_path / "people/train/y/two.png", tmp_path / "people/val/y/two.jpg")
    return tmp_path / "people"


@needs_detector
@pytest.mark.parametrize("photo", MARKS)
@pytest.mark.parametrize("change", [*(f"{name}.png" for name in CHANGES), "exif.jpg"])
def test_eyes_and_nose_are_found_and_aligned_within_5_percent_of_the_eye_distance(
    changed: tuple[Path, dict[str, np.ndarray]], aligned: Path, photo: str, change: str
) -> None:
    marks = changed[1][f"{photo}/{change}"]
    (row,) = [row for row in rows_of(aligned / "faces.csv") if row["image"] == f"{photo}/{change}"]
    found = points(row)
    off = np.linalg.norm(found - marks, axis=1) / np.linalg.norm(marks[0] - marks[1])
    assert off.max() < 0.05, off
    in_picture = moved(similarity(found, PLACES), marks)
    off = np.linalg.norm(in_picture - PLACES, axis=1) / EYE_DISTANCE
    assert off.max() < 0.05, off
    left, top, right, bottom = (float(row[name]) for name in ("left", "top", "right", "bottom"))
    assert (marks > [left, top]).all()
    assert (marks < [right, bottom]).all()
    assert float(row["score"]) > 0.9


@needs_detector
@pytest.mark.parametrize("change", ["turned+0.png", "turned-30.png", "scaled0.5.png", "scaled3.0.png"])
def test_the_pixels_are_those_of_the_similarity_transform(
    changed: tuple[Path, dict[str, np.ndarray]], aligned: Path, change: str
) -> None:
    (row,) = [row for row in rows_of(aligned / "faces.csv") if row["image"] == f"hopper/{change}"]
    picture = np.asarray(Image.open(aligned / row["path"])).astype(float)
    assert picture.shape == (224, 224, 3)
    transform = similarity(points(row), PLACES)
    # TensorFlow's bilinear sampling, of several points in each pixel where the picture is smaller than the face.
    finer = max(1, int(1 / np.hypot(*transform[:, 0])))
    from_finer = np.array([[1 / finer, 0, (1 / finer - 1) / 2], [0, 1 / finer, (1 / finer - 1) / 2], [0, 0, 1]])
    inverse = np.linalg.inv(np.vstack([transform, [0, 0, 1]])) @ from_finer
    sampled = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.constant(read_image(changed[0] / row["image"]), tf.float32)[None],
        transforms=[inverse.ravel()[:8].astype(np.float32)],
        output_shape=[224 * finer, 224 * finer],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="NEAREST",
    )
    (sampled,) = tf.nn.avg_pool2d(sampled, finer, finer, "VALID").numpy()
    assert np.abs(picture - sampled).mean() < 2.5
    shifted = np.abs(picture[:, 1:] - sampled[:, :-1]).mean()  # one pixel beside it is worse
    assert shifted > 1.5 * np.abs(picture - sampled).mean()


@needs_detector
def test_every_image_is_in_one_of_the_lists_and_train_reads_them(
    changed: tuple[Path, dict[str, np.ndarray]], aligned: Path
) -> None:
    found, left_out = rows_of(aligned / "faces.csv"), rows_of(aligned / "left-out.csv")
    data = find_images(str(changed[0]))
    listed = {
        (name, data.class_names[label], split)
        for split, examples in data.splits.items()
        for name, label in zip(data.relative_names(split), examples.labels, strict=True)
    }
    rows = [(row["image"], row["label"], row["split"]) for row in (*found, *left_out)]
    assert sorted(rows) == sorted(listed)
    reasons = {row["image"]: row["reason"] for row in left_out}
    assert set(reasons) == {f"nobody/{name}" for name in ("cat.png", "coffee.png", "tiny.png", "broken.jpg")}
    assert [reason for name, reason in reasons.items() if "broken" not in name] == ["no face found"] * 3
    assert reasons["nobody/broken.jpg"] not in ("", "no face found")
    read = find_images(str(aligned / "faces.csv"))
    assert read.class_names == ("astronaut", "hopper")
    by_path = {row["path"]: (row["label"], row["split"]) for row in found}
    for split, examples in read.splits.items():
        for name, label in zip(read.relative_names(split), examples.labels, strict=True):
            assert by_path.pop(name) == (read.class_names[label], split)
            assert name.startswith(f"{read.class_names[label]}/")
    assert not by_path


@needs_detector
def test_which_faces(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        exit_status(lambda: align_faces.main([str(people), str(tmp_path / "one"), "--faces", "one", "--jobs", "1"]))
        == 0
    )
    assert [row["path"] for row in rows_of(tmp_path / "one/faces.csv")] == ["train/x/one.png-1.png"]
    reasons = {row["image"]: row["reason"] for row in rows_of(tmp_path / "one/left-out.csv")}
    two = {"train/y/two.png": "2 faces found", "val/y/two.jpg": "2 faces found"}
    assert reasons == {**two, "val/x/none.png": "no face found"}
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:5]] == [
        ["x", "2", "1", "1"],
        ["y", "2", "0", "2"],
        ["all", "4", "1", "3"],
    ]


@needs_detector
def test_killed_and_run_again_is_one_run(people: Path, tmp_path: Path) -> None:
    flags = ["--faces", "all", "--grey", "--equalize", "--size", "96", "--format", "jpg"]
    assert exit_status(lambda: align_faces.main([str(people), str(tmp_path / "whole"), *flags])) == 0
    whole = contents(tmp_path / "whole")
    names = [
        f"{name}.jpg"
        for name in ("train/x/one.png-1", *(f"{v}-{i}" for v in ("train/y/two.png", "val/y/two.jpg") for i in (1, 2)))
    ]
    assert sorted(whole) == sorted([*names, "faces.csv", "left-out.csv"])
    first, second = (row for row in rows_of(tmp_path / "whole/faces.csv") if row["image"] == "train/y/two.png")
    assert float(first["left"]) > 512 > float(second["right"])  # hopper's face is the larger one
    with Image.open(tmp_path / "whole" / first["path"]) as picture:
        assert (picture.mode, picture.size, picture.format) == ("L", (96, 96), "JPEG")

    # A process that kills itself, as nobody could clean up after it, once two records are in the journal.
    kill = (
        "import os, signal, sys\nfrom tools import align_faces, face_pictures\n"
        "def killing(records, **_):\n"
        "    for number, record in enumerate(records):\n"
        "        if number == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield record\n"
        "face_pictures.tqdm = killing\nalign_faces.main(sys.argv[1:])\n"
    )
    out, journal = tmp_path / "killed", tmp_path / "killed/.progress.jsonl"
    command = [sys.executable, "-c", kill, str(people), str(out), *flags, "--jobs", "1"]
    # This returns when the last of the processes has closed its end of the pipes: none outlives the main one.
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(journal.read_text().splitlines()) == 3  # its first line and two records
    assert not (out / "faces.csv").exists()
    with open(journal, "a", encoding="utf-8") as file:
        file.write('{"image": "val/y/tw')  # as it is when the disk was full, or the power cut
    (out / "train/.tmp-0123.jpg").write_bytes(b"half a picture")
    done = run_tool("align_faces", people, out, *flags, "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert contents(out) == whole


def test_other_flags_or_a_finished_folder_are_refused(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert exit_status(lambda: prepare_faces.main([str(people), *map(str, arguments)])) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    assert exit_status(lambda: prepare_faces.main([str(people), str(tmp_path / "out"), "--jobs", "1"])) == 0
    assert "finished or holds other files" in refused(tmp_path / "out")
    assert "inside the data" in refused(people / "out")
    assert "--grey" in refused(tmp_path / "new", "--equalize")
    assert "--size 3" in refused(tmp_path / "new", "--size", 3)
    (tmp_path / "file").write_bytes(b"")
    assert "cannot write" in refused(tmp_path / "file")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".progress.jsonl").write_text('{"size": 224}\n')
    assert "other images or flags" in refused(begun)
    assert not (tmp_path / "new").exists()
    assert not (people / "out").exists()


def test_a_missing_detector_is_one_line(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mtcnn", None)
    assert exit_status(lambda: align_faces.main([str(people), str(tmp_path / "out")])) == 2
    assert "pip install -r requirements-faces.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prepared_faces_are_grey_equalised_and_resized(tmp_path: Path) -> None:
    colour = skimage.data.astronaut()[60:190, 165:295]
    for name, image in {"x/face.png": colour, "x/wide.jpg": colour[:65], "y/face.jpg": colour}.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / name)
    (tmp_path / "data/y/broken.png").write_bytes(b"no picture")
    arguments = [
        str(tmp_path / "data"),
        str(tmp_path / "out"),
        "--grey",
        "--equalize",
        "--size",
        "64",
        "--val-fraction",
        "0",
    ]
    assert exit_status(lambda: prepare_faces.main(arguments)) == 0
    grey_levels = np.rint(colour @ [0.299, 0.587, 0.114])
    equalised = skimage.exposure.equalize_hist(grey_levels, nbins=256) * 255
    expected = tf.image.resize(equalised[..., None], [64, 64], "bicubic", antialias=True)[..., 0]
    with Image.open(tmp_path / "out/x/face.png-1.png") as picture:
        assert picture.mode == "L"
        off = np.abs(np.asarray(picture).astype(float) - np.clip(expected, 0, 255))
    assert off.mean() < 2
    assert off.max() < 12
    with Image.open(tmp_path / "out/x/wide.jpg-1.png") as picture:
        assert picture.size == (128, 64)  # no face is stretched
    assert [row["image"] for row in rows_of(tmp_path / "out/left-out.csv")] == ["y/broken.png"]
    assert find_images(str(tmp_path / "out/faces.csv")).class_names == ("x", "y")


def synthetic_fer2013(count: int) -> Iterator[tuple[int, str, np.ndarray]]:
    """Rows of (emotion, Usage, pixels): a brightness for each emotion, with noise."""
    random = np.random.default_rng(0)
    for number in range(count):
        emotion = number % 7
        usage = ("Training", "Training", "Training", "PublicTest", "PrivateTest")[number // 7 % 5]
        yield emotion, usage, random.integers(emotion * 30, emotion * 30 + 60, (48, 48)).astype(np.uint8)


def write_fer2013(path: Path, rows: list[str], header: str = "emotion,pixels,Usage") -> Path:
    path.write_text("\n".join([header, *rows, ""]))
    return path


def test_fer2013_is_imported_trained_on_and_evaluated(tmp_path: Path, run_script: RunScript) -> None:
    rows = list(synthetic_fer2013(700))
    lines = [f'{emotion},"{" ".join(map(str, pixels.ravel()))}",{usage}' for emotion, usage, pixels in rows]
    imported = run_tool("import_fer2013", write_fer2013(tmp_path / "fer.csv", lines), tmp_path / "fer")
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.splitlines()[-3].split() == ["all", "420", "140", "140"]
    assert "not the official counts" in imported.stdout.splitlines()[-1]
    data = find_images(str(tmp_path / "fer"))
    assert data.class_names == ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
    names = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
    splits = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
    for number, (emotion, usage, pixels) in enumerate(rows, 1):
        image = read_image(tmp_path / "fer" / splits[usage] / names[emotion] / f"{number:05d}.png")
        assert (image == pixels[..., None]).all()
    assert sum(map(len, data.splits.values())) == 700

    tiny = ["--network", "small", "--pretrained", "none", "--image-size", "32", "--crop-margin", "2"]
    run = tmp_path / "run"
    trained = run_script(
        "train.py", tmp_path / "fer", "--run", run, "--epochs", 2, "--learning-rate", 0.01, *tiny, cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    evaluated = run_script("evaluate.py", "--run", run, "--split", "test", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert len(rows_of(run / "predictions-test.csv")) == 140


GOOD = " ".join(["7"] * 48 * 48)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"0,{GOOD[:-2]},Training", "line 3: 2303 pixels in place of 2304"),
        (f"0,{GOOD} 7,Training", "line 3: 2305 pixels"),
        (f"0,{GOOD[:-1]}256,Training", "line 3: pixels that are not numbers from 0 to 255"),
        (f"0,{GOOD[:-1]}-1,Training", "line 3: pixels that are not numbers"),
        (f"0,{GOOD[:-1]}x,Training", "line 3: pixels that are not numbers"),
        (f"7,{GOOD},Training", "line 3: emotion '7'"),
        (f"0,{GOOD},Trainin", "line 3: Usage 'Trainin'"),
        (f"0,{GOOD}", "line 3: Usage ''"),
        (f'0,"{GOOD},Training', "is not CSV"),
    ],
)
def test_a_damaged_row_is_named_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: str, message: str
) -> None:
    path = write_fer2013(tmp_path / "fer.csv", [f"0,{GOOD},Training", row, f"1,{GOOD},PublicTest"])
    assert exit_status(lambda: import_fer2013.main([str(path), str(tmp_path / "out")])) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: '{path}'")
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["fer.csv"]


def test_what_is_not_fer2013_or_a_full_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_fer2013(tmp_path / "other.csv", [f"0,{GOOD}"], "emotion,pixels")
    good = write_fer2013(
        tmp_path / "good.csv", [f"0, Training,{GOOD}"], "emotion, Usage, pixels"
    )  # as in Kaggle's copy
    assert exit_status(lambda: import_fer2013.main([str(other), str(tmp_path / "out")])) == 2
    assert "no column 'Usage'" in capsys.readouterr().err
    assert exit_status(lambda: import_fer2013.main([str(good), str(tmp_path)])) == 2
    assert "exists already" in capsys.readouterr().err
    assert exit_status(lambda: import_fer2013.main([str(tmp_path / "none.csv"), str(tmp_path / "out")])) == 2
    assert "cannot read" in capsys.readouterr().err
    assert exit_status(lambda: import_fer2013.main([str(good), str(tmp_path / "out")])) == 0
    assert (tmp_path / "out/train/angry/00001.png").is_file()
