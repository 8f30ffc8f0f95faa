"""Training speed with and without cached activations: python -m tools.benchmark DATA --train-from conv5 [flags].

The two ways take turns, step by step, in one process, since machines are shared and their speed drifts; the median of
each and the ratio are printed. Computing the cache is not part of it. Takes the flags of train.py.
"""

import dataclasses
import time
from collections.abc import Iterator

from console import ArgumentParser, StopSignals, UserError, quiet_tensorflow, run_script

quiet_tensorflow()

import numpy as np

import data
from reports.tables import table
from run import Phase
from training.evaluation import readable_failures
from training.session import prepare
from training.settings import Settings, add_flags
from training.step import Trainer, decay_over

WARM_UP = 2  # steps of each way that are not counted


def timed_steps(
    trainer: Trainer, phase: Phase, load: data.Load, labels: np.ndarray, order: data.Order
) -> Iterator[float]:
    """Seconds of one step after another, reading its batch included; the device's work has ended at each."""
    step = trainer.train_step(phase, decay_over(phase, trainer.settings))
    order = dataclasses.replace(order, views=phase.views)
    batches = iter(data.train_batches(load, labels, order, 0, phase.end_step))
    while True:
        begin = time.perf_counter()
        x, y, _ = next(batches)
        step(x, y)
        trainer.take_sums()
        yield time.perf_counter() - begin


def compare(settings: Settings, data_path: str, steps: int) -> dict[str, list[float]]:
    """{way: seconds of each of its `steps` steps}."""
    prepared = prepare(settings, data_path)
    train, images = prepared.examples["train"], prepared.network.stages[0]
    used = train.subset(list(range(min(len(train), settings.batch_size * 4))))
    planned = prepared.config.phases[-1]
    if planned.train_from == images:
        raise UserError(f"--train-from {images}: nothing is frozen, so nothing can be cached; name a later stage")
    order = data.Order(len(used), settings.batch_size, settings.seed)
    phase = dataclasses.replace(planned, first_step=0, end_step=order.epoch_steps * 10**6)
    ways = {
        "cached": dataclasses.replace(phase, input_stage=phase.train_from, views=max(1, phase.views)),
        "uncached": dataclasses.replace(phase, input_stage=images, views=0),
    }
    trainer = prepared.trainer(list(ways.values()))
    with StopSignals() as stop:
        cached = prepared.cached_loads([ways["cached"]], {"train": used}, stop)
        loads = {
            "cached": cached[phase.train_from]["train"],
            "uncached": data.image_loader(used, prepared.config.preprocessing, settings.seed),
        }
        timers = {way: timed_steps(trainer, ways[way], loads[way], used.labels, order) for way in ways}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(WARM_UP + steps):
            for way, timer in timers.items():
                seconds[way].append(next(timer))
                stop.check()
    return {way: values[WARM_UP:] for way, values in seconds.items()}


def main() -> int:
    parser = ArgumentParser(prog="tools.benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", metavar="DATA", help="as for train.py")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each way (default: 10)")
    add_flags(parser, train_from="conv5", batch_size=32)
    values = vars(parser.parse_args())
    data_path, steps = values.pop("data"), values.pop("steps")
    settings = Settings.from_dict(values)
    with readable_failures():
        seconds = compare(settings, data_path, steps)
    rows = []
    for way, values_of_way in seconds.items():
        rates = settings.batch_size / np.array(values_of_way)
        rows.append([way, f"{np.median(rates):.2f}", f"{rates.min():.2f}", f"{rates.max():.2f}"])
    print(table(rows, ["training on", "images/s (median)", "slowest", "fastest"]))
    ratio = np.median(np.array(seconds["cached"]) / np.array(seconds["uncached"]))
    print(f"a cached step takes {ratio:.3f} of an uncached one (median of {steps} pairs)")
    return 0


if __name__ == "__main__":
    run_script(main)
