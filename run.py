"""The run directory: one folder that holds everything a training run leaves, and all that other commands need of it.

README.md, "What a run leaves", says what each file is. The hidden ones are for this program alone: `.lock` is held by
the process that trains, and `.complete` is written last of all.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from console import UserError, one_line
from files import UNSUPPORTED, flush_to_disk, open_regular, warn_once, write_json, write_text
from model import Network
from run_config import RunConfig, new_network
from weights.checkpoint import DamagedFile, read_checkpoint

Arrays = dict[str, np.ndarray]
FOLDERS = ("train", "val", "latest", "best")
MOST_BYTES = 2**30  # of a text file of a run


class Run:
    """Reads and writes one run directory. Files that others may read are written aside and renamed.

    Nothing in it is read or written through a link, and nothing that another program put there is deleted.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not os.fspath(path):
            raise UserError("--run '': give the name of a folder")
        # TensorFlow takes a checkpoint's path for a pattern and a UTF-8 string: it would write one and never find it.
        if re.search(r"[\[\\\ud800-\udfff]", os.fspath(path)):
            raise UserError(
                f"--run {self.path}: TensorFlow reads no checkpoint at a path with [, \\ or other than UTF-8"
            )

    # -- config ------------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether the folder is a run; raises UserError where it holds something else."""
        if (self.path / "config.json").is_file():
            for name in FOLDERS:
                folder = self.path / name
                if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                    raise UserError(f"{folder} is a link or no folder, which is not ours: move it away")
            return True
        try:
            others = [name for name in os.listdir(self.path) if name != ".lock" and not name.startswith(".tmp-")]
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UserError(f"--run {self.path}: can't be written: {error.strerror}") from None
        # A run that was killed while it was created has at most these two.
        if others and set(others) - {"classes.txt", "images.csv"}:
            raise UserError(
                f"--run {self.path}: not empty and no run (no config.json), it holds {one_line(min(others))!r}: "
                "name a new folder"
            )
        return False

    def create(self, config: RunConfig) -> None:
        """Makes the folder with its `config.json` and `classes.txt`."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "classes.txt", "".join(f"{one_line(name)}\n" for name in config.class_names))
        # Last: its presence is what makes the folder a run.
        write_json(self.path / "config.json", dataclasses.asdict(config))

    def config(self) -> RunConfig:
        """Raises UserError where the folder is no run or its config can't be read."""
        file = self.path / "config.json"
        try:
            return RunConfig.from_json(json.loads(self._read_text("config.json")))
        except FileNotFoundError:
            raise UserError(f"{self.path}: not a run directory (no config.json); train one with train.py") from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError, OverflowError) as error:
            raise UserError(f"{file}: not the record of a run: {one_line(error)[:200]}") from None

    def temperature(self) -> float:
        """What logits are divided by for calibrated probabilities; 1 in a run without calibration.json."""
        try:
            value = json.loads(self._read_text("calibration.json"))["temperature"]
            if isinstance(value, int | float) and 0 < value < math.inf:
                return float(value)
        except FileNotFoundError:
            return 1.0
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            pass
        raise UserError(f"{self.path / 'calibration.json'}: damaged; without that file probabilities are uncalibrated")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Refuses a second process that wants to write this run; the lock goes with the process, however it ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = open_regular(self.path / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"--run {self.path}: can't be written: {error.strerror}") from None
        with os.fdopen(descriptor, "r+"):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another process is training this run; wait for it or stop it") from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                warn_once(f"{self.path}: this file system has no locks: start no second process on this run")
            yield

    # -- files -------------------------------------------------------------------------------------------------------

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a log up to the first damaged line, such as a half-written last one."""
        records: list[dict[str, Any]] = []
        with contextlib.suppress(ValueError, RecursionError, FileNotFoundError):
            for line in self._read_text(name).split("\n")[:-1]:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "split" not in record:
                    break
                records.append(record)
        return records

    def append_line(self, name: str, record: Mapping[str, Any]) -> None:
        descriptor = open_regular(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with open(descriptor, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _read_text(self, name: str) -> str:
        with open(open_regular(self.path / name), encoding="utf-8", errors="replace") as file:
            text = file.read(MOST_BYTES)
        if len(text) == MOST_BYTES:
            raise ValueError(f"{name} is larger than any that a run writes")
        return text

    def keep_lines(self, name: str, count: int) -> None:
        """Drops what a killed process logged after its last checkpoint: those steps are about to be done again."""
        kept = self.read_lines(name)[:count]
        write_text(self.path / name, "".join(json.dumps(record) + "\n" for record in kept))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, kind: str, tensors: Mapping[str, Any], keep: int) -> None:
        """Writes a new checkpoint of `tensors` by name into `latest` or `best`, then removes all but `keep`.

        The files are TensorFlow's V2 format, so that `tf.train.load_checkpoint` and TF-Slim's tools read them.
        """
        folder = self.path / kind
        folder.mkdir(exist_ok=True)
        for leftover in (*folder.glob("*tempstate*"), *folder.glob(".tmp-*")):
            leftover.unlink()
        older = _prefixes(folder)
        serial = 1 + (_serial(older[-1]) if older else 0)
        prefix = folder / f"checkpoint-{serial:06d}"
        try:
            tf.raw_ops.SaveV2(
                prefix=str(prefix),
                tensor_names=list(tensors),
                shape_and_slices=[""] * len(tensors),
                tensors=[tf.convert_to_tensor(value) for value in tensors.values()],
            )
        except tf.errors.OpError as error:
            for part in folder.glob(f"{prefix.name}.*"):
                part.unlink()
            raise UserError(
                f"{prefix}: the checkpoint can't be written ({one_line(error.message)[:200]}); is the disk full? "
                "Earlier checkpoints are intact: free some space and run the same command again"
            ) from None
        for part in folder.glob(f"{prefix.name}.*"):
            with open(part, "rb") as file:
                flush_to_disk(file.fileno())  # before an older checkpoint goes
        self.settle(kind, keep)

    def settle(self, kind: str, keep: int) -> None:
        """Names the newest checkpoints for `tf.train.latest_checkpoint` and removes all but `keep`."""
        folder = self.path / kind
        prefixes = _prefixes(folder)
        names = [file.name for file in prefixes[-keep:]]
        pointer = [f'model_checkpoint_path: "{names[-1]}"', *(f'all_model_checkpoint_paths: "{n}"' for n in names)]
        write_text(folder / "checkpoint", "\n".join(pointer) + "\n")
        for old in prefixes[:-keep]:
            for part in folder.glob(f"{old.name}.*"):
                part.unlink()

    def load(self, kind: str) -> tuple[Arrays, list[str]] | None:
        """The newest readable checkpoint and what is wrong with any newer one; None where there is no checkpoint.

        Raises UserError where checkpoints are there and none can be read.
        """
        warnings: list[str] = []
        prefixes = _prefixes(self.path / kind)
        for prefix in reversed(prefixes):
            try:
                return read_checkpoint(str(prefix)), warnings
            except DamagedFile as error:
                warnings.append(f"{prefix}: damaged, not used ({one_line(error)[:160]})")
            except UserError:
                if prefix.with_suffix(".index").exists():
                    raise
        if _prefixes(self.path / kind) != prefixes:  # a training process has replaced them meanwhile
            return self.load(kind)
        if warnings:
            raise UserError(f"{'; '.join(warnings)}; no intact checkpoint is left: delete {self.path / kind}")
        return None

    def has_checkpoint(self, *kinds: str) -> bool:
        """Whether there is a checkpoint of one of `kinds`; default: any."""
        return any(_prefixes(self.path / kind) for kind in kinds or ("best", "latest"))

    def load_model(self) -> Network:
        """The network to predict with: `best`, or `latest` in a run that has no validation behind it yet."""
        network = new_network(self.config(), seeded=False)
        self.load_best(network)
        return network

    def load_best(self, network: Network) -> None:
        """Assigns to `network` what `load_model` gives."""
        for kind in ("best", "latest"):
            if loaded := self.load(kind):
                return self.assign(network.variables_by_name, loaded[0], kind)
        raise UserError(f"{self.path}: no checkpoint yet; run train.py with --run {self.path} to its first validation")

    def assign(self, variables: Mapping[str, tf.Variable], arrays: Arrays, kind: str) -> None:
        """Gives each variable its array of a loaded checkpoint; UserError where one is missing or has another shape."""
        for name, variable in variables.items():
            array = arrays.get(name)
            if array is None or array.shape != tuple(variable.shape):
                what = "is missing" if array is None else f"has shape {list(array.shape)}, not {list(variable.shape)}"
                raise UserError(
                    f"{self.path / kind}: not a checkpoint of this run: {name} {what}; delete that folder and run "
                    "train.py again, or restore both it and config.json"
                )
        for name, variable in variables.items():
            variable.assign(arrays[name])


def _serial(prefix: Path) -> int:
    return int(prefix.name.rpartition("-")[2])


def _prefixes(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first. An index file is written last, so its presence says that all is there."""
    names = [file.name.removesuffix(".index") for file in folder.glob("checkpoint-*.index")]
    return sorted((folder / name for name in names if re.fullmatch(r"checkpoint-\d+", name)), key=_serial)


def newest_run(parent: str | os.PathLike[str] = "checkpoints") -> Run:
    """The run below `parent` that was created last and has a checkpoint; says on stderr which that is.

    Raises UserError where there is none.
    """
    runs: list[tuple[float, str, Run]] = []
    for file in sorted(Path(parent).glob("*/config.json")):
        with contextlib.suppress(UserError):  # a damaged run must not hide the others
            run = Run(file.parent)
            if run.has_checkpoint():
                runs.append((_seconds(run.config().created), file.parent.name, run))
    if not runs:
        raise UserError(f"no run with a checkpoint in {parent}/ yet: train one with train.py, or name one with --run")
    run = max(runs, key=lambda entry: entry[:2])[2]
    print(f"run {one_line(run.path)}", file=sys.stderr)
    return run


def _seconds(created: str) -> float:
    """Seconds since 1970 of a date as config.json has it; 0 for what is none."""
    with contextlib.suppress(ValueError):
        return datetime.strptime(created, "%Y-%m-%dT%H:%M:%S.%f%z").timestamp()
    with contextlib.suppress(ValueError):
        return datetime.strptime(created, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return 0.0
