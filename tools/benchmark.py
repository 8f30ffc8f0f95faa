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
from training import plan
from training.session import cached_loads, readable_failures
from training.settings import Settings, add_flags
from training.step import Phase, Trainer

WARM_UP = 2  # steps of each way that are not counted


def timed_steps(
    trainer: Trainer, phase: Phase, load: data.Load, labels: np.ndarray, batch_size: int
) -> Iterator[float]:
    """Seconds of one step after another, reading its batch included; the device's work has ended at each."""
    step = trainer.train_step(phase)
    batches = iter(data.train_batches(load, labels, batch_size, 0, 0, phase.last_step, phase.views))
    while True:
        begin = time.perf_counter()
        x, y, _ = next(batches)
        step(x, y)
        trainer.take_sums()
        yield time.perf_counter() - begin


def compare(settings: Settings, data_path: str, steps: int) -> dict[str, list[float]]:
    """{way: seconds of each of its `steps` steps}."""
    found = plan.find_images(settings, data_path)
    config, arrays = plan.new_config(settings, found, command=[])
    train = plan.usable_examples(settings, found, config["excluded"])["train"]
    used = train.subset(list(range(min(len(train), settings.batch_size * 4))))
    planned = Phase(**config["phases"][-1])
    if planned.train_from == "conv1":
        raise UserError("--train-from conv1: nothing is frozen, so nothing can be cached; name a later stage")
    phase = dataclasses.replace(
        planned, first_step=0, last_step=data.steps_per_epoch(len(used), settings.batch_size) * 10**6
    )
    ways = {
        "cached": dataclasses.replace(phase, input_stage=phase.train_from, views=max(1, phase.views)),
        "uncached": dataclasses.replace(phase, input_stage="conv1", views=0),
    }
    trainer = plan.make_trainer(config, settings, used, list(ways.values()))
    plan.restore_pretrained(trainer.model, arrays, config["pretrained"]["source"])
    spec = plan.preprocessing(settings)
    with StopSignals() as stop:
        cached = cached_loads(trainer.model, [ways["cached"]], {"train": used}, spec, settings.cache_dir, stop)
        loads = {
            "cached": cached[phase.train_from]["train"],
            "uncached": data.image_loader(used, spec, settings.seed),
        }
        timers = {way: timed_steps(trainer, ways[way], loads[way], used.labels, settings.batch_size) for way in ways}
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
