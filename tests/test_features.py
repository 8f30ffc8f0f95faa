"""Cached activations against the uncached network: values, files, keys, interruptions, and whole training runs."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

import data
import model as model_module
from console import UserError
from dataset.layouts import Examples
from model import Network
from run import Run
from training import features, plan, session
from training.features import BATCH_SIZE, DISK_RESERVE, VIEW_SEED, Cache, check_disk
from training.settings import Settings
from training.step import Phase

CENTRAL, VIEWS = [data.CENTRAL_VIEW], [0, 1]
COUNT = 70  # two whole batches of rows and a short one
SPEC = data.Preprocessing(image_size=32)


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_module.NETWORKS, "tiny", ((4,), (6,), (6,), (8,), (8,)))


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    """Files that are only looked at from outside: `noise_loader` needs no content."""
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{n}.jpg" for n in range(COUNT)]
    for path in paths:
        path.touch()
    return Examples(tuple(map(str, paths)), np.arange(COUNT) % 3)


class NoiseLoader:
    """A `data.Load` that makes an image of noise from (index, view), and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, positions: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
        self.asked += [(int(index), int(view)) for index, view in positions.as_numpy_iterator()]

        def image(index: tf.Tensor, view: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return 60 * tf.random.stateless_normal([32, 32, 3], tf.stack([index, view])), index

        return positions.map(image).batch(batch_size)


def build(head: str = "gap", dtype: tf.DType = tf.float32, seed: int = 0, classes: int = 3) -> Network:
    return Network("tiny", head, classes, 32, dtype, seed)


def ignore(rows: int) -> None:
    """A progress callback."""


def filled(cache: Cache, source: data.Load | None = None, source_stage: str = "conv1") -> Cache:
    cache.fill(source or NoiseLoader(), source_stage, ignore)
    return cache


def positions(pairs: list[tuple[int, int]]) -> tf.data.Dataset:
    indices, views = np.array(pairs, np.int64).T
    return tf.data.Dataset.from_tensor_slices((indices, views))


def load(loader: data.Load, pairs: list[tuple[int, int]]) -> np.ndarray:
    """The rows of (index, view) pairs, read in batches of 4."""
    batches = list(loader(positions(pairs), 4).as_numpy_iterator())
    assert np.concatenate([indices for _, indices in batches]).tolist() == [index for index, _ in pairs]
    return np.concatenate([x for x, _ in batches])


def files_of(cache: Cache) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.folder.iterdir()}


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
@pytest.mark.parametrize("stage", ["conv3", "conv5", "gap"])
def test_cached_activations_equal_the_uncached_forward(
    tmp_path: Path, examples: Examples, stage: str, dtype: tf.DType
) -> None:
    model = build(dtype=dtype)
    pairs = [(69, 0), (3, 1), (0, 0), (32, 1), (3, 0), (64, 1)]
    cached = load(filled(Cache(model, stage, examples, SPEC, VIEWS, str(tmp_path))).loader(), pairs)
    images = load(NoiseLoader(), pairs)
    below = model.stages[model.stages.index(stage) - 1]
    expected = model.forward(tf.constant(images), last=below).numpy().astype(np.float32)
    assert cached.dtype == np.float32
    assert cached.shape == (6, *model.input_shape(stage))
    assert expected.std() > 1e-3
    if dtype == tf.bfloat16:
        assert np.array_equal(cached, expected)
    else:  # half a unit in the last of float16's eleven bits, and its smallest number
        assert (np.abs(cached - expected) <= np.maximum(expected * 2.0**-11 * 1.01, 2.0**-24)).all()


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_a_later_stage_computed_from_a_cached_earlier_one_equals_the_direct_way(
    tmp_path: Path, examples: Examples, dtype: tf.DType
) -> None:
    model = build(dtype=dtype)
    pairs = [(index, view) for view in VIEWS for index in range(COUNT)]
    direct = filled(Cache(model, "gap", examples, SPEC, VIEWS, str(tmp_path / "direct")))
    conv5 = filled(Cache(model, "conv5", examples, SPEC, VIEWS, str(tmp_path / "chain")))
    images = NoiseLoader()
    chained = filled(Cache(model, "gap", examples, SPEC, VIEWS, str(tmp_path / "chain")), conv5.loader(), "conv5")
    assert not images.asked
    left, right = load(direct.loader(), pairs), load(chained.loader(), pairs)
    if dtype == tf.bfloat16:
        assert np.array_equal(left, right)
    else:
        assert np.abs(left - right).max() < 2e-3 * left.max()


def test_activations_beyond_float16_are_kept_at_its_largest_number(tmp_path: Path, examples: Examples) -> None:
    model = build()
    model.variables_by_name["tiny/conv5/conv5_1/biases"].assign(np.full(8, 1e6))
    rows = load(filled(Cache(model, "gap", examples, SPEC, CENTRAL, str(tmp_path))).loader(), [(0, -1), (69, -1)])
    assert (rows == np.finfo(np.float16).max).all()


# -- files and interruptions ------------------------------------------------------------------------------------------


def test_a_filled_cache_is_reused_and_its_rows_take_the_bytes_that_were_announced(
    tmp_path: Path, examples: Examples
) -> None:
    cache = Cache(build(), "conv5", examples, SPEC, VIEWS, str(tmp_path))
    assert cache.missing_rows() == 2 * COUNT
    assert cache.missing_bytes() == 2 * COUNT * 2 * 2 * 8 * 2
    source = NoiseLoader()
    rows: list[int] = []
    cache.fill(source, "conv1", rows.append)
    assert sum(rows) == 2 * COUNT
    assert sorted(source.asked) == sorted((index, view) for index in range(COUNT) for view in VIEWS)
    files = files_of(cache)
    assert sorted(files) == ["cache.json", "view-0.bin", "view-1.bin"]
    assert len(files["view-0.bin"]) + len(files["view-1.bin"]) == 2 * COUNT * 2 * 2 * 8 * 2
    again = Cache(build(seed=0), "conv5", examples, SPEC, VIEWS, str(tmp_path))
    unused = NoiseLoader()
    again.fill(unused, "conv1", ignore)
    assert again.missing_rows() == again.missing_bytes() == 0
    assert not unused.asked
    assert files_of(again) == files


def test_more_views_compute_the_new_ones_only(tmp_path: Path, examples: Examples) -> None:
    filled(Cache(build(), "gap", examples, SPEC, [0], str(tmp_path)))
    more = Cache(build(), "gap", examples, SPEC, [0, 1, 2], str(tmp_path))
    assert more.missing_rows() == 2 * COUNT
    source = NoiseLoader()
    filled(more, source)
    assert {view for _, view in source.asked} == {1, 2}


@pytest.mark.parametrize(
    ("rows_left", "odd_bytes", "first"), [(0, 7, 0), (20, 1, 0), (32, 0, 32), (50, 13, 32), (64, 5, 64), (69, 15, 64)]
)
def test_a_truncated_partial_file_is_completed_to_the_same_bytes(
    tmp_path: Path, examples: Examples, rows_left: int, odd_bytes: int, first: int
) -> None:
    cache = filled(Cache(build(), "gap", examples, SPEC, CENTRAL, str(tmp_path)))
    whole = files_of(cache)
    row_bytes = len(whole["central.bin"]) // COUNT
    assert row_bytes == 16
    (cache.folder / "central.bin").unlink()
    (cache.folder / "central.partial").write_bytes(whole["central.bin"][: rows_left * row_bytes + odd_bytes])
    source = NoiseLoader()
    rows: list[int] = []
    cache.fill(source, "conv1", rows.append)
    assert files_of(cache) == whole
    assert [index for index, _ in source.asked] == list(range(first, COUNT))
    assert sum(rows) == COUNT  # the rows that were there count as progress


def test_an_interrupted_computation_keeps_its_rows(tmp_path: Path, examples: Examples) -> None:
    whole = files_of(filled(Cache(build(), "conv5", examples, SPEC, VIEWS, str(tmp_path / "whole"))))
    cache = Cache(build(), "conv5", examples, SPEC, VIEWS, str(tmp_path / "stopped"))
    done = 0

    def stop_in_view_1(rows: int) -> None:
        nonlocal done
        done += rows
        if done == COUNT + 2 * BATCH_SIZE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(NoiseLoader(), "conv1", stop_in_view_1)
    assert cache.missing_rows() == COUNT
    source = NoiseLoader()
    filled(cache, source)
    assert source.asked == [(index, 1) for index in range(2 * BATCH_SIZE, COUNT)]
    assert files_of(cache) == whole


# -- the key ----------------------------------------------------------------------------------------------------------


def key(model: Network, examples: Examples, stage: str = "conv5", spec: data.Preprocessing = SPEC) -> str:
    return Cache(model, stage, examples, spec, VIEWS, "unused").folder.name


def copy_below(stage: str, source: Network, target: Network) -> Network:
    for name, variable in source.variables_by_name.items():
        if source.stages.index(source.stage_of(name)) < source.stages.index(stage):
            target.variables_by_name[name].assign(variable)
    return target


def test_the_key_changes_with_everything_that_activations_depend_on(examples: Examples) -> None:
    changed = build()
    changed.variables_by_name["tiny/conv4/conv4_1/biases"][7].assign(1e-6)
    other_order = examples.subset(np.arange(COUNT)[::-1])
    keys = [
        key(build(), examples),
        key(build(), examples, stage="conv4"),
        key(build(dtype=tf.bfloat16), examples),
        key(build(seed=1), examples),
        key(changed, examples),
        key(build(), examples, spec=data.Preprocessing(32, crop_margin=9)),
        key(build(), examples, spec=data.Preprocessing(32, augment=("flip",))),
        key(build(), other_order),
        key(build(), examples.subset(range(COUNT - 1))),
    ]
    path = Path(examples.paths[5])
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    keys.append(key(build(), examples))
    path.write_bytes(b"longer")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    keys.append(key(build(), examples))
    renamed = path.rename(path.with_name("renamed.jpg"))
    keys.append(key(build(), Examples((*examples.paths[:5], str(renamed), *examples.paths[6:]), examples.labels)))
    assert len(set(keys)) == len(keys) == 12


def test_the_key_does_not_change_with_the_labels_the_classes_or_what_lies_above(examples: Examples) -> None:
    original = build()
    expected = key(original, examples)
    assert key(build(), examples) == expected
    assert key(copy_below("conv5", original, build(seed=9, classes=5, head="linear")), examples) == expected
    assert key(original, Examples(examples.paths, np.zeros(COUNT, np.int64))) == expected
    original.variables_by_name["tiny/conv5/conv5_1/weights"].assign_add(tf.ones([3, 3, 8, 8]))
    assert key(original, examples) == expected


def test_heads_share_what_enters_them(examples: Examples) -> None:
    gap = build()
    linear = copy_below("gap", gap, build(head="linear"))
    assert key(linear, examples, stage="linear") == key(gap, examples, stage="gap")


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_computed(
    tmp_path: Path, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(build(), "conv5", examples, SPEC, VIEWS, str(tmp_path / "cache"))
    needed = cache.missing_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=DISK_RESERVE + needed - 1))
    root = str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"cache: the cached activations take .* GB are free: take fewer"):
        check_disk([cache], root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=DISK_RESERVE + needed))
    check_disk([cache], root)
    with pytest.raises(UserError):
        check_disk([cache, cache], root)  # what they take together
    filled(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    check_disk([cache], root)  # it is all there: nothing is needed


def test_rows_of_a_partial_file_need_no_space_again(
    tmp_path: Path, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(Cache(build(), "gap", examples, SPEC, CENTRAL, str(tmp_path)))
    rows = (cache.folder / "central.bin").read_bytes()
    (cache.folder / "central.bin").unlink()
    (cache.folder / "central.partial").write_bytes(rows[: 64 * 16])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=DISK_RESERVE + 6 * 16))
    check_disk([cache], str(tmp_path))


# -- whole runs -------------------------------------------------------------------------------------------------------


def cached_run(folder: Path, images: Path, **changes: object) -> tuple[Run, Settings]:
    """A finished run of two epochs on two cached views."""
    fixed = {"pretrained": "none", "network": "tiny", "head": "gap", "cached_views": 2, "epochs": 2, "batch_size": 8}
    settings = Settings(**{**fixed, "image_size": 32, "cache_dir": str(folder / "cache"), "seed": 3, **changes})
    run = Run(folder / f"run-{len(list(folder.glob('run-*')))}")
    session.train(settings, str(images), run, ["test"])
    return run, settings


@pytest.mark.parametrize(
    ("train_from", "precision"), [("head", "bfloat16"), ("conv4", "bfloat16"), ("conv4", "float32")]
)
def test_training_on_cached_views_equals_training_on_the_same_views_uncached(
    tmp_path: Path, sample_images: Path, train_from: str, precision: str
) -> None:
    run, settings = cached_run(
        tmp_path, sample_images, train_from=train_from, precision=precision, learning_rate=1e-4, augment=("flip",)
    )
    latest = run.load("latest")
    assert latest is not None
    examples = plan.usable_examples(settings, plan.find_images(settings, str(sample_images)), [])["train"]
    stage = "gap" if train_from == "head" else train_from
    phase = Phase("uncached", stage, "conv1", 2, 0, 2 * data.steps_per_epoch(len(examples), 8))
    trainer = plan.make_trainer(run.config(), settings, examples, [phase])
    start = {name: variable.numpy() for name, variable in trainer.model.variables_by_name.items()}
    step = trainer.train_step(phase)
    loader = data.image_loader(examples, data.Preprocessing(32, 10, ("flip",)), VIEW_SEED)
    for x, labels, _ in data.train_batches(loader, examples.labels, 8, 3, 0, phase.last_step, views=2):
        step(x, labels)
    assert int(latest[0]["global_step"]) == phase.last_step
    for name, variable in trainer.state().items():
        if name in ("sums", "bad_step"):
            continue
        value, cached = variable.numpy(), latest[0][name]
        if precision == "bfloat16":
            assert np.array_equal(cached, value), name
        elif name in start:
            moved = np.abs(value - start[name]).max()
            assert (moved > 0) == (name in trainer.model.variables_from(stage)), name
            # float16 rounds by 1 / 2048 at most; the bound leaves room for what two epochs of training make of that.
            assert np.abs(cached - value).max() <= 0.05 * moved, name


def test_later_runs_with_another_learning_rate_seed_and_classifier_compute_nothing_again(
    tmp_path: Path, sample_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {n: v.numpy() for n, v in build().variables_by_name.items() if "/conv" in n}
    np.savez(tmp_path / "weights.npz", **weights)
    given = {"pretrained": str(tmp_path / "weights.npz"), "train_from": "conv5", "precision": "float32"}
    cached_run(tmp_path, sample_images, **given)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    assert sorted(path.name for path in files) == ["central.bin", "view-0.bin", "view-1.bin"]

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(features.Cache, "fill", refuse)
    cached_run(tmp_path, sample_images, **given, learning_rate=0.01, seed=8, head="linear", batch_size=5)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == files


def test_two_phases_at_two_boundaries_share_one_pass_over_the_images(
    tmp_path: Path, sample_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[tuple[str, str]] = []
    original = features.Cache.fill

    def fill(self: Cache, source: data.Load, source_stage: str, each: object) -> None:
        sources.append((self.stage, source_stage))
        original(self, source, source_stage, each)

    monkeypatch.setattr(features.Cache, "fill", fill)
    run, _ = cached_run(tmp_path, sample_images, train_from="conv5", head_epochs=1, precision="float32")
    assert sources == [("conv5", "conv1")] * 2 + [("gap", "conv5")] * 2
    lines = run.read_lines("metrics.jsonl")
    assert {line["stage"] for line in lines} == {"head", "conv5"}
