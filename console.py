"""What every script shows a person: one-line errors and exit statuses, progress, signals, a quiet start."""

import argparse
import contextlib
import errno
import functools
import gc
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO, TypeVar

from tqdm import tqdm

ENDING_AT_ONCE = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)  # where they come a second time
STOPPING = (*ENDING_AT_ONCE, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
KERAS = "keras.src.optimizers"  # what TensorFlow imports of it
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Batch = TypeVar("Batch")


class UserError(Exception):
    """Something that the user can fix: the message names the thing and the remedy, in one line."""


class Stopped(Exception):
    """A signal asked the run to stop; `signal_number` says which."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def one_line(text: object) -> str:
    r"""`text` on one line: line breaks, other control characters and lone surrogates as escapes such as `\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class Output:
    """A text stream that outlives its reader: what is written after a broken pipe or a closed terminal is dropped.

    `gone` then says so, and `StopSignals` ends a run that can be resumed as a signal would. The same where the disk
    under it is `full`. Text that the stream's encoding lacks is escaped.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (None: closed at the start)
        self.gone = self.full = False
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: OSError | ValueError) -> None:
        self.gone = True
        self.full |= isinstance(error, OSError) and error.errno in NO_SPACE

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def exit_status(main: Callable[[], int | None]) -> int:
    """Runs a script's `main` and returns its exit status: a user's mistake is one line on stderr and status 2."""
    try:
        return main() or 0
    except Stopped as stopped:
        if stopped.signal_number != signal.SIGPIPE:  # whoever read our output has seen enough
            print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
    except OSError as error:
        where = one_line(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else ""
        if error.errno in NO_SPACE:
            where = f" ({where})" if where else ""
            print(f"error: no space left{where}: free some disk and run the same command again", file=sys.stderr)
        else:
            reason = one_line(error.strerror or error)
            remedy = "check that this place exists, is yours to use and that its disk works, then run the command again"
            print(f"error: {where or 'the operating system refused a file'}: {reason}: {remedy}", file=sys.stderr)
    except MemoryError:
        print("error: not enough memory: close other programs or lower --batch-size", file=sys.stderr)
    return 2


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and ends the process with its exit status, without waiting for anything.

    While an interpreter shuts down, its other threads can no longer enter it. One that reads images for an abandoned
    `tf.data` iterator would wait for that for ever, and the iterator's end for the thread.
    """
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # for the time of the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = exit_status(main)
    except SystemExit as error:  # of argparse, after --help
        status = int(error.code or 0)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.stdout.full:
        print(
            "error: no space left under standard output: free some disk and run the same command again", file=sys.stderr
        )
        status = 2
    if status == 0 and sys.stdout.gone:  # whoever read our output has seen enough
        status = 128 + signal.SIGPIPE
    os._exit(status)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What Linux says of the CPU, its instruction sets among it; empty where it says nothing."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split())
    except OSError:
        return frozenset()


def has_avx2_alone() -> bool:
    """Whether the CPU has AVX2 and no AVX-512, as many laptops have."""
    return "avx2" in cpu_flags() and "avx512f" not in cpu_flags()


def quiet_tensorflow() -> None:
    """Imports TensorFlow and finds its devices without the start-up lines that its C++ side writes to stderr.

    Its own TF_CPP_MIN_LOG_LEVEL does not cover the lines written before logging is initialised, and an error line
    about a missing CUDA driver would be read as one. A user who sets TF_CPP_MIN_LOG_LEVEL sees all of them.
    From here on a program that is interrupted says so in one line.
    """
    sys.excepthook = _report_exception
    set_tensorflow_defaults()
    for descriptor in range(3):  # one closed by the caller would go to the next file opened, and messages into that
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        _import_tensorflow()
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    if sys.stderr is not None:
        sys.stderr.flush()
    stderr_copy = os.dup(2)
    with open(os.devnull, "wb") as swallowed:
        os.dup2(swallowed.fileno(), 2)
        try:
            _import_tensorflow().config.list_physical_devices()
        finally:
            os.dup2(stderr_copy, 2)
            os.close(stderr_copy)


def set_tensorflow_defaults() -> None:
    """Environment variables for a faster TensorFlow on a CPU, where the user has not set them; before its import.

    Its own allocator keeps memory for the next step, which saves a tenth of the step: asking the system for it again
    means to have it zeroed again. And where the machine's memory is used up, that is an error that can be explained,
    and not the end of the process. With AVX2 and no AVX-512 oneDNN computes a forward pass in a seventh less time;
    TensorFlow takes it by itself on newer CPUs alone.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
        memory = min(memory, int(limit.read()))  # of a container; "max" where there is none
    os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
    os.environ.setdefault("TF_CPU_BFC_MEM_LIMIT_IN_MB", str(memory >> 20))
    if has_avx2_alone():
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def _import_tensorflow() -> Any:
    """TensorFlow without Keras, and so without matplotlib, which Keras imports: half the time of `import tensorflow`.

    The last thing that TensorFlow's import does is to import `KERAS`, or to go on without where that raises
    ImportError, as it does for a name that is None in `sys.modules`. `tf.keras` and `import keras` work as ever: Keras
    is imported where a program first uses it.
    """
    blocked = "tensorflow" not in sys.modules and KERAS not in sys.modules
    if blocked:
        sys.modules[KERAS] = None  # type: ignore[assignment]
    collecting = gc.isenabled()
    gc.disable()  # what an import makes stays: looking through it for garbage, again and again, takes 0.3 s
    try:
        return importlib.import_module("tensorflow")
    finally:
        gc.freeze()  # nor later, when the records of 100,000 images make Python look again
        if collecting:
            gc.enable()
        if blocked:
            del sys.modules[KERAS]


def _report_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)  # Python then ends by SIGINT, which a shell reports as 130
    else:
        sys.__excepthook__(kind, error, trace)


def progress_bar(total: int, initial: int, description: str, leave: bool = True) -> tqdm:
    """A bar over images: rate in images/s and the time left; off a terminal a line now and then."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit="img",
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        leave=leave,
        disable=None if not leave else False,  # None: not off a terminal
        smoothing=0.05,
    )


class StopSignals:
    """While entered, a signal or the loss of standard output asks the program to stop at its next `check`.

    SIGINT, SIGTERM, SIGQUIT, SIGHUP (a closed terminal; not where nohup has it ignored), SIGUSR1 and SIGXCPU (batch
    systems announce the end of a job by them). A second SIGINT, SIGTERM or SIGQUIT ends the program at once; the others
    are sent repeatedly by systems. A thread reads the signals from a pipe, since Python's own handlers wait until the
    running TensorFlow call returns, which for one step on a CPU can take a minute.
    """

    def __init__(self) -> None:
        self._received: int | None = None

    @property
    def received(self) -> int | None:
        """The first signal that arrived; SIGPIPE where nobody reads standard output any more."""
        if self._received is None and getattr(sys.stdout, "gone", False):
            return signal.SIGPIPE
        return self._received

    def check(self) -> None:
        """Raises Stopped once a signal has arrived."""
        if self.received is not None:
            raise Stopped(self.received)

    def watch(
        self, batches: Iterable[Batch], total: int, description: str, size: Callable[[Batch], int]
    ) -> Iterator[Batch]:
        """Yields `batches` under a progress bar of `total` images; raises Stopped between two after a signal."""
        with progress_bar(total, 0, description, leave=False) as bar:
            for batch in batches:
                self.check()
                yield batch
                bar.update(size(batch))

    def __enter__(self) -> "StopSignals":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end)
        numbers = [s for s in STOPPING if s in ENDING_AT_ONCE or signal.getsignal(s) != signal.SIG_IGN]
        self._old_handlers = {s: signal.signal(s, lambda *_: None) for s in numbers}
        threading.Thread(target=self._read_signals, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_end)  # ends the thread

    def _read_signals(self) -> None:
        while number := os.read(self._read_end, 1):
            if number[0] not in self._old_handlers:
                continue
            again = self._received is not None
            if again and number[0] in ENDING_AT_ONCE:
                _write_to_stderr(b"\nstopped at once; what is saved so far is intact\n")
                os._exit(128 + number[0])
            if not again:
                self._received = number[0]
                _write_to_stderr(b"\nstopping at the next step; a second signal ends at once\n")
        os.close(self._read_end)


def _write_to_stderr(line: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, line)
