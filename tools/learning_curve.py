"""Accuracy against the number of training images: python -m tools.learning_curve DATA --examples-per-class 1 2 5 10.

Would more images help? A head is trained on cached activations for each number of images per class and each seed;
the seed draws the images, larger draws contain the smaller ones. Takes the other flags of train.py, of which only
those of the head, the optimiser and the preprocessing matter: everything below the head is frozen.
"""

import dataclasses
import os

from console import ArgumentParser, StopSignals, UserError, quiet_tensorflow, run_script

quiet_tensorflow()

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from tqdm import tqdm

import data
from dataset import layouts
from files import check_writable, write_csv
from reports import metrics
from reports.pictures import BLUE, save_figure
from reports.tables import table
from run_config import Phase
from training.evaluation import readable_failures
from training.preparation import Prepared, prepare
from training.settings import Settings, add_flags
from training.step import compiled_forward, decay_over, predict

IGNORED = ("examples_per_class", "train_from", "head_epochs", "epochs", "patience", "devices", "auto_batch")
Row = tuple[int, int, float, float]  # images per class, seed, validation accuracy, validation loss


def learning_curve(settings: Settings, data_path: str, counts: list[int], seeds: int, steps: int) -> list[Row]:
    """Trains a head of `steps` steps for each number of images per class and each seed; the last step counts."""
    settings = dataclasses.replace(settings, train_from="head", head_epochs=0, examples_per_class=0)
    prepared = prepare(settings, data_path)
    train, val = prepared.examples["train"], prepared.examples["val"]
    # One cache serves every run: it holds the images of the largest draw of any seed.
    drawn = [layouts.take_per_class(train, max(counts), seed) for seed in range(seeds)]
    union = sorted({path for draw in drawn for path in draw.paths})
    position = {path: index for index, path in enumerate(train.paths)}
    pool = train.subset([position[path] for path in union])
    phase = prepared.config.phases[-1]
    if not phase.views:
        raise UserError("a learning curve is made from cached activations: give --cached-views 2")
    head = prepared.network.variables_from(phase.train_from)
    start = {name: variable.numpy() for name, variable in head.items()}
    rows: list[Row] = []
    with StopSignals() as stop:
        loads = prepared.cached_loads([phase], {"train": pool, "val": val}, stop)[phase.input_stage]
        for count, seed in tqdm([(n, seed) for n in counts for seed in range(seeds)], unit="run", leave=False):
            for name, variable in head.items():
                variable.assign(start[name])
            chosen = layouts.take_per_class(train, count, seed)
            run = dataclasses.replace(settings, seed=seed)
            one = dataclasses.replace(prepared, settings=run, examples={"train": chosen})
            logits = _train_head(one, phase, loads, pool, val, steps)
            rows.append((count, seed, metrics.accuracy(logits, val.labels), metrics.log_loss(logits, val.labels)))
            stop.check()
    return rows


def _train_head(
    prepared: Prepared,
    phase: Phase,
    loads: dict[str, data.Load],
    pool: layouts.Examples,
    val: layouts.Examples,
    steps: int,
) -> np.ndarray:
    """Logits of the validation images, [N, classes], after training on the prepared examples, all out of `pool`."""
    settings, chosen = prepared.settings, prepared.examples["train"]
    row_of = {path: row for row, path in enumerate(pool.paths)}
    rows = np.array([row_of[path] for path in chosen.paths])  # of the cache, for each chosen example
    place = np.zeros(len(pool), np.int64)
    place[rows] = np.arange(len(chosen))

    def load(positions: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
        in_pool = positions.map(data.traced(lambda index, view: (tf.gather(rows, index), view)))
        return loads["train"](in_pool, batch_size).map(data.traced(lambda x, row: (x, tf.gather(place, row))))

    order = data.Order(len(chosen), settings.batch_size, settings.seed, phase.views)
    end_step = -(-steps // order.epoch_steps) * order.epoch_steps
    phase = dataclasses.replace(phase, first_step=0, end_step=end_step)
    trainer = prepared.trainer([phase])
    step = trainer.train_step(phase, decay_over(phase, trainer.settings))
    for x, labels, _ in data.train_batches(load, chosen.labels, order, 0, end_step):
        step(x, labels)
    forward = compiled_forward(trainer.model, phase.input_stage)
    return predict(forward, data.ordered_batches(loads["val"], val.labels, settings.batch_size))


def draw(path: str, counts: list[int], accuracies: np.ndarray) -> None:
    """Mean accuracy over seeds with its standard deviation and every run; accuracies [counts, seeds]."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    mean = accuracies.mean(axis=1)
    deviation = accuracies.std(axis=1, ddof=1) if accuracies.shape[1] > 1 else np.zeros(len(counts))
    for column in accuracies.T:
        axes.plot(counts, column, ".", color="#999999", markersize=5)
    axes.errorbar(counts, mean, deviation, color=BLUE, marker="o", capsize=4, label="mean and standard deviation")
    axes.plot([], [], ".", color="#999999", label=f"each of {accuracies.shape[1]} seeds")
    axes.set(xscale="log", xlabel="training images per class", ylabel="validation accuracy", title="Learning curve")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, path)


def main() -> int:
    parser = ArgumentParser(prog="tools.learning_curve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", metavar="DATA", help="as for train.py")
    parser.add_argument("--examples-per-class", type=int, nargs="+", default=[1, 2, 5, 10, 25, 50], metavar="N")
    parser.add_argument("--seeds", type=int, default=3, help="runs for each number of images (default: 3)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of a run (default: 300)")
    parser.add_argument("--output", default="learning-curve.png", help="picture to write; the numbers go beside it")
    add_flags(parser, without=IGNORED)
    values = vars(parser.parse_args())
    data_path, output, seeds, steps = (values.pop(name) for name in ("data", "output", "seeds", "steps"))
    counts = sorted(set(values.pop("examples_per_class")))
    if min(counts) < 1 or seeds < 1 or steps < 1:
        raise UserError("--examples-per-class, --seeds and --steps must be at least 1")
    check_writable("--output", output)
    with readable_failures():
        rows = learning_curve(Settings.from_dict(values), data_path, counts, seeds, steps)
    accuracies = np.array([row[2] for row in rows]).reshape(len(counts), seeds)
    header = ["images_per_class", "seed", "accuracy", "loss"]
    write_csv(os.path.splitext(output)[0] + ".csv", header, rows)
    draw(output, counts, accuracies)
    lines = [
        [n, f"{a.mean():.4f}", f"{a.std(ddof=1):.4f}" if seeds > 1 else ""]
        for n, a in zip(counts, accuracies, strict=True)
    ]
    print(table(lines, ["images per class", "mean accuracy", "deviation"]))
    print(f"picture in {output}")
    return 0


if __name__ == "__main__":
    run_script(main)
