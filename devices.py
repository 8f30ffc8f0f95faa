"""What the hardware offers: precision, threads, GPUs or why there is none, and the devices that compute together."""

import contextlib
import ctypes
import functools
import glob
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from console import UserError, cores, one_line
from files import warn_once

LEAST_THREADS = 8

# What TensorFlow opens before it takes a GPU, by the names that they have for CUDA 12.
CUDA_LIBRARIES = (
    *("libcudart.so.12", "libcublas.so.12", "libcublasLt.so.12", "libcufft.so.11"),
    *("libcusolver.so.11", "libcusparse.so.12", "libcudnn.so.9"),
)
LEAST_DRIVER = "525.60"  # for CUDA 12: NVIDIA, "CUDA Compatibility", minor version compatibility
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")  # seen in a container, too
DEVICE_FILES = "/dev/nvidia[0-9]*"
CONTAINER = "a container needs --gpus all, and the NVIDIA Container Toolkit on the host"
CUDA_ERRORS = {  # of cuInit, by the numbers in cuda.h
    34: "libcuda.so.1 is the stub that programs are linked with: take its folder out of LD_LIBRARY_PATH",
    802: "the GPUs are not ready: start nvidia-fabricmanager on the host",
    803: "the NVIDIA driver was updated while an older one is running: restart the host",
    804: "the driver of the package cuda-compat does not work with this GPU: remove that package",
}


def compute_dtype(precision: str) -> tf.DType:
    """float32 or bfloat16; `auto` is bfloat16 where the hardware multiplies in it, else float32."""
    if precision != "auto":
        return tf.dtypes.as_dtype(precision)
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return tf.bfloat16 if capability >= (8, 0) else tf.float32
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split())
    except OSError:
        flags = set()
    return tf.bfloat16 if flags & {"avx512_bf16", "amx_bf16"} else tf.float32


def use_xla(setting: str, deterministic: bool) -> bool:
    """Whether XLA compiles the training step: `on`, `off`, or `auto`.

    `auto` is on where there is a GPU; a CPU is slower with it (docs/benchmarks.md), and it isn't `deterministic`: it
    chooses among algorithms by timing them. Dropout's masks are other ones with it: XLA orders its numbers otherwise.
    """
    return setting == "on" or (setting == "auto" and not deterministic and bool(tf.config.list_physical_devices("GPU")))


def gpu_problem() -> str | None:
    """What is wrong with a GPU that TensorFlow sees, in one line for the user; None where nothing is.

    TensorFlow 2.21 holds no machine code for compute capability 12.0 (RTX 50), and what it compiles instead fails
    there with CUDA_ERROR_INVALID_PTX, in the middle of the first step (tensorflow/tensorflow issue 101746).
    """
    built_for = tf.sysconfig.get_build_info().get("cuda_compute_capabilities", ())
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        major, minor = details.get("compute_capability", (0, 0))
        if major >= 12 and not {f"sm_{major}{minor}", f"compute_{major}{minor}"} & set(built_for):
            return (
                f"{details.get('device_name', 'the GPU')} has compute capability {major}.{minor}, "
                f"where TensorFlow {tf.__version__} is known to fail: use another GPU, or the CPU "
                "(CUDA_VISIBLE_DEVICES=-1)"
            )
    return None


def default_threads() -> int:
    """Threads that a new run divides an operation among.

    The number of threads decides how a sum is divided and so how it is rounded. At least `LEAST_THREADS`, so that
    machines of up to so many cores give the same bits; more threads than cores cost little (docs/reliability.md).
    """
    return max(LEAST_THREADS, cores())


def use_threads(count: int) -> None:
    """Divides every CPU operation among `count` threads (0: one a core); before TensorFlow computes anything."""
    count = count or cores()
    try:
        tf.config.threading.set_intra_op_parallelism_threads(count)
    except RuntimeError:
        used = tf.config.threading.get_intra_op_parallelism_threads() or cores()
        warn_once(
            f"TensorFlow already uses {used} threads, not the {count} of this run: results can differ in rounding"
        )


def grow_gpu_memory() -> None:
    """Takes the memory of each GPU as it is needed and not all at once; before TensorFlow computes anything.

    People's desktops use the same GPU. TF_FORCE_GPU_ALLOW_GROWTH=false in the environment takes all at once.
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            warn_once("TensorFlow has already taken the memory of the GPUs")


def explain_gpu() -> str | None:
    """Why TensorFlow has no GPU that works, with the remedy, in one line; None where it has one."""
    if gpus := tf.config.list_physical_devices("GPU"):
        return _cudnn_problem() or _capability_problem(gpus) or gpu_problem()
    if not tf.test.is_built_with_cuda():
        return f"this TensorFlow ({tf.__version__}) was built without CUDA"
    return _driver_problem() or _library_problem()


def _driver_problem() -> str | None:
    running = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", _text(KERNEL_DRIVER))
    driver = f"NVIDIA driver {running[1]}" if running else "NVIDIA driver"
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        if "No such file" not in str(error):
            return f"the {driver} can't be loaded: {one_line(error)}"
        if running or glob.glob(DEVICE_FILES):
            return (
                f"the host has an {driver}, but its libcuda.so.1 is missing here: {CONTAINER}, "
                "with NVIDIA_DRIVER_CAPABILITIES=compute,utility; elsewhere install the driver's CUDA library"
            )
        return f"no NVIDIA driver (libcuda.so.1): install it on the host; {CONTAINER}"
    supported = ctypes.c_int()  # 12040: CUDA 12.4
    needed = int(tf.sysconfig.get_build_info()["cuda_version"].split(".")[0])
    if library.cuDriverGetVersion(ctypes.byref(supported)) == 0 and supported.value < needed * 1000:
        cuda = f"{supported.value // 1000}.{supported.value % 1000 // 10}"
        return f"the {driver} is too old (CUDA {cuda}, not {needed}): install {LEAST_DRIVER} or newer on the host"
    status = library.cuInit(0)
    if status == 0:
        return None
    if status in CUDA_ERRORS:
        return CUDA_ERRORS[status]
    if not glob.glob(DEVICE_FILES):
        return f"the {driver} has no GPU here ({DEVICE_FILES} is missing): {CONTAINER}"
    if status == 100 and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={one_line(visible)} hides every GPU"
    return f"the {driver} answers with CUDA error {status}: does nvidia-smi work on the host, and in here?"


def _library_problem() -> str:
    """Of a TensorFlow that has a driver and no GPU."""
    missing = []
    for name in CUDA_LIBRARIES:
        try:
            ctypes.CDLL(name)  # what TensorFlow found in its own folders is loaded, and so found by its name
        except OSError:
            missing.append(name)
    if missing:
        remedy = f"pip install 'tensorflow[and-cuda]=={tf.__version__}'"
        return f"TensorFlow can't load {', '.join(missing)}: {remedy}"
    return "the driver works, but TensorFlow takes no GPU: TF_CPP_MIN_LOG_LEVEL=0 in the environment shows why"


def _cudnn_problem() -> str | None:
    """cuDNN must have the major version that TensorFlow was built with, and at least its minor one."""
    with contextlib.suppress(OSError, metadata.PackageNotFoundError):
        requirements = " ".join(metadata.requires("tensorflow") or ())  # the only place that has the minor version
        built = re.search(r"nvidia-cudnn-cu\d+[^;]*>=(\d+)\.(\d+)", requirements)
        library = ctypes.CDLL(CUDA_LIBRARIES[-1])
        library.cudnnGetVersion.restype = ctypes.c_size_t
        number = library.cudnnGetVersion()  # 90300: cuDNN 9.3.0
        found = (number // 10000, number % 10000 // 100)
        if built and found < (needed := (int(built[1]), int(built[2]))):
            return (
                "cuDNN {}.{} is loaded, and this TensorFlow needs {}.{} or newer: ".format(*found, *needed)
                + f"pip install 'tensorflow[and-cuda]=={tf.__version__}', and no other cuDNN in LD_LIBRARY_PATH"
            )
    return None


def _capability_problem(gpus: list[tf.config.PhysicalDevice]) -> str | None:
    """sm_80 is code for compute capability 8.0 to 8.9; compute_90 is also PTX, compiled for all that come later."""
    names = tf.sysconfig.get_build_info().get("cuda_compute_capabilities", ())
    built = [(m[1], divmod(int(m[2]), 10)) for name in names if (m := re.fullmatch(r"(sm|compute)_(\d+)", name))]
    problem = None
    for gpu in gpus:
        details = tf.config.experimental.get_device_details(gpu)
        have = details.get("compute_capability")
        if not have or not built:
            return None
        if any(code <= have and (kind == "compute" or code[0] == have[0]) for kind, code in built):
            return None
        has_code = ", ".join("{}.{}".format(*code) for _, code in built)
        problem = (
            f"{details.get('device_name', 'the GPU')} has compute capability {have[0]}.{have[1]}, "
            f"and TensorFlow {tf.__version__} has code for {has_code}: use another GPU"
        )
    return problem


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


# -- several devices, several hosts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Part number `part` of `parts`: neighbouring rows, as many as in every other part or one more."""

    part: int = 0
    parts: int = 1

    def bounds(self, rows: Any) -> tuple[Any, Any]:
        """The first row of this part of `rows` rows, and the one after its last; of an int, or of an int32 tensor."""
        sizes = [(rows + self.parts - 1 - part) // self.parts for part in range(self.part + 1)]
        return sum(sizes[:-1]), sum(sizes)


ALL = Share()


@dataclass(frozen=True)
class Replicas:
    """The devices that compute every step together: those of this process, and those of the other workers.

    Each holds all variables. What is called a batch is divided twice: among the workers, each of which loads its share
    alone, and that among the worker's devices.

    strategy: TensorFlow's, None on one device. share: which worker this is, of how many.
    """

    strategy: tf.distribute.Strategy | None = None
    share: Share = ALL

    @property
    def workers(self) -> int:
        return self.share.parts

    @property
    def is_chief(self) -> bool:
        """Whether this worker is the one that writes the run."""
        return self.share.part == 0

    @property
    def count(self) -> int:
        """Devices of all workers."""
        return self.strategy.num_replicas_in_sync if self.strategy else 1

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Variables made in it exist on every device."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def run(self, function: Callable[..., Any], x: tf.Tensor, *others: tf.Tensor) -> list[Any]:
        """Calls `function(rows, first, *others)` on each device of this process, and returns their results.

        `rows` are the device's share of x, cut where x lies, and `first` is the place of the first of them.
        """
        if self.strategy is None:
            return [function(x, 0, *others)]
        parts = self.count // self.workers

        def on_device(x: tf.Tensor, *others: tf.Tensor) -> Any:
            number = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
            first, end = Share(number % parts, parts).bounds(tf.shape(x)[0])
            with tf.device("CPU:0"):
                rows = x[first:end]
            return function(rows, first, *others)

        return list(self.strategy.experimental_local_results(self.strategy.run(on_device, (x, *others))))

    def sum(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """Within `run`: each value summed over all devices of all workers, the same bits on each of them."""
        if self.strategy is None:
            return values
        return list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all workers, [n, k] float32 with any n, in the workers' order. Every worker has to call it."""
        if self.workers == 1:
            return rows
        return self._gather(rows).numpy()

    def of_chief(self, values: np.ndarray) -> np.ndarray:
        """The chief's values, float32 of any shape. Every worker has to call it."""
        row = values.reshape(1, -1)
        return self.gather(row if self.is_chief else row[:0]).reshape(values.shape)

    def largest(self, value: int) -> int:
        """The largest of the workers' values, below 2^24. Every worker has to call it."""
        return int(self.gather(np.array([[value]], np.float32)).max())

    def leave(self) -> None:
        """Waits until all workers come here: one that ends earlier takes with it what others are still to receive."""
        with contextlib.suppress(tf.errors.OpError):  # the others have what they need, and may end first
            self.largest(0)

    @functools.cached_property
    def _gather(self) -> Any:
        def on_device(rows: tf.Tensor, first: Any) -> tf.Tensor:
            return tf.distribute.get_replica_context().all_gather(tf.identity(rows), axis=0)

        @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32)], autograph=False)
        def gather(rows: tf.Tensor) -> tf.Tensor:
            return self.run(on_device, rows)[0]

        return gather

    def check_equal(self, value: int, what: str) -> None:
        """Raises UserError, naming the first worker whose 32-bit `value` is not the chief's."""
        halves = self.gather(np.array([[value >> 16, value & 0xFFFF]], np.float32))
        if len(others := np.flatnonzero((halves != halves[0]).any(axis=1))):
            raise UserError(
                f"worker {others[0]} has other {what} than worker 0: give all workers the same files, the run's folder "
                "on a file system that they share"
            )

    @contextlib.contextmanager
    def readable_failures(self) -> Iterator[None]:
        """Turns TensorFlow's error where another worker has gone into a UserError."""
        try:
            yield
        except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError):
            if self.workers == 1:
                raise
            raise UserError(
                "another worker has ended or can't be reached: see what it wrote, then start the same command on all "
                "workers: the run is resumed"
            ) from None


ONE_DEVICE = Replicas()


def replicas(count: int) -> Replicas:
    """The devices to train on: of this machine `count` (0: every GPU), and those of the other workers of TF_CONFIG.

    To be called before TensorFlow computes anything. Without a GPU a machine is one device; a `count` divides its CPU
    into so many, which is for tests. Raises UserError for a TF_CONFIG that can't be used; waits for the other workers.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and count > len(gpus):
        raise UserError(f"--devices {count}: TensorFlow sees {len(gpus)} GPU")
    if gpus and count:
        tf.config.set_visible_devices(gpus[:count], "GPU")
    cluster = _read_cluster(os.environ.get("TF_CONFIG", ""))
    if cluster:
        return _join(*cluster)
    os.environ.pop("TF_CONFIG", None)  # TensorFlow fails where it is empty
    kind, count = ("GPU", count or len(gpus)) if gpus else ("CPU", count or 1)
    if count == 1:
        return ONE_DEVICE
    if not gpus:
        one = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [one] * count)
    return Replicas(tf.distribute.MirroredStrategy([f"{kind}:{number}" for number in range(count)]))


def _read_cluster(text: str) -> tuple[list[str], int] | None:
    """The addresses of the workers and which of them this process is; None where TF_CONFIG names no other worker."""
    if not text.strip():
        return None
    try:
        config = json.loads(text)
        jobs, task = config["cluster"], config["task"]
        addresses = [(job, number) for job in ("chief", "worker") for number in range(len(jobs.get(job, [])))]
        hosts = [jobs[job][number] for job, number in addresses]
        valid = set(jobs) <= {"chief", "worker"} and all(re.fullmatch(r"\S+:\d+", host) for host in hosts)
        place = addresses.index((task["type"], int(task["index"])))
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise UserError(
            f"TF_CONFIG {one_line(text[:200])!r}: not of the form "
            '{"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, "task": {"type": "worker", "index": 0}} with an index '
            "that the list has: correct it, or unset it to train on this machine alone"
        )
    return (hosts, place) if len(hosts) > 1 else None


_GIVE_UP = """
import os, signal, sys, time
seconds, parent, message = sys.argv[1:]
end = time.monotonic() + int(seconds)
while time.monotonic() < end and os.getppid() == int(parent):
    time.sleep(0.2)
if os.getppid() == int(parent):
    print(message, file=sys.stderr, flush=True)
    os.kill(int(parent), signal.SIGKILL)
"""


def _join(hosts: list[str], place: int) -> Replicas:
    """Waits for the other workers, at most CLUSTER_TIMEOUT seconds (an environment variable)."""
    text = os.environ.get("CLUSTER_TIMEOUT", "300")
    if not text.isdecimal():
        raise UserError(f"CLUSTER_TIMEOUT {one_line(text)!r}: not a number of seconds")

    message = (
        f"error: not all of the {len(hosts)} workers of TF_CONFIG came within {text} s ({', '.join(hosts)}): start "
        "train.py on each, see that they reach each other, or set CLUSTER_TIMEOUT to more seconds"
    )
    print(f"worker     {place} of {len(hosts)}; waiting for the others, at most {text} s", flush=True)
    # A process, since TensorFlow waits without letting any of Python's threads run.
    timer = subprocess.Popen([sys.executable, "-ISc", _GIVE_UP, text, str(os.getpid()), message])
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        joined = Replicas(tf.distribute.MultiWorkerMirroredStrategy(), Share(place, len(hosts)))
        joined.largest(0)
    except (tf.errors.OpError, RuntimeError) as error:
        raise UserError(f"TF_CONFIG: worker {place}, {hosts[place]}, can't join: {one_line(error)[:300]}") from None
    finally:
        timer.kill()
        timer.wait()
        signal.signal(signal.SIGINT, on_interrupt)
    return joined
