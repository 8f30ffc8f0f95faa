"""tools.advise: what it measures of a tiny network, against computations of its own, and what it recommends."""

import functools
import shlex

import numpy as np
import pytest

import data
import train
from console import StopSignals, exit_status
from model import EVEN_SHARE, FEATURE_NORM
from networks.vgg import MEAN_RGB
from tests.conftest import rows_of
from tools import advise
from tools.advise_evidence import Evidence, judge, kept_images, pooled_features, step_seconds
from training.preparation import Prepared, prepare
from training.settings import Settings


@pytest.fixture
def prepared(sample_images, weights, tmp_path) -> Prepared:
    settings = Settings(pretrained=str(weights), network="small", head="gap", train_from="head", image_size=32,
                        precision="float32", batch_size=8, cache_dir=str(tmp_path / "features"))  # fmt: skip
    return prepare(settings, str(sample_images))


def rooted(pooled: np.ndarray) -> np.ndarray:
    share = pooled / pooled.sum(axis=1, keepdims=True)
    return FEATURE_NORM * np.sqrt((1 - EVEN_SHARE) * share + EVEN_SHARE / share.shape[1])


def test_features_are_those_of_each_depth_normalised_on_its_own(prepared):
    with StopSignals() as stop:
        found = pooled_features(prepared, ("flip",), stop)
        cached_again = pooled_features(prepared, ("flip",), stop)
    assert list(found) == ["conv3", "conv4", "conv5", "conv3 + conv4 + conv5"]
    examples, network = prepared.examples["train"], prepared.network
    spec = data.Preprocessing(32, augment=("flip",), mean_rgb=MEAN_RGB)
    load = data.image_loader(examples, spec, 0)
    for view in (0, 1):
        x, *_ = next(iter(data.ordered_batches(load, examples.labels, len(examples), view)))
        rows = slice(view * len(examples), (view + 1) * len(examples))
        for depth in ("conv3", "conv4", "conv5"):
            pooled = network.forward(x, last=depth).numpy().mean(axis=(1, 2))
            np.testing.assert_allclose(found[depth][rows], rooted(pooled), rtol=1e-3, atol=1e-3)
    parts = [found[depth] for depth in ("conv3", "conv4", "conv5")]
    np.testing.assert_array_equal(found["conv3 + conv4 + conv5"], np.concatenate(parts, axis=1))
    np.testing.assert_array_equal(cached_again["conv3"], found["conv3"])


def test_the_last_depth_shares_the_cache_of_training(prepared, monkeypatch):
    with StopSignals() as stop:
        pooled_features(prepared, (), stop)
        monkeypatch.setattr("training.features.fill", lambda *_: pytest.fail("computed again"))
        prepared.cached_loads(prepared.config.phases, {"train": prepared.examples["train"]}, stop)


def test_rows_of_weight_zero_are_judged_and_not_trained_on(prepared):
    """Where the trained views separate the classes and the judged ones are swapped between them, all is wrong."""
    labels = prepared.examples["train"].labels
    codes = np.eye(labels.max() + 1, dtype=np.float32)
    swapped, trained = codes[(labels + 1) % len(codes)], codes[labels]
    weights = np.repeat([0.0, 1.0], len(labels))
    with StopSignals() as stop:
        assert judge(prepared, np.concatenate([swapped, trained]), weights, 1, stop).max() == 0
        assert judge(prepared, np.concatenate([trained, trained]), weights, 1, stop).min() == 1


def test_smaller_shares_are_parts_of_larger_ones():
    labels = np.repeat([0, 1, 2], [40, 4, 1])
    quarter, half = kept_images(labels, 0.25, 3), kept_images(labels, 0.5, 3)
    assert np.bincount(labels[quarter]).tolist() == [10, 2, 1]
    assert np.bincount(labels[half]).tolist() == [20, 2, 1]
    assert not (quarter & ~half).any()


def test_timed_steps_change_nothing(prepared):
    before = {name: v.numpy() for name, v in prepared.network.variables_by_name.items()}
    with StopSignals() as stop:
        seconds = step_seconds(prepared, stop)
    assert list(seconds) == ["gap", "conv5", "conv1"]
    assert all(value > 0 for value in seconds.values())
    for name, value in before.items():
        np.testing.assert_array_equal(prepared.network.variables_by_name[name], value)


def test_the_tool_prints_tables_writes_numbers_and_a_command_that_train_takes(sample_images, weights, tmp_path, capsys):
    flags = ["--network", "small", "--pretrained", weights, "--image-size", 32, "--precision", "float32",
             "--cache-dir", tmp_path / "features", "--output", tmp_path / "advice.png"]  # fmt: skip
    arguments = [str(a) for a in (sample_images, *flags)]
    assert exit_status(functools.partial(advise.main, arguments)) == 0
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "advice.csv")
    assert [(r["depth"], r["flips"], r["images"]) for r in rows] == [
        *((depth, flips, "1.0") for depth in ("conv3", "conv4", "conv5", "conv3 + conv4 + conv5")
          for flips in ("no", "yes")),
        ("conv5", "no", "0.25"), ("conv5", "no", "0.5"),
    ]  # fmt: skip
    for row in rows:
        assert float(row["accuracy"]) * 72 % 1 == pytest.approx(0, abs=1e-6), "of 36 images, two views each"
        assert f"{float(row['accuracy']):.4f}" in printed
    base = next(r for r in rows if (r["depth"], r["flips"], r["images"]) == ("conv5", "no", "1.0"))
    for row in rows:
        if row is not base:
            difference = float(row["accuracy"]) - float(base["accuracy"])
            assert float(row["difference"]) == pytest.approx(difference, abs=1e-9)
    assert (tmp_path / "advice.png").stat().st_size > 10_000
    command = next(line for line in printed.splitlines() if line.startswith("advice")).split(maxsplit=1)[1]
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"]
    path, _, settings = train.parse_arguments(words[2:])
    assert path == str(sample_images)
    assert (settings.network, settings.head, settings.image_size) == ("small", "gap", 32)
    prepare(settings, path)


def evidence(network: str, seconds: tuple[float, float, float] = (0.1, 1.0, 10.0), **accuracies: float) -> Evidence:
    """1,000 images, the first so many right; accuracies by depth, `_flips` behind it for mirrored views."""
    right = {
        (key.removesuffix("_flips"), key.endswith("_flips")): (np.arange(1000) < round(1000 * value)).astype(float)
        for key, value in accuracies.items()
    }
    settings = Settings(network=network, head="gap", train_from="head")
    curve = dict.fromkeys((0.25, 0.5, 1.0), right["conv5", False])
    return Evidence(settings, "conv5", right, curve, dict(zip(("gap", "conv5", "conv1"), seconds, strict=True)), 16)


def test_little_left_to_gain_trains_the_head():
    settings, why = advise.recommend([evidence("vgg_19", conv4=0.9, conv5=0.995)], 100)
    assert settings.train_from == "head"
    assert "99.5% ± 0.2%" in why


def test_time_decides_how_deep():
    of = evidence("vgg_19", conv4=0.7, conv5=0.8)  # 320 steps: 320 s from conv5, 3,200 s end to end
    ways = {hours: advise.recommend([of], hours)[0] for hours in (1, 0.5, 0.05)}
    assert {hours: s.train_from for hours, s in ways.items()} == {1: "conv1", 0.5: "conv5", 0.05: "head"}
    assert ways[0.5].head_epochs == 1
    assert "5 min, more than --hours 0.05" in advise.recommend([of], 0.05)[1]


def test_an_earlier_stage_that_knows_more_is_a_reason_to_train():
    settings, why = advise.recommend([evidence("vgg_19", conv4=0.999, conv5=0.985)], 0.5)
    assert settings.train_from == "conv5"
    assert "conv4" in why


def test_flips_are_taken_where_they_help():
    assert advise.recommend([evidence("vgg_19", conv5=0.8, conv5_flips=0.85)], 1)[0].augment == ("flip",)
    assert advise.recommend([evidence("vgg_19", conv5=0.8, conv5_flips=0.79)], 1)[0].augment == ()


def test_of_networks_that_are_as_good_the_faster_is_taken():
    slow, fast = evidence("vgg_19", conv5=0.901), evidence("resnet_18", (0.1, 0.2, 0.3), conv5=0.9)
    worse = evidence("resnet_34", (0.1, 0.1, 0.1), conv5=0.8)
    assert advise.recommend([slow, fast, worse], 1)[0].network == "resnet_18"
    assert advise.recommend([slow, worse], 1)[0].network == "vgg_19"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cached-views", "0"], "--cached-views of 1 or more"),
        (["--pretrained", "none"], "--pretrained weights"),
        (["--hours", "nan"], "--hours"),
        (["--network", "small", "--pretrained", "a", "--pretrained", "b"], "given 2 times"),
        (["--network", "small", "--network", "small"], "twice"),
    ],
)
def test_what_can_not_be_judged_is_one_line(sample_images, flags, message, capsys):
    assert exit_status(functools.partial(advise.main, [str(sample_images), *flags])) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
