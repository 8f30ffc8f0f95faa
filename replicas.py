"""The devices that compute every step together: several of one machine, or of several hosts.

On one device nothing of `tf.distribute` is used.
"""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from console import UserError, one_line


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

    def wait(self) -> None:
        """Until all workers come here."""
        self.largest(0)

    def leave(self) -> None:
        """Waits until all workers come here: one that ends earlier takes with it what others are still to receive."""
        with contextlib.suppress(tf.errors.OpError):  # the others have what they need, and may end first
            self.wait()

    @functools.cached_property
    def _gather(self) -> Any:
        def on_device(rows: tf.Tensor, first: Any) -> tf.Tensor:
            return tf.distribute.get_replica_context().all_gather(tf.identity(rows), axis=0)

        @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32)], autograph=False)
        def gather(rows: tf.Tensor) -> tf.Tensor:
            return self.run(on_device, rows)[0]

        return gather

    def check_equal(self, variables: Iterable[tf.Variable]) -> None:
        """Raises UserError where the variables of a worker are not those of the chief, bit for bit."""
        if self.workers == 1:
            return
        checksum = 0
        for variable in variables:
            checksum = zlib.crc32(variable.numpy().tobytes(), checksum)
        halves = self.gather(np.array([[checksum >> 16, checksum & 0xFFFF]], np.float32))
        if len(others := np.flatnonzero((halves != halves[0]).any(axis=1))):
            raise UserError(
                f"the variables of worker {others[0]} are not those of worker 0: give all workers the same code, "
                "TensorFlow, kind of device and files, and the run's folder on a file system that they share"
            )

    @contextlib.contextmanager
    def losses_explained(self) -> Iterator[None]:
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


def find_replicas(count: int) -> Replicas:
    """The devices to train on: of this machine `count` (0: every GPU), and those of the other workers of TF_CONFIG.

    To be called before TensorFlow computes anything. Without a GPU a machine is one device; a `count` divides its CPU
    into so many, which is for tests. Raises UserError for a TF_CONFIG that can't be used; waits for the other workers.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and count > len(gpus):
        raise UserError(f"--devices {count}: TensorFlow sees {len(gpus)} GPU")
    if gpus and count:
        tf.config.set_visible_devices(gpus[:count], "GPU")
    cluster = read_cluster()
    if cluster and count and not gpus:
        raise UserError(f"--devices {count}: divides a CPU on one machine only, not with the workers of TF_CONFIG")
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


def read_cluster() -> tuple[list[str], int] | None:
    """The addresses of the workers and which of them this process is; None where TF_CONFIG names no other worker."""
    text = os.environ.get("TF_CONFIG", "")
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
    text = os.environ.get("CLUSTER_TIMEOUT") or "300"
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
        joined.wait()
    except (tf.errors.OpError, RuntimeError) as error:
        raise UserError(
            f"TF_CONFIG: worker {place}, {hosts[place]}, can't join, perhaps since another program has its port: "
            f"{one_line(error)[:200]}"
        ) from None
    finally:
        timer.kill()
        timer.wait()
        signal.signal(signal.SIGINT, on_interrupt)
    return joined
