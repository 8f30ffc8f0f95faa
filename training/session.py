"""One training run from its settings: find the images, restore the weights, open the run directory, train, report."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

import data
import devices
from console import StopSignals, UserError, one_line, progress_bar
from dataset import images, layouts
from files import check_folder, write_text
from replicas import Replicas, find_replicas
from run import Run
from run_config import Phase, RunConfig
from training import features, plan
from training.evaluation import (
    batch_logits,
    calibrate,
    readable_failures,
    write_scores,
)
from training.known import write_known
from training.log import Log, NoLog
from training.loop import Keeper, Loop
from training.memory import fitting_parts
from training.preparation import Prepared, copy_variables, prepare, resume
from training.settings import Settings


def train(settings: Settings, data_path: str, run: Run, command: list[str]) -> dict[str, Any]:
    """Trains `run` on the images of `data_path`, from the start or from its last checkpoint, and evaluates its best.

    Returns the scores of the best checkpoint on the validation images (the content of results-val.json). Raises
    UserError for what the user can fix and console.Stopped after a signal; the run can then be resumed.
    """
    devices.grow_gpu_memory()
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    settings = settings.resolved()
    if settings.image_root:
        settings = dataclasses.replace(settings, image_root=os.path.abspath(settings.image_root))
    refuse_inside(data_path, {"--run": run.path, "--cache-dir": Path(settings.cache_dir)})
    devices.use_threads(run.config().threads if run.exists() else devices.default_threads())
    replicas = find_replicas(settings.devices)
    _check_devices(settings, replicas)
    if not replicas.is_chief:
        return _train_with_chief(settings, data_path, run, replicas)
    prepared = None if run.exists() else prepare(settings, data_path, command)
    if prepared and any(phase.views for phase in prepared.config.phases):
        check_folder("--cache-dir", settings.cache_dir)
    with run.locked():
        begins = not run.exists()  # another process may have made it a moment ago
        if prepared is None or not begins:
            prepared = resume(run, settings, data_path)
        if settings.auto_batch and (begins or not run.config().settings.get("auto_batch")):
            prepared = _in_fitting_parts(prepared, replicas.count)
        if begins:
            plan.write_images(run, prepared.images)
            run.create(prepared.config)
        with StopSignals() as stop, readable_failures(), replicas.losses_explained():
            for line in _introduction(run, prepared.config, prepared.found.remarks(), replicas):
                print(line, flush=True)
            replicas.largest(prepared.settings.accumulate)  # the other workers begin with the run as it is now
            results = _train(run, prepared, stop, replicas)
            replicas.leave()
            return results


def _train_with_chief(settings: Settings, data_path: str, run: Run, replicas: Replicas) -> dict[str, Any]:
    """`train` of a worker that computes with the chief and writes nothing."""
    with readable_failures(), replicas.losses_explained():
        parts = replicas.largest(0)  # the chief's, when it has made the run
        if not run.exists():
            raise UserError(f"--run {run.path}: not here, but made by worker 0: name a folder that all workers share")
        prepared = resume(run, settings, data_path)
        settings = dataclasses.replace(prepared.settings, accumulate=parts)
        with StopSignals() as stop:
            results = _train(run, dataclasses.replace(prepared, settings=settings), stop, replicas)
            replicas.leave()
            return results


def _check_devices(settings: Settings, replicas: Replicas) -> None:
    """Raises UserError for settings that several devices can't keep."""
    if settings.batch_size < replicas.count:
        raise UserError(f"--batch-size {settings.batch_size}: less than an image for each of {replicas.count} devices")
    if settings.compile == "on" and replicas.count > 1:
        raise UserError(f"--compile on: XLA compiles a step on one device, not on {replicas.count}: leave it out")


def _in_fitting_parts(prepared: Prepared, device_count: int) -> Prepared:
    """`prepared` with the `accumulate` with which its steps fit the memory of each of the devices."""
    settings = prepared.settings

    def in_parts(parts: int) -> Prepared:
        changed = dataclasses.replace(settings, accumulate=parts)
        config = dataclasses.replace(prepared.config, settings=changed.as_dict())
        return dataclasses.replace(prepared, settings=changed, config=config)

    stepwise = [phase for phase in prepared.config.phases if phase.solver == "sgd"]
    rows = -(-settings.batch_size // device_count)
    parts = fitting_parts(lambda parts: in_parts(parts).trainer(), stepwise, rows, settings.accumulate)
    print(f"memory     a step of {rows} images on a device fits in {parts} part{'s' if parts > 1 else ''}", flush=True)
    return in_parts(parts)


def refuse_inside(data_path: str, places: Mapping[str, Path]) -> None:
    """Raises UserError where what we write would lie among the images of a folder, and be taken for some of them."""
    root = os.path.realpath(data_path)
    for flag, place in places.items():
        if os.path.isdir(root) and os.path.commonpath([root, os.path.realpath(place)]) == root:
            raise UserError(f"{flag} {place} lies inside DATA, {data_path}: name a folder elsewhere")


def _introduction(run: Run, config: RunConfig, remarks: str, replicas: Replicas) -> list[str]:
    """The lines that say what is about to be trained, on what."""
    gpus, problem = tf.config.get_visible_devices("GPU"), devices.explain_gpu()
    device = f"{len(gpus)} GPU" if gpus else "CPU"
    if replicas.count > 1:
        device += f", {replicas.count} devices of {replicas.workers} worker{'s' if replicas.workers > 1 else ''}"
    counts = ", ".join(f"{count} {split}" for split, count in config.counts.items())
    return [
        f"run        {one_line(run.path)}",
        f"data       {one_line(config.data.root)} ({config.data.layout}): {len(config.class_names)} classes, {counts}",
        *([f"note       {remarks}"] if remarks else []),
        f"weights    {one_line(config.pretrained.source)}: {config.pretrained.summary}",
        f"head       {config.model.head} ({config.head_reason})",
        "training   "
        + ", then ".join(
            (
                f"{p.train_from} solved"
                if p.solver == "lbfgs"
                else f"steps {p.first_step}-{p.end_step} from {p.train_from}"
            )
            + (f" on {p.views} cached views" if p.views else "")
            for p in config.phases
        ),
        f"device     {device}, {config.precision}{f': {problem}' if problem else ''}",
    ]


def _train(run: Run, prepared: Prepared, stop: StopSignals, replicas: Replicas) -> dict[str, Any]:
    """Does what is left of the run; returns the scores of its best checkpoint on the validation images."""
    settings, trainer = prepared.settings, prepared.trainer(replicas=replicas)
    keeper = Keeper(run, trainer, settings.patience)
    keeper.restore()
    if replicas.strategy:
        copy_variables(trainer.model, prepared.network)  # what was restored: it computes the cached activations
        replicas.check_equal(trainer.state().values())
    if keeper.is_done() and (stored := _stored_results(run)):
        print("this run is complete: name a new --run to train again", flush=True)
        return stored
    examples = prepared.examples
    log: Log | NoLog = NoLog()
    if replicas.is_chief:
        log = Log(run, keeper.progress.log_lines)
        log.events.images("train", "inputs", _sample_inputs(examples["train"], prepared.config), step=0)
    order = data.Order(len(examples["train"]), settings.batch_size, settings.seed, share=replicas.share)
    loop = Loop(trainer, order, examples["train"], examples["val"], keeper, log, stop)
    results: dict[str, Any] = {}
    while not results:
        try:
            with readable_failures():
                phase, loads = _train_phases(prepared, loop)
                if not isinstance(log, Log):  # not the chief, which alone evaluates: wait for its results below
                    accuracy, log_loss = replicas.gather(np.zeros((0, 2), np.float32))[0].tolist()
                    return {"accuracy": accuracy, "log_loss": log_loss}
                results = _evaluate_best(run, prepared, log, keeper.progress.best_step, phase, loads, stop)
        except features.DamagedCache as damage:  # nothing was trained on it: the loop continues at the same step
            damage.delete_file()
            if replicas.workers > 1:
                raise UserError(f"{damage.path} was damaged and is deleted: start all workers again") from None
            print(f"cache      {one_line(damage.path)} is damaged: computed again", flush=True)
    write_text(run.path / ".complete", "")  # a kill may have left results, but only half of them
    replicas.gather(np.array([[results["accuracy"], results["log_loss"]]], np.float32))
    return results


def _stored_results(run: Run) -> dict[str, Any] | None:
    """The results of a run that is complete; None where they are missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads((run.path / "results-val.json").read_text(encoding="utf-8"))
        if (run.path / ".complete").is_file() and all(np.isfinite([stored["accuracy"], stored["log_loss"]])):
            return stored
    return None


def _train_phases(prepared: Prepared, loop: Loop) -> tuple[Phase, dict[str, data.Load]]:
    """Does what is left of the run; returns its last phase, and what loads the images of each split for that."""
    config, settings, replicas = prepared.config, prepared.settings, loop.trainer.replicas
    examples = {split: prepared.examples[split] for split in ("train", "val")}
    # Of phases still to do: once a phase has changed a stage, what a finished phase cached above it is gone.
    to_do = [phase for phase in config.phases if phase.end_step >= loop.trainer.steps_done()]
    cached = prepared.cached_loads(to_do, examples, loop.stop, replicas.share.part, prepared.listed)
    of_images = {split: data.image_loader(examples[split], config.preprocessing, settings.seed) for split in examples}
    done = loop.order.images_before(loop.trainer.steps_done())
    with progress_bar(settings.epochs * len(examples["train"]), done, "training") as bar:
        for phase in to_do:
            loads = cached[phase.input_stage] if phase.views else of_images
            train_phase = loop.solve_phase if phase.solver == "lbfgs" else loop.run_phase
            train_phase(phase, loads["train"], loads["val"], bar)
    return phase, loads


def _evaluate_best(
    run: Run, prepared: Prepared, log: Log, step: int, phase: Phase, loads: dict[str, data.Load], stop: StopSignals
) -> dict[str, Any]:
    """Evaluates the run's best checkpoint, that of `step`, on the validation images.

    `loads` give the images of each split as the last `phase` takes them.
    """
    config, network = prepared.config, prepared.network
    val = prepared.examples["val"]
    log.draw_curves()
    run.load_best(network)
    # The frozen stages are those of the last phase's input, so its cached activations serve the best checkpoint too.
    batches = data.ordered_batches(loads["val"], val.labels, prepared.settings.images_at_once)
    logits = np.concatenate(list(batch_logits(network, batches, len(val), "val", phase.input_stage, stop)))
    temperature = calibrate(run, logits, val.labels)
    if phase.views and network.pools(phase.input_stage):
        write_known(run, prepared.examples["train"], loads["train"], phase.views, val, loads["val"], stop)
    results = write_scores(run.path, config, [logits], val, config.data.root, "val", temperature)
    pictures = ("confusion-val", "confusion-val-normalised", "worst-val", "reliability-val", "head-strengths")
    for file in (run.path / f"{picture}.png" for picture in pictures):
        if file.exists():  # the last one where a head was solved
            log.events.images("val", file.stem, images.read_image(file)[None], step)
    log.events.close()
    return results


def _sample_inputs(examples: layouts.Examples, config: RunConfig, count: int = 16) -> np.ndarray:
    """What the network sees of the first training images of the run, uint8 [count, S, S, 3]."""
    load = data.image_loader(examples, config.preprocessing, config.model.seed)
    order = data.Order(len(examples), count, config.model.seed)
    batch = next(iter(data.train_batches(load, examples.labels, order, 0, order.epoch_steps)))
    return data.to_picture(batch[0].numpy(), config.preprocessing)
