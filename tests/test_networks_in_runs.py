"""Networks with fixed batch normalisation in whole runs: cached equals uncached, and a stopped run is the whole one."""

import signal
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import data
import model
from console import Stopped, StopSignals
from dataset.contents import fingerprints
from model import Network
from run import Run
from tests import kill_run
from tests.tiny_networks import filled, tiny_inception, tiny_resnet
from training import features, loop, plan, session
from training.settings import Settings

SIZES = {"tiny_resnet": 32, "tiny_inception": 75}


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.NETWORKS, "tiny_resnet", tiny_resnet())
    monkeypatch.setitem(model.NETWORKS, "tiny_inception", tiny_inception())


@pytest.mark.parametrize("name", SIZES)
def test_cached_activations_are_those_of_the_network_at_every_cut(
    name: str, sample_images: Path, tmp_path: Path
) -> None:
    network = filled(Network(name, "gap", 3, SIZES[name]))
    settings = Settings(pretrained="none", network=name, image_size=SIZES[name])
    val = plan.list_images(settings, str(sample_images)).splits["val"]
    spec = data.Preprocessing(SIZES[name], mean_rgb=(120.0, 115.0, 105.0), std_rgb=(60.0, 60.0, 60.0))
    prints, load = fingerprints(val.paths, {}, 1), data.image_loader(val, spec, features.VIEW_SEED)
    stages = network.stages[1:]
    caches = [features.Cache(network, s, val, prints, spec, [data.CENTRAL_VIEW], str(tmp_path)) for s in stages]
    features.fill(caches, load, StopSignals())
    x, *_ = next(iter(data.ordered_batches(load, val.labels, len(val))))
    for stage, cache in zip(stages, caches, strict=True):
        kept, *_ = next(iter(data.ordered_batches(cache.loader(), val.labels, len(val))))
        below = network.stages[network.stages.index(stage) - 1]
        expected = tf.cast(network.forward(x, last=below), tf.float32)
        if network.pools(stage):
            expected = tf.reduce_mean(expected, axis=[1, 2], keepdims=True)
        scale = float(np.abs(expected).max())
        assert scale > 0
        assert np.abs(kept - expected).max() <= 1e-3 * scale, stage
        logits = network.forward(kept, first=stage)
        assert np.abs(logits - network.forward(x)).max() < 5e-3 * float(np.abs(network.forward(x)).max())


def stop_at_step_7(keeper: loop.Keeper, epoch_ends: bool) -> bool:
    if keeper._trainer.steps_done() == 7:
        raise Stopped(signal.SIGTERM)
    return False


@pytest.mark.parametrize("name", SIZES)
def test_a_stopped_run_is_the_whole_one(
    name: str, sample_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = filled(Network(name, "gap", 3, SIZES[name]))
    given = {key: v.numpy() for key, v in start.variables_by_name.items() if start.stage_of(key) != "gap"}
    np.savez("start.npz", **given)
    last = start.stages[-2]
    fixed = {"network": name, "pretrained": "start.npz", "image_size": SIZES[name], "train_from": last}
    fixed |= {"epochs": 2, "head_epochs": 1, "cached_views": 2, "batch_size": 8, "learning_rate": 1e-4}
    whole, stopped = Run(tmp_path / "whole"), Run(tmp_path / "stopped")
    session.train(Settings(**fixed, cache_dir="one"), str(sample_images), whole, [])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Keeper, "due", stop_at_step_7)
        with pytest.raises(Stopped):
            session.train(Settings(**fixed, cache_dir="two"), str(sample_images), stopped, [])
    session.train(Settings(**fixed, cache_dir="two"), str(sample_images), stopped, [])
    assert kill_run.compare(whole.path, stopped.path) == []
    # The statistics are those of the start, in every checkpoint; the last stage has learnt.
    loaded = whole.load("latest")
    assert loaded is not None
    moved = {key for key, value in given.items() if not np.array_equal(loaded[0][key], value)}
    assert moved
    assert moved <= {key for key in start.variables_from(last) if start.stage_of(key) == last}
