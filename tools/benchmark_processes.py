"""Whole Python processes as candidates of tools.benchmark: the scripts, and a plain Keras script doing the same."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from console import UserError
from model import Network
from reports.tables import table
from run import Run
from tools.timing import Candidate, Round

ROOT = Path(__file__).resolve().parent.parent


def process(*command: str, images: int = 1) -> Candidate:
    """A Python process from its start to its end, in which that many images are predicted."""

    def work() -> int:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"python {' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
        return images

    return work


def predictions(run: Run, folder: Path, photographs: Path, count: int) -> dict[str, Candidate]:
    """inference.py and tools/keras_predict.py on an image or a folder of `count`; the Keras model is saved in `folder`.

    Whoever runs them again and again has the files in memory: that is how both are measured.
    """
    config = run.config()
    model, saved = keras_model(run.load_model(), config.precision), folder / "model.keras"
    model.save(saved)
    path = str(photographs)
    return {
        "inference.py": process(
            "inference.py", path, "--run", str(run.path.resolve()), "--format", "json", images=count
        ),
        "plain Keras": process("tools/keras_predict.py", str(saved), path, images=count),
    }


def keras_model(network: Network, precision: str) -> Any:
    """A Keras model of the same layers with random weights; in place of the roots of the `gap` head a plain softmax."""
    import keras

    if network.network not in ("vgg_19", "vgg_16", "small"):
        raise UserError(f"the run's network is {network.network}: give a run of vgg_19, vgg_16 or small")
    of = keras.layers
    keras.mixed_precision.set_global_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    layers = [of.Input((network.image_size, network.image_size, 3))]
    for stage in network.stages:
        names = [n for n in network.variables_by_name if network.stage_of(n) == stage and n.endswith("/weights")]
        widths = [int(network.variables_by_name[name].shape[-1]) for name in names]
        if stage not in network.head_stages:
            layers += [of.Conv2D(width, 3, padding="same", activation="relu") for width in widths]
            layers.append(of.MaxPooling2D())
            continue
        if stage == network.head_stages[0]:
            layers.append(of.GlobalAveragePooling2D() if network.head == "gap" else of.Flatten())
        last = {"activation": "softmax", "dtype": "float32"}
        layers += [of.Dense(widths[0], **(last if stage == network.stages[-1] else {"activation": "relu"}))]
    keras.mixed_precision.set_global_policy("float32")
    return keras.Sequential(layers)


def seconds(measured: Mapping[str, Sequence[Round]]) -> str:
    """A table of the seconds of processes: of the clock, and of all cores together."""
    rows = []
    for name, rounds in measured.items():
        wall, cpu = [r.wall for r in rounds], [r.cpu for r in rounds]
        spread = f"{min(wall):.2f} to {max(wall):.2f}"
        rows.append([name, f"{np.median(wall):.2f}", spread, f"{np.median(cpu):.2f}"])
    return table(rows, ["process", "seconds (median)", "fastest to slowest", "CPU seconds"])


def imports(module: str, count: int = 12) -> list[tuple[str, float]]:
    """The packages that take longest to import for `module`: (name, seconds of its own files), longest first."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = {}
    for line in done.stderr.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and fields[0].strip().isdigit():
            package = fields[2].strip().partition(".")[0]
            found[package] = found.get(package, 0.0) + int(fields[0]) / 1e6
    return sorted(found.items(), key=lambda item: -item[1])[:count]
