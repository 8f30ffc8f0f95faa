"""What the hardware offers: precision, threads, and GPUs or the reason that there is none."""

import contextlib
import ctypes
import glob
import os
import re
from importlib import metadata
from pathlib import Path

import tensorflow as tf

from console import cores, cpu_flags, has_avx2_alone, one_line
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
    return tf.bfloat16 if cpu_flags() & {"avx512_bf16", "amx_bf16"} else tf.float32


def slow_filter_gradients() -> bool:
    """Whether oneDNN computes the gradients of filters half as fast as convolutions: on a CPU with AVX2 alone."""
    uses_onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "1"
    return uses_onednn and has_avx2_alone() and not tf.config.list_physical_devices("GPU")


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
