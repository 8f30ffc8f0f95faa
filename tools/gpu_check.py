"""Checks and measures everything that needs a GPU, in at most six minutes: python -m tools.gpu_check.

It prints a table. Exit status 0: all that ran is right; 1: something is wrong; 2: TensorFlow sees no GPU. With --tiny
it runs on a CPU, with tiny sizes, to test itself.
"""

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from console import ArgumentParser, UserError, cores, quiet_tensorflow, run_script

quiet_tensorflow()

import numpy as np
import tensorflow as tf
from PIL import Image

import data
import devices
from dataset.layouts import Examples
from model import Network
from reports.tables import table
from run_config import Phase
from tools.benchmark import flops, matrix_product
from training.evaluation import readable_failures
from training.step import Optimisation, Trainer, compiled_forward, decay_over

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 101
RESERVE = 130.0  # seconds that the speeds leave for what comes after them
# How far a loss may be from the CPU's in float32: TF32 rounds to 10 bits, bfloat16 to 7.
TOLERANCE = {tf.float32: 0.01, tf.bfloat16: 0.05}

Row = tuple[str, str, str]  # what, "ok", "WRONG", "not run" or a number, and a remark


@dataclass
class Check:
    """What all parts share. rate: images/s of the fastest training step so far."""

    tiny: bool
    device: str
    folder: Path
    deadline: float
    rate: float = 0.0
    ceiling: float = 0.0

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


def verdict(right: bool) -> str:
    return "ok" if right else "WRONG"


def noise(batch_size: int, side: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise, brighter by class, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, batch_size)
    x = rng.normal(0, 60, (batch_size, side, side, 3)) + (labels[:, None, None, None] - CLASSES / 2)
    return x.astype(np.float32), labels


def new_trainer(network: Network, compile: str) -> Trainer:
    phase = Phase("all", network.stages[0], network.stages[0], 0, 0, 10**6)
    return Trainer(network, Optimisation(compile=compile), [phase], frozenset(), 0)


def step_of(trainer: Trainer) -> Callable[[tf.Tensor, tf.Tensor], None]:
    phase = trainer.phases[0]
    return trainer.train_step(phase, decay_over(phase, trainer.settings))


# -- what is right ---------------------------------------------------------------------------------------------------


def losses(device: str, dtype: tf.DType, compile: str, steps: int, side: int) -> np.ndarray:
    """The loss of each of the first steps of a small network; the last batch is shorter."""
    with tf.device(device):
        trainer = new_trainer(Network("small", "gap", CLASSES, side, compute_dtype=dtype), compile)
        step, seen = step_of(trainer), []
        for number in range(steps):
            x, labels = noise(32 if number < steps - 1 else 7, side, number % 4)
            step(tf.constant(x), tf.constant(labels))
            seen.append(trainer.take_sums()[0])
    return np.array(seen)


def check_losses(check: Check) -> Iterator[Row]:
    """Twenty steps, with and without XLA, in both precisions, against float32 on the CPU."""
    steps, side = (3, 32) if check.tiny else (20, 64)
    expected = losses("/CPU:0", tf.float32, "off", steps, side)
    for dtype, tolerance in TOLERANCE.items():
        for compile in ("off", "on"):
            actual = losses(check.device, dtype, compile, steps, side)
            difference = float(np.abs(actual / expected - 1).max())
            what = f"losses of {steps} steps, {dtype.name}{', XLA' if compile == 'on' else ''}"
            yield what, verdict(difference < tolerance), f"at most {difference:.1e} from the CPU's, of {tolerance}"


def check_program(check: Check) -> Iterator[Row]:
    """What XLA makes of the training step of a small network: the instructions that start one after another."""
    with tf.device(check.device):
        step = step_of(new_trainer(Network("small", "gap", CLASSES, 32), "on"))
        inspect = step.experimental_get_compiler_ir(*map(tf.constant, noise(8, 32)))  # type: ignore[attr-defined]
    before, after = (
        Counter(re.findall(r"(?m)^ +(?:ROOT )?\S+ = .*? ([a-z-]+)\(", text[text.index("\nENTRY") :]))
        for text in (inspect(stage="hlo"), inspect(stage="optimized_hlo"))
    )
    remark = f"instructions of the {before.total()} that were traced, {after['fusion']} of them fused"
    yield "step as XLA compiles it", str(after.total()), remark


def make_pictures(folder: Path, per_class: int, side: int) -> Examples:
    """JPEG files of three classes, `train` and `val`, as smooth as photographs; gives those of training."""
    rng = np.random.default_rng(0)
    paths, labels = [], []
    for split, count in (("train", per_class), ("val", max(2, per_class // 4))):
        for number, name in enumerate(("a", "b", "c")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                coarse = rng.integers(40 * number, 40 * number + 160, (side // 8, side // 8, 3), dtype=np.uint8)
                path = folder / split / name / f"{index}.jpg"
                Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
                if split == "train":
                    paths.append(str(path))
                    labels.append(number)
    return Examples(tuple(paths), np.array(labels))


def check_runs(check: Check) -> Iterator[Row]:
    """`--deterministic` runs are equal, and so is one that was killed and resumed."""
    make_pictures(check.folder / "small", 24, 96)
    epochs, side = (2, 32) if check.tiny else (6, 64)

    def start(name: str) -> "subprocess.Popen[str]":
        flags = f"--pretrained none --network small --head gap --image-size {side} --batch-size 8 --epochs {epochs}"
        command = ["train.py", str(check.folder / "small"), "--run", str(check.folder / name), *flags.split()]
        return subprocess.Popen(
            [sys.executable, *command, "--deterministic"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def ended(process: "subprocess.Popen[str]") -> bool:
        output, _ = process.communicate(timeout=max(10.0, check.left() + RESERVE))
        if process.returncode:
            print(output[-2000:], file=sys.stderr)
        return process.returncode == 0

    def lines(name: str) -> list[str]:
        try:
            return (check.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []

    if not (ended(start("one")) and ended(start("other"))):
        yield "--deterministic", "WRONG", "train.py failed"
        return
    yield "--deterministic", verdict(lines("one") == lines("other") != []), f"{len(lines('one'))} log lines of two runs"
    killed = start("killed")
    while killed.poll() is None and not any(json.loads(line)["split"] == "val" for line in lines("killed")[:-1]):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = len(lines("killed"))
    same = ended(start("killed")) and lines("killed") == lines("one")
    yield "killed and resumed", verdict(same), f"killed after {before} of {len(lines('one'))} log lines"


def check_memory(check: Check) -> Iterator[Row]:
    """A batch that does not fit ends in one line that names the remedy."""
    if check.tiny:
        yield "too large a batch", "not run", "needs a GPU"
        return
    side = 224
    try:
        with readable_failures(), tf.device(check.device):
            step = step_of(new_trainer(Network("vgg_19", "gap", CLASSES, side), "off"))
            step(tf.zeros([8192, side, side, 3]), tf.zeros([8192], tf.int64))
        yield "too large a batch", "WRONG", "8192 images fitted"
    except UserError as error:
        yield "too large a batch", verdict("--accumulate" in str(error)), str(error)[:90]


# -- how fast it is --------------------------------------------------------------------------------------------------


def timed(
    enqueue: Callable[[], object], wait: Callable[[], object], batch_size: int, least: float
) -> tuple[float, float]:
    """images/s, and the part of the time after which the host was free again."""
    for _ in range(2):
        enqueue()
    wait()
    begin = time.perf_counter()
    enqueue()
    wait()
    repeat = max(2, int(least / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    for _ in range(repeat):
        enqueue()
    free = time.perf_counter() - begin
    wait()
    seconds = time.perf_counter() - begin
    return repeat * batch_size / seconds, free / seconds


def check_ceiling(check: Check) -> Iterator[Row]:
    """What matrix products reach."""
    for dtype in TOLERANCE:
        with tf.device(check.device):
            product, operations = matrix_product(dtype, 256 if check.tiny else 8192)
            rate, _ = timed(product, lambda: None, 1, 0.05 if check.tiny else 1.0)
        if dtype == tf.bfloat16:
            check.ceiling = rate * operations
        yield f"matrix products, {dtype.name}", f"{rate * operations / 1e12:.3g}", "TFLOP/s"


def check_speed(check: Check) -> Iterator[Row]:
    """Training steps and forward passes of VGG19, the most wanted first, while there is time."""
    name, head, side, least = ("small", "gap", 32, 0.05) if check.tiny else ("vgg_19", "fc", 224, 1.5)
    batches = (2,) if check.tiny else (64, 256, 128, 32)
    for dtype in (tf.bfloat16,) if check.tiny else (tf.bfloat16, tf.float32):
        with tf.device(check.device):
            network = Network(name, head, CLASSES, side, compute_dtype=dtype)
        operations = flops(compiled_forward(network))
        for compile, batch_size in [(c, b) for b in batches for c in ("on", "off")] + [("forward", b) for b in batches]:
            what = {"on": "step, XLA", "off": "step", "forward": "forward"}[compile]
            what = f"{what}, {dtype.name}, batch {batch_size}"
            if check.left() < RESERVE and not check.tiny:
                yield what, "not run", "no time left"
                continue
            x, labels = noise(batch_size, side)
            try:
                with tf.device(check.device):
                    images, of_images = tf.constant(x), tf.constant(labels)
                    if compile == "forward":
                        predict, kept = compiled_forward(network), []
                        rate, free = timed(
                            lambda: kept.append(predict(images)),  # noqa: B023
                            lambda: kept.pop().numpy(),  # noqa: B023
                            batch_size,
                            least,
                        )
                    else:
                        trainer = new_trainer(network, compile)
                        step = step_of(trainer)
                        rate, free = timed(lambda: step(images, of_images), trainer.take_sums, batch_size, least)  # noqa: B023
            except tf.errors.ResourceExhaustedError:
                yield what, "not run", "not enough memory"
                continue
            times = 1 if compile == "forward" else 3
            if times == 3:
                check.rate = max(check.rate, rate)
            remark = f"images/s; the host was free after {free:.0%}"
            if check.ceiling:
                remark += f"; {times * operations * rate / check.ceiling:.0%} of what bfloat16 products reach"
            yield what, f"{rate:.0f}", remark


def check_pytorch(check: Check) -> Iterator[Row]:
    """PyTorch's VGG19, in a process of its own so that it has the GPU's memory."""
    if not find_spec("torch"):
        yield "PyTorch", "not run", "not installed"
        return
    side, batch_size, device = (32, 2, "cpu") if check.tiny else (224, 128, "cuda")
    for compiled in (False,) if check.tiny else (False, True):
        what = f"PyTorch VGG19{', compiled' if compiled else ''}, bfloat16, batch {batch_size}"
        call = f"print_pytorch_rate({batch_size}, {side}, {device!r}, {compiled})"
        try:
            done = subprocess.run(
                [sys.executable, "-c", f"from tools.benchmark_peers import print_pytorch_rate; {call}"],
                cwd=ROOT, capture_output=True, text=True, check=False, timeout=90,
            )  # fmt: skip
            train, forward = map(float, done.stdout.split()[-2:])
        except (subprocess.TimeoutExpired, ValueError):
            yield what, "not run", "it failed or took more than 90 s"
            continue
        yield what, f"{train:.0f}", f"images/s a step; forward {forward:.0f}"


def check_input(check: Check) -> Iterator[Row]:
    """Reading, cropping and resizing 512 px JPEGs, which must be faster than the step."""
    count, side, original = (4, 32, 64) if check.tiny else (200, 224, 512)
    examples = make_pictures(check.folder / "large", count, original)
    load = data.image_loader(examples, data.Preprocessing(side), 0)
    order = data.Order(len(examples), 4 if check.tiny else 64, 0)
    stream = iter(data.train_batches(load, examples.labels, order, 0, order.epoch_steps * 10**6))
    next(stream)
    begin, images = time.perf_counter(), 0
    while time.perf_counter() - begin < (0.2 if check.tiny else 6.0):
        images += len(next(stream)[0])
    rate = images / (time.perf_counter() - begin)
    remark = f"images/s with {cores()} cores"
    if check.rate:
        remark += f": {rate / check.rate:.2f} of the fastest step" + (", which waits" if rate < check.rate else "")
    yield "input pipeline", f"{rate:.0f}", remark


PARTS: dict[str, Callable[[Check], Iterator[Row]]] = {
    "losses": check_losses,
    "program": check_program,
    "ceiling": check_ceiling,
    "pytorch": check_pytorch,
    "speed": check_speed,
    "input": check_input,
    "runs": check_runs,
    "memory": check_memory,
}


def main() -> int:
    parser = ArgumentParser(prog="tools.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also without a GPU: tests this command itself")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="default: all")
    arguments = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # it warns of many compiled functions, which are meant
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus and not arguments.tiny:
        raise UserError("TensorFlow sees no GPU: install tensorflow[and-cuda] and a driver, or test with --tiny")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)  # other processes of this check need some
        details = tf.config.experimental.get_device_details(gpu)
        print(f"{details.get('device_name', gpu.name)}, compute capability {details.get('compute_capability')}")
    print(f"TensorFlow {tf.__version__}, {cores()} cores, {len(gpus)} GPUs", flush=True)
    if problem := devices.gpu_problem():
        print(f"warning: {problem}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        check = Check(arguments.tiny, "/GPU:0" if gpus else "/CPU:0", Path(folder), time.monotonic() + 360)
        for name in arguments.parts:
            begin = time.monotonic()
            try:
                for row in PARTS[name](check):
                    rows.append(row)
                    print(*row, sep="  ", flush=True)  # as it comes, since what follows may crash
            except (tf.errors.OpError, subprocess.SubprocessError, RuntimeError) as error:
                rows.append((name, "WRONG", str(error).splitlines()[0][:90]))
            print(f"({name}: {time.monotonic() - begin:.0f} s)", flush=True)
    print("\n" + table(rows, ["what", "result", ""]))
    return int(any(result == "WRONG" for _, result, _ in rows))


if __name__ == "__main__":
    run_script(main)
