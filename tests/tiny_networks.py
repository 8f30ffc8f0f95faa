"""Small networks of each family for fast tests, and values for their variables.

`monkeypatch.setitem(model.NETWORKS, "tiny_resnet", tiny_resnet())` makes one known under that name. Like all of their
families they are not for training from scratch: save the values of `filled` as an npz to start from.
"""

import dataclasses
import math

import numpy as np

from model import Network
from networks.inception import inception_v3
from networks.layers import Architecture
from networks.resnet import keras_bottleneck


def tiny_resnet() -> Architecture:
    """Bottleneck blocks in the stages conv1, conv2 and conv3 (4 and 32 channels): 32 px are enough."""
    return keras_bottleneck(1, 2, width=4)


def tiny_inception() -> Architecture:
    """A sixteenth of the channels, and one block of each kind: 75 px or more."""
    row = inception_v3(width=1 / 16)
    kept = ("stem", "mixed_5c", "mixed_6a", "mixed_6b", "mixed_7a", "mixed_7b")
    return dataclasses.replace(row, stages={stage: row.stages[stage] for stage in kept}, image_size=75)


def filled(network: Network, seed: int = 1) -> Network:
    """Gives every variable random values, as large as those of a trained network; fixed statistics too."""
    rng = np.random.default_rng(seed)
    for name, variable in network.variables_by_name.items():
        variable.assign(random_values(rng, name, tuple(variable.shape)))
    return network


def random_values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that keep activations at one scale: He et al.'s for weights, near 1 for gamma and variances."""
    if name.endswith(("weights", "kernel")):
        return rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2.0 / math.prod(shape[:-1])))
    if name.endswith(("gamma", "variance")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return rng.normal(0.0, 0.1, shape).astype(np.float32)
