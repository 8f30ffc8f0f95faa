"""Cached activations against the uncached network: values, files, keys, interruptions, and whole training runs."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import data
import model as model_module
import train
from console import Stopped, StopSignals, UserError
from dataset import layouts
from dataset.contents import fingerprints
from dataset.layouts import Examples
from model import Network
from networks.vgg import MEAN_RGB, vgg
from run import Run
from run_config import Phase, new_network
from tests import kill_run
from tests.conftest import TINY, call
from training import features, plan, session
from training.evaluation import readable_failures
from training.features import CHECKSUM_BYTES, DISK_RESERVE, VIEW_SEED, Cache, DamagedCache, check_disk, fill
from training.settings import IMAGES_AT_ONCE, Settings
from training.step import Trainer, decay_over

CENTRAL, VIEWS = [data.CENTRAL_VIEW], [0, 1]
CHANNELS = vgg((4,), (6,), (6,), (8,), (8,), fc_units=16)  # of the tiny network
COUNT = 70  # two whole batches of rows and a short one
ROW = 8 * 4 + CHECKSUM_BYTES  # bytes of what enters the gap head: the mean of eight channels in float32
SPEC = data.Preprocessing(image_size=32)


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_module.NETWORKS, "tiny", CHANNELS)


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    """Files of different content, which is hashed and never decoded: `NoiseLoader` makes the images."""
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{n}.jpg" for n in range(COUNT)]
    for number, path in enumerate(paths):
        path.write_text(f"image {number:02}")
    return Examples(tuple(map(str, paths)), np.arange(COUNT) % 3)


class NoiseLoader:
    """A `data.Load` that makes an image of noise from (index, view), and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.batch_sizes: set[int] = set()

    def __call__(self, positions: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
        self.asked += [(int(index), int(view)) for index, view in positions.as_numpy_iterator()]
        self.batch_sizes.add(batch_size)

        def image(index: tf.Tensor, view: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return 60 * tf.random.stateless_normal([32, 32, 3], tf.stack([index, view])), index

        return positions.map(image).batch(batch_size)


def build(head: str = "gap", dtype: tf.DType = tf.float32, seed: int = 0, classes: int = 3) -> Network:
    return Network("tiny", head, classes, 32, dtype, seed)


def make_cache(
    model: Network,
    stage: str,
    examples: Examples,
    views: list[int],
    root: Path,
    spec: data.Preprocessing = SPEC,
    batch: int = IMAGES_AT_ONCE,
) -> Cache:
    return Cache(model, stage, examples, fingerprints(examples.paths, {}, 2), spec, views, str(root), batch=batch)


def filled(cache: Cache, source: data.Load | None = None) -> Cache:
    fill([cache], source or NoiseLoader(), StopSignals())
    return cache


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows shown as done, all rows) of each progress bar that has ended."""
    ended: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int, initial: int, description: str):
            self.done, self.total = initial, total

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            ended.append((self.done, self.total))

        def update(self, count: int) -> None:
            self.done += count

    monkeypatch.setattr(features, "progress_bar", Bar)
    return ended


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
    cached = load(filled(make_cache(model, stage, examples, VIEWS, tmp_path)).loader(), pairs)
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
@pytest.mark.parametrize("already_there", [{}, {"conv5": 64}, {"gap": 32, "conv3": 70}])
def test_stages_filled_in_one_pass_equal_each_filled_alone(
    tmp_path: Path, examples: Examples, dtype: tf.DType, already_there: dict[str, int]
) -> None:
    model, stages = build(dtype=dtype), ["conv3", "conv5", "gap"]
    alone = {stage: filled(make_cache(model, stage, examples, VIEWS, tmp_path / "alone")) for stage in stages}
    together = [make_cache(model, stage, examples, VIEWS, tmp_path / "together") for stage in stages]
    for cache in together:  # rows that an interrupted computation left
        whole, rows = (alone[cache.stage].folder / "view-0.bin").read_bytes(), already_there.get(cache.stage, 0)
        cache.folder.mkdir(parents=True)
        name = "view-0.bin" if rows == COUNT else "view-0.partial"
        (cache.folder / name).write_bytes(whole[: rows * len(whole) // COUNT])
    source = NoiseLoader()
    fill(together, source, StopSignals())
    assert source.asked == [(index, view) for view in VIEWS for index in range(COUNT)], "one pass over each view"
    for cache in together:
        assert files_of(cache) == files_of(alone[cache.stage]), cache.stage


def test_activations_beyond_float16_are_kept_at_its_largest_number(tmp_path: Path, examples: Examples) -> None:
    model = build(head="linear")
    model.variables_by_name["tiny/conv5/conv5_1/biases"].assign(np.full(8, 1e6))
    rows = load(filled(make_cache(model, "linear", examples, CENTRAL, tmp_path)).loader(), [(0, -1), (69, -1)])
    assert (rows == np.finfo(np.float16).max).all()


# -- files and interruptions ------------------------------------------------------------------------------------------


def test_a_filled_cache_is_reused_and_its_rows_take_the_bytes_that_were_announced(
    tmp_path: Path, examples: Examples, bars: list[tuple[int, int]]
) -> None:
    cache = make_cache(build(), "conv5", examples, VIEWS, tmp_path)
    row = 2 * 2 * 8 * 2 + CHECKSUM_BYTES
    assert cache.missing_rows() == 2 * COUNT
    assert cache.missing_bytes() == 2 * COUNT * row
    source = NoiseLoader()
    filled(cache, source)
    assert bars == [(COUNT, COUNT)] * 2
    assert sorted(source.asked) == sorted((index, view) for index in range(COUNT) for view in VIEWS)
    files = files_of(cache)
    assert sorted(files) == ["cache.json", "view-0.bin", "view-1.bin"]
    assert len(files["view-0.bin"]) + len(files["view-1.bin"]) == 2 * COUNT * row
    again = make_cache(build(seed=0), "conv5", examples, VIEWS, tmp_path)
    unused = NoiseLoader()
    filled(again, unused)
    assert again.missing_rows() == again.missing_bytes() == 0
    assert not unused.asked
    assert files_of(again) == files


def test_more_views_compute_the_new_ones_only(tmp_path: Path, examples: Examples) -> None:
    filled(make_cache(build(), "gap", examples, [0], tmp_path))
    more = make_cache(build(), "gap", examples, [0, 1, 2], tmp_path)
    assert more.missing_rows() == 2 * COUNT
    source = NoiseLoader()
    filled(more, source)
    assert {view for _, view in source.asked} == {1, 2}


@pytest.mark.parametrize(
    ("rows_left", "odd_bytes", "first"), [(0, 7, 0), (20, 1, 0), (32, 0, 32), (50, 13, 32), (64, 5, 64), (69, 15, 64)]
)
def test_a_truncated_partial_file_is_completed_to_the_same_bytes(
    tmp_path: Path, examples: Examples, bars: list[tuple[int, int]], rows_left: int, odd_bytes: int, first: int
) -> None:
    cache = filled(make_cache(build(), "gap", examples, CENTRAL, tmp_path))
    whole = files_of(cache)
    assert len(whole["central.bin"]) == COUNT * ROW
    (cache.folder / "central.bin").unlink()
    (cache.folder / "central.partial").write_bytes(whole["central.bin"][: rows_left * ROW + odd_bytes])
    source = NoiseLoader()
    bars.clear()
    filled(cache, source)
    assert files_of(cache) == whole
    assert [index for index, _ in source.asked] == list(range(first, COUNT))
    assert bars == [(COUNT, COUNT)]  # the rows that were there count as progress


def test_rows_are_computed_in_batches_of_the_size_that_was_asked_for(tmp_path: Path, examples: Examples) -> None:
    """Also the rest of an interrupted computation, whose rows beyond a whole batch are computed again."""
    cache = filled(make_cache(build(), "gap", examples, CENTRAL, tmp_path, batch=8))
    whole = files_of(cache)
    (cache.folder / "central.bin").unlink()
    (cache.folder / "central.partial").write_bytes(whole["central.bin"][: 20 * ROW])
    source = NoiseLoader()
    filled(cache, source)
    assert [index for index, _ in source.asked] == list(range(16, COUNT))
    assert source.batch_sizes == {8}
    assert files_of(cache) == whole


class StopAfter(StopSignals):
    """A signal that arrives before the `count`-th check."""

    def __init__(self, count: int):
        super().__init__()
        self._left = count

    def check(self) -> None:
        self._left -= 1
        if not self._left:
            raise Stopped(signal.SIGINT)


def test_an_interrupted_computation_keeps_its_rows(tmp_path: Path, examples: Examples) -> None:
    whole = files_of(filled(make_cache(build(), "conv5", examples, VIEWS, tmp_path / "whole")))
    cache = make_cache(build(), "conv5", examples, VIEWS, tmp_path / "stopped")
    with pytest.raises(Stopped):
        fill([cache], NoiseLoader(), StopAfter(3 + 2))  # batches
    assert cache.missing_rows() == COUNT
    source = NoiseLoader()
    filled(cache, source)
    assert source.asked == [(index, 1) for index in range(2 * IMAGES_AT_ONCE, COUNT)]
    assert files_of(cache) == whole


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(file: Path, place: int = -1) -> None:
    """Changes one bit of a file, by default in its middle."""
    contents = bytearray(file.read_bytes())
    contents[place if place >= 0 else len(contents) // 2] ^= 16
    file.write_bytes(contents)


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def fill_with_zeros(file: Path) -> None:
    """As a power cut can leave a file: of the right length."""
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("place", [0, 7, ROW - CHECKSUM_BYTES - 1, ROW - CHECKSUM_BYTES, ROW - 1])
def test_a_flipped_bit_in_a_row_or_its_checksum_is_found_when_that_row_is_read(
    tmp_path: Path, examples: Examples, place: int
) -> None:
    cache = filled(make_cache(build(), "gap", examples, CENTRAL, tmp_path))
    others = [(index, data.CENTRAL_VIEW) for index in range(COUNT) if index != 5]
    expected = load(cache.loader(), others)
    flip(cache.file(data.CENTRAL_VIEW), 5 * ROW + place)
    assert cache.is_filled(data.CENTRAL_VIEW)
    assert np.array_equal(load(cache.loader(), others), expected)
    with pytest.raises(DamagedCache, match=r"central\.bin: damaged cached activations .*; delete") as caught:
        read_row(cache.loader(), 5)
    assert caught.value.path == str(cache.file(data.CENTRAL_VIEW))


def test_a_damaged_file_is_deleted_but_not_the_new_one_that_another_run_has_put_in_its_place(
    tmp_path: Path, examples: Examples
) -> None:
    cache = filled(make_cache(build(), "gap", examples, CENTRAL, tmp_path))
    file = cache.file(data.CENTRAL_VIEW)
    flip(file)
    found: list[DamagedCache] = []
    for _ in range(2):  # runs that share the cache
        with pytest.raises(DamagedCache) as caught:
            read_row(cache.loader(), COUNT // 2)
        found.append(caught.value)
    found[0].delete_file()
    assert not file.exists()
    found[0].delete_file()  # as another worker of the same run does
    filled(cache)
    found[1].delete_file()
    read_row(cache.loader(), COUNT // 2)
    assert cache.is_filled(data.CENTRAL_VIEW)


def read_row(loader: data.Load, index: int) -> None:
    with readable_failures():
        load(loader, [(index, data.CENTRAL_VIEW)])


@pytest.mark.parametrize("damage", [shorten, empty, fill_with_zeros])
def test_a_file_that_is_damaged_while_it_is_open_is_found_when_it_is_read(
    tmp_path: Path, examples: Examples, damage: Callable[[Path], None]
) -> None:
    cache = filled(make_cache(build(), "gap", examples, CENTRAL, tmp_path))
    loader = cache.loader()
    damage(cache.file(data.CENTRAL_VIEW))
    with pytest.raises(DamagedCache):
        read_row(loader, COUNT - 1)


@pytest.mark.parametrize("damage", [shorten, empty])
def test_a_file_of_another_size_is_computed_again(
    tmp_path: Path, examples: Examples, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = filled(make_cache(build(), "gap", examples, VIEWS, tmp_path))
    whole = files_of(cache)
    damage(cache.file(1))
    assert cache.missing_rows() == COUNT
    assert f"{cache.file(1)} is damaged" in capsys.readouterr().out
    source = NoiseLoader()
    filled(cache, source)
    assert {view for _, view in source.asked} == {1}
    assert files_of(cache) == whole


# -- the key ----------------------------------------------------------------------------------------------------------


def key(
    model: Network,
    examples: Examples,
    stage: str = "conv5",
    spec: data.Preprocessing = SPEC,
    batch: int = IMAGES_AT_ONCE,
) -> str:
    return make_cache(model, stage, examples, VIEWS, Path("unused"), spec, batch).folder.name


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
        key(build(), examples, batch=8),
    ]
    keys += [
        key(build(), examples, spec=data.Preprocessing(32, mean_rgb=(1.0, 0.0, 0.0))),
        key(build(), examples, spec=data.Preprocessing(32, std_rgb=(1.0, 1.0, 2.0))),
    ]
    path = Path(examples.paths[5])
    status = path.stat()
    path.write_text("image 5.")  # of the same length, and of the same time
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    keys.append(key(build(), examples))
    assert len(set(keys)) == len(keys) == 13


def test_the_key_does_not_change_with_the_places_and_times_of_the_images(tmp_path: Path, examples: Examples) -> None:
    expected = key(build(), examples)
    os.utime(examples.paths[5], ns=(1, 1))
    assert key(build(), examples) == expected
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    (moved / "5.jpg").rename(moved / "renamed.jpg")
    paths = [str(moved / f"{'renamed' if n == 5 else n}.jpg") for n in range(COUNT)]
    assert key(build(), Examples(tuple(paths), examples.labels)) == expected


def test_the_key_does_not_change_with_the_labels_the_classes_or_what_lies_above(examples: Examples) -> None:
    original = build()
    expected = key(original, examples)
    assert key(build(), examples) == expected
    assert key(copy_below("conv5", original, build(seed=9, classes=5, head="linear")), examples) == expected
    assert key(original, Examples(examples.paths, np.zeros(COUNT, np.int64))) == expected
    original.variables_by_name["tiny/conv5/conv5_1/weights"].assign_add(tf.ones([3, 3, 8, 8]))
    assert key(original, examples) == expected


def test_heads_that_need_the_same_share_what_enters_them(examples: Examples) -> None:
    """Of the gap head's input the mean over positions is kept, of the others' all of it."""
    gap = build()
    linear = copy_below("gap", gap, build(head="linear", classes=7))
    assert key(linear, examples, stage="linear") != key(gap, examples, stage="gap")
    assert key(copy_below("gap", gap, build(classes=9, seed=4)), examples, stage="gap") == key(
        gap, examples, stage="gap"
    )
    again = copy_below("gap", gap, build(head="linear", classes=3, seed=4))
    assert key(again, examples, stage="linear") == key(linear, examples, stage="linear")


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_computed(
    tmp_path: Path, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(build(), "conv5", examples, VIEWS, tmp_path / "cache")
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
    cache = filled(make_cache(build(), "gap", examples, CENTRAL, tmp_path))
    rows = (cache.folder / "central.bin").read_bytes()
    (cache.folder / "central.bin").unlink()
    (cache.folder / "central.partial").write_bytes(rows[: 64 * ROW])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=DISK_RESERVE + 6 * ROW))
    check_disk([cache], str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=DISK_RESERVE + 6 * ROW - 1))
    with pytest.raises(UserError):
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
    config, found = run.config(), layouts.find_images(str(sample_images))
    examples = plan.usable_examples(settings, found, [])["train"]
    stage = "gap" if train_from == "head" else train_from
    order = data.Order(len(examples), 8, 3, views=2)
    phase = Phase("uncached", stage, "conv1", 2, 0, 2 * order.epoch_steps)
    optimisation = plan.optimisation(settings, examples)
    trainer = Trainer(new_network(config), optimisation, [phase], frozenset(config.new_variables), settings.seed)
    start = {name: variable.numpy() for name, variable in trainer.model.variables_by_name.items()}
    step = trainer.train_step(phase, decay_over(phase, optimisation))
    loader = data.image_loader(examples, data.Preprocessing(32, 10, ("flip",), MEAN_RGB), VIEW_SEED)
    for x, labels, _ in data.train_batches(loader, examples.labels, order, 0, phase.end_step):
        step(x, labels)
    assert int(latest[0]["global_step"]) == phase.end_step
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

    monkeypatch.setattr(features, "fill", refuse)
    cached_run(tmp_path, sample_images, **given, learning_rate=0.01, seed=8, head="linear", batch_size=5)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == files


def test_two_phases_at_two_boundaries_share_one_pass_over_the_images(
    tmp_path: Path, sample_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[list[str]] = []
    computed: list[tuple[int, int]] = []
    original = features.fill

    def counted(caches: list[Cache], images: data.Load, *others: Any) -> None:
        def images_counted(positions: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
            computed.extend((int(index), int(view)) for index, view in positions.as_numpy_iterator())
            return images(positions, batch_size)

        stages.append([cache.stage for cache in caches])
        original(caches, images_counted, *others)

    monkeypatch.setattr(features, "fill", counted)
    run, _ = cached_run(tmp_path, sample_images, train_from="conv5", head_epochs=1, precision="float32")
    assert stages == [["conv5", "gap"]] * 2  # of the training and the validation images
    assert computed == [(i, view) for view in VIEWS for i in range(36)] + [(i, data.CENTRAL_VIEW) for i in range(24)]
    assert [line["phase"] for line in run.read_lines("metrics.jsonl") if line["split"] == "val"] == ["head", "conv5"]


# Each view of each stage is read: 36 images in batches of 8 are 5 steps an epoch, 20 in all.
TWO_PHASES = {"train_from": "conv5", "head_epochs": 2, "epochs": 4, "precision": "float32"}


@pytest.fixture(scope="module")
def undisturbed(sample_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `TWO_PHASES`, with its cache; not to be changed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_module.NETWORKS, "tiny", CHANNELS)
        run, _ = cached_run(folder, sample_images, **TWO_PHASES)
    assert len(list((folder / "cache").rglob("*.bin"))) == 2 * (2 + 1)
    return run.path


@pytest.mark.parametrize("damage", [flip, shorten, empty, fill_with_zeros])
def test_a_run_on_a_damaged_cache_ends_as_the_undisturbed_one(
    tmp_path: Path,
    sample_images: Path,
    undisturbed: Path,
    damage: Callable[[Path], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(undisturbed.parent / "cache", tmp_path / "cache")
    for file in (tmp_path / "cache").rglob("*.bin"):
        damage(file)
    capfd.readouterr()
    run, _ = cached_run(tmp_path, sample_images, **TWO_PHASES)
    assert capfd.readouterr().out.count("computed again") == 6
    assert kill_run.compare(undisturbed, run.path) == []
    assert kill_run.compare_caches(undisturbed.parent / "cache", tmp_path / "cache") == []


@pytest.mark.parametrize("step", [0, 7, 10, 14, 20])
def test_a_run_whose_cache_is_damaged_meanwhile_ends_as_the_undisturbed_one(
    tmp_path: Path,
    sample_images: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    step: int,
) -> None:
    """Before a step is done; 10 begins the second phase, and at 20 the best checkpoint is evaluated."""
    waiting = True

    def damage_all() -> None:
        nonlocal waiting
        for file in (tmp_path / "cache").rglob("*.bin") if waiting else ():
            fill_with_zeros(file)
        waiting = False

    original, load_best = data.train_batches, Run.load_best

    def train_batches(load: data.Load, labels: np.ndarray, order: data.Order, first: int, end: int) -> Iterator:
        for number, batch in enumerate(original(load, labels, order, first, end), start=first):
            if number == step and order.batch_size == 8:  # not the pictures of the inputs
                damage_all()
            yield batch

    def damaged_before(run: Run, network: Network) -> None:
        load_best(run, network)
        damage_all()

    monkeypatch.setattr(data, "train_batches", train_batches)
    monkeypatch.setattr(Run, "load_best", damaged_before)
    capfd.readouterr()
    run, _ = cached_run(tmp_path, sample_images, **TWO_PHASES)
    assert not waiting
    assert "computed again" in capfd.readouterr().out
    assert kill_run.compare(undisturbed, run.path) == []


@pytest.mark.parametrize("name", ["view-0.bin", "view-0.partial", "central.bin"])
def test_a_folder_in_the_place_of_a_file_is_one_line_and_status_2(
    tmp_path: Path, sample_images: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--epochs", 1, "--train-from", "conv5", "--cached-views", 1, "--cache-dir", tmp_path / "cache"]
    assert call(train, sample_images, "--run", tmp_path / "first", *flags) == 0
    (file,) = (tmp_path / "cache").rglob(f"{name.split('.')[0]}.bin")
    file.unlink()
    (file.parent / name).mkdir()
    capfd.readouterr()
    assert call(train, sample_images, "--run", tmp_path / "second", *flags) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {file.parent / name} is a")
    assert error.endswith("move it away")
