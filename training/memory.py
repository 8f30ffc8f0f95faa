"""How many parts a batch has to be computed in to fit the device's memory."""

import gc
from collections.abc import Callable, Sequence

import tensorflow as tf

from console import UserError
from run_config import Phase
from training.step import Trainer, decay_over


def fitting_parts(make_trainer: Callable[[int], Trainer], phases: Sequence[Phase], rows: int, parts: int) -> int:
    """`parts`, doubled until a step of every phase fits the memory, up to a part for each image.

    make_trainer: gives a trainer whose `accumulate` is its argument. rows: images of a step on one device.
    The real step is tried, without changing a variable. Raises UserError where not even single images fit.
    """
    while not all(_fits(make_trainer(parts), phase, rows) for phase in phases):
        if parts >= rows:
            raise UserError(
                "--auto-batch: the device has not enough memory to train on a single image: take a smaller "
                "--image-size or a later --train-from"
            )
        parts = min(2 * parts, rows)
    return parts


def _fits(trainer: Trainer, phase: Phase, rows: int) -> bool:
    trainer.bad_step.assign(0)  # as if a step had not been finite: from there on a step changes no variable
    x = tf.zeros([rows, *trainer.model.input_shape(phase.input_stage)])
    try:
        trainer.train_step(phase, decay_over(phase, trainer.settings))(x, tf.zeros([rows], tf.int64))
        trainer.steps_done()  # waits for the device
    except tf.errors.ResourceExhaustedError:
        return False
    finally:
        del trainer
        gc.collect()  # the compiled step and its trainer refer to each other, and hold memory of the device
    return True
