"""ResNet: residual blocks in four stages, as Keras has the 50 layers and as torchvision has the 18 and 34.

He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", 2016, table 1.
"""

import functools
from collections.abc import Callable
from typing import Any

from networks.layers import (
    Architecture,
    Convolution,
    Layer,
    MaxPool,
    Norm,
    PooledLinear,
    Residual,
    Sequential,
    Shape,
    Stages,
    Variables,
)

_Block = Callable[[Variables, str, int, int, int], Residual]  # (variables, name, inputs, width, stride)
_KERAS: dict[str, Any] = {"norm": Norm(epsilon=1.001e-5), "biases": True}
_TORCHVISION: dict[str, Any] = {"norm": Norm(epsilon=1e-5), "biases": False}


def keras_bottleneck(*counts: int, width: int = 64) -> Architecture:
    """A ResNet as `keras.applications` has it: stride in the first 1x1 convolution of a stage, convolution biases.

    Args:
        counts: blocks of the stages conv2, conv3, conv4 and conv5.
        width: channels of conv1; those of conv2 to conv5 are this, twice, four and eight times this (output: times 4).
    """
    mean_rgb = (123.68, 116.779, 103.939)  # Caffe's, with which these weights were trained
    return _resnet(_bottleneck, counts, width, _KERAS, mean_rgb=mean_rgb)


def torchvision_basic(*counts: int, width: int = 64) -> Architecture:
    """A ResNet of two 3x3 convolutions a block as torchvision has it; the arguments are those of `keras_bottleneck`."""
    mean_rgb, std_rgb = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    return _resnet(_basic, counts, width, _TORCHVISION, mean_rgb=mean_rgb, std_rgb=std_rgb)


def _resnet(block: _Block, counts: tuple[int, ...], width: int, kind: dict[str, Any], **pixels: Any) -> Architecture:
    stages: dict[str, Any] = {"conv1": functools.partial(_conv1, width, kind)}
    for index, count in enumerate(counts):
        stage = f"conv{index + 2}"
        stages[stage] = functools.partial(_blocks, stage, block, count, width * 2**index, 2 if index else 1)
    return Architecture(stages, _fc, from_scratch=False, **pixels)


def _conv1(width: int, kind: dict[str, Any], variables: Variables, shape: Shape) -> Layer:
    conv = Convolution(variables, "conv1", (7, 7), shape[-1], width, stride=2, padding=3, **kind)
    return Sequential([conv, MaxPool(3, 2, padding=1)])  # [B, H/4, W/4, width]


def _blocks(
    stage: str, block: _Block, count: int, width: int, stride: int, variables: Variables, shape: Shape
) -> Layer:
    layers, channels = [], shape[-1]
    for number in range(1, count + 1):
        layers.append(block(variables, f"{stage}/block{number}", channels, width, stride if number == 1 else 1))
        channels = layers[-1].outputs
    return Sequential(layers)


def _bottleneck(variables: Variables, name: str, inputs: int, width: int, stride: int) -> Residual:
    outputs = 4 * width
    layers = [
        Convolution(variables, f"{name}/conv1", (1, 1), inputs, width, stride=stride, **_KERAS),
        Convolution(variables, f"{name}/conv2", (3, 3), width, width, **_KERAS),
        Convolution(variables, f"{name}/conv3", (1, 1), width, outputs, relu=False, **_KERAS),
    ]
    return Residual(Sequential(layers), _shortcut(variables, name, inputs, outputs, stride, _KERAS), outputs)


def _basic(variables: Variables, name: str, inputs: int, width: int, stride: int) -> Residual:
    layers = [
        Convolution(variables, f"{name}/conv1", (3, 3), inputs, width, stride=stride, padding=1, **_TORCHVISION),
        Convolution(variables, f"{name}/conv2", (3, 3), width, width, relu=False, **_TORCHVISION),
    ]
    return Residual(Sequential(layers), _shortcut(variables, name, inputs, width, stride, _TORCHVISION), width)


def _shortcut(
    variables: Variables, name: str, inputs: int, outputs: int, stride: int, kind: dict[str, Any]
) -> Convolution | None:
    """A 1x1 convolution where a block changes the shape."""
    if stride == 1 and inputs == outputs:
        return None
    return Convolution(variables, f"{name}/shortcut", (1, 1), inputs, outputs, stride=stride, relu=False, **kind)


def _fc(class_count: int) -> Stages:
    return {"fc": lambda variables, shape: PooledLinear(variables, "fc", (shape[-1], class_count))}
