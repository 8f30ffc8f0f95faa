"""--auto-batch: a batch that does not fit the memory is computed in parts, and the run is the same."""

import signal
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

import evaluate
import train
from console import Stopped
from model import Network
from run import Run
from tests.conftest import TINY, call
from training.loop import Loop
from training.settings import IMAGES_AT_ONCE

FLAGS = [*TINY, "--head", "linear", "--epochs", "2", "--augment", "flip", "--auto-batch"]  # 36 images: 5 steps an epoch


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The most images whose gradients fit: to be set by a test. Beyond it TensorFlow's own error is raised."""
    most, forward = {"images": 1000}, Network.forward

    def check(images: int) -> int:
        if images > most["images"]:
            raise MemoryError(f"{images} images")
        return images

    def limited(
        self: Network, x: tf.Tensor, first: str | None = None, last: str | None = None, dropout: Any = None
    ) -> tf.Tensor:
        if dropout:
            with tf.control_dependencies([tf.numpy_function(check, [tf.shape(x)[0]], tf.int32)]):
                x = tf.identity(x)
        return forward(self, x, first, last, dropout)

    monkeypatch.setattr(Network, "forward", limited)
    return most


def stop_at_step(loop: Loop, step: int) -> None:
    """In the place of what looks for a signal."""
    if loop.trainer.steps_done() == step:
        raise Stopped(signal.SIGTERM)


def test_too_large_a_batch_is_computed_in_parts(
    memory: dict[str, int],
    sample_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert call(train, sample_images, "--run", tmp_path / "whole", *FLAGS) == 0
    assert "a step of 8 images on a device fits in 1 part\n" in capsys.readouterr().out
    memory["images"] = 3
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_check_stop", lambda self: stop_at_step(self, 3))
        assert call(train, sample_images, "--run", tmp_path / "parts", *FLAGS) == 128 + signal.SIGTERM
    assert "a step of 8 images on a device fits in 4 parts\n" in capsys.readouterr().out
    memory["images"] = 2  # resumed with the parts that it began with, without another try
    assert call(train, sample_images, "--run", tmp_path / "parts", *FLAGS) == 0
    assert "fits in" not in capsys.readouterr().out
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    assert (whole.config().settings["accumulate"], parts.config().settings["accumulate"]) == (1, 4)
    lines = list(zip(whole.read_lines("metrics.jsonl"), parts.read_lines("metrics.jsonl"), strict=True))
    assert len(lines) == 12
    for one, other in lines:
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)  # sums of parts are rounded otherwise
        assert other["accuracy"] == one["accuracy"]


def test_a_run_that_has_begun_goes_on_in_parts(
    memory: dict[str, int], sample_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FLAGS[:-1]
    assert call(train, sample_images, "--run", tmp_path / "whole", *plain) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_check_stop", lambda self: stop_at_step(self, 3))
        assert call(train, sample_images, "--run", tmp_path / "parts", *plain) == 128 + signal.SIGTERM
    memory["images"] = 4
    assert call(train, sample_images, "--run", tmp_path / "parts", *plain) == 2
    assert call(train, sample_images, "--run", tmp_path / "parts", *FLAGS) == 0
    losses = [
        [line["loss"] for line in Run(tmp_path / name).read_lines("metrics.jsonl")] for name in ("whole", "parts")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_run_in_parts_computes_no_more_images_at_once_anywhere(
    sample_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do its cached activations, its validation, its last evaluation and evaluate.py."""
    largest, forward = [0], Network.forward

    def note(images: int) -> int:
        largest[0] = max(largest[0], int(images))
        return images

    def noting(self: Network, x: tf.Tensor, *arguments: Any, **keywords: Any) -> tf.Tensor:
        with tf.control_dependencies([tf.numpy_function(note, [tf.shape(x)[0]], tf.int32)]):
            return forward(self, tf.identity(x), *arguments, **keywords)

    monkeypatch.setattr(Network, "forward", noting)
    flags = ["--train-from", "conv5", "--cached-views", 1, "--epochs", 1, "--cache-dir", tmp_path / "cache"]
    assert call(train, sample_images, "--run", tmp_path / "run", *TINY, *flags, "--accumulate", 3) == 0
    assert largest == [3]  # of 8 images in three parts
    assert call(evaluate, "--run", tmp_path / "run") == 0
    assert largest == [3]
    assert call(train, sample_images, "--run", tmp_path / "whole", *TINY, *flags) == 0
    assert largest == [IMAGES_AT_ONCE]  # runs of other batch sizes share it


def test_trying_changes_nothing(memory: dict[str, int], sample_images: Path, tmp_path: Path) -> None:
    for name, flags in (("tried", FLAGS), ("plain", FLAGS[:-1])):
        assert call(train, sample_images, "--run", tmp_path / name, *flags) == 0
    tried, plain = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("tried", "plain"))
    assert tried == plain


def test_a_device_without_room_for_an_image_is_one_line(
    memory: dict[str, int], sample_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory["images"] = 0
    assert call(train, sample_images, "--run", tmp_path / "run", *FLAGS) == 2
    assert "--auto-batch: the device has not enough memory to train on a single image" in capsys.readouterr().err
    assert not (tmp_path / "run/config.json").exists()
