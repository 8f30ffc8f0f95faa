"""What can go wrong around a training run: signals, full disks, damaged files, bad images, bad numbers.

Most faults are made in this process, which trains a tiny network in a second or two; every run that a fault ended is
resumed and must end as the run that nothing happened to.
"""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import data
import train
from console import StopSignals, UserError, exit_status
from dataset import layouts
from reports import results
from run import Run
from tests import kill_run
from training import features, log, loop
from training.evaluation import readable_failures

EPOCHS = 3
EPOCH_STEPS = -(-kill_run.IMAGES["train"] // kill_run.BATCH_SIZE)  # 9
STOPPED_AT = 14  # in the middle of the second epoch
CACHED = ("--train-from", "conv4", "--cached-views", "2", "--cache-dir")


ENTERED: list[StopSignals] = []  # the one of the run in this process is the last


def start(images: Path, run: Path | str, *flags: object) -> int:
    """train.py in this process; returns its exit status."""
    enter = StopSignals.__enter__

    def noted(stop: StopSignals) -> StopSignals:
        ENTERED.append(stop)
        return enter(stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignals, "__enter__", noted)
        settings = [*kill_run.SETTINGS, "--epochs", str(EPOCHS)]
        patch.setattr(sys, "argv", ["train.py", str(images), "--run", str(run), *settings, *map(str, flags)])
        return exit_status(train.main)


def send(number: int) -> None:
    """Signals this process, and waits until the thread of the run's `StopSignals` has read that."""
    os.kill(os.getpid(), number)
    for _ in range(3000):
        if ENTERED[-1].received is not None:
            return
        time.sleep(0.01)
    raise AssertionError(f"signal {number} was not noticed")


def at_batch(step: int, action: Callable[[tf.Tensor], tf.Tensor | None]) -> Callable[..., Iterator]:
    """`data.train_batches` that does something with the batch of one step."""
    original = data.train_batches

    def train_batches(load: data.Load, labels: np.ndarray, order: data.Order, first: int, end: int) -> Iterator:
        for number, (x, *others) in enumerate(original(load, labels, order, first, end), start=first):
            changed = action(x) if number == step else None
            yield (x if changed is None else changed, *others)

    return train_batches


@contextlib.contextmanager
def stopped_at(step: int, number: int) -> Iterator[None]:
    """A signal arrives before that many steps are done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "train_batches", at_batch(step - 1, lambda _: send(number)))
        yield


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass
class Runs:
    """What the tests begin with; they change copies."""

    images: Path
    whole: Path  # a finished run that nothing happened to
    half: Path  # the same, stopped after STOPPED_AT steps

    def copy(self, folder: Path) -> Path:
        """A copy of the stopped run."""
        return shutil.copytree(self.half, folder / "run")

    def resume(self, run: Path) -> None:
        """Resumes `run` and checks that it ends as the undisturbed one."""
        assert start(self.images, run) == 0
        assert kill_run.compare(self.whole, run) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("faults")
    runs = Runs(kill_run.make_data(folder / "images", kill_run.IMAGES), folder / "whole", folder / "half")
    assert start(runs.images, runs.whole) == 0
    with stopped_at(STOPPED_AT, signal.SIGTERM):
        assert start(runs.images, runs.half) == 128 + signal.SIGTERM
    assert len(list((runs.half / "latest").glob("*.index"))) == 2
    return runs


def steps_done(run: Path) -> int:
    loaded = Run(run).load("latest")
    assert loaded is not None
    return int(loaded[0]["global_step"])


def last_line(text: str) -> str:
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def newest(run: Path, suffix: str) -> Path:
    return max((run / "latest").glob(f"*{suffix}"))


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- kills and signals -----------------------------------------------------------------------------------------------


def test_killed_run_ends_as_the_undisturbed_one(tmp_path):
    """A small one of `python tests/kill_run.py`, with --head-epochs and cached views."""
    report = kill_run.run(kills=2, seed=0, folder=tmp_path, variant="cached")
    assert report.differences == []
    assert report.kills.total() == 2


def test_sigterm_within_an_epoch(runs, tmp_path):
    assert steps_done(runs.half) == STOPPED_AT
    runs.resume(runs.copy(tmp_path))


def test_sigint_during_validation(runs, tmp_path, monkeypatch, capfd):
    predict = vars(loop)["predict"]

    def interrupted(forward, batches):
        def then_signal(x):
            logits = forward(x)
            send(signal.SIGINT)
            return logits

        return predict(then_signal, batches)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "predict", interrupted)
        assert start(runs.images, run) == 128 + signal.SIGINT
    err = capfd.readouterr().err
    assert err.count("stopping at the next step") == 1
    assert last_line(err) == f"stopped by SIGINT; resume with the same command and --run {run}"
    assert steps_done(run) == EPOCH_STEPS
    assert [line["split"] for line in Run(run).read_lines("metrics.jsonl")] == ["train"] * EPOCH_STEPS
    runs.resume(run)


def test_sigterm_while_the_results_are_computed(runs, tmp_path, monkeypatch):
    run = runs.copy(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "load_best", lambda *_: send(signal.SIGTERM))
        assert start(runs.images, run) == 128 + signal.SIGTERM
    assert not (run / "results-val.json").exists()
    runs.resume(run)


def test_kill_between_two_result_files(runs, tmp_path, monkeypatch):
    run = runs.copy(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(results, "draw_worst", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            start(runs.images, run)
    assert (run / "results-val.json").exists()
    runs.resume(run)


def test_second_signal_and_second_process(runs, tmp_path, capfd):
    run = tmp_path / "run"
    script = str(Path(kill_run.__file__).resolve())
    settings = [*kill_run.SETTINGS, "--epochs", str(EPOCHS)]
    victim = kill_run.Victim([sys.executable, script, "--train", str(runs.images), "--run", str(run), *settings],
                             tmp_path, run)  # fmt: skip
    assert victim.wait_for(lambda: victim.place() == "validation" and victim.step() >= 2 * EPOCH_STEPS)
    victim.process.send_signal(signal.SIGSTOP)
    before = snapshot(run)
    capfd.readouterr()
    assert start(runs.images, run) == 2
    assert last_line(capfd.readouterr().err) == (
        f"error: {run}: another process is training this run; wait for it or stop it"
    )
    assert snapshot(run) == before
    victim.process.send_signal(signal.SIGINT)
    victim.process.send_signal(signal.SIGCONT)
    output = tmp_path / "output.txt"
    assert victim.wait_for(lambda: "stopping at the next step" in output.read_text())
    victim.process.send_signal(signal.SIGINT)
    assert victim.process.wait(timeout=20) == 128 + signal.SIGINT
    assert "Traceback" not in output.read_text()
    assert steps_done(run) >= EPOCH_STEPS
    runs.resume(run)


@pytest.mark.parametrize(("script", "said"), [(["train.py"], ""), (["-m", "tools.benchmark"], "\ninterrupted\n")])
def test_interrupted_before_training(script, said):
    """While TensorFlow is still being imported there is nothing to save: no traceback, and an end by SIGINT (130)."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    process = subprocess.Popen(
        [sys.executable, *script, "."], cwd=kill_run.ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "tensorflow" not in maps.read_text(encoding="utf-8"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == said
    assert process.returncode == -signal.SIGINT


# -- no space --------------------------------------------------------------------------------------------------------


def test_no_space_for_a_checkpoint(runs, tmp_path, capfd):
    run = runs.copy(tmp_path)
    with file_limit(1_000_000):
        assert start(runs.images, run) == 2
    assert "the checkpoint can't be written" in last_line(capfd.readouterr().err)
    assert steps_done(run) == STOPPED_AT
    assert len(list((run / "latest").iterdir())) == 5  # two checkpoints of two files each, and the pointer
    runs.resume(run)


def test_no_space_for_event_files(runs, tmp_path, capfd):
    run = runs.copy(tmp_path)
    with file_limit(20_000):
        assert start(runs.images, run) == 2
    assert "the event files can't be written" in last_line(capfd.readouterr().err)
    runs.resume(run)


def test_no_space_for_the_metric_log(runs, tmp_path, monkeypatch, capfd):
    class NoEvents:
        def __init__(self, *args, **keywords):
            pass

        def images(self, *args, **keywords):
            pass

    run = runs.copy(tmp_path)
    with monkeypatch.context() as patch, file_limit((run / "metrics.jsonl").stat().st_size + 50):
        patch.setattr(log, "EventWriter", NoEvents)
        assert start(runs.images, run) == 2
    assert "no space left" in last_line(capfd.readouterr().err)
    assert not (run / "metrics.jsonl").read_text().endswith("\n")  # half a line
    runs.resume(run)


def test_no_space_for_results(runs, tmp_path, monkeypatch, capfd):
    run, load_best = runs.copy(tmp_path), Run.load_best
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:

        def limited(*args):
            load_best(*args)
            stack.enter_context(file_limit(30_000))

        patch.setattr(Run, "load_best", limited)
        assert start(runs.images, run) == 2
    assert "no space left" in last_line(capfd.readouterr().err)
    runs.resume(run)


def test_interrupted_feature_caches_are_whole(runs, tmp_path, monkeypatch, capfd):
    """One caching ends for lack of space and one by a signal; resumed, both hold the same."""
    full, stopped = tmp_path / "full", tmp_path / "stopped"
    with file_limit(100_000):
        assert start(runs.images, tmp_path / "run-full", *CACHED, full) == 2
    assert "no space left" in last_line(capfd.readouterr().err)
    fill = features.fill

    def interrupted(*args):
        send(signal.SIGINT)
        fill(*args)

    with monkeypatch.context() as patch:
        patch.setattr(features, "fill", interrupted)
        assert start(runs.images, tmp_path / "run-stopped", *CACHED, stopped) == 128 + signal.SIGINT
    assert list(full.rglob("*.partial"))
    assert list(stopped.rglob("*.partial"))
    assert start(runs.images, tmp_path / "run-full", *CACHED, full) == 0
    assert start(runs.images, tmp_path / "run-stopped", *CACHED, stopped) == 0
    assert kill_run.compare_caches(full, stopped) == []
    assert kill_run.compare(tmp_path / "run-full", tmp_path / "run-stopped") == []


def test_full_tmpfs(runs, tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=22m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a tmpfs")
    try:
        capfd.readouterr()
        assert start(runs.images, disk / "run") == 2
        assert "the checkpoint can't be written" in last_line(capfd.readouterr().err)
        assert steps_done(disk / "run") > 0
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        runs.resume(disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_other_system_errors_are_one_line(capfd):
    def fails() -> None:
        raise OSError(errno.EIO, "Input/output error", "some\nwhere")

    assert exit_status(fails) == 2
    error = capfd.readouterr().err
    assert error.startswith(r"error: some\nwhere: Input/output error: ")
    assert error.count("\n") == 1


# -- damaged files ---------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 16
    file.write_bytes(contents)


@pytest.mark.parametrize("suffix", [".data-00000-of-00001", ".index"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damaged_checkpoint_is_not_used(runs, tmp_path, suffix, damage):
    run = runs.copy(tmp_path)
    damage(newest(run, suffix))
    loaded = Run(run).load("latest")
    assert loaded is not None
    assert loaded[0]["global_step"] == EPOCH_STEPS
    if damage is not Path.unlink or suffix != ".index":  # without an index it never was a checkpoint
        assert "damaged, not used" in loaded[1][0]


def test_damaged_run_is_resumed_from_the_checkpoint_before(runs, tmp_path, capfd):
    run = runs.copy(tmp_path)
    truncate(newest(run, ".data-00000-of-00001"))
    (run / "latest" / "checkpoint").write_bytes(b"\0garbage")
    (run / "best" / "checkpoint").write_bytes(b"")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 15, "ep')
    runs.resume(run)
    assert "resuming from the checkpoint before it" in capfd.readouterr().out


def test_damaged_metric_log_is_said(runs, tmp_path, capfd):
    run = runs.copy(tmp_path)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-2]) + b"\0\0\n" + lines[-1])
    assert start(runs.images, run) == 0
    assert "warning: metrics.jsonl has lost 2 lines" in capfd.readouterr().out
    steps = [line["step"] for line in Run(run).read_lines("metrics.jsonl") if line["split"] == "train"]
    assert steps == [*range(1, STOPPED_AT - 1), *range(STOPPED_AT + 1, EPOCHS * EPOCH_STEPS + 1)]


def test_no_intact_checkpoint(runs, tmp_path, capfd):
    run = runs.copy(tmp_path)
    for file in (run / "latest").glob("*.data-*"):
        truncate(file)
    assert start(runs.images, run) == 2
    assert "no intact checkpoint is left" in last_line(capfd.readouterr().err)


def test_checkpoint_replaced_while_it_is_read(runs, tmp_path, monkeypatch):
    """A reader of `best` may find that training has just replaced it."""
    run = Run(runs.copy(tmp_path))
    load_checkpoint = tf.train.load_checkpoint

    def replaced_meanwhile(prefix):
        monkeypatch.setattr(tf.train, "load_checkpoint", load_checkpoint)
        run.save("best", {"x": np.float32(7)}, keep=1)
        return load_checkpoint(prefix)

    monkeypatch.setattr(tf.train, "load_checkpoint", replaced_meanwhile)
    loaded = run.load("best")
    assert loaded is not None
    assert loaded[0]["x"] == 7
    assert loaded[1] == []


# -- numbers and images ----------------------------------------------------------------------------------------------


def test_loss_that_is_not_finite(runs, tmp_path, monkeypatch, capfd):
    run, bad = runs.copy(tmp_path), 20
    with monkeypatch.context() as patch:
        patch.setattr(data, "train_batches", at_batch(bad - 1, lambda x: x * np.nan))
        assert start(runs.images, run) == 2
    line = last_line(capfd.readouterr().err)
    paths = data_paths(runs.images, "train")
    files = [paths[i] for i in data.Order(len(paths), kill_run.BATCH_SIZE, 0).indices(bad - 1)]
    assert f"not finite at step {bad}, learning rate 2.97e-05" in line
    assert line.endswith(", ".join(files))
    saved = Run(run).load("latest")
    assert saved is not None
    assert all(np.isfinite(a).all() for a in saved[0].values() if a.dtype == np.float32)
    runs.resume(run)


def data_paths(images: Path, split: str) -> tuple[str, ...]:
    return layouts.find_images(str(images)).splits[split].paths


def test_learning_rate_that_diverges(runs, tmp_path, capfd):
    assert start(runs.images, tmp_path / "run", "--learning-rate", "1e30") == 2
    assert "not finite at step" in last_line(capfd.readouterr().err)


def test_image_that_fails_only_when_it_is_decoded(runs, tmp_path, capfd):
    images = shutil.copytree(runs.images, tmp_path / "images")
    bad = images / "train" / "class1" / "bad.png"
    Image.effect_noise((64, 64), 50).save(bad)
    contents = bad.read_bytes()
    bad.write_bytes(contents[:500] + contents[1500:])  # header and end are in place
    assert start(images, tmp_path / "run") == 2
    line = last_line(capfd.readouterr().err)
    assert line.startswith(f"error: {bad}: ")
    assert line.endswith("python -m tools.check_data finds all bad images")
    run = tmp_path / "skipping"
    with stopped_at(STOPPED_AT, signal.SIGTERM):
        assert start(images, run, "--on-bad-image", "skip") == 128 + signal.SIGTERM
    out = capfd.readouterr().out
    assert f"skipped {bad.relative_to(images)}: " in out
    assert f"skipped 1 bad files of {len(data_paths(images, 'train')) + len(data_paths(images, 'val'))}" in out
    assert Run(run).config().excluded == [str(bad.relative_to(images))]
    assert start(images, run, "--on-bad-image", "skip") == 0
    # Without the bad file the run is that of the folder without it.
    assert (run / "metrics.jsonl").read_bytes() == (runs.whole / "metrics.jsonl").read_bytes()


def test_out_of_memory_suggests_a_remedy():
    error = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[64,64,224,224]")
    with (
        pytest.raises(UserError, match=r"--accumulate 2 .*--auto-batch.*lower --batch-size \(OOM when allocating"),
        readable_failures(),
    ):
        raise error


# -- resumed, or not -------------------------------------------------------------------------------------------------


def test_refuses_other_settings_or_data(runs, tmp_path, capfd):
    run = runs.copy(tmp_path)
    before = snapshot(run)
    assert start(runs.images, run, "--seed", 1, "--augment", "flip") == 2
    line = last_line(capfd.readouterr().err)
    assert "--seed was 0, now 1" in line
    assert "--augment was ['flip', 'rotate', 'color'], now ['flip']" in line
    images = shutil.copytree(runs.images, tmp_path / "images")
    shutil.copy(images / "train" / "class0" / "0.jpg", images / "train" / "class0" / "more.jpg")
    assert start(images, run) == 2
    line = last_line(capfd.readouterr().err)
    assert f"the images of {images} are not those that it began with: 1 new (first 'train/class0/more.jpg')" in line
    assert snapshot(run) == before


def test_complete_run_is_left_as_it_is(runs, capfd):
    before = snapshot(runs.whole)
    assert start(runs.images, runs.whole) == 0
    assert "this run is complete" in capfd.readouterr().out
    assert snapshot(runs.whole) == before


def test_odd_names_of_run_and_data(runs, tmp_path):
    images = shutil.copytree(runs.images, tmp_path / "dätä [1] *?'\"")
    run = tmp_path / "rüns * 漢字 ? {a,b} '"
    with stopped_at(STOPPED_AT, signal.SIGTERM):
        assert start(images, run) == 128 + signal.SIGTERM
    assert start(images, run) == 0
    assert (run / "metrics.jsonl").read_bytes() == (runs.whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["runs [2]", "back\\slash", os.fsdecode(b"latin-\xfc")])
def test_refuses_a_path_that_tensorflow_cannot_read(runs, tmp_path, capfd, name):
    assert start(runs.images, tmp_path / name) == 2
    assert "TensorFlow reads no checkpoint at a path" in last_line(capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_run_that_is_a_file(runs, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    assert start(runs.images, tmp_path / "file") == 2
    assert "can't be written" in last_line(capfd.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


def test_no_thread_or_handler_is_left(runs):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for thread in threading.enumerate():
        if "_read_signals" in thread.name:
            thread.join(timeout=30)
            assert not thread.is_alive()
