"""Keras' names and forms of VGG's and VGGFace's weights → TF-Slim's, which are ours."""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from console import UserError
from model import NETWORKS, variable_shapes

_LAYER = {  # of keras.applications, and of keras-vggface as in Oxford's own release
    False: re.compile(r"block(\d)_conv(\d)|fc1|fc2|predictions"),
    True: re.compile(r"conv(\d)_(\d)|fc6|fc7|fc8"),
}
_PARAMETERS = {"kernel": "weights", "bias": "biases"}
_FC = {"fc1": "fc6", "fc2": "fc7", "predictions": "fc8"}


def from_keras(arrays: Mapping[str, np.ndarray], network: str) -> dict[str, np.ndarray]:
    """`arrays` by TF-Slim's names and in its form: HWIO, RGB, fc6 [7, 7, 512, 4096]; others keep their names.

    Raises UserError for the layers of another VGG: Keras' names lack the network, and VGG19's include all of VGG16's.
    """
    ours = {}
    for name, array in arrays.items():
        layer, _, parameter = name.rpartition("/")
        matched = _LAYER[network == "vgg_face"].fullmatch(layer)
        if matched and parameter in _PARAMETERS:
            name, array = f"{network}/{_slim_layer(matched)}/{_PARAMETERS[parameter]}", _slim_array(layer, array)
        ours[name] = array
    convs = _convolutions(ours, network)
    if convs != _convolutions(variable_shapes(network), network):
        for other in (other for other in NETWORKS if other.startswith("vgg_")):
            if convs == _convolutions(variable_shapes(other), other):
                raise UserError(f"it has the layers of {other}, not of {network}: use --network {other}")
    return ours


def _convolutions(names: Iterable[str], network: str) -> set[str]:
    """Those of `names` that are convolutions' of `network`, without its name."""
    return {name.removeprefix(network) for name in names if name.startswith(f"{network}/conv")}


def _slim_layer(matched: re.Match[str]) -> str:
    stage, number = matched.groups()
    return f"conv{stage}/conv{stage}_{number}" if stage else _FC.get(matched[0], matched[0])


def _slim_array(layer: str, array: np.ndarray) -> np.ndarray:
    """Keras' VGG weights are Caffe's, for BGR input; its flatten is in the order h, w, c, as [h, w, 512, o] stands."""
    if layer in ("block1_conv1", "conv1_1") and array.ndim == 4:
        return np.ascontiguousarray(array[:, :, ::-1, :])  # BGR → RGB
    if layer in ("fc1", "fc2", "predictions", "fc6", "fc7", "fc8") and array.ndim == 2:
        side = math.isqrt(array.shape[0] // 512) if layer in ("fc1", "fc6") else 1  # 7 at 224 px
        if side and array.shape[0] % side**2 == 0:
            return array.reshape(side, side, -1, array.shape[1])
    return array
