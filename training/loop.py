"""The training loop: steps, log events, validation, checkpoints, and resuming where a killed run stopped.

What is logged, validated and compared depends on the step alone, so a resumed run repeats nothing and skips nothing.
Only the moments of `latest` checkpoints and of the curves depend on the clock, and they change no result.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import data
from console import Stopped, StopSignals, UserError, one_line
from dataset.layouts import Examples
from reports import metrics
from run import Run
from run_config import Phase
from training.head import as_records, solve_head
from training.log import Log, NoLog, Pacer
from training.step import Schedule, Trainer, compiled_forward, decay_over, predict

LOGS_PER_EPOCH = 10
LONGEST_UNSAVED = 60.0  # seconds within an epoch


@dataclass
class Progress:
    """What a checkpoint holds beside tensors. Nothing in it depends on the clock."""

    log_lines: int = 0
    validated_step: int = 0
    best_accuracy: float = -1.0
    best_loss: float = 0.0
    best_step: int = 0
    waited: int = 0  # validations of this phase since the best one


class Keeper:
    """The checkpoints of a run, and its progress, which they hold. Of several workers the chief alone writes them.

    Args:
        patience: end after so many epochs of the last phase without a better validation accuracy or loss; 0: never.
    """

    def __init__(self, run: Run, trainer: Trainer, patience: int):
        self._run, self._trainer, self._patience = run, trainer, patience
        self.progress = Progress()
        self._pacer = Pacer()

    def restore(self) -> bool:
        """Assigns the newest intact checkpoint; False where there is none."""
        loaded = self._run.load("latest")
        if loaded is None:
            return False
        tensors, warnings = loaded
        for warning in warnings:
            print(f"warning: {warning}; resuming from the checkpoint before it", flush=True)
        self._run.assign(self._trainer.state(), tensors, "latest")
        self._run.settle("latest", keep=2)  # a kill may have come between a checkpoint and its name
        try:
            self.progress = Progress(**json.loads(tensors["progress"].item()))
        except (KeyError, ValueError, TypeError):
            raise UserError(
                f"{self._run.path / 'latest'}: not a checkpoint of this program: name a new --run"
            ) from None
        return True

    def is_done(self) -> bool:
        """Whether no step is left, because all are done or patience ran out."""
        step, last = self._trainer.steps_done(), self._trainer.phases[-1]
        return step == last.end_step == self.progress.validated_step or self.out_of_patience(last, step)

    def out_of_patience(self, phase: Phase, step: int) -> bool:
        """Whether the last phase has been without a better validation for too long."""
        in_last_phase = phase is self._trainer.phases[-1] and step > phase.first_step
        return in_last_phase and 0 < self._patience <= self.progress.waited

    def save(self) -> None:
        """A checkpoint that a resumed run continues from."""
        if self._trainer.replicas.is_chief:
            tensors = {**self._trainer.state(), "progress": json.dumps(dataclasses.asdict(self.progress))}
            self._pacer.timed(lambda: self._run.save("latest", tensors, keep=2))

    def due(self, epoch_ends: bool) -> bool:
        """At the end of an epoch and after `LONGEST_UNSAVED` within one, unless saving takes too much of the time."""
        return (epoch_ends or self._pacer.elapsed() > LONGEST_UNSAVED) and self._pacer.due()

    def offer_best(self, step: int, accuracy: float, loss: float) -> bool:
        """Keeps the variables as `best` if these scores of a validation at `step` are the best so far."""
        progress = self.progress
        # Of equal accuracies the lower loss: on a small split many epochs tie, the first of them far from trained.
        better = (accuracy, -loss) > (progress.best_accuracy, -progress.best_loss)
        if better:
            if self._trainer.replicas.is_chief:
                tensors = {**self._trainer.model.variables_by_name, "global_step": self._trainer.step}
                self._run.save("best", tensors, keep=1)
            progress.best_accuracy, progress.best_loss, progress.best_step = accuracy, loss, step
        progress.waited = 0 if better else progress.waited + 1
        progress.validated_step = step
        return better


class Loop:
    """Trains a run, phase by phase."""

    def __init__(
        self,
        trainer: Trainer,
        order: data.Order,
        train: Examples,
        val: Examples,
        keeper: Keeper,
        log: Log | NoLog,
        stop: StopSignals,
    ):
        self.trainer, self.order, self.train, self.val = trainer, order, train, val
        self.keeper, self.log, self.stop = keeper, log, stop
        self._log_every = max(1, order.epoch_steps // LOGS_PER_EPOCH)

    def run_phase(self, phase: Phase, train_load: data.Load, val_load: data.Load, bar: tqdm) -> None:
        """Does what is left of a phase.

        Raises Stopped after a signal, when all is saved, and UserError where a loss or an output is not finite.
        """
        step, progress = self.trainer.steps_done(), self.keeper.progress
        if not phase.first_step <= step <= phase.end_step or self.keeper.out_of_patience(phase, step):
            return
        if step == phase.end_step == progress.validated_step:
            return  # perhaps the network holds the best variables by now: not to be saved as the latest
        order = dataclasses.replace(self.order, views=phase.views)
        schedule = decay_over(phase, self.trainer.settings)
        train_step = self.trainer.train_step(phase, schedule)
        forward = compiled_forward(self.trainer.model, phase.input_stage, self.trainer.replicas)
        val_batches = self._val_batches(val_load)
        try:
            if step == phase.first_step:
                progress.waited = 0
            elif step % order.epoch_steps == 0 and progress.validated_step < step:
                self._validate(phase, step, forward, val_batches, bar)
            self.log.restart_clock(order.images_before(step))
            for x, labels, _ in data.train_batches(train_load, self.train.labels, order, step, phase.end_step):
                if self.keeper.out_of_patience(phase, step):
                    break
                train_step(x, labels)
                step += 1
                bar.update(len(labels))
                epoch_ends = step % order.epoch_steps == 0
                if epoch_ends or step % order.epoch_steps % self._log_every == 0:
                    self._log_training(phase, step, schedule, bar)
                if epoch_ends:
                    self._validate(phase, step, forward, val_batches, bar)
                self._check_stop()
                if self.keeper.due(epoch_ends):
                    self._save(schedule)
        except Stopped:
            self._save(schedule)
            self.trainer.replicas.leave()
            raise
        self._save(schedule)

    def solve_phase(self, phase: Phase, train_load: data.Load, val_load: data.Load, bar: tqdm) -> None:
        """Solves the head of a phase, as if its steps were done; killed meanwhile, it begins again."""
        if self.keeper.progress.validated_step >= phase.end_step:
            return
        if self.trainer.steps_done() < phase.end_step:  # else a damaged cache has ended its validation
            self._solve(phase, train_load)
        bar.update(self.order.images_before(phase.end_step) - bar.n)
        forward = compiled_forward(self.trainer.model, phase.input_stage, self.trainer.replicas)
        self._validate(phase, phase.end_step, forward, self._val_batches(val_load), bar)
        self.keeper.save()

    def _solve(self, phase: Phase, train_load: data.Load) -> None:
        network, optimisation = self.trainer.model, self.trainer.settings
        if self.log.lines == 0:  # all weights are zero
            before = {"loss": math.log(network.class_count), "accuracy": float(np.mean(self.train.labels == 0))}
            self.log.training({**_place(self.order, phase, phase.first_step, "train"), **before}, 0)
        solved = solve_head(network, train_load, self.train, phase.views, optimisation, self.order.seed, self.stop)
        for variable in network.variables_from(phase.train_from).values():  # on other hardware the last bits differ
            variable.assign(self.trainer.replicas.of_chief(variable.numpy()))
        self.trainer.step.assign(phase.end_step)
        figures = {"loss": solved.loss, "accuracy": solved.accuracy, "strength": solved.strength}
        record = {**_place(self.order, phase, phase.end_step, "train"), **figures}
        images = self.order.images_before(phase.end_step)
        self.log.training({**record, "out_of_fold": as_records(solved.path)}, images)

    def _val_batches(self, load: data.Load) -> tf.data.Dataset:
        """What this worker validates, as many images at a time as it trains on, which fit the memory."""
        share = self.trainer.replicas.share
        size = -(-self.order.batch_size // (share.parts * self.trainer.settings.accumulate))
        return data.ordered_batches(load, self.val.labels, size, share=share)

    def _check_stop(self) -> None:
        """Raises Stopped after a signal, at the same step on all workers, whichever of them got it."""
        if received := self.trainer.replicas.largest(self.stop.received or 0):
            raise Stopped(received)

    def _save(self, schedule: Schedule) -> None:
        begin = time.monotonic()
        self._check_finite(schedule)
        self.keeper.save()
        self.log.pause_clock(time.monotonic() - begin)

    def _validate(self, phase: Phase, step: int, forward, val_batches: tf.data.Dataset, bar: tqdm) -> None:  # type: ignore[no-untyped-def]
        """Scores the whole validation split and keeps the variables if they are the best so far."""
        begin, count = time.monotonic(), len(self.val)
        replicas = self.trainer.replicas
        if replicas.workers == 1:  # none of several stops alone: the others would wait for it
            val_batches = self.stop.watch(val_batches, count, "validation", size=lambda batch: len(batch[0]))
        replicas.check_equal(self.trainer.state().values())
        logits = replicas.gather(predict(forward, val_batches))
        if not np.isfinite(logits).all():
            first = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise UserError(
                f"validation at step {step}: the outputs are not finite numbers, first for "
                f"{one_line(self.val.paths[first])}: lower --learning-rate or set --clip-norm and name a new --run; "
                f"best is the checkpoint of step {self.keeper.progress.best_step}"
            )
        accuracy, loss = metrics.accuracy(logits, self.val.labels), metrics.log_loss(logits, self.val.labels)
        seconds = time.monotonic() - begin
        best = self.keeper.offer_best(step, accuracy, loss)
        self.log.validation(
            {**_place(self.order, phase, step, "val"), "loss": loss, "accuracy": accuracy}, count / seconds
        )
        self.keeper.progress.log_lines = self.log.lines
        epoch = step // self.order.epoch_steps
        bar.write(f"epoch {epoch}: validation loss {loss:.4f}, accuracy {accuracy:.4f}" + (" (best)" if best else ""))
        self.log.pause_clock(time.monotonic() - begin)

    def _log_training(self, phase: Phase, step: int, schedule: Schedule, bar: tqdm) -> None:
        self._check_finite(schedule)
        loss, accuracy = self.trainer.take_sums()  # waits for the device, so the clock of the log is right
        rate = float(schedule(tf.constant(step - 1, tf.int64)))
        values = {"loss": loss, "accuracy": accuracy, "learning_rate": rate}
        self.log.training({**_place(self.order, phase, step, "train"), **values}, self.order.images_before(step))
        self.keeper.progress.log_lines = self.log.lines
        epochs = self.trainer.phases[-1].end_step // self.order.epoch_steps
        bar.set_description(f"epoch {-(-step // self.order.epoch_steps)}/{epochs}", refresh=False)
        bar.set_postfix_str(f"step {step}, loss {loss:.4f}, lr {rate:.2e}", refresh=False)

    def _check_finite(self, schedule: Schedule) -> None:
        """Nothing after a step whose loss or gradient was not finite may be saved or logged."""
        bad_step = int(self.trainer.bad_step.numpy())
        if bad_step < 0:
            return
        rate = float(schedule(tf.constant(bad_step, tf.int64)))
        files = ", ".join(one_line(self.train.paths[i]) for i in self.order.indices(bad_step))
        raise UserError(
            f"the loss or its gradient is not finite at step {bad_step + 1}, learning rate {rate:.3g}: lower "
            f"--learning-rate or set --clip-norm; the last checkpoint is intact. Images of that batch: {files}"
        )


def _place(order: data.Order, phase: Phase, step: int, split: str) -> dict:
    return {"step": step, "epoch": step / order.epoch_steps, "split": split, "phase": phase.name}
