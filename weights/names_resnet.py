"""Names and forms of ResNet's weights in Keras' and torchvision's files → ours."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from console import UserError, one_line
from model import variable_shapes

# conv2_block1_0_conv and conv2_block1_0_bn; before 2019 res2a_branch1, bn2a_branch1, res2a_branch2a, ...
_KERAS_BLOCK = re.compile(r"conv(\d)_block(\d+)_(\d)_(?:conv|bn)")
_OLD_KERAS_BLOCK = re.compile(r"(?:res|bn)(\d)([a-z])_branch(1|2[a-c])")
_OLD_KERAS_CONVOLUTION = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_KERAS_ENDS = dict.fromkeys(("conv1_conv", "conv1_bn", "conv1", "bn_conv1"), "conv1")
_KERAS_ENDS |= dict.fromkeys(("predictions", "probs", "fc1000"), "fc")
_KERAS_PARAMETERS = {"kernel": "weights", "bias": "biases"}

_TORCH_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(?:conv(\d)|bn(\d)|downsample\.[01])")
_TORCH_ENDS = {"conv1": "conv1", "bn1": "conv1", "fc": "fc"}
_TORCH_PARAMETERS = {"weight": "weights", "bias": "biases"}
_TORCH_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def from_keras(arrays: Mapping[str, np.ndarray], network: str) -> dict[str, np.ndarray]:
    """`arrays`, {layer/parameter: array}, by our names and for RGB input (Keras' are Caffe's, for BGR).

    Those without one of our names keep theirs. Raises UserError for the blocks of another ResNet.
    """
    ours = {}
    for name, array in arrays.items():
        layer, _, parameter = name.rpartition("/")
        if place := _keras_place(layer):
            parameter = _KERAS_PARAMETERS.get(parameter, f"BatchNorm/{parameter}")
            name = f"{network}/{place}/{parameter}"
            if name == f"{network}/conv1/weights":
                array = np.ascontiguousarray(array[:, :, ::-1, :])  # BGR → RGB
        ours[name] = array
    _check_blocks(ours, network)
    return ours


def _keras_place(layer: str) -> str | None:
    if block := _KERAS_BLOCK.fullmatch(layer):
        return f"conv{block[1]}/block{block[2]}/" + ("shortcut" if block[3] == "0" else f"conv{block[3]}")
    if block := _OLD_KERAS_BLOCK.fullmatch(layer):
        number = ord(block[2]) - ord("a") + 1
        return f"conv{block[1]}/block{number}/{_OLD_KERAS_CONVOLUTION[block[3]]}"
    return _KERAS_ENDS.get(layer)


def from_torch(arrays: Mapping[str, np.ndarray], network: str) -> dict[str, np.ndarray]:
    """`arrays` by torchvision's names (timm's are the same) by ours, convolutions OIHW → HWIO.

    Those without one of our names keep theirs. Raises UserError for the blocks of another ResNet, and for a network
    that is not as torchvision has it.
    """
    if f"{network}/conv1/biases" in variable_shapes(network):
        raise UserError(f"{network} has the biases and strides of Keras here, not of torchvision: give a file of Keras")
    ours = {}
    for name, array in arrays.items():
        layer, _, parameter = name.rpartition(".")
        if place := _torch_place(layer):
            is_norm = layer.startswith("bn") or ".bn" in layer or layer.endswith("downsample.1")
            known = (_TORCH_NORM if is_norm else _TORCH_PARAMETERS).get(parameter)
            if known:
                name = f"{network}/{place}/" + (f"BatchNorm/{known}" if is_norm else known)
                array = _as_tensorflow(array)
        ours[name] = array
    _check_blocks(ours, network)
    return ours


def _torch_place(layer: str) -> str | None:
    if block := _TORCH_BLOCK.fullmatch(layer):
        number = block[3] or block[4]
        return f"conv{int(block[1]) + 1}/block{int(block[2]) + 1}/" + (f"conv{number}" if number else "shortcut")
    return _TORCH_ENDS.get(layer)


def _as_tensorflow(array: np.ndarray) -> np.ndarray:
    """Kernels [out, in, h, w] → [h, w, in, out], matrices [out, in] → [in, out]."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return np.ascontiguousarray(array.transpose(axes)) if axes else array


def _check_blocks(names: Iterable[str], network: str) -> None:
    """Raises UserError where a name is below `network` but no variable of it: deeper ones have all its names too."""
    known = variable_shapes(network)
    for name in names:
        if name.startswith(f"{network}/") and name not in known:
            layer = one_line(name.removeprefix(f"{network}/"))[:80]
            raise UserError(f"it has {layer}, which {network} has not: it is of another ResNet")
