"""How every script meets a person: the exception for mistakes they can mend, its exit status, and a quiet start."""

import argparse
import contextlib
import errno
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn


class UserError(Exception):
    """Something that the user can mend: the message names the thing and the remedy, in one line."""


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


def exit_status(main: Callable[[], int | None]) -> int:
    """Runs a script's `main` and returns its exit status: a user's mistake is one line on stderr and status 2."""
    try:
        return main() or 0
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: no space left{where}: free some disk and run the same command again", file=sys.stderr)
    return 2


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and ends the process with its exit status, without waiting for anything.

    While an interpreter shuts down, its other threads can no longer enter it. One that reads images for an abandoned
    `tf.data` iterator would wait for that for ever, and the iterator's end for the thread.
    """
    try:
        status = exit_status(main)
    except SystemExit as error:  # of argparse, after --help
        status = int(error.code or 0)
    except BrokenPipeError:  # whoever read our output has seen enough
        status = 128 + signal.SIGPIPE
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def quiet_tensorflow() -> None:
    """Imports TensorFlow and finds its devices without the start-up lines that its C++ side writes to stderr.

    Its own TF_CPP_MIN_LOG_LEVEL does not cover the lines written before logging is initialised, and an error line
    about a missing CUDA driver would be read as one. A user who sets TF_CPP_MIN_LOG_LEVEL sees all of them.
    From here on a program that is interrupted says so in one line.
    """
    sys.excepthook = _report_exception
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    sys.stderr.flush()
    stderr_copy = os.dup(2)
    with tempfile.TemporaryFile() as swallowed:
        os.dup2(swallowed.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()
        finally:
            os.dup2(stderr_copy, 2)
            os.close(stderr_copy)


def _report_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)  # Python then ends by SIGINT, which a shell reports as 130
    else:
        sys.__excepthook__(kind, error, trace)


class StopSignals:
    """While entered, SIGINT and SIGTERM ask the program to stop at its next `check`; a second one ends it at once.

    A thread reads the signals from a pipe, since Python's own handlers wait until the running TensorFlow call returns,
    which for one step on a CPU can take a minute.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def check(self) -> None:
        """Raises Stopped once a signal has arrived."""
        if self.received is not None:
            raise Stopped(self.received)

    def __enter__(self) -> "StopSignals":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end)
        self._old_handlers = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_end)  # ends the thread

    def _watch(self) -> None:
        while number := os.read(self._read_end, 1):
            if number[0] not in self._old_handlers:
                continue
            if self.received is not None:
                os.write(2, b"\nstopped at once; what is saved so far is intact\n")
                os._exit(128 + number[0])
            self.received = number[0]
            os.write(2, b"\nstopping at the next step; a second signal ends at once\n")
        os.close(self._read_end)
