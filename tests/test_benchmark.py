"""The benchmarks and the GPU check: what they compute from their times, and that every command runs at a tiny size."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import train
from console import StopSignals, UserError
from model import NETWORKS, Network
from networks.vgg import vgg
from run import Run
from tests.conftest import TINY, call
from tools import benchmark, benchmark_peers, benchmark_processes, gpu_check, keras_predict, timing
from tools.timing import Round
from training.step import compiled_forward

SMALL = ["--network", "small", "--head", "gap", "--image-size", 32, "--batch-size", 2, "--precision", "float32"]


def test_candidates_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []

    def candidate(name: str, images: int) -> Callable[[], int]:
        def work() -> int:
            calls.append(name)
            return images

        return work

    with StopSignals() as stop:
        measured = timing.take_turns({"a": candidate("a", 3), "b": candidate("b", 5)}, 2, 1, stop)
    assert calls == ["a", "b"] * 3
    assert {name: [r.images for r in rounds] for name, rounds in measured.items()} == {"a": [3, 3], "b": [5, 5]}


def test_comparison_gives_medians_and_ratios_of_the_same_round() -> None:
    """By hand: a does 10, 20, 40 images/s, b 5, 5, 40; the ratios of the rounds are 2, 4 and 1."""
    measured = {
        "a": [Round(1.0, 2.0, 10), Round(0.5, 1.0, 10), Round(0.25, 0.5, 10)],
        "b": [Round(2.0, 2.0, 10), Round(2.0, 4.0, 10), Round(0.25, 1.0, 10)],
    }
    lines = timing.comparison(measured).splitlines()
    assert lines[2].split() == ["a", "20", "10", "to", "40", "0.1", "1.000", "1.000"]
    assert lines[3].split() == ["b", "5", "5", "to", "40", "0.2", "2.000", "2.000"]


def test_operations_are_those_of_the_convolutions_and_products() -> None:
    """Of `small` at 32 px: a convolution takes 2 * 9 * inputs * outputs * positions, the head 2 * inputs * outputs."""
    by_hand, channels = 0, 3
    for side, width in ((32, 32), (16, 64), (8, 128), (4, 256), (2, 256)):
        by_hand += 2 * 9 * channels * width * side**2
        channels = width
    by_hand += 2 * 256 * 7
    assert benchmark.flops(compiled_forward(Network("small", "gap", 7, 32))) == by_hand


def test_step_and_inference_are_measured_and_recorded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.md"
    for command in ("step", "inference"):
        assert call(benchmark, command, *SMALL, "--rounds", 1, "--record", file) == 0
        assert "% of what products of large matrices reach" in capfd.readouterr().out
    recorded = file.read_text(encoding="utf-8")
    assert recorded.count("```") == 4
    assert f"TensorFlow {tf.__version__}" in recorded


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["step", *SMALL, "--peers"], "--peers"),
        (["step", *SMALL, "--train-from", "conv9"], "conv9"),
        (["step", "--network", "small", "--image-size", 8], "--image-size 8"),
        (["step", *SMALL, "--rounds", 0], "--rounds 0"),
        (["startup", "--run", "somewhere"], "--image"),
    ],
)
def test_mistakes_are_one_line(arguments: list, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(benchmark, *arguments) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_training_on_cached_activations_and_on_images_is_compared(
    sample_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    network = Network("small", "gap", 2, 32)
    weights = tmp_path / "small.npz"
    np.savez(weights, **{name: v.numpy() for name, v in network.variables_by_name.items() if "/conv" in name})
    monkeypatch.chdir(tmp_path)
    flags = [sample_images, *TINY, "--pretrained", weights, "--rounds", 1]
    assert call(benchmark, "cache", *flags) == 0
    assert "cached activations" in capfd.readouterr().out
    assert call(benchmark, "cache", *flags, "--train-from", "conv1") == 2
    assert "nothing is frozen" in capfd.readouterr().err


def test_processes_predict_a_folder_with_inference_and_with_keras(
    sample_images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call(train, sample_images, "--run", run, "--epochs", 1, *TINY) == 0
    flags = ["--rounds", 1, "--warm-up", 0]
    assert call(benchmark, "folder", sample_images, "--images", 3, "--run", run, *flags) == 0
    table = capfd.readouterr().out
    assert "inference.py" in table
    assert "plain Keras" in table
    photograph = next(sample_images.rglob("*.jpg"))
    benchmark_processes.keras_model(Run(run).load_model(), "float32").save(tmp_path / "model.keras")
    for given, count in ((photograph, 1), (sample_images / "val", 24)):
        keras_predict.main(str(tmp_path / "model.keras"), str(given))
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        assert len(lines) == count
        assert {Path(line["image"]).name for line in lines} <= {path.name for path in sample_images.rglob("*.jpg")}
    missing = benchmark_processes.process("inference.py", str(tmp_path / "no.jpg"), "--run", str(run))
    with pytest.raises(UserError, match="does not exist"):
        missing()


@pytest.mark.parametrize(("head", "size"), [("gap", 64), ("fc", 224)])
def test_the_keras_model_has_our_layers(head: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "small", vgg((2, 3), (4,), (5,), (6,), (7,), fc_units=8))
    network = Network("small", head, 9, size)
    model = benchmark_processes.keras_model(network, "float32")
    ours = [tuple(v.shape) for name, v in network.variables_by_name.items() if name.endswith("/weights")]
    theirs = [tuple(v.shape) for v in model.weights if len(v.shape) > 1]
    assert [np.prod(shape) for shape in ours] == [np.prod(shape) for shape in theirs]
    assert model.output_shape == (None, 9)


def test_imports_are_summed_by_package() -> None:
    packages = benchmark_processes.imports("json")
    assert "json" in dict(packages)
    assert [seconds for _, seconds in packages] == sorted((s for _, s in packages), reverse=True)


def test_the_published_step_does_a_step_and_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_peers, "WIDTHS", ((2,),) * 5)
    monkeypatch.setattr(benchmark_peers, "FC_UNITS", 8)
    x = np.random.default_rng(0).normal(0, 1, (2, 224, 224, 3)).astype(np.float32)
    train, forward = benchmark_peers.published_vgg19(x, np.array([0, 1]), 3, "float32")
    assert train() == forward() == 2


# -- the GPU check ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="this machine has a GPU")
def test_without_a_gpu_the_check_says_so_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(gpu_check) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: TensorFlow sees no GPU")
    assert error.count("\n") == 1


def test_the_check_finds_losses_that_differ(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def losses(device: str, dtype: tf.DType, compile: str, steps: int, side: int) -> np.ndarray:
        wrong = dtype == tf.bfloat16 and compile == "on"
        return np.full(steps, 1.2 if wrong else 1.0)

    monkeypatch.setattr(gpu_check, "losses", losses)
    assert call(gpu_check, "--tiny", "--parts", "losses", "memory") == 1
    shown = capfd.readouterr().out
    assert shown.count("WRONG") == 2  # as it comes, and in the table
    assert "bfloat16, XLA  WRONG" in shown
    assert "needs a GPU" in shown


def test_the_speeds_of_the_check_are_measured_at_a_tiny_size(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(gpu_check, "--tiny", "--parts", "ceiling", "input", "program") == 0
    shown = capfd.readouterr().out
    assert "TFLOP/s" in shown
    assert "input pipeline" in shown
    counts = re.search(r"step as XLA compiles it +(\d+) +instructions of the (\d+) that were traced, (\d+)", shown)
    assert counts
    after, before, fused = map(int, counts.groups())
    assert 0 < fused < after < before


def test_the_host_is_free_when_the_device_is_not_waited_for() -> None:
    """A queue that does its work in `wait` frees the host at once; the rate counts all of the work."""
    clock = [0.0]
    queued: list[float] = []

    def wait() -> None:
        clock[0] += sum(queued)
        queued.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock[0])
        rate, free = gpu_check.timed(lambda: queued.append(0.5), wait, 4, least=5.0)
    assert rate == pytest.approx(8.0)
    assert free == 0
