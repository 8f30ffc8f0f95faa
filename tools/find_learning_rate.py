"""Learning-rate range test: python -m tools.find_learning_rate DATA [--output PICTURE] [flags of train.py].

Trains for some hundred steps while the learning rate grows exponentially, and draws the loss against it: Smith,
"Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3. Takes every flag of train.py; nothing but
the picture and its numbers (CSV) is written.
"""

import argparse
import dataclasses
import os

from console import UserError, quiet_tensorflow, run_script

quiet_tensorflow()

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import data
from console import ArgumentParser, StopSignals
from files import write_csv
from reports.pictures import BLUE, ORANGE, save_figure
from training import plan
from training.loop import progress_bar
from training.session import cached_loads, readable_failures
from training.settings import Settings, add_flags
from training.step import Phase, Trainer

SMOOTHING = 0.9  # of the exponential mean of the loss
DIVERGED = 4.0  # times the smallest smoothed loss: the test ends


class RangeTrainer(Trainer):
    """Its learning rate grows from the end to the start learning rate of its settings, by one factor a step."""

    def learning_rate(self, phase: Phase, step: tf.Tensor) -> tf.Tensor:
        lowest, highest = self.settings.end_learning_rate, self.settings.learning_rate
        return lowest * (highest / lowest) ** (tf.cast(step, tf.float32) / float(phase.last_step - 1))


def range_test(settings: Settings, data_path: str, steps: int) -> list[tuple[float, float]]:
    """(learning rate, loss of the batch) of each step, until the loss diverges."""
    found = plan.find_images(settings, data_path)
    config, arrays = plan.new_config(settings, found, command=[])
    train = plan.usable_examples(settings, found, config["excluded"])["train"]
    planned = Phase(**config["phases"][-1])
    epoch_steps = data.steps_per_epoch(len(train), settings.batch_size)
    steps = -(-steps // epoch_steps) * epoch_steps
    phase = dataclasses.replace(planned, first_step=0, last_step=steps)
    trainer = plan.make_trainer(config, settings, train, [phase], RangeTrainer)
    plan.restore_pretrained(trainer.model, arrays, config["pretrained"]["source"])
    spec = plan.preprocessing(settings)
    with StopSignals() as stop:
        loads = cached_loads(trainer.model, [phase], {"train": train}, spec, settings.cache_dir, stop)
        load = loads[phase.input_stage]["train"] if phase.views else data.image_loader(train, spec, settings.seed)
        batches = data.train_batches(load, train.labels, settings.batch_size, settings.seed, 0, steps, phase.views)
        train_step = trainer.train_step(phase)
        curve: list[tuple[float, float]] = []
        with progress_bar(steps * settings.batch_size, 0, "range test", leave=False) as bar:
            for step, (x, labels, _) in enumerate(batches):
                train_step(x, labels)
                loss, _ = trainer.take_sums()
                curve.append((float(trainer.learning_rate(phase, tf.constant(step, tf.int64))), loss))
                bar.update(len(labels))
                stop.check()
                smooth = smoothed([loss for _, loss in curve])
                if not np.isfinite(loss) or smooth[-1] > DIVERGED * smooth.min():
                    break
    return curve


def smoothed(losses: list[float]) -> np.ndarray:
    """Exponential mean with its start-up bias removed (as Adam's), float64 [N]."""
    mean, result = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        result.append(mean / (1 - SMOOTHING**count))
    return np.array(result)


def suggest(rates: np.ndarray, smooth: np.ndarray) -> float:
    """A tenth of the rate at which the smoothed loss is smallest: a start for a schedule that decays to zero."""
    return float(rates[np.nanargmin(smooth)]) / 10


def draw(path: str, rates: np.ndarray, losses: np.ndarray, smooth: np.ndarray, suggestion: float) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="#999999", linewidth=0.8, label="loss of each batch")
    axes.plot(rates, smooth, color=BLUE, linewidth=2, label="smoothed")
    axes.axvline(suggestion, color=ORANGE, linestyle="--", label=f"suggestion {suggestion:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="Learning-rate range test")
    axes.set_ylim(0, 1.1 * float(np.nanmax(smooth[np.isfinite(smooth)])))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def main() -> int:
    parser = ArgumentParser(
        prog="tools.find_learning_rate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", help="as for train.py")
    parser.add_argument("--steps", type=int, default=200, help="steps of the test, rounded up to epochs (default: 200)")
    parser.add_argument("--output", default="learning-rate.png", help="picture to write; the numbers go beside it")
    add_flags(parser, learning_rate=1.0, end_learning_rate=1e-6)
    values = vars(parser.parse_args())
    data_path, output, steps = values.pop("data"), values.pop("output"), values.pop("steps")
    if steps < 20:
        raise UserError(f"--steps {steps}: must be at least 20")
    with readable_failures():
        curve = range_test(Settings.from_dict(values), data_path, steps)
    rates, losses = (np.array(column) for column in zip(*curve, strict=True))
    smooth = smoothed(losses.tolist())
    suggestion = suggest(rates, smooth)
    write_csv(
        os.path.splitext(output)[0] + ".csv",
        ["learning_rate", "loss", "smoothed"],
        zip(rates, losses, smooth, strict=True),
    )
    draw(output, rates, losses, smooth, suggestion)
    print(f"the loss is smallest at {10 * suggestion:.1e}; try --learning-rate {suggestion:.1e}; picture in {output}")
    return 0


if __name__ == "__main__":
    run_script(main)
