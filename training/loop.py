"""The training loop: steps, log events, validation, checkpoints, and going on where a killed run stopped.

What is logged, validated and compared depends on the step alone, so a resumed run repeats nothing and skips nothing.
Only the moments of `latest` checkpoints and of the curves depend on the clock, and they change no result.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import tensorflow as tf
from tqdm import tqdm

import data
from console import Stopped, StopSignals, UserError, one_line
from dataset.layouts import Examples
from reports import metrics
from reports.events import EventWriter
from reports.pictures import draw_curves
from run import Run
from training.step import Phase, Trainer, compiled_forward, predict

LOGS_PER_EPOCH = 10
LONGEST_UNSAVED = 60.0  # seconds within an epoch
DUTY = 20.0  # checkpoints, and pictures, take at most one part in so many of the time


@dataclass
class Progress:
    """What a checkpoint holds beside tensors. Nothing in it depends on the clock."""

    log_lines: int = 0
    validated_step: int = 0
    best_accuracy: float = -1.0
    best_loss: float = 0.0
    best_step: int = 0
    waited: int = 0  # validations of this phase since the best one


class Pacer:
    """Says when something that costs time is due again, so that it takes at most 1 / DUTY of the time."""

    def __init__(self) -> None:
        self._last, self._cost = time.monotonic(), 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self._last

    def due(self) -> bool:
        return self.elapsed() >= DUTY * self._cost

    def timed(self, action: Callable[[], None]) -> float:
        """Does it, and returns what it took in seconds."""
        begin = time.monotonic()
        action()
        self._last = time.monotonic()
        self._cost = self._last - begin
        return self._cost


class Fit:
    """Trains a run, phase by phase.

    Args:
        patience: end after so many epochs of the last phase without a better validation accuracy; 0: never.
        seed: of the order of the examples.
    """

    def __init__(
        self,
        run: Run,
        trainer: Trainer,
        train: Examples,
        val: Examples,
        batch_size: int,
        patience: int,
        seed: int,
        stop: StopSignals,
    ):
        self.run, self.trainer, self.train, self.val, self.stop = run, trainer, train, val, stop
        self.batch_size, self.patience, self.seed = batch_size, patience, seed
        self.epoch_steps = data.steps_per_epoch(len(train), batch_size)
        self.log_every = max(1, self.epoch_steps // LOGS_PER_EPOCH)
        self.progress = Progress()
        self._saves, self._draws = Pacer(), Pacer()
        self._begin = self._mark_time = time.monotonic()  # of the run; of the images/s of the next log event
        self._mark_step = 0

    def restore(self) -> bool:
        """Takes up the newest intact checkpoint; False where there is none."""
        loaded = self.run.load("latest")
        if loaded:
            tensors, warnings = loaded
            for warning in warnings:
                print(f"warning: {warning}; going on from the checkpoint before it", flush=True)
            for name, variable in self.trainer.state().items():
                variable.assign(tensors[name])
            self.progress = Progress(**json.loads(tensors["progress"].item()))
        return loaded is not None

    def is_done(self) -> bool:
        """Whether no step is left, because all are done or patience ran out."""
        step, last = self.step(), self.trainer.phases[-1]
        return step == last.last_step == self.progress.validated_step or self._out_of_patience(last, step)

    def open_logs(self) -> None:
        """Drops what a killed process logged after its checkpoint, and starts event files that hold the rest."""
        lost = self.progress.log_lines - len(self.run.read_lines("metrics.jsonl"))
        if lost > 0:  # by something else than a kill, which leaves what was written before the checkpoint
            print(f"warning: metrics.jsonl has lost {lost} lines", flush=True)
            self.progress.log_lines -= lost
        for log in ("metrics.jsonl", "timing.jsonl"):
            self.run.keep_lines(log, self.progress.log_lines)
        timing = self.run.read_lines("timing.jsonl")
        self._begin = time.monotonic() - (timing[-1]["seconds"] if timing else 0.0)
        self.events = EventWriter(self.run)

    def step(self) -> int:
        """Steps done. Reads the device."""
        return int(self.trainer.step.numpy())

    def run_phase(self, phase: Phase, train_load: data.Load, val_load: data.Load, bar: tqdm) -> None:
        """Does what is left of a phase; raises Stopped after a signal, UserError where the loss is not finite."""
        step = self.step()
        if self._out_of_patience(phase, step) or not phase.first_step <= step <= phase.last_step:
            return
        forward = compiled_forward(self.trainer.model, phase.input_stage)
        val_batches = data.ordered_batches(val_load, self.val.labels, self.batch_size)
        if step == phase.first_step:
            self.progress.waited = 0
        elif self._validation_due(step):
            self._validate(phase, step, forward, val_batches, bar)
        train_step = self.trainer.train_step(phase)
        batches = data.train_batches(
            train_load, self.train.labels, self.batch_size, self.seed, step, phase.last_step, phase.views
        )
        self._mark_time, self._mark_step = time.monotonic(), step
        for x, labels, _ in batches:
            if self._out_of_patience(phase, step):
                break
            train_step(x, labels)
            step += 1
            bar.update(len(labels))
            if step % self.epoch_steps == 0 or step % self.epoch_steps % self.log_every == 0:
                self._log_training(phase, step, bar)
            if self._validation_due(step):
                self._validate(phase, step, forward, val_batches, bar)
            self._save_if_due(step)
        self._save()

    def finish(self) -> None:
        """Draws the curves of the whole run."""
        draw_curves(self.run.path / "curves.png", self.run.read_lines("metrics.jsonl"))

    def _out_of_patience(self, phase: Phase, step: int) -> bool:
        in_last_phase = phase is self.trainer.phases[-1] and step > phase.first_step
        return in_last_phase and 0 < self.patience <= self.progress.waited

    def _validation_due(self, step: int) -> bool:
        return step % self.epoch_steps == 0 and self.progress.validated_step < step

    def _validate(
        self,
        phase: Phase,
        step: int,
        forward: Callable[[tf.Tensor], tf.Tensor],
        val_batches: tf.data.Dataset,
        bar: tqdm,
    ) -> None:
        """Scores the whole validation split and keeps the variables if they are the best so far."""
        begin, progress, count = time.monotonic(), self.progress, len(self.val)
        with progress_bar(count, 0, "validation", leave=False) as val_bar:

            def each(examples: int) -> None:
                val_bar.update(examples)
                if self.stop.received is not None:
                    self._save()
                    raise Stopped(self.stop.received)

            logits = predict(forward, val_batches, each)
        accuracy = metrics.accuracy(logits, self.val.labels)
        scores = {"loss": metrics.log_loss(logits, self.val.labels), "accuracy": accuracy}
        seconds = time.monotonic() - begin
        # Of equal accuracies the lower loss: on a small split many epochs tie, the first of them far from trained.
        if (accuracy, -scores["loss"]) > (progress.best_accuracy, -progress.best_loss):
            self.run.save("best", {**self.trainer.model.variables_by_name, "global_step": self.trainer.step}, keep=1)
            progress.best_accuracy, progress.best_loss = accuracy, scores["loss"]
            progress.best_step, progress.waited = step, 0
        else:
            progress.waited += 1
        progress.validated_step = step
        self._log(
            {"step": step, "epoch": step / self.epoch_steps, "split": "val", "stage": phase.name, **scores},
            count / seconds,
        )
        self.events.flush()
        bar.write(
            f"epoch {step // self.epoch_steps}: validation loss {scores['loss']:.4f}, accuracy {accuracy:.4f}"
            + (" (best)" if progress.best_step == step else "")
        )
        if self._draws.due():
            self._draws.timed(lambda: draw_curves(self.run.path / "curves.png", self.run.read_lines("metrics.jsonl")))
        self._mark_time += time.monotonic() - begin

    def _log_training(self, phase: Phase, step: int, bar: tqdm) -> None:
        self._check_finite(phase)
        loss, accuracy = self.trainer.take_sums()  # waits for the device, so the clock below is right
        now = time.monotonic()
        rate = float(self.trainer.learning_rate(phase, tf.constant(step - 1, tf.int64)))
        images = self.images_between(self._mark_step, step)
        record = {
            "step": step,
            "epoch": step / self.epoch_steps,
            "split": "train",
            "stage": phase.name,
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": rate,
        }
        self._log(record, images / max(now - self._mark_time, 1e-9))
        self._mark_time, self._mark_step = now, step
        bar.set_description(f"epoch {-(-step // self.epoch_steps)}/{bar.total // len(self.train)}", refresh=False)
        bar.set_postfix_str(f"step {step}, loss {loss:.4f}, lr {rate:.2e}", refresh=False)

    def images_between(self, first_step: int, last_step: int) -> int:
        """Training images in the steps [first_step, last_step)."""
        epochs_and_rest = [divmod(s, self.epoch_steps) for s in (first_step, last_step)]
        first, last = (e * len(self.train) + min(r * self.batch_size, len(self.train)) for e, r in epochs_and_rest)
        return last - first

    def _log(self, record: dict, images_per_second: float) -> None:
        timing = {"seconds": time.monotonic() - self._begin, "images_per_second": images_per_second}
        self.run.append_line("metrics.jsonl", record)
        self.run.append_line("timing.jsonl", {"step": record["step"], "split": record["split"], **timing})
        self.progress.log_lines += 1
        self.events.scalars({**record, **timing})

    def _check_finite(self, phase: Phase) -> None:
        bad_step = int(self.trainer.bad_step.numpy())
        if bad_step < 0:
            return
        rate = float(self.trainer.learning_rate(phase, tf.constant(bad_step, tf.int64)))
        indices = data.indices_of_step(len(self.train), self.batch_size, self.seed, bad_step)
        files = ", ".join(one_line(self.train.paths[i]) for i in indices)
        raise UserError(
            f"the loss or its gradient is not finite at step {bad_step + 1}, learning rate {rate:.3g}: lower "
            f"--learning-rate or set --clip-norm; the last checkpoint is intact. Images of that batch: {files}"
        )

    def _save_if_due(self, step: int) -> None:
        epoch_ends = step % self.epoch_steps == 0
        if self.stop.received is not None:
            self._save()
            raise Stopped(self.stop.received)
        if (epoch_ends or self._saves.elapsed() > LONGEST_UNSAVED) and self._saves.due():
            self._mark_time += self._save()

    def _save(self) -> float:
        """A checkpoint that a resumed run goes on from; returns the seconds it took."""
        step = self.step()
        phase = next(p for p in self.trainer.phases if p.first_step <= step <= p.last_step)
        self._check_finite(phase)
        tensors = {**self.trainer.state(), "progress": json.dumps(asdict(self.progress))}
        return self._saves.timed(lambda: self.run.save("latest", tensors, keep=2))


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
