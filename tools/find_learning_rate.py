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
from files import check_writable, write_csv
from reports.pictures import BLUE, ORANGE, save_figure
from training.evaluation import readable_failures
from training.preparation import prepare
from training.settings import Settings, add_flags
from training.step import Schedule

SMOOTHING = 0.9  # of the exponential mean of the loss
DIVERGED = 4.0  # times the smallest smoothed loss: the test ends


def exponential(steps: int, lowest: float, highest: float) -> Schedule:
    """A learning rate that grows from `lowest` to `highest` by one factor a step."""
    return lambda step: lowest * (highest / lowest) ** (tf.cast(step, tf.float32) / float(steps - 1))


def range_test(settings: Settings, data_path: str, steps: int) -> list[tuple[float, float]]:
    """(learning rate, loss of the batch) of each step, until the loss diverges."""
    prepared = prepare(settings, data_path)
    config, train = prepared.config, prepared.examples["train"]
    order = data.Order(len(train), settings.batch_size, settings.seed, config.phases[-1].views)
    steps = -(-steps // order.epoch_steps) * order.epoch_steps
    phase = dataclasses.replace(config.phases[-1], first_step=0, end_step=steps)
    schedule = exponential(steps, settings.end_learning_rate, settings.learning_rate)
    trainer = prepared.trainer([phase])
    curve: list[tuple[float, float]] = []
    with StopSignals() as stop:
        load = data.image_loader(train, config.preprocessing, settings.seed)
        if phase.views:
            load = prepared.cached_loads([phase], {"train": train}, stop)[phase.input_stage]["train"]
        batches = data.train_batches(load, train.labels, order, 0, steps)
        train_step = trainer.train_step(phase, schedule)
        watched = stop.watch(batches, order.images_before(steps), "range test", size=lambda batch: len(batch[0]))
        for step, (x, labels, _) in enumerate(watched):
            train_step(x, labels)
            loss, _ = trainer.take_sums()
            curve.append((float(schedule(tf.constant(step, tf.int64))), loss))
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
    add_flags(parser, without=("devices", "auto_batch"), learning_rate=1.0, end_learning_rate=1e-6)
    values = vars(parser.parse_args())
    data_path, output, steps = values.pop("data"), values.pop("output"), values.pop("steps")
    if steps < 20:
        raise UserError(f"--steps {steps}: must be at least 20")
    check_writable("--output", output)
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
