"""What scripts show a person, and what ends them: errors in one line, lost terminals, signals, odd file systems."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import files
from console import Output, Stopped, StopSignals, UserError, exit_status, one_line
from run import Run
from training import features

ROOT = Path(__file__).resolve().parent.parent


def run_code(code: str, **keywords: object) -> "subprocess.CompletedProcess[str]":
    """A script of that `main` body in a process of its own, started as the project's scripts are."""
    lines = ["import os, signal, sys", "from console import *", "from console import quiet_tensorflow, run_script"]
    text = "\n".join([*lines, "def main():", *(f"    {line}" for line in code.splitlines()), "run_script(main)"])
    return subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False,
        **keywords,  # type: ignore[call-overload]
    )  # fmt: skip


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("bad\x1b[31m name\nhere"), "error: bad\\x1b[31m name\\nhere"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "error: /x/y: Permission denied: check that"),
        (OSError(errno.EIO, "Input/output error"), "error: the operating system refused a file: Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device", b"/disk/\xff"), "error: no space left (/disk/\\udcff): free"),
        (MemoryError(), "error: not enough memory: close other programs or lower --batch-size"),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_status_2(capsys, error, expected):
    def fails() -> None:
        raise error

    assert exit_status(fails) == 2
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert err.count("\n") == 1


def test_one_line_shows_what_a_terminal_would_run():
    assert one_line("a\r\n\t\x1b]0;title\x07 é 漢 \udcff") == "a\\r\\n\\t\\x1b]0;title\\x07 é 漢 \\udcff"


# -- standard streams ------------------------------------------------------------------------------------------------


def test_output_escapes_what_the_encoding_lacks_and_outlives_its_reader():
    raw = io.BytesIO()
    stream = Output(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("é 漢\n")
    stream.flush()
    assert raw.getvalue() == b"\\xe9 \\u6f22\n"
    assert not stream.gone
    read, write = os.pipe()
    os.close(read)
    stream = Output(os.fdopen(write, "w"))
    stream.write("nobody reads this\n")
    stream.flush()
    assert stream.gone
    assert Output(None).write("closed at the start") > 0


def test_a_script_without_standard_streams_does_its_work(tmp_path):
    """A file that is opened first must not become descriptor 1 or 2, and so receive messages."""
    target = tmp_path / "out"
    code = f"quiet_tensorflow()\nopen({str(target)!r}, 'w').write('mine')\nprint('x')\nos.write(2, b'y')"

    def close() -> None:
        for descriptor in range(3):
            os.close(descriptor)

    done = run_code(code, preexec_fn=close)
    assert done.returncode == 0
    assert target.read_text() == "mine"


def test_a_lost_reader_ends_the_script_as_a_signal_would():
    read, write = os.pipe()
    os.close(read)
    lines = ["from console import *", "from console import run_script", "def main():"]
    body = ["    with StopSignals() as stop:", "        print('x', flush=True)", "        stop.check()"]
    code = "\n".join([*lines, *body, "run_script(main)"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_full_disk_under_standard_output_is_said():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    lines = ["from console import *", "from console import run_script", "def main():", "    print('x')"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join([*lines, "run_script(main)"])], cwd=ROOT, stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "no space left under standard output" in done.stderr


# -- a quick start ---------------------------------------------------------------------------------------------------

USE_OF_KERAS = """
import keras
from tensorflow.keras.layers import Dense
assert Dense is keras.layers.Dense is tf.keras.layers.Dense
assert tf.optimizers.SGD is keras.optimizers.SGD
model = keras.Sequential([keras.Input((3,)), Dense(2)])
model.compile("sgd", "mse")
model.fit(tf.ones((4, 3)), tf.ones((4, 2)), verbose=0)
print(model(tf.ones((1, 3))).shape)
"""


@pytest.mark.parametrize("level", [None, "2"])
@pytest.mark.parametrize("keras_first", [False, True])
def test_keras_is_imported_by_those_alone_who_use_it(level, keras_first):
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    absent = "assert not {'keras', 'keras.src.optimizers', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
    start = "import keras\n" if keras_first else ""
    code = f"{start}quiet_tensorflow()\n{'' if keras_first else absent}import tensorflow as tf{USE_OF_KERAS}"
    done = run_code(code, env=environment | ({"TF_CPP_MIN_LOG_LEVEL": level} if level else {}))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 2)\n"


# -- signals ---------------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    while not condition():
        done.wait(0.001)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_every_signal_that_ends_jobs_asks_to_stop(name, capfd):
    number = signal.Signals[name]
    with StopSignals() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.received is not None)
        with pytest.raises(Stopped, match=name):
            stop.check()
        if name in ("SIGHUP", "SIGUSR1", "SIGXCPU"):  # which systems repeat
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
    assert capfd.readouterr().err.count("stopping at the next step") == 1
    assert exit_status(lambda: stop.check()) == 128 + number


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: stop.received is not None)
            assert stop.received == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, old)


def test_watch_stops_between_two_batches():
    with StopSignals() as stop:
        batches = stop.watch([[1, 2], [3], [4]], 4, "test", size=len)
        assert [next(batches), next(batches)] == [[1, 2], [3]]
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stop.received is not None)
        with pytest.raises(Stopped):
            next(batches)


def test_no_handler_or_thread_is_left():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)}
    with StopSignals():
        assert any("_read_signals" in thread.name for thread in threading.enumerate())
    assert {number: signal.getsignal(number) for number in before} == before
    wait_until(lambda: not any("_read_signals" in thread.name for thread in threading.enumerate()))


# -- file systems that lack a call -----------------------------------------------------------------------------------


@pytest.fixture
def no_warnings_yet():
    files.warn_once.cache_clear()


def refuse(number: int) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, capsys, no_warnings_yet):
    monkeypatch.setattr("fcntl.flock", refuse(errno.ENOLCK))
    with Run(tmp_path / "run").locked():
        pass
    with open(tmp_path / "rows", "w", encoding="utf-8") as file:
        features._lock(file.fileno(), tmp_path / "rows", StopSignals())
    err = capsys.readouterr().err
    assert err.count("this file system has no locks") == 2


def test_without_fsync_files_are_written_with_one_warning(tmp_path, monkeypatch, capsys, no_warnings_yet):
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    files.write_text(tmp_path / "a", "1")
    files.write_text(tmp_path / "b", "2")
    assert (tmp_path / "b").read_text() == "2"
    assert capsys.readouterr().err.count("warning: this file system can't flush") == 1
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))  # the disk is broken: that is no lack of a call
    with pytest.raises(OSError, match="Input/output"):
        files.write_text(tmp_path / "a", "3")
    assert (tmp_path / "a").read_text() == "1"


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    os.close(files.open_regular(tmp_path / "file"))
    for name in ("link", "folder", "fifo"):
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND):
            with pytest.raises(UserError, match="a link or no regular file"):
                files.open_regular(tmp_path / name, flags)
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "missing")
