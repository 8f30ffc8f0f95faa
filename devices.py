"""What the hardware offers: precision and CPU cores."""

import os
from pathlib import Path

import tensorflow as tf


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


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
