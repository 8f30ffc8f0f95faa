"""Kills one training run again and again, and compares it with the run that was never killed.

`python tests/kill_run.py --kills 30 --seed 0` makes a small data set, trains on it undisturbed, then trains on it once
more in a process that gets SIGKILL at random moments and is started anew each time, until it is done. Both runs must
have left the same: every tensor of the checkpoints, the metric log, the results, the event files' steps.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MARKER = "KILL_RUN_MARKER"  # environment variable: the file in which the process says what it is doing
BATCH_SIZE = 4
IMAGES = {"train": 34, "val": 13}  # neither is a multiple of the batch size
CACHED_IMAGES = {"train": 100, "val": 40}  # several of the cache's batches a view
EPOCHS_PER_LIFE = 4
SETTINGS = [
    *("--network", "small", "--pretrained", "none", "--image-size", "32", "--precision", "float32"),
    *("--batch-size", str(BATCH_SIZE), "--learning-rate", "1e-4", "--augment", "flip", "rotate", "color"),
]
VARIANTS = {
    "end to end": [],
    "cached": ["--train-from", "conv4", "--head-epochs", "{half}", "--cached-views", "2"],
}


def make_data(folder: Path, counts: dict[str, int]) -> Path:
    """Noise in three faint colours, which a network learns slowly enough for the best checkpoint to change often."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            pixels = rng.integers(0, 256, (40, 48, 3))
            pixels[..., number % 3] += 12
            file = folder / split / f"class{number % 3}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.minimum(pixels, 255).astype(np.uint8)).save(file)
    return folder


# -- the process that is killed --------------------------------------------------------------------------------------


def train_with_marks(arguments: list[str]) -> NoReturn:
    """train.py in this process, saying in a file what it is doing and lingering where a kill would do most harm.

    The project's functions are wrapped, not changed: each does what it does, after and before a short sleep.
    """
    sys.path.insert(0, str(ROOT))
    import train  # first: it starts TensorFlow quietly

    # isort: split
    import tensorflow as tf

    import run
    from console import run_script
    from training import features, loop, session

    marker = os.open(os.environ[MARKER], os.O_WRONLY | os.O_CREAT)
    places = ["start"]

    def mark() -> None:
        os.pwrite(marker, f"{places[-1]:<12}".encode(), 0)

    @contextmanager
    def during(place: str) -> Iterator[None]:
        places.append(place)
        mark()
        try:
            yield
        finally:
            places.pop()
            mark()

    def wrap(owner: Any, name: str, place: str | None = None, sleep: float = 0.0) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **keywords: Any) -> Any:
            with during(place or places[-1]):
                time.sleep(sleep * random.random())
                result = original(*args, **keywords)
                time.sleep(sleep * random.random())
            return result

        setattr(owner, name, wrapped)

    def then_mark(owner: Any, name: str, place: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **keywords: Any) -> Any:
            result = original(*args, **keywords)
            places[-1] = place
            mark()
            return result

        setattr(owner, name, wrapped)

    def slowly(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            time.sleep(0.01)
            yield batch

    mark()
    then_mark(vars(session)["Log"], "__init__", "training")
    then_mark(run.Run, "load_best", "results")
    wrap(run.Run, "save", "checkpoint")
    wrap(tf.raw_ops, "SaveV2", sleep=0.02)
    wrap(run, "write_text", sleep=0.01)
    predict = vars(loop)["predict"]
    setattr(loop, "predict", lambda forward, batches: predict(forward, slowly(batches)))  # noqa: B010
    wrap(loop.Loop, "_validate", "validation")
    wrap(features, "fill", "caching")
    wrap(vars(features)["_Rows"], "append", sleep=0.05)
    sys.argv = ["train.py", *arguments]
    run_script(train.main)


# -- killing ---------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What happened, and what differs in the end."""

    kills: Counter[str] = field(default_factory=Counter)  # by what the process was doing
    signals: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0
    undisturbed_seconds: float = 0.0

    def __str__(self) -> str:
        places = ", ".join(f"{count} {place}" for place, count in self.kills.most_common())
        signals = ", ".join(f"{count} {name}" for name, count in self.signals.most_common()) or "none"
        return (
            f"{self.kills.total()} kills ({places}); other signals: {signals}; {self.seconds:.0f} s, undisturbed "
            f"{self.undisturbed_seconds:.0f} s; lost: {len(self.differences)}"
            + "".join(f"\n  {difference}" for difference in self.differences)
        )


class Victim:
    """A training process that is watched from outside."""

    def __init__(self, command: list[str], folder: Path, run: Path):
        self._run, self._marker = run, folder / "marker"
        self._marker.write_bytes(b"")
        environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
        with open(folder / "output.txt", "ab") as output:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=output, env={**environment, MARKER: str(self._marker)}
            )

    def place(self) -> str:
        return self._marker.read_bytes().decode().strip() or "start"

    def step(self) -> int:
        """The last step that the log names."""
        try:
            with open(self._run / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
                lines = file.read().split(b"\n")[:-1]
            return json.loads(lines[-1])["step"] if lines else 0
        except (FileNotFoundError, ValueError):
            return 0

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """False where the process ends first."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.001)
        return True


def disturb(victim: Victim, mode: str, target: int, startup: float, rng: random.Random) -> bool:
    """Waits for a random moment of the wanted kind; False where the process ends before it comes."""
    if mode == "start":
        time.sleep(startup * rng.random())
        return victim.process.poll() is None
    if mode in ("caching", "results"):
        found = victim.wait_for(lambda: victim.place() == mode)
        time.sleep(rng.random() * (0.2 if mode == "caching" else 1.0))
        return found and victim.process.poll() is None
    busy = ("training", "checkpoint", "validation")
    if not victim.wait_for(lambda: victim.place() in busy and victim.step() >= target):
        return False
    if mode == "anywhere":
        time.sleep(rng.random() * 0.5)
    elif victim.wait_for(lambda: victim.place() == mode):
        time.sleep(rng.random() * 0.04)
    return victim.process.poll() is None


def modes(kills: int, cached: bool, rng: random.Random) -> list[str]:
    """How each of the `kills` is aimed: at certain work, or at any moment; and where the other signals come between."""
    kinds = ["checkpoint", "training", "validation", "start", "anywhere"]
    chosen = [*kinds, *rng.choices(kinds, weights=[3, 4, 2, 1, 3], k=kills)][: kills - (kills >= 10)]
    rng.shuffle(chosen)
    if cached:
        caching = max(1, kills // 6)
        chosen[:caching] = ["caching"] * caching
    if kills >= 10:
        chosen.append("results")
        for place in range(5, kills, 6):
            chosen.insert(place, rng.choice(["SIGTERM", "SIGINT", "SIGTERM twice", "SIGINT twice"]))
    return chosen


def send(victim: Victim, mode: str, report: Report, rng: random.Random) -> None:
    """Ends the process in the way that `mode` says, and notes it."""
    name = mode.split()[0] if mode.startswith("SIG") else "SIGKILL"
    victim.process.send_signal(signal.Signals[name])
    if mode.endswith("twice"):
        time.sleep(0.01 + rng.random() * 0.02)
        victim.process.send_signal(signal.Signals[name])
    status = victim.process.wait(timeout=60)
    if name == "SIGKILL":
        report.kills[victim.place()] += 1
        return
    report.signals[mode] += 1
    if status != 128 + signal.Signals[name]:
        report.differences.append(f"{mode}: exit status {status}")


def run(kills: int, seed: int, folder: Path, variant: str = "end to end") -> Report:
    """Trains twice in `folder`, once undisturbed and once killed `kills` times, and compares."""
    rng, report, cached = random.Random(seed), Report(), variant == "cached"
    plan = modes(kills, cached, rng)
    epochs = EPOCHS_PER_LIFE * (len(plan) + 1) // (3 if cached else 1)
    counts = CACHED_IMAGES if cached else IMAGES
    data = make_data(folder / "data", counts)
    flags = [*SETTINGS, *(flag.format(half=epochs // 2) for flag in VARIANTS[variant]), "--epochs", str(epochs)]

    def command(script: list[str], name: str) -> list[str]:
        caching = ["--cache-dir", f"features-{name}"] if cached else []
        return [sys.executable, *script, str(data), "--run", str(folder / name), *flags, *caching]

    begin = time.monotonic()
    subprocess.run(command([str(ROOT / "train.py")], "undisturbed"), cwd=folder, check=True, capture_output=True)
    report.undisturbed_seconds = time.monotonic() - begin
    steps = epochs * -(-counts["train"] // BATCH_SIZE)
    marked = command([str(Path(__file__).resolve()), "--train"], "killed")
    begin, startup = time.monotonic(), 8.0
    for number, mode in enumerate(plan):
        victim = Victim(marked, folder, folder / "killed")
        started = time.monotonic()
        target = int(steps * (number + rng.random()) / (len(plan) + 1))
        aimed = "anywhere" if mode.startswith("SIG") else mode
        if not disturb(victim, aimed, target, startup, rng):
            report.differences.append(f"it ended with {victim.process.wait()} before being killed ({mode}, {number})")
            if victim.process.returncode:
                break
            continue
        if mode not in ("start", "caching"):
            startup = min(startup, time.monotonic() - started)
        send(victim, mode, report, rng)
    last = subprocess.run(marked, cwd=folder, capture_output=True, text=True, check=False,
                          env={**os.environ, MARKER: str(folder / "marker")})  # fmt: skip
    report.seconds = time.monotonic() - begin
    if last.returncode:
        report.differences.append(f"the last start ended with {last.returncode}: {last.stderr[-2000:]}")
    else:
        report.differences += compare(folder / "undisturbed", folder / "killed")
        if cached:
            report.differences += compare_caches(folder / "features-undisturbed", folder / "features-killed")
    return report


# -- comparing -------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of the newest checkpoint of `latest` or `best`."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(folder)))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def read_events(folder: Path) -> list[tuple[int, str]]:
    """(step, tag) of the scalars in every event file of a folder, sorted."""
    import tensorflow as tf
    from tensorflow.core.util import event_pb2

    files = [str(file) for file in folder.glob("events.out.tfevents.*")]
    events = (event_pb2.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(files))
    return sorted((event.step, value.tag) for event in events for value in event.summary.value)


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two run directories, beside what tells the time."""
    differences = []
    for kind in ("latest", "best"):
        first, second = read_tensors(one / kind), read_tensors(other / kind)
        differences += [f"{kind}: names {sorted(set(first) ^ set(second))}"] if set(first) != set(second) else []
        for name in set(first) & set(second):
            a, b = np.asarray(first[name]), np.asarray(second[name])
            if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
                differences.append(f"{kind}: tensor {name}")
    for name in ("metrics.jsonl", "results-val.json", "predictions-val.csv", "confusion-val.csv", "classes.txt",
                 "images.csv"):  # fmt: skip
        if (one / name).read_bytes() != (other / name).read_bytes():
            differences.append(name)
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for split in ("train", "val"):
        events = read_events(other / split)
        tags = ("loss", "accuracy", "learning_rate")
        of_split = [line for line in lines if line["split"] == split]
        expected = sorted((line["step"], tag) for line in of_split for tag in tags if tag in line)
        if [event for event in events if event[1] in tags] != expected or read_events(one / split) != events:
            differences.append(f"event files of {split}/")
    timing = (other / "timing.jsonl").read_text(encoding="utf-8").splitlines()
    if [json.loads(line)["step"] for line in timing] != [line["step"] for line in lines]:
        differences.append("timing.jsonl: steps")
    files = [{file.name for file in folder.iterdir()} for folder in (one, other)]
    differences += [f"only one has {name}" for name in files[0] ^ files[1] if not name.startswith("events.out")]
    left = {file.name for file in other.rglob("*") if "tempstate" in file.name or file.name.startswith(".tmp-")}
    return differences + [f"left behind: {name}" for name in sorted(left)]


def compare_caches(one: Path, other: Path) -> list[str]:
    """Files of cached activations that differ or are there once only."""
    contents = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*") if file.suffix != ".json"}
        for folder in (one, other)
    ]
    return [f"cache: {name}" for name in contents[0] | contents[1] if contents[0].get(name) != contents[1].get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=[*VARIANTS, "all"], default="all")
    parser.add_argument("--folder", type=Path, help="where to train; what is left there is kept")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from console import quiet_tensorflow

    quiet_tensorflow()
    lost = 0
    for variant in VARIANTS if arguments.variant == "all" else [arguments.variant]:
        folder = Path(tempfile.mkdtemp(prefix="kill-run-", dir=arguments.folder))
        report = run(arguments.kills, arguments.seed, folder, variant)
        print(f"{variant}: {report}", flush=True)
        lost += len(report.differences)
        if report.differences or arguments.folder:
            print(f"  kept in {folder}")
        else:
            shutil.rmtree(folder)
    return int(lost > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_with_marks(sys.argv[2:])
    sys.exit(main())
