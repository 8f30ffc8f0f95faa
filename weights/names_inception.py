"""Names of Inception v3's weights in Keras' files → TF-Slim's, which are ours."""

import re
from collections.abc import Mapping

import numpy as np

from console import UserError
from model import variable_shapes

_LAYER = re.compile(r"(conv2d|batch_normalization)(?:_(\d+))?")
_NORM_PARAMETERS = ("beta", "moving_mean", "moving_variance")
_LOGITS = "InceptionV3/Logits/Conv2d_1c_1x1"
_REMEDY = "save the whole keras.applications InceptionV3, and nothing else, or give TF-Slim's checkpoint"


def from_keras(arrays: Mapping[str, np.ndarray], network: str) -> dict[str, np.ndarray]:
    """`arrays`, {layer/parameter: array}, by our names; those without one keep theirs.

    Keras numbers layers as it makes them (conv2d, conv2d_1, ..., from any number on), in the order of our variables.
    Raises UserError where numbers, count, parameters or a shape leave a doubt.
    """
    shapes = variable_shapes(network)
    ours = {name: array for name, array in arrays.items() if not _LAYER.fullmatch(name.rpartition("/")[0])}
    layers = [
        name.removesuffix("/weights") for name in shapes if name.endswith("/weights") and name != f"{_LOGITS}/weights"
    ]
    for kind, parameters in (("conv2d", ("kernel",)), ("batch_normalization", _NORM_PARAMETERS)):
        for layer, numbered in zip(layers, _in_order(arrays, kind, parameters, len(layers)), strict=True):
            for parameter in parameters:
                name = f"{layer}/weights" if kind == "conv2d" else f"{layer}/BatchNorm/{parameter}"
                array = arrays[f"{numbered}/{parameter}"]
                if array.shape != shapes[name]:
                    raise UserError(
                        f"its {numbered} has the shape {list(array.shape)} where {list(shapes[name])} is due: {_REMEDY}"
                    )
                ours[name] = array
    if "predictions/kernel" in ours:
        ours[f"{_LOGITS}/weights"] = ours.pop("predictions/kernel")[np.newaxis, np.newaxis]
    if "predictions/bias" in ours:
        ours[f"{_LOGITS}/biases"] = ours.pop("predictions/bias")
    return ours


def _in_order(arrays: Mapping[str, np.ndarray], kind: str, parameters: tuple[str, ...], count: int) -> list[str]:
    """The `count` layers called `kind` or `kind`_<number>, by their numbers."""
    numbers: dict[int, str] = {}
    for name in arrays:
        layer, _, parameter = name.rpartition("/")
        matched = _LAYER.fullmatch(layer)
        if matched and matched[1] == kind:
            if parameter not in parameters:
                raise UserError(f"its {layer} has a {parameter}, which Inception v3 has not: {_REMEDY}")
            numbers[int(matched[2] or 0)] = layer
    ordered = [numbers[number] for number in sorted(numbers)]
    if len(ordered) != count or max(numbers) - min(numbers) != count - 1:
        raise UserError(f"it has {len(ordered)} layers called {kind} and not {count} in a row: {_REMEDY}")
    for layer in ordered:
        for parameter in parameters:
            if f"{layer}/{parameter}" not in arrays:
                raise UserError(f"its {layer} has no {parameter}: {_REMEDY}")
    return ordered
