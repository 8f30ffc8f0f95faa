"""inference.py and the Predictor: streams, shards, test-time augmentation, thresholds, calibration, heat maps."""

import contextlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import answers
import data
import inference
import predictor as predictor_module
import train
from predictor import Predictor
from reports import metrics
from run import Run
from tests.conftest import ROOT, TINY, RunScript, call, rows_of


@pytest.fixture(scope="module")
def trained(sample_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on the sample photographs; not to be changed."""
    run = tmp_path_factory.mktemp("inference") / "run"
    flags = ("--epochs", 1, "--augment", "color", "--learning-rate", 1e-2)
    assert call(train, sample_images, "--run", run, *flags, *TINY) == 0
    return run


@pytest.fixture(scope="module")
def photos(sample_images: Path) -> list[str]:
    return sorted(map(str, (sample_images / "val").rglob("*.jpg")))


def predicted(capfd: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> list[dict]:
    capfd.readouterr()
    assert call(inference, *arguments, "--format", "json") == status
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def with_temperature(trained: Path, folder: Path, temperature: object) -> Path:
    run = shutil.copytree(trained, folder / "calibrated")
    (run / "calibration.json").write_text(json.dumps({"temperature": temperature}))
    return run


def test_prediction_imports_no_more_than_it_uses(run_script: RunScript, tmp_path: Path) -> None:
    """TensorFlow brings a part of SciPy; what draws, fits and resizes is not imported for a prediction."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from console import quiet_tensorflow; quiet_tensorflow()\n"
        "before = set(sys.modules); import inference\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    (tmp_path / "imports.py").write_text(code)
    done = run_script(tmp_path / "imports.py", cwd=tmp_path)
    imported = done.stdout.split()
    assert {"predictor", "PIL", "simplejpeg"} <= set(imported), done.stderr
    assert not {"keras", "matplotlib", "scipy", "skimage", "imageio", "h5py", "tensorboard"} & set(imported)


def test_prediction_leaves_no_temporary_file(
    trained: Path, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoGraph would write one for each function that it converts, and is not needed: no Python `if` on a tensor."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert call(inference, photos[0], "--run", trained, "--tta", 1) == 0
    assert list(tmp_path.iterdir()) == []


def test_paths_bytes_and_arrays_give_the_same_prediction_and_errors_stay_in_place(
    trained: Path, photos: list[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_text("no image")
    array = np.asarray(Image.open(photos[0]).convert("RGB"))
    sources = [photos[0], tmp_path / "bad.png", Path(photos[0]).read_bytes(), array, b""]
    predictor = Predictor(trained, batch_size=2)
    found = list(predictor.predict(sources))
    assert [p.name for p in found] == [photos[0], str(tmp_path / "bad.png"), "", "", ""]
    assert [bool(p.error) for p in found] == [False, True, False, False, True]
    for prediction in found[2:4]:
        # The first one is in a batch of its own, which is rounded otherwise.
        np.testing.assert_allclose(prediction.probabilities, found[0].probabilities, atol=1e-5)
    assert found[1].top() == []
    assert [p.name for p in predictor.predict(photos[0])] == [photos[0]]
    with pytest.raises(ValueError, match="uint8"):
        next(predictor.predict(array / 255.0))
    assert list(predictor.predict([])) == []


def test_probabilities_and_features_are_those_of_the_network(trained: Path, photos: list[str]) -> None:
    run = Run(trained)
    network, spec = run.load_model(), run.config().preprocessing
    image = tf.constant(np.asarray(Image.open(photos[3]).convert("RGB")))
    x = data.preprocess(image, spec)[tf.newaxis]
    (prediction,) = Predictor(run).predict([photos[3]])
    np.testing.assert_allclose(prediction.probabilities, tf.nn.softmax(network.forward(x))[0], atol=1e-5)
    last = network.forward(x, last="conv5").numpy()
    np.testing.assert_allclose(prediction.features, last.mean(axis=(1, 2))[0], rtol=1e-4)
    assert prediction.top(3) == sorted(prediction.top(12), key=lambda pair: -pair[1])[:3]


def test_few_images_are_held_however_many_there_are(
    trained: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor_module, "cores", lambda: 2)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield photos[0]

    predictions = Predictor(trained, batch_size=4).predict(endless())
    for _ in range(9):  # two batches and one image of the third
        assert next(predictions).name == photos[0]
    assert 12 <= taken <= 12 + 4 + 2 * 2 + 1


def test_batch_size_changes_no_answer(trained: Path, sample_images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = predicted(capfd, sample_images / "val", "--run", trained, "--batch-size", 1)
    many = predicted(capfd, sample_images / "val", "--run", trained, "--batch-size", 7)
    assert len(one) == 24
    for a, b in zip(one, many, strict=True):
        assert a["image"] == b["image"]
        np.testing.assert_allclose(
            [p["probability"] for p in a["predictions"]], [p["probability"] for p in b["predictions"]], atol=1e-5
        )


def test_shards_share_the_images_and_stdin_lists_them(
    trained: Path, photos: list[str], sample_images: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    folder = sample_images / "val"
    shards = [
        [line["image"] for line in predicted(capfd, folder, "--run", trained, "--shard", f"{i}/5")] for i in range(1, 6)
    ]
    assert [len(shard) for shard in shards] == [5, 5, 5, 5, 4]
    assert shards[1] == photos[1::5]
    assert sorted(itertools.chain.from_iterable(shards)) == photos
    assert predicted(capfd, photos[0], "--run", trained, "--shard", "2/2") == []
    text = "\n".join([photos[2], "", photos[0] + "\r", photos[1]]).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    found = predicted(capfd, photos[5], "-", "--run", trained, "--shard", "1/2")
    assert [line["image"] for line in found] == [photos[5], photos[0]]


def test_tta_is_the_mean_of_the_probabilities_of_the_views(trained: Path, photos: list[str]) -> None:
    run = Run(trained)
    network, spec = run.load_model(), run.config().preprocessing
    image = tf.constant(np.asarray(Image.open(photos[7]).convert("RGB")))
    central = data.preprocess(image, spec).numpy()
    views = [central, central[:, ::-1], *(data.preprocess(image, spec, tf.constant([0, k])).numpy() for k in range(3))]
    expected = metrics.softmax(network.forward(np.stack(views)).numpy()).mean(axis=0)
    predictor = Predictor(run, tta=3, batch_size=2)
    found = list(predictor.predict([photos[0], photos[7], photos[7]]))  # wherever it stands
    for prediction in found[1:]:
        np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)
    (mirrored,) = Predictor(run, tta=0).predict([photos[7]])
    np.testing.assert_allclose(
        mirrored.probabilities, metrics.softmax(network.forward(np.stack(views[:2])).numpy()).mean(axis=0), atol=1e-5
    )
    plain = next(Predictor(run).predict([photos[7]]))
    np.testing.assert_allclose(found[1].features, plain.features, rtol=1e-3, atol=1e-4)  # of the central view


def test_the_temperature_of_the_run_is_used_unless_raw(trained: Path, photos: list[str], tmp_path: Path, capfd) -> None:
    run = with_temperature(trained, tmp_path, 2.5)
    raw = predicted(capfd, photos[0], "--run", run, "--raw", "--top", 12)[0]["predictions"]
    calibrated = predicted(capfd, photos[0], "--run", run, "--top", 12)[0]["predictions"]
    powers = np.array([p["probability"] for p in raw]) ** (1 / 2.5)
    np.testing.assert_allclose([p["probability"] for p in calibrated], powers / powers.sum(), rtol=1e-5)
    assert raw == predicted(capfd, photos[0], "--run", trained, "--top", 12)[0]["predictions"]
    (run / "calibration.json").write_text('{"temperature": 0}')
    assert call(inference, photos[0], "--run", run) == 2
    assert "calibration.json" in capfd.readouterr().err


def test_below_the_threshold_no_class_is_named(trained: Path, photos: list[str], capfd) -> None:
    chosen = photos[:12]
    best = [line["predictions"][0] for line in predicted(capfd, *chosen, "--run", trained)]
    limit = float(np.median([p["probability"] for p in best]))
    below = [p["probability"] < limit for p in best]
    assert any(below)
    assert not all(below)
    lines = predicted(capfd, *chosen, "--run", trained, "--threshold", limit)
    assert [line["below_threshold"] for line in lines] == below
    assert [line["predictions"][0] for line in lines] == best
    assert call(inference, *chosen, "--run", trained, "--threshold", limit) == 0
    assert capfd.readouterr().out.count("none above") == sum(below)


def test_csv_below_the_threshold(trained: Path, photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    flags = ("--run", trained, "--threshold", 1, "--format", "csv", "--output", out)
    assert call(inference, photos[0], *flags) == 0
    (row,) = rows_of(out)
    assert (row["image"], row["rank"], row["class"], row["error"]) == (photos[0], "1", "", "")
    assert 0 < float(row["probability"]) < 1


def test_embeddings_name_the_readable_images(trained: Path, photos: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("x")
    out = tmp_path / "features.npz"
    assert call(inference, photos[0], tmp_path / "bad.jpg", photos[1], "--run", trained, "--embeddings", out) == 1
    with np.load(out) as arrays:
        assert arrays["images"].tolist() == photos[:2]
        assert arrays["features"].dtype == np.float32
        expected = [prediction.features for prediction in Predictor(trained).predict(photos[:2])]
        np.testing.assert_allclose(arrays["features"], expected, rtol=1e-5)


@pytest.mark.parametrize("flag", ["--output", "--embeddings"])
def test_an_interrupted_run_leaves_the_earlier_file_alone(
    trained: Path, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    (tmp_path / "out.npz").write_text("of an earlier run")

    predict = Predictor.predict

    def interrupted(self: Predictor, sources: Iterator[str]) -> Iterator[predictor_module.Prediction]:
        yield from predict(self, sources)
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(inference, *photos[:2], "--run", trained, flag, tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    assert (tmp_path / "out.npz").read_text() == "of an earlier run"


def test_results_of_a_full_disk_go_to_standard_output(
    trained: Path, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    expected = predicted(capfd, *photos[:3], "--run", trained, "--batch-size", 1)
    room = len("".join(json.dumps(line) + "\n" for line in expected[:2])) + 9

    def on_small_disk(file: io.FileIO, content: bytes) -> None:
        part = content[: max(0, room - file.tell())]
        file.write(part)
        if len(part) < len(content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(answers, "append", on_small_disk)
    flags = ("--run", trained, "--batch-size", 1, "--format", "json", "--output", tmp_path / "out.json")
    assert call(inference, *photos[:4], *flags) == 2
    captured = capfd.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == expected
    assert "No space left on device; the results are on standard output" in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--output", "--embeddings"])
def test_results_replace_no_device_and_no_photograph(
    trained: Path, photos: list[str], tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    fifo, photograph = tmp_path / "fifo", tmp_path / "photo.jpg"
    os.mkfifo(fifo)
    shutil.copy(photos[0], photograph)
    before = photograph.read_bytes()
    (tmp_path / "link").symlink_to(photograph)
    for place, words in (
        (fifo, "not a regular file"),
        (photograph, "one of the images"),
        (tmp_path / "link", "one of"),
    ):
        assert call(inference, photograph, "--run", trained, flag, place) == 2
        assert words in capfd.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(photograph))))
    assert call(inference, "-", "--run", trained, flag, photograph) == 2
    assert "one of the images" in capfd.readouterr().err
    assert fifo.is_fifo()
    assert photograph.read_bytes() == before


def test_a_link_is_followed_and_two_results_need_two_files(
    trained: Path, photos: list[str], tmp_path: Path, capfd
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert call(inference, photos[0], "--run", trained, "--output", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert photos[0] in (tmp_path / "target").read_text()
    flags = ("--output", tmp_path / "target", "--embeddings", tmp_path / "link")
    assert call(inference, photos[0], "--run", trained, *flags) == 2
    assert "the file of --output" in capfd.readouterr().err


def test_results_are_not_lost_where_the_embeddings_find_no_room(
    trained: Path, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    def without_room(file: io.FileIO, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    embedding_file = answers.embedding_file

    @contextlib.contextmanager
    def on_full_disk(path: str) -> Iterator[Callable[[predictor_module.Prediction], None]]:
        with monkeypatch.context() as patch, embedding_file(path) as add:
            append = vars(answers)["append"]

            def add_without_room(prediction: predictor_module.Prediction) -> None:
                if prediction.name == photos[2]:
                    patch.setattr(answers, "append", without_room)
                add(prediction)
                patch.setattr(answers, "append", append)

            yield add_without_room

    monkeypatch.setattr(inference, "embedding_file", on_full_disk)
    flags = ("--output", tmp_path / "out.txt", "--embeddings", tmp_path / "out.npz")
    assert call(inference, *photos[:3], "--run", trained, *flags) == 2
    captured = capfd.readouterr()
    assert photos[0] in captured.out
    assert photos[1] in captured.out
    assert "No space left on device; the results are on standard output" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_heat_maps_and_boxes_lie_on_the_upright_photograph(trained: Path, tmp_path: Path, capfd) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (120, 300, 3), np.uint8).repeat(8, 0).repeat(8, 1))  # 2400 x 960
    exif = Image.Exif()
    exif[274] = 6  # to be turned: upright it is 960 wide and 2400 high
    picture.save(tmp_path / "turned.jpg", exif=exif)
    maps = tmp_path / "maps"
    (line,) = predicted(capfd, tmp_path / "turned.jpg", "--run", trained, "--heatmap", maps, "--boxes")
    assert line["heatmap"] == str(maps / "000001-turned.jpg")
    assert Image.open(line["heatmap"]).size == (410, 1024)
    left, top, right, bottom = line["box"]
    assert 10 <= left < right <= 950
    assert 730 <= top < bottom <= 1670
    assert call(inference, tmp_path / "turned.jpg", "--run", trained, "--boxes") == 0
    assert f"  box  left {left}, top {top}, right {right}, bottom {bottom}\n" in capfd.readouterr().out
    (prediction,) = Predictor(trained, heatmaps=True).predict([tmp_path / "turned.jpg"])
    assert prediction.heatmap is not None
    assert prediction.heatmap.size == (2400, 960)
    assert prediction.heatmap.values.shape == (2, 2)  # `small` at 32 px


def test_mistakes_are_one_line(trained: Path, photos: list[str], tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    (tmp_path / "file").write_text("")
    cases = [
        ("--shard", "0/2"), ("--shard", "3/2"), ("--shard", "half"), ("--tta", "-1"), ("--batch-size", "0"),
        ("--threshold", "1.5"), ("--threshold", "nan"), ("--boxes", "--format", "csv"),
        ("--embeddings", tmp_path / "gone" / "e.npz"), ("--heatmap", tmp_path / "file"),
    ]  # fmt: skip
    for flags in cases:
        assert call(inference, photos[0], "--run", trained, *flags) == 2, flags
        captured = capfd.readouterr()
        assert captured.err.startswith(f"error: {flags[0]}"), captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert call(inference, "-", "--run", trained) == 2
    assert "standard input" in capfd.readouterr().err
