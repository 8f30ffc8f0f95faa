"""Images unlike the training images: what a run keeps, and what inference.py says of them."""

import json
from pathlib import Path

import numpy as np
import pytest

import inference
import train
from console import UserError
from model import Network
from predictor import Predictor
from reports.neighbours import unit_length
from run import Run
from tests.conftest import TINY, call, rows_of
from training import known


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sample_images: Path) -> Path:
    folder = tmp_path_factory.mktemp("unknown")
    network = Network("small", "gap", 2, 32, seed=5)
    weights = {name: v.numpy() for name, v in network.variables_by_name.items() if "/conv" in name}
    np.savez(folder / "small.npz", **weights)
    flags = ("--train-from", "head", "--cached-views", 2, "--cache-dir", folder / "cache")
    assert call(train, sample_images, "--run", folder / "run", *TINY, "--pretrained", folder / "small.npz", *flags) == 0
    return folder / "run"


def test_a_run_keeps_its_training_features_and_scores_of_held_out_images(run, sample_images):
    kept = np.load(run / "known.npz")
    counts = Run(run).config().counts
    assert kept["references"].shape == (2 * counts["train"], 256)
    assert kept["held_out"].shape == (counts["val"],)
    assert np.linalg.norm(kept["references"].astype(np.float32), axis=1) == pytest.approx(1, abs=2e-3)
    # The distances are those of the pictures themselves, by brute force.
    images = sorted((sample_images / "val").rglob("*.jpg"))
    features = unit_length(np.stack([p.features for p in Predictor(run).predict(images)]))
    references = kept["references"].astype(np.float32)
    among = np.linalg.norm(references[:, None] - references[None], axis=2)
    spreads = np.sort(among, axis=1)[:, known.NEIGHBOUR]  # the first is the row itself
    assert kept["spreads"] == pytest.approx(spreads, abs=2e-3)
    distances = np.linalg.norm(features[:, None] - references[None], axis=2)
    order = np.argsort(distances, axis=1)[:, : known.NEIGHBOUR]
    kth = np.take_along_axis(distances, order, axis=1)[:, -1]
    expected = kth / np.sqrt(spreads[order].mean(axis=1))
    assert np.sort(kept["held_out"]) == pytest.approx(np.sort(expected), rel=0.03)


def test_known_images_exceed_the_limit_as_rarely_as_asked(run, sample_images):
    images = sorted((sample_images / "val").rglob("*.jpg"))
    predictor = Predictor(run, unknown_rate=0.1)
    assert sum(bool(p.unknown) for p in predictor.predict(images)) <= 0.1 * len(images)
    assert predictor._known is not None
    assert predictor._known.are_beyond(np.eye(2, 256, dtype=np.float32)).tolist() == [True, True]  # one channel alone


def test_every_format_says_what_is_unknown(run, sample_images, tmp_path, monkeypatch, capfd):
    images = sorted((sample_images / "val").rglob("*.jpg"))
    (tmp_path / "bad.jpg").write_text("text")
    monkeypatch.setattr("predictor._Known.are_beyond", lambda self, features: np.arange(len(features)) == 0)
    arguments = (*images[:2], "--run", run, "--unknown", 0.1, "--format")
    assert call(inference, *arguments, "json") == 0
    assert [json.loads(line)["unknown"] for line in capfd.readouterr().out.splitlines()] == [True, False]
    table = tmp_path / "out.csv"
    assert call(inference, tmp_path / "bad.jpg", *arguments, "csv", "--top", 2, "--output", table) == 1
    rows = [(row["rank"], row["error"], row["unknown"]) for row in rows_of(table)]
    bad = ("", "is not an image (starts with b'text')", "")
    assert rows == [bad, ("1", "", "true"), ("2", "", "true"), ("1", "", "false"), ("2", "", "false")]
    assert call(inference, images[0], "--run", run, "--format", "csv", "--output", table) == 0
    assert list(rows_of(table)[0]) == ["image", "rank", "class", "probability", "error"]  # where it is not asked
    capfd.readouterr()
    assert call(inference, *arguments, "text") == 0
    assert capfd.readouterr().out.count("unknown: unlike the training images") == 1


def test_what_cannot_be_told_is_one_line(run, tmp_path, capfd):
    with pytest.raises(UserError, match="takes 999 held-out images or more"):
        Predictor(run, unknown_rate=0.001)
    with pytest.raises(UserError, match="--unknown 1: the rate must lie between 0 and 1"):
        Predictor(run, unknown_rate=1.0)
    kept = (run / "known.npz").read_bytes()
    try:
        (run / "known.npz").write_bytes(kept[: len(kept) // 2])
        with pytest.raises(UserError, match=r"known.npz: cannot be read"):
            Predictor(run, unknown_rate=0.1)
        (run / "known.npz").unlink()
        with pytest.raises(UserError, match="keeps no features"):
            Predictor(run, unknown_rate=0.1)
    finally:
        (run / "known.npz").write_bytes(kept)


def test_many_training_images_keep_a_bounded_number_of_rows(run, sample_images, tmp_path, monkeypatch):
    monkeypatch.setattr(known, "MOST_REFERENCES", 10)
    flags = ("--train-from", "head", "--cached-views", 2, "--cache-dir", tmp_path / "cache")
    weights = run.parent / "small.npz"
    assert call(train, sample_images, "--run", tmp_path / "run", *TINY, "--pretrained", weights, *flags) == 0
    assert len(np.load(tmp_path / "run" / "known.npz")["references"]) == 10
