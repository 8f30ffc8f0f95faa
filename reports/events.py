"""TensorBoard event files of a run: `train/` and `val/` share their tags, so that both curves are on one chart.

The scalars repeat metrics.jsonl and timing.jsonl. The files are written anew from those when a run is resumed, so no
step is in them twice and none is missing.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import summary_v2 as hparams  # its `api` imports Keras, for a second

from console import UserError, one_line
from reports.records import Record, is_record, number, usable_records
from reports.tables import markdown_table

TAGS = ("loss", "accuracy", "learning_rate", "images_per_second")
SUFFIX = ".fine-tuning-run"  # marks the event files that this program wrote


class EventWriter:
    """Starts new event files in a run directory that hold the settings and everything logged so far.

    Event files that this program wrote there before are deleted; those of other programs stay.

    Args:
        folder: the run directory.
        settings: every setting by name, in JSON's types.
        metrics, timing: the parsed lines of metrics.jsonl and timing.jsonl, joined by split and step; lines that are no
            records are ignored with a warning.
        adopt_unmarked: the run is of an earlier version, whose event files have no mark: delete those too.

    Raises UserError where `train` or `val` is a link, or where event files can't be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        metrics: Sequence[Any],
        timing: Sequence[Any],
        adopt_unmarked: bool = False,
    ):
        folders = {"run": folder, "train": folder / "train", "val": folder / "val"}
        for name in ("train", "val"):
            if folders[name].is_symlink():
                raise UserError(f"{folders[name]} is a link, and event files are not written through one: remove it")
        suffixes = (SUFFIX, ".v2") if adopt_unmarked else (SUFFIX,)  # ".v2" is TensorFlow's own
        for path in folders.values():
            for file in path.glob("events.out.tfevents.*"):
                if file.name.endswith(suffixes) and not file.is_dir():
                    file.unlink()
        with _readable_failures():
            self._writers: dict[str, tf.summary.SummaryWriter] = {
                name: tf.summary.create_file_writer(str(path), filename_suffix=SUFFIX) for name, path in folders.items()
            }
            with self._writers["run"].as_default():
                # The HParams tab finds the scores of train/ and val/ below the folder that holds this record.
                cells = {name: _hparam(value) for name, value in settings.items()}
                hparams.hparams(cells, folder.resolve().name)
                rows = [[name, json.dumps(value)] for name, value in settings.items()]
                tf.summary.text("config", markdown_table(rows, ["setting", "value"]), step=0)
        odd = sum(not is_record(line) for line in (*metrics, *timing))
        if odd:
            print(f"warning: {folder}: ignored {odd} odd lines of metrics.jsonl or timing.jsonl", file=sys.stderr)
        timing_of = {(record["split"], record["step"]): record for record in usable_records(timing)}
        for record in usable_records(metrics):
            self.scalars({**record, **timing_of.get((record["split"], record["step"]), {})})

    def scalars(self, record: Record) -> None:
        """Adds the values of a log record, {"split": ..., "step": ..., tag: value}, finite numbers only."""
        with _readable_failures(), self._writers[record["split"]].as_default():
            for tag in TAGS:
                if math.isfinite(value := number(record, tag)):
                    tf.summary.scalar(tag, value, step=record["step"])
            for place, point in enumerate(record.get("out_of_fold", ())):  # one for each strength, strong to weak
                for tag in ("log_loss", "accuracy"):
                    tf.summary.scalar(f"out_of_fold/{tag}", number(point, tag), step=place)

    def images(self, split: str, tag: str, images: np.ndarray, step: int) -> None:
        """Adds pictures, uint8 [N, H, W, 3]."""
        with _readable_failures(), self._writers[split].as_default():
            tf.summary.image(tag, images, step=step, max_outputs=len(images))

    def flush(self) -> None:
        with _readable_failures():
            for writer in self._writers.values():
                writer.flush()

    def close(self) -> None:
        with _readable_failures():
            for writer in self._writers.values():
                writer.close()


def _hparam(value: Any) -> int | float | str:
    """A setting in one of the types that the HParams tab shows."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return value if isinstance(value, int | float | str) else json.dumps(value)


@contextlib.contextmanager
def _readable_failures() -> Iterator[None]:
    """A full disk, which TensorFlow reports as one resource exhausted among others, becomes a UserError."""
    try:
        yield
    except tf.errors.OpError as error:
        raise UserError(
            f"the event files can't be written ({one_line(error.message)[-200:]}); is the disk full? "
            "Checkpoints are intact: free some space and run the same command again"
        ) from None
