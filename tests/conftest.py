"""What the tests share: a quiet TensorFlow, the real images, the scripts run as a user runs them, and their files read.

Test modules import the functions as `from tests.conftest import call`.
"""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from console import exit_status, set_tensorflow_defaults

# Before any test module imports TensorFlow or matplotlib: a run in this process has the bits of a script's run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
set_tensorflow_defaults()
os.environ["MPLBACKEND"] = "Agg"

ROOT = Path(__file__).resolve().parent.parent

RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure(config: pytest.Config) -> None:
    """Makes a warning that one of the project's own modules causes an error, and Ctrl-C work under nohup and `&`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    for module in ROOT.glob("*.py"):
        config.addinivalue_line("filterwarnings", rf"error:::{module.stem}$")
    for package in ("dataset", "exporting", "networks", "reports", "tools", "training", "weights"):
        config.addinivalue_line("filterwarnings", rf"error:::{package}\..*")


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """Gives TensorFlow the threads that the scripts give it: a run in this process has the bits of a script's run."""
    import devices

    devices.use_threads(devices.default_threads())


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the project, `../shared/data`, or wherever VGG_SHARED_DATA points."""
    named = os.environ.get("VGG_SHARED_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"VGG_SHARED_DATA={named} is not a folder")
        pytest.skip(f"no real data sets at {folder} (VGG_SHARED_DATA names another place)")
    return folder


@pytest.fixture(scope="session")
def sample_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of real photographs, 12 classes of 3 training and 2 validation pictures; not to be changed."""
    from tools.sample_data import make_sample

    folder = tmp_path_factory.mktemp("sample") / "images"
    make_sample(folder, train=3, val=2)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the small network's convolutions to start from, as an npz."""
    from model import Network
    from tests.tiny_networks import filled

    path = tmp_path_factory.mktemp("weights") / "small.npz"
    network = filled(Network("small", "gap", 2, 32))
    np.savez(path, **{name: v.numpy() for name, v in network.variables_by_name.items() if "conv" in name})
    return path


@pytest.fixture
def run_script() -> RunScript:
    """Runs one of the project's scripts in a process of its own: `run_script("train.py", data, "--run", run, cwd=…)`.

    `cwd` must be given, so that no test leaves a run in the project's folder.
    """
    # Without it the scripts quieten TensorFlow themselves, as they do for a user.
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}

    def run(script: str, *args: object, cwd: Path, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


TINY = [
    *("--network", "small", "--pretrained", "none", "--image-size", "32"),
    *("--batch-size", "8", "--precision", "float32"),
]


def call(module: ModuleType, *arguments: object) -> int:
    """Runs a script's `main` in this process, as its last line does, and returns the exit status."""
    old, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, arguments)]
    try:
        return exit_status(module.main)
    finally:
        sys.argv = old


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV by its header."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def event_values(folder: Path) -> Iterator[tuple[str, str, int, np.ndarray]]:
    """(plugin, tag, step, value) of the event files in a folder."""
    import tensorflow as tf

    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                yield value.metadata.plugin_data.plugin_name, value.tag, event.step, tf.make_ndarray(value.tensor)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: (step, value) pairs} of the event files in a folder."""
    found: dict[str, list[tuple[int, float]]] = {}
    for plugin, tag, step, value in event_values(folder):
        if plugin == "scalars":
            found.setdefault(tag, []).append((step, float(value)))
    return found
