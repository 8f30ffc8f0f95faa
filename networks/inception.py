"""Inception v3 with TF-Slim's names and shapes, irregular as they are, so that its checkpoint restores by name.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016. The order of the convolutions is also
the one in which Keras makes them, which `weights.names_inception` relies on.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from networks.layers import (
    Architecture,
    AveragePool,
    Branches,
    Build,
    Convolution,
    Layer,
    MaxPool,
    Norm,
    PooledLinear,
    Sequential,
    Shape,
    Stages,
    Variables,
)

NORM = Norm(epsilon=1e-3, gamma=False)


class Conv(NamedTuple):
    """A convolution, normalised and with ReLU; its kernel is what its name ends with."""

    name: str
    channels: int
    padding: str = "SAME"


class Reduce(NamedTuple):
    """A 3x3 convolution that halves height and width, whatever its name ends with."""

    name: str
    channels: int


class Part(NamedTuple):
    """Two convolutions side by side, their outputs concatenated; the end of a path."""

    first: Conv
    second: Conv


# What a path goes through; "max" is a 3x3 max pool that halves height and width, "average" a 3x3 average pool.
Path = Sequence[Conv | Reduce | Part | str]


def inception_v3(width: float = 1.0) -> Architecture:
    """Inception v3; `width` is a factor on the channels of all convolutions."""
    mixed = {  # the branches of each
        "5b": _mixed_5(32),
        "5c": _mixed_5(64, "Conv2d_0b_1x1", "Conv_1_0c_5x5"),
        "5d": _mixed_5(64),
        "6a": _MIXED_6A,
        "6b": _mixed_6(128),
        "6c": _mixed_6(160),
        "6d": _mixed_6(160),
        "6e": _mixed_6(192),
        "7a": _MIXED_7A,
        "7b": _mixed_7("Conv2d_0b_3x1"),
        "7c": _mixed_7("Conv2d_0c_3x1"),
    }
    stages: dict[str, Build] = {"stem": functools.partial(_stem, width)}
    stages |= {f"mixed_{n}": functools.partial(_mixed, width, f"Mixed_{n}", paths) for n, paths in mixed.items()}
    grey = (127.5, 127.5, 127.5)  # inputs are in [-1, 1]
    return Architecture(
        stages,
        _fc,
        image_size=299,
        min_size=75,
        fc_min_size=75,
        mean_rgb=grey,
        std_rgb=grey,
        scope="InceptionV3",
        from_scratch=False,
    )


_STEM: Path = (  # with the side of what comes out, for an image of 299 pixels
    Reduce("Conv2d_1a_3x3", 32),  # 149
    Conv("Conv2d_2a_3x3", 32, "VALID"),  # 147
    Conv("Conv2d_2b_3x3", 64),  # 147
    "max",  # 73
    Conv("Conv2d_3b_1x1", 80),  # 73
    Conv("Conv2d_4a_3x3", 192, "VALID"),  # 71
    "max",  # 35
)


def _mixed_5(pooled: int, first: str = "Conv2d_0a_1x1", second: str = "Conv2d_0b_5x5") -> list[Path]:  # 35
    return [
        [Conv("Conv2d_0a_1x1", 64)],
        [Conv(first, 48), Conv(second, 64)],
        [Conv("Conv2d_0a_1x1", 64), Conv("Conv2d_0b_3x3", 96), Conv("Conv2d_0c_3x3", 96)],
        ["average", Conv("Conv2d_0b_1x1", pooled)],
    ]


_MIXED_6A: list[Path] = [  # 17
    [Reduce("Conv2d_1a_1x1", 384)],
    [Conv("Conv2d_0a_1x1", 64), Conv("Conv2d_0b_3x3", 96), Reduce("Conv2d_1a_1x1", 96)],
    ["max"],
]


def _mixed_6(inner: int) -> list[Path]:  # 17
    return [
        [Conv("Conv2d_0a_1x1", 192)],
        [Conv("Conv2d_0a_1x1", inner), Conv("Conv2d_0b_1x7", inner), Conv("Conv2d_0c_7x1", 192)],
        [
            Conv("Conv2d_0a_1x1", inner),
            Conv("Conv2d_0b_7x1", inner),
            Conv("Conv2d_0c_1x7", inner),
            Conv("Conv2d_0d_7x1", inner),
            Conv("Conv2d_0e_1x7", 192),
        ],
        ["average", Conv("Conv2d_0b_1x1", 192)],
    ]


_MIXED_7A: list[Path] = [  # 8
    [Conv("Conv2d_0a_1x1", 192), Reduce("Conv2d_1a_3x3", 320)],
    [
        Conv("Conv2d_0a_1x1", 192),
        Conv("Conv2d_0b_1x7", 192),
        Conv("Conv2d_0c_7x1", 192),
        Reduce("Conv2d_1a_3x3", 192),
    ],
    ["max"],
]


def _mixed_7(tall: str) -> list[Path]:  # 8
    return [
        [Conv("Conv2d_0a_1x1", 320)],
        [Conv("Conv2d_0a_1x1", 384), Part(Conv("Conv2d_0b_1x3", 384), Conv(tall, 384))],
        [
            Conv("Conv2d_0a_1x1", 448),
            Conv("Conv2d_0b_3x3", 384),
            Part(Conv("Conv2d_0c_1x3", 384), Conv("Conv2d_0d_3x1", 384)),
        ],
        ["average", Conv("Conv2d_0b_1x1", 192)],
    ]


def _stem(width: float, variables: Variables, shape: Shape) -> Layer:
    return _path(variables, "", shape[-1], width, _STEM)


def _mixed(width: float, name: str, paths: Sequence[Path], variables: Variables, shape: Shape) -> Layer:
    return Branches([_path(variables, f"{name}/Branch_{n}/", shape[-1], width, path) for n, path in enumerate(paths)])


def _path(variables: Variables, scope: str, channels: int, width: float, path: Path) -> Layer:
    """The layers of a path that `channels` channels enter."""

    def convolution(conv: Conv | Reduce) -> Layer:
        outputs = int(conv.channels * width)
        name = f"{scope}{conv.name}"
        if isinstance(conv, Reduce):
            kernel, stride, padding = (3, 3), 2, "VALID"
        else:
            height, side = conv.name.rpartition("_")[2].split("x")
            kernel, stride, padding = (int(height), int(side)), 1, conv.padding
        return Convolution(
            variables, name, kernel, channels, outputs, stride=stride, padding=padding, norm=NORM, biases=False
        )

    layers: list[Layer] = []
    for step in path:
        if isinstance(step, str):
            layers.append(MaxPool(3, 2) if step == "max" else AveragePool())
        elif isinstance(step, Part):
            layers.append(Branches([convolution(step.first), convolution(step.second)]))
        else:
            layers.append(convolution(step))
            channels = int(step.channels * width)
    return Sequential(layers)


def _fc(class_count: int) -> Stages:
    def logits(variables: Variables, shape: Shape) -> Layer:
        return PooledLinear(variables, "Logits/Conv2d_1c_1x1", (1, 1, shape[-1], class_count))

    return {"logits": logits}
