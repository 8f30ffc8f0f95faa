"""The container's first process: says on stderr whether TensorFlow sees a GPU, then becomes the given command."""

import ctypes
import os
import sys

from console import quiet_tensorflow


def why_no_gpu(built_with_cuda: bool) -> str:
    """The reason that TensorFlow sees no GPU, with its remedy."""
    if not built_with_cuda:
        return "this TensorFlow was built without CUDA"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (
            "no NVIDIA driver in this container: start it with docker run --gpus all, "
            "on a host with the NVIDIA driver and the NVIDIA Container Toolkit"
        )
    status = driver.cuInit(0)
    if status != 0:
        return f"the NVIDIA driver answers with CUDA error {status}: does nvidia-smi work on the host, and in here?"
    return "the driver works but TensorFlow could not load a CUDA library: -e TF_CPP_MIN_LOG_LEVEL=0 shows which"


def gpu_line() -> str:
    """One line on the devices that TensorFlow will use."""
    quiet_tensorflow()
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return f"TensorFlow {tf.__version__}: no GPU, running on the CPU ({why_no_gpu(tf.test.is_built_with_cuda())})"
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
    return f"TensorFlow {tf.__version__} sees {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}: {', '.join(names)}"


def main() -> None:
    """Prints the line and replaces this process with the command; `X.py ...` is short for `python X.py ...`."""
    environment = dict(os.environ)  # as it was before quiet_tensorflow
    # On stderr, so that `inference.py --format json` can be piped.
    print(gpu_line(), file=sys.stderr, flush=True)
    command = sys.argv[1:] or ["train.py", "--help"]
    if command[0].endswith(".py"):
        command = ["python", *command]
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        sys.exit(f"error: cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
