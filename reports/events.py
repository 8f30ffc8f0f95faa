"""TensorBoard event files of a run: `train/` and `val/` share their tags, so that both curves are on one chart.

The scalars repeat metrics.jsonl and timing.jsonl. The files are written anew from those when a run is resumed, so no
step is in them twice and none is missing.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams

from console import UserError, one_line
from run import Run

TAGS = ("loss", "accuracy", "learning_rate", "images_per_second")


class EventWriter:
    """Starts new event files that hold the configuration and everything logged so far."""

    def __init__(self, run: Run):
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        for name, folder in (("run", run.path), ("train", run.path / "train"), ("val", run.path / "val")):
            for file in folder.glob("events.out.tfevents.*"):
                file.unlink()
            self._writers[name] = tf.summary.create_file_writer(str(folder))
        settings = run.config().settings
        with self._writers["run"].as_default():
            # The HParams tab finds the scores of train/ and val/ below the folder that holds this record.
            hparams.hparams({k: v for k, v in settings.items() if isinstance(v, int | float | str)}, run.path.name)
            rows = [f"| {name} | {json.dumps(value)} |" for name, value in settings.items()]
            tf.summary.text("config", "\n".join(["| setting | value |", "|---|---|", *rows]), step=0)
        for record, timing in zip(run.read_lines("metrics.jsonl"), run.read_lines("timing.jsonl"), strict=False):
            self.scalars({**record, **timing})

    def scalars(self, record: Mapping[str, Any]) -> None:
        """Adds the values of a log record, {"split": ..., "step": ..., tag: value}."""
        with _readable_failures(), self._writers[record["split"]].as_default():
            for tag in TAGS:
                if tag in record:
                    tf.summary.scalar(tag, record[tag], step=record["step"])

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
