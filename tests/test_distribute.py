"""Training on several devices and in several processes, against the same run on one device."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import data
import replicas
from console import UserError
from dataset.layouts import Examples
from replicas import Share
from run import Run
from tests.conftest import ROOT, TINY

FINISH = 300  # seconds that a run may take on a machine that does much else
CENTRAL = data.CENTRAL_VIEW


# -- shares of a batch ------------------------------------------------------------------------------------------------


def numbers(positions: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
    """Loads the index itself for an image."""
    return positions.map(lambda index, view: (tf.cast(index, tf.float32)[tf.newaxis], index)).batch(batch_size)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_shares_are_neighbours_that_cover_every_row_once(parts: int) -> None:
    for rows in range(12):
        found = [Share(part, parts).bounds(rows) for part in range(parts)]
        assert [list(range(*bounds)) for bounds in found] == [
            part.tolist() for part in np.array_split(range(rows), parts)
        ]
        as_tensors = [[int(bound) for bound in Share(part, parts).bounds(tf.constant(rows))] for part in range(parts)]
        assert as_tensors == [list(bounds) for bounds in found]


@pytest.mark.parametrize("first_step", [0, 1, 3, 6])
def test_shares_of_workers_are_the_batches_of_one(first_step: int) -> None:
    """13 examples in batches of 6 on 3 workers: the last batch of an epoch has one row, which two workers lack."""
    labels = np.arange(13) % 4

    def stream(share: Share) -> list[tuple[np.ndarray, ...]]:
        order = data.Order(13, 6, seed=3, share=share)
        return list(data.train_batches(numbers, labels, order, first_step, 9).as_numpy_iterator())

    whole, shares = stream(Share()), [stream(Share(part, 3)) for part in range(3)]
    assert len(whole) == 9 - first_step
    for step, (x, of_batch, indices) in enumerate(whole):
        assert np.array_equal(np.concatenate([share[step][0] for share in shares]), x)
        for share in shares:
            assert np.array_equal(share[step][1], of_batch)
            assert np.array_equal(share[step][2], indices)
    assert {len(share[step][0]) for share in shares for step in range(len(whole))} == {0, 1, 2}


def test_validation_covers_each_image_once() -> None:
    for count in (2, 7):
        found = [
            index
            for part in range(3)
            for _, _, indices in data.ordered_batches(numbers, np.arange(count), 2, CENTRAL, Share(part, 3))
            for index in indices.numpy()
        ]
        assert found == list(range(count))


def test_a_share_reads_no_file_of_another(tmp_path: Path) -> None:
    """Only the first of the two files is there: its worker never sees that the other is missing."""
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    examples = Examples((str(tmp_path / "0.png"), str(tmp_path / "missing.png")), np.array([0, 1]))
    load = data.image_loader(examples, data.Preprocessing(32), 0)
    order = data.Order(2, 2, seed=0)
    part = order.indices(0).index(0)
    for share, is_readable in ((Share(part, 2), True), (Share(1 - part, 2), False)):
        stream = data.train_batches(load, examples.labels, data.Order(2, 2, seed=0, share=share), 0, 1)
        if is_readable:
            assert [x.shape for x, *_ in stream] == [(1, 32, 32, 3)]
        else:
            with pytest.raises(tf.errors.OpError, match=r"missing\.png"):
                list(stream)


# -- TF_CONFIG --------------------------------------------------------------------------------------------------------


def tf_config(hosts: list[str], index: Any, kind: str = "worker") -> str:
    return json.dumps({"cluster": {"worker": hosts}, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"cluster": {"worker": ["a:1", "b:2"]}}',
        tf_config(["a:1", "b:2"], 2),
        tf_config(["a:1", "b:2"], -1),
        tf_config(["a:1", "b:2"], "first"),
        tf_config(["a", "b"], 0),
        tf_config(["a:1", "b:2"], 0, "ps"),
        json.dumps({"cluster": {"worker": ["a:1"], "ps": ["b:2"]}, "task": {"type": "worker", "index": 0}}),
    ],
)
def test_a_wrong_tf_config_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match=r'TF_CONFIG .* not of the form \{"cluster"'):
        replicas.find_replicas(0)


def test_one_device_needs_no_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])
    for text in ("", tf_config(["a:1"], 0)):
        monkeypatch.setenv("TF_CONFIG", text)
        assert replicas.find_replicas(0).strategy is None


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 training images: batches of 8 leave one over, which all devices but one have no part of."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, counts in (("train", (9, 8, 8)), ("val", (3, 2, 2))):
        for number, count in enumerate(counts):
            (folder / split / f"class-{number}").mkdir(parents=True)
            for image in range(count):
                pixels = rng.integers(0, 255, (40, 40, 3)) * (0.3 + 0.7 * np.eye(3)[number])
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f"class-{number}" / f"{image}.png")
    return folder


@pytest.fixture(scope="module")
def ways(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Arguments of train.py but for --run: every head, parts of a batch, clipping, caches, phases, a solved head."""
    from model import Network

    weights = tmp_path_factory.mktemp("weights") / "small.npz"
    start = Network("small", "gap", 2, 32, seed=5).variables_by_name
    np.savez(weights, **{name: v.numpy() for name, v in start.items() if "/conv" in name})
    tiny = [str(images), *TINY, "--epochs", "2"]
    caches = ["--cache-dir", str(tmp_path_factory.mktemp("caches"))]
    return {
        "linear": [*tiny, "--head", "linear", "--accumulate", "2"],
        "gap": [*tiny, "--head", "gap", "--clip-norm", "1", "--label-smoothing", "0.1", "--augment", "flip"],
        "fc": [*tiny, "--network", "narrow", "--head", "fc", "--image-size", "224", "--accumulate", "3"],
        "phases": [
            *(*tiny, *caches, "--pretrained", str(weights), "--head", "linear"),
            *("--head-epochs", "1", "--train-from", "conv5", "--cached-views", "2"),
        ],
        "solved": [*tiny, *caches, "--pretrained", str(weights), "--head", "gap", "--train-from", "head"],
    }


def start(jobs: list[list[str]], config: str = "", timeout: int = 120) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"TF_CONFIG": config, "CLUSTER_TIMEOUT": str(timeout)}
    command = [sys.executable, str(ROOT / "tests/distributed.py"), json.dumps(jobs)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: "subprocess.Popen[str]") -> list[tuple[int, str]]:
    """The exit status and stderr of each."""
    try:
        return [
            (process.returncode, error) for process in processes for _, error in [process.communicate(timeout=FINISH)]
        ]
    finally:
        for process in processes:
            process.kill()


def free_hosts(count: int) -> list[str]:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    hosts = [f"localhost:{listening.getsockname()[1]}" for listening in sockets]
    for listening in sockets:
        listening.close()
    return hosts


def start_workers(arguments: list[str], count: int = 2) -> list["subprocess.Popen[str]"]:
    hosts = free_hosts(count)
    return [start([arguments], tf_config(hosts, number)) for number in range(count)]


@pytest.fixture(scope="module")
def on_one_device(ways: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {way: tmp_path_factory.mktemp("one") / way for way in ways}
    [(status, error)] = finish(start([[*ways[way], "--run", str(run)] for way, run in runs.items()]))
    assert status == 0, error
    return runs


def assert_same_run(one: Path, other: Path) -> None:
    """To float rounding: losses to 6 digits; variables to 4 digits of the largest of each."""
    lines, others = Run(one).read_lines("metrics.jsonl"), Run(other).read_lines("metrics.jsonl")
    assert len(lines) == len(others) > 0
    for left, right in zip(lines, others, strict=True):
        assert right.pop("loss") == pytest.approx(left.pop("loss"), rel=2e-6)
        assert right == left
    for kind in ("latest", "best"):
        expected, found = Run(one).load(kind), Run(other).load(kind)
        assert expected is not None
        assert found is not None
        assert expected[0].keys() == found[0].keys()
        for name, value in expected[0].items():
            if name != "progress":
                assert np.abs(found[0][name] - value).max() <= 5e-5 * np.abs(value).max(), name


@pytest.mark.parametrize("count", [2, 3])
def test_several_devices_train_the_run_of_one(
    count: int, ways: dict[str, list[str]], on_one_device: dict[str, Path], tmp_path: Path
) -> None:
    for way, arguments in ways.items():
        [(status, error)] = finish(start([[*arguments, "--run", str(tmp_path / way), "--devices", str(count)]]))
        assert status == 0, f"{way}: {error}"
    for way, run in on_one_device.items():
        assert_same_run(run, tmp_path / way)


@pytest.mark.parametrize(("way", "count"), [("linear", 3), ("phases", 2), ("solved", 2)])
def test_several_processes_train_the_run_of_one(
    way: str, count: int, ways: dict[str, list[str]], on_one_device: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [*ways[way], "--run", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "caches")]
    for status, error in finish(*start_workers(arguments, count)):
        assert status == 0, error
    assert_same_run(on_one_device[way], tmp_path / "run")


def steps_of(run: Path) -> int:
    loaded = Run(run).load("latest")
    assert loaded is not None
    return int(loaded[0]["global_step"])


def test_a_signal_to_one_worker_stops_all_and_the_run_resumes_on_one_device(
    ways: dict[str, list[str]], on_one_device: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    workers = start_workers([*ways["linear"], "--run", str(run)])
    assert workers[1].stdout is not None
    for line in workers[1].stdout:  # it trains, or is about to
        if line.startswith("worker"):
            break
    assert workers[0].stdout is not None
    for line in workers[0].stdout:
        if line.startswith("device"):
            break
    workers[1].send_signal(signal.SIGTERM)
    statuses = [status for status, _ in finish(*workers)]
    assert statuses in ([128 + signal.SIGTERM] * 2, [0, 0])  # it may have been about to end
    assert (statuses[0] == 0) == (steps_of(run) == 8)
    [(status, error)] = finish(start([[*ways["linear"], "--run", str(run)]]))
    assert status == 0, error
    assert_same_run(on_one_device["linear"], run)


def test_a_run_begun_on_one_device_resumes_on_two(
    ways: dict[str, list[str]], on_one_device: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    alone = start([[*ways["linear"], "--run", str(run)]])
    assert alone.stdout is not None
    for line in alone.stdout:
        if line.startswith("device"):
            break
    alone.send_signal(signal.SIGTERM)
    [(status, error)] = finish(alone)
    assert status == 128 + signal.SIGTERM, error
    [(status, error)] = finish(start([[*ways["linear"], "--run", str(run), "--devices", "2"]]))
    assert status == 0, error
    assert_same_run(on_one_device["linear"], run)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_worker_ends_the_others_and_all_resume(
    killed: int, ways: dict[str, list[str]], on_one_device: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    workers = start_workers([*ways["linear"], "--run", str(run)])
    assert workers[0].stdout is not None
    for line in workers[0].stdout:
        if line.startswith("device"):
            break
    workers[killed].kill()
    (_, _), (status, error) = sorted(finish(*workers))
    assert status == 2, error
    assert "another worker has ended" in error.splitlines()[-1]
    for status, error in finish(*start_workers([*ways["linear"], "--run", str(run)])):
        assert status == 0, error
    assert_same_run(on_one_device["linear"], run)


def test_a_worker_that_never_comes_is_one_line(ways: dict[str, list[str]], tmp_path: Path) -> None:
    config = tf_config(free_hosts(2), 0)
    [(status, error)] = finish(start([[*ways["linear"], "--run", str(tmp_path / "run")]], config, timeout=3))
    assert status == -signal.SIGKILL
    assert "error: not all of the 2 workers of TF_CONFIG came within 3 s" in error.splitlines()[-1]
    assert not (tmp_path / "run").exists()
