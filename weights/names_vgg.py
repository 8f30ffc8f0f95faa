"""Keras' names and forms of VGG's and VGGFace's weights → TF-Slim's, which are ours."""

import math
import re
from collections.abc import Mapping

import numpy as np

from console import UserError

CONVS_PER_STAGE = {"vgg_16": (2, 2, 3, 3, 3), "vgg_19": (2, 2, 4, 4, 4), "vgg_face": (2, 2, 3, 3, 3)}

_LAYER = {  # of keras.applications, and of keras-vggface as in Oxford's own release
    False: re.compile(r"block(\d)_conv(\d)|fc1|fc2|predictions"),
    True: re.compile(r"conv(\d)_(\d)|fc6|fc7|fc8"),
}
_FC = {"fc1": "fc6", "fc2": "fc7", "predictions": "fc8"}


def from_keras(arrays: Mapping[str, np.ndarray], network: str) -> dict[str, np.ndarray]:
    """`arrays` by TF-Slim's names and in its form: HWIO, RGB, fc6 [7, 7, 512, 4096]; others keep their names.

    Raises UserError for the layers of another VGG: Keras' names lack the network, and VGG19's include all of VGG16's.
    """
    ours, convs = {}, []
    for name, array in arrays.items():
        layer, _, parameter = name.rpartition("/")
        matched = _LAYER[network == "vgg_face"].fullmatch(layer)
        if matched and parameter in ("kernel", "bias"):
            name, array = f"{network}/{_slim_layer(matched)}", _slim_array(layer, array)
            name += "/weights" if parameter == "kernel" else "/biases"
            convs += [matched[1]] if matched[1] and parameter == "kernel" else []
        ours[name] = array
    counts = tuple(convs.count(str(stage)) for stage in range(1, 6))
    for other, expected in CONVS_PER_STAGE.items():
        if counts == expected != CONVS_PER_STAGE.get(network):
            raise UserError(f"it has the layers of {other}, not of {network}: use --network {other}")
    return ours


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
