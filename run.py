"""The run directory: one folder that holds everything a training run leaves, and all that other commands need of it.

config.json   settings, classes, counts, preprocessing, versions, command line
classes.txt   class names, a line each
metrics.jsonl a line per log event: values that depend on the seed alone, equal however often the run was killed
timing.jsonl  a line per line of metrics.jsonl: seconds and images/s, which depend on the machine
train/, val/  TensorBoard event files
latest/       the last two checkpoints, with the optimiser's state
best/         the checkpoint with the highest validation accuracy, variables only
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from console import UserError, one_line
from data import Preprocessing
from devices import compute_dtype
from files import write_json, write_text
from model import Network

Arrays = dict[str, np.ndarray]


class Run:
    """Reads and writes one run directory. Files that others may read are written aside and renamed."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        # TensorFlow takes a checkpoint's path for a pattern and a UTF-8 string: it would write one and never find it.
        if re.search(r"[\[\\\ud800-\udfff]", os.fspath(path)):
            raise UserError(
                f"--run {self.path}: TensorFlow reads no checkpoint at a path with [, \\ or other than UTF-8"
            )

    # -- config ------------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return (self.path / "config.json").is_file()

    def create(self, config: Mapping[str, Any]) -> None:
        """Makes the folder with its `config.json` and `classes.txt`."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "classes.txt", "".join(f"{one_line(name)}\n" for name in config["class_names"]))
        write_json(self.path / "config.json", config)  # last: its presence is what makes the folder a run

    def config(self) -> dict[str, Any]:
        """Raises UserError where the folder is no run or its config can't be read."""
        file = self.path / "config.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path}: not a run directory (no config.json); train one with train.py") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None

    def preprocessing(self) -> Preprocessing:
        """What the run's network was trained to see."""
        fields = self.config()["preprocessing"]
        return Preprocessing(fields["image_size"], fields["crop_margin"], tuple(fields["augment"]))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Refuses a second process that wants to write this run; the lock goes with the process, however it ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--run {self.path}: can't be written: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another process is training this run; wait for it or stop it") from None
            yield

    # -- files -------------------------------------------------------------------------------------------------------

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file up to the first damaged line, such as a half-written last one."""
        file = self.path / name
        records: list[dict[str, Any]] = []
        if file.is_file():
            with contextlib.suppress(ValueError):
                for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
                    records.append(json.loads(line))  # noqa: PERF401
        return records

    def append_line(self, name: str, record: Mapping[str, Any]) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

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
                os.fsync(file.fileno())  # before an older checkpoint goes
        kept = [*older, prefix][-keep:]
        names = [file.name for file in kept]
        pointer = [f'model_checkpoint_path: "{names[-1]}"', *(f'all_model_checkpoint_paths: "{n}"' for n in names)]
        write_text(folder / "checkpoint", "\n".join(pointer) + "\n")  # for tf.train.latest_checkpoint
        for old in older:
            if old not in kept:
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
                reader = tf.train.load_checkpoint(str(prefix))
                # Reading a tensor checks its checksum.
                names = reader.get_variable_to_shape_map()
                return {name: np.asarray(reader.get_tensor(name)) for name in names}, warnings  # text comes as bytes
            except (tf.errors.OpError, ValueError, RuntimeError, IndexError) as error:
                warnings.append(f"{prefix}: damaged, not used ({one_line(error)[:120]})")
        if _prefixes(self.path / kind) != prefixes:  # a training process has replaced them meanwhile
            return self.load(kind)
        if warnings:
            raise UserError(f"{'; '.join(warnings)}; no intact checkpoint is left: delete {self.path / kind}")
        return None

    def load_model(self) -> Network:
        """The network to predict with: `best`, or `latest` in a run that has no validation behind it yet."""
        config = self.config()
        model = Network(**config["model"], compute_dtype=compute_dtype(config["precision"]))
        for kind in ("best", "latest"):
            loaded = self.load(kind)
            if loaded:
                for name, variable in model.variables_by_name.items():
                    variable.assign(loaded[0][name])
                return model
        raise UserError(f"{self.path}: no checkpoint yet; run train.py with --run {self.path} to its first validation")


def _serial(prefix: Path) -> int:
    return int(prefix.name.rpartition("-")[2])


def _prefixes(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first. An index file is written last, so its presence says that all is there."""
    names = [file.name.removesuffix(".index") for file in folder.glob("checkpoint-*.index")]
    return sorted((folder / name for name in names if re.fullmatch(r"checkpoint-\d+", name)), key=_serial)


def newest_run(parent: str | os.PathLike[str] = "checkpoints") -> Run:
    """The run below `parent` that was created last; UserError where there is none."""
    configs = list(Path(parent).glob("*/config.json"))
    if not configs:
        raise UserError(f"no run in {parent}/ yet: train one with train.py, or name one with --run")
    return Run(max(configs, key=lambda file: file.stat().st_mtime_ns).parent)
