"""Weight files of every format → arrays under the names that the file has, Keras' names in one spelling.

Formats are recognised by content: TensorFlow checkpoints (V1: one file; V2: .index and .data), one of our run
directories, Keras HDF5 (legacy and Keras 3), the layers format of TensorFlow.js (model.json and its shards),
safetensors, npz. A file from a stranger can fail but not run anything or read another file: no pickle, no links inside
HDF5, and the sizes that a file declares are checked before memory is taken.
"""

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import h5py
import numpy as np
import tensorflow as tf
from safetensors import safe_open

from console import UserError
from weights.checkpoint import TABLE_FOOTER, DamagedFile, check_size, one_line_errors, read_checkpoint

_REMEDY = "give a TF-Slim checkpoint, a Keras .h5, a .safetensors or an .npz, or the word imagenet or none"
_OTHER_KINDS = (  # how a file that is no weight file begins, what it is and what to do
    (b"\x1f\x8b", "a gzip archive: unpack it first (tar -xzf FILE) and give the file inside"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"<!doctype", "a web page, not the file itself: download it again"),
    (b"<html", "a web page, not the file itself: download it again"),
    (b"\x93numpy", "one array without a name: save all of them by name with numpy.savez"),
    (b"\x80", "a pickle, which could run code and is never read: save the arrays with numpy.savez"),
)

_PARAMETERS = {  # how versions of Keras have spelled them
    **{name: name for name in ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")},
    **{"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"},  # a variance too
}
_PARAMETER = re.compile(rf"(?:.*_)?({'|'.join(_PARAMETERS)})(?:_\d+)?(?::0)?")
_NUMBERED = {  # Keras 3 numbers the parameters of a layer: by class of the layer and their count
    ("conv2d", 1): ("kernel",),
    ("conv2d", 2): ("kernel", "bias"),
    ("dense", 1): ("kernel",),
    ("dense", 2): ("kernel", "bias"),
    ("batch_normalization", 3): ("beta", "moving_mean", "moving_variance"),  # scale=False, as InceptionV3 has it
    ("batch_normalization", 4): ("gamma", "beta", "moving_mean", "moving_variance"),
}
_LEGACY_ROOT = "model_weights"  # where a legacy file of a whole model keeps its weights
_MAX_JSON_BYTES = 64 * 2**20  # ResNet-50's is 109 kB
_TFJS_DTYPES = {"float32": "<f4", "int32": "<i4"}


@dataclass
class WeightFile:
    """The arrays of one file, in its order.

    Attributes:
        path: the file, or the prefix of a V2 checkpoint.
        kind: `tensorflow` and `npz` (names as saved), `keras` (`<layer>/<kernel, bias, gamma, beta, moving_mean or
            moving_variance>`; what is no parameter of a layer keeps its path) or `torch` (names as saved).
        arrays: {name: array}.
    """

    path: str
    kind: str
    arrays: dict[str, np.ndarray]


def read(path: str) -> WeightFile:
    """Every array of the weight file at `path`; of a run directory its best checkpoint, else its latest.

    Raises UserError, in one line, for anything that is not a readable weight file.
    """
    with one_line_errors(path):
        file = _locate(path)
        kind, reader = _reader(file)
        return WeightFile(file, kind, reader(file))


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
        if os.path.isfile(model := os.path.join(path, "model.json")):
            return model
        raise UserError(f"{path} is a folder without a checkpoint: give the weight file in it, or a run directory")
    prefix = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path)
    if prefix != path and os.path.isfile(path) and not os.path.isfile(f"{prefix}.index"):
        raise UserError(f"{path} has no {os.path.basename(prefix)}.index next to it: copy all files of the checkpoint")
    return prefix if os.path.isfile(f"{prefix}.index") else path


def _reader(file: str) -> tuple[str, Callable[[str], dict[str, np.ndarray]]]:
    """The kind of `file` and its reader, by its content; UserError that says what it is when there is none."""
    if os.path.isfile(f"{file}.index"):
        return "tensorflow", read_checkpoint
    if not os.path.isfile(file):
        raise UserError(f"{file} is {'not a file' if os.path.exists(file) else 'not there'}: {_REMEDY}")
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        head = stream.read(512)
        stream.seek(max(0, size - len(TABLE_FOOTER)))
        tail = stream.read()
    if not head:
        raise UserError(f"{file} is empty: copy or download it again")
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras", _read_hdf5
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "npz", _read_npz
    if tail == TABLE_FOOTER:
        return "tensorflow", read_checkpoint
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "torch", _read_safetensors
    if head.lstrip().startswith(b"{"):
        return "keras", _read_tfjs
    for start, what in _OTHER_KINDS:
        if head.lstrip().lower().startswith(start):
            raise UserError(f"{file} is {what}")
    raise UserError(f"{file} is not a weight file, or only the beginning of one: {_REMEDY}")


def _read_npz(file: str) -> dict[str, np.ndarray]:
    """All arrays of an npz archive; object arrays would need pickle and are refused."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.filename == "model.weights.h5" for member in members):
        raise UserError(f"{file} is a .keras archive: unzip it and give the model.weights.h5 inside")
    if not all(member.filename.endswith(".npy") for member in members):
        raise UserError(f"{file} is a zip archive but not an npz: {_REMEDY}")
    check_size(file, (member.file_size for member in members))
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _read_safetensors(file: str) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, which is never larger in memory than on disk."""
    check_size(file, [os.path.getsize(file)])
    with safe_open(file, framework="numpy") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.offset_keys()}


# -- Keras ------------------------------------------------------------------------------------------------------------


def _read_tfjs(file: str) -> dict[str, np.ndarray]:
    """All weights of a model.json of TensorFlow.js, which describes the content of the shards beside it."""
    with open(file, "rb") as stream:
        groups = json.loads(stream.read(_MAX_JSON_BYTES)).get("weightsManifest")
    if groups is None:
        raise UserError(f"{file} is JSON but not the model.json of a TensorFlow.js model: {_REMEDY}")
    weights = [weight for group in groups for weight in group["weights"]]
    shards = [os.path.join(os.path.dirname(file), name) for group in groups for name in group["paths"]]
    for weight in weights:
        if "quantization" in weight or weight["dtype"] not in _TFJS_DTYPES:
            raise UserError(f"{file} has {weight['name'][:80]} quantised: convert the model without quantisation")
    sizes = [4 * math.prod(weight["shape"]) for weight in weights]
    check_size(file, sizes)
    for shard in shards:
        if os.path.dirname(shard) != os.path.dirname(file) or not os.path.isfile(shard):
            raise UserError(f"{file} names {shard[-80:]}, which is not a file beside it: copy all files of the model")
    if (found := sum(map(os.path.getsize, shards))) != sum(sizes):
        raise DamagedFile(f"{file} describes {sum(sizes)} bytes, its shards have {found}: copy or download them again")
    content = np.concatenate([np.fromfile(shard, np.uint8) for shard in shards])
    arrays, start = {}, 0
    for weight, size in zip(weights, sizes, strict=True):
        array = content[start : start + size].view(_TFJS_DTYPES[weight["dtype"]]).reshape(weight["shape"])
        arrays["/".join(weight["name"].split("/")[-2:])] = array  # a model inside a model adds its name in front
        start += size
    if len(arrays) < len(weights):
        raise UserError(f"{file} has two weights of one name: save the network alone")
    return arrays


def _read_hdf5(file: str) -> dict[str, np.ndarray]:
    """All arrays of a Keras HDF5 file."""
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(file, "r") as hdf5:
        datasets = _hdf5_datasets(file, hdf5)
        check_size(file, (dataset.nbytes for dataset in datasets.values()))
        tops = [_top(place) for place in {place.rpartition("/")[0] for place in datasets}]
        for place in _in_layer_order(hdf5, datasets):
            whole = tops.count(_top(place)) == 1  # a group with several groups of arrays is a model inside the model
            name = _keras_name(place, datasets[place], whole)
            if name in arrays:
                raise UserError(f"{file} has two arrays for {name[:80]}: save the network alone")
            arrays[name] = datasets[place][()]
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


def _in_layer_order(hdf5: h5py.File, datasets: Mapping[str, h5py.Dataset]) -> list[str]:
    """The paths of the datasets in the order of the layers: as listed in a legacy file, as numbered in Keras 3."""
    base = f"{_LEGACY_ROOT}/" if _LEGACY_ROOT in hdf5 else ""
    root = hdf5[base or "/"]
    listed = [
        f"{base}{_text(layer)}/{_text(weight)}"
        for layer in root.attrs.get("layer_names", ())
        for weight in root[_text(layer)].attrs.get("weight_names", ())
    ]
    ranks = {place: rank for rank, place in enumerate(listed)}

    def order(place: str) -> tuple[int, list[str | int]]:
        pieces = re.split(r"(\d+)", place)  # text and numbers in turn, so that layer 10 comes after layer 9
        return ranks.get(place, len(ranks)), [int(p) if i % 2 else p for i, p in enumerate(pieces)]

    return sorted(datasets, key=order)


def _keras_name(place: str, dataset: h5py.Dataset, whole: bool) -> str:
    """`<layer>/<parameter>` of the dataset at `place`, or `place` where it is no parameter that we know.

    Keras 3 counts layers per class, layers/conv2d_4/vars/0, and keeps the layer's own name as attribute of `vars`.
    Legacy files have the layer first, whose arrays lie a group deeper (`whole`), or a model and then its layer:
    block1_conv1/block1_conv1_W_1:0, model_weights/conv1/conv1_2/kernel:0, vgg19/block1_conv1/kernel:0.
    """
    *groups, last = place.split("/")
    if not groups or any(group.startswith("optimizer") for group in groups):
        return place
    if groups[-1] == "vars" and len(groups) > 1:
        parameters = _NUMBERED.get((re.sub(r"_\d+$", "", groups[-2]), len(dataset.parent)), ())
        known = last.isdecimal() and int(last) < len(parameters)
        return f"{dataset.parent.attrs.get('name', groups[-2])}/{parameters[int(last)]}" if known else place
    spelled = _PARAMETER.fullmatch(last)
    return f"{_top(place) if whole else groups[-1]}/{_PARAMETERS[spelled[1]]}" if spelled else place


def _top(place: str) -> str:
    """The first group of a path in a legacy file."""
    return place.removeprefix(f"{_LEGACY_ROOT}/").partition("/")[0]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
