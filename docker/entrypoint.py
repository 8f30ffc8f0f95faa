"""The container's first process: says on stderr whether TensorFlow sees a GPU, then becomes the given command."""

import os
import sys

from console import quiet_tensorflow


def gpu_line() -> str:
    """One line on the devices that TensorFlow will use."""
    quiet_tensorflow()
    import tensorflow as tf

    import devices

    problem = devices.explain_gpu()
    gpus = tf.config.list_physical_devices("GPU")
    if problem:
        return (
            f"TensorFlow {tf.__version__} {'sees a GPU that will not work:' if gpus else 'runs on the CPU:'} {problem}"
        )
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
