"""What the hardware offers: precision and threads."""

from pathlib import Path

import tensorflow as tf

from console import cores
from files import warn_once

LEAST_THREADS = 8


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
