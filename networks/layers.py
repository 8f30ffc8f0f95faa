"""What networks are made of: layers that own their variables, and the row of the table that describes a network."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import tensorflow as tf

import devices

Shape = tuple[int, ...]
Layer = Callable[[tf.Tensor], tf.Tensor]
Build = Callable[["Variables", Shape], Layer]  # makes a stage, given the shape of one example that enters it
Stages = Mapping[str, Build]  # by name, in order


@dataclass(frozen=True)
class Architecture:
    """A row of the table of networks.

    stages: of the convolutional part; the output of each is one tensor [B, H, W, C] without negative values.
    fc: the stages of the published classifier, given the number of classes.
    heads: those of `model.HEADS` that fit.
    image_size: side of the square input in pixels, as published; min_size: the least; fc_min_size: the least with `fc`.
    mean_rgb, std_rgb: an input is (pixel in 0..255 - mean) / std, by channel.
    scope: what the names of variables begin with; empty: the network's name.
    from_scratch: False for batch normalisation, whose statistics are never learnt here: it needs pretrained weights.
    """

    stages: Stages
    fc: Callable[[int], Stages]
    heads: tuple[str, ...] = ("fc", "gap", "linear")
    image_size: int = 224
    min_size: int = 32
    fc_min_size: int = 32
    mean_rgb: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std_rgb: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scope: str = ""
    from_scratch: bool = True


@dataclass
class Variables:
    """The variables of a network while its layers make them.

    Weights begin as in He et al. 2015 (normal, variance 2 / fan in), all else as zeros or ones. An initial value is a
    function of the seed and of how many variables were made before. Without a seed all weights are zero: for values
    that are loaded at once, since a VGG19 of random numbers takes seconds.
    """

    scope: str
    seed: int | None
    by_name: dict[str, tf.Variable] = field(default_factory=dict)

    def weights(self, name: str, shape: Shape, gain: float = 1.0) -> tf.Variable:
        """Float32 weights; the last axis are the outputs. `gain` is a factor on the initial values."""
        if self.seed is None:
            return self._add(f"{name}/weights", tf.zeros(shape))
        deviation = gain * math.sqrt(2.0 / math.prod(shape[:-1]))
        key = (self.seed, len(self.by_name))
        return self._add(f"{name}/weights", deviation * tf.random.stateless_normal(shape, seed=key))

    def vector(self, name: str, size: int, value: float = 0.0, trainable: bool = True) -> tf.Variable:
        """A float32 [size] variable, `value` everywhere."""
        return self._add(name, tf.fill([size], value), trainable)

    def _add(self, name: str, initial: tf.Tensor, trainable: bool = True) -> tf.Variable:
        name = f"{self.scope}/{name}"
        self.by_name[name] = tf.Variable(initial, name=name, trainable=trainable)
        return self.by_name[name]


class _Outline(Variables):
    """The variables of a network as placeholders of a graph that never runs: their shapes alone."""

    def weights(self, name: str, shape: Shape, gain: float = 1.0) -> tf.Tensor:
        return self._add(f"{name}/weights", tf.compat.v1.placeholder(tf.float32, shape))

    def vector(self, name: str, size: int, value: float = 0.0, trainable: bool = True) -> tf.Tensor:
        return self._add(name, tf.compat.v1.placeholder(tf.float32, [size]))

    def _add(self, name: str, initial: tf.Tensor, trainable: bool = True) -> tf.Tensor:
        self.by_name[f"{self.scope}/{name}"] = initial
        return initial


def trace(stages: Stages, image_size: int, scope: str) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """{stage: shape of one example that enters it} and {variable: shape}, both in order; nothing is computed."""
    input_shapes: dict[str, Shape] = {}
    with tf.Graph().as_default():
        outline = _Outline(scope, seed=0)
        x = tf.zeros([1, image_size, image_size, 3])
        for stage, build in stages.items():
            input_shapes[stage] = tuple(x.shape[1:])
            x = build(outline, input_shapes[stage])(x)
    return input_shapes, {name: tuple(tensor.shape) for name, tensor in outline.by_name.items()}


@dataclass(frozen=True)
class Norm:
    """How a family of networks normalises the output of a convolution."""

    epsilon: float
    gamma: bool = True


class BatchNorm(tf.Module):
    """Batch normalisation with fixed statistics: gamma and beta are trained, mean and variance stay as pretrained.

    So an image's activations do not depend on the batch it is in. Ioffe & Szegedy 2015, algorithm 2.
    """

    def __init__(self, variables: Variables, name: str, channels: int, norm: Norm):
        super().__init__()
        self.epsilon = norm.epsilon
        self.gamma = variables.vector(f"{name}/gamma", channels, 1.0) if norm.gamma else None
        self.beta = variables.vector(f"{name}/beta", channels)
        self.mean = variables.vector(f"{name}/moving_mean", channels, trainable=False)
        self.variance = variables.vector(f"{name}/moving_variance", channels, 1.0, trainable=False)

    def scale_and_offset(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Float32 [channels] each: what is normalised becomes x * scale + offset."""
        scale = tf.math.rsqrt(self.variance + self.epsilon)
        scale = scale if self.gamma is None else scale * self.gamma
        return scale, self.beta - self.mean * scale


class Convolution(tf.Module):
    """A 2-D convolution with biases, batch normalisation or both, then ReLU.

    Args:
        kernel: its [height, width].
        inputs, outputs: channels.
        padding: SAME, VALID, or a number of zeros on every side: at stride 2 SAME may have one more below and right.
        relu: whether the ReLU follows; gain: factor on the initial weights.
    """

    def __init__(
        self,
        variables: Variables,
        name: str,
        kernel: tuple[int, int],
        inputs: int,
        outputs: int,
        *,
        stride: int = 1,
        padding: str | int = "SAME",
        norm: Norm | None = None,
        biases: bool = True,
        relu: bool = True,
        gain: float = 1.0,
    ):
        super().__init__()
        self.stride, self.padding, self.relu = stride, padding, relu
        self.weights = variables.weights(name, (*kernel, inputs, outputs), gain)
        self.biases = variables.vector(f"{name}/biases", outputs) if biases else None
        self.norm = BatchNorm(variables, f"{name}/BatchNorm", outputs, norm) if norm else None

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, inputs] -> [B, H', W', outputs] in the dtype of `x`."""
        weights, offset = self.weights, self.biases
        if self.norm:
            # Folded into the convolution in float32: bfloat16 rounds once, and no activation is kept for gamma.
            scale, norm_offset = self.norm.scale_and_offset()
            weights = weights * scale
            offset = norm_offset if offset is None else offset * scale + norm_offset
        padding = self.padding
        if isinstance(padding, int):
            x, padding = pad(x, padding), "VALID"
        x = convolve(x, tf.cast(weights, x.dtype), self.stride, padding)
        x = x if offset is None else tf.nn.bias_add(x, tf.cast(offset, x.dtype))
        return tf.nn.relu(x) if self.relu else x


class MaxPool(tf.Module):
    """Max pooling; `padding` is a number of zeros on every side, for input without negative values."""

    def __init__(self, size: int, stride: int, padding: int = 0):
        super().__init__()
        self.size, self.stride, self.padding = size, stride, padding

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, C] -> [B, H', W', C]."""
        return tf.nn.max_pool2d(pad(x, self.padding), ksize=self.size, strides=self.stride, padding="VALID")


class AveragePool(tf.Module):
    """The mean of the 3x3 values around each position, of those that lie inside."""

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, C] -> the same shape."""
        return tf.nn.avg_pool2d(x, ksize=3, strides=1, padding="SAME")


class Sequential(tf.Module):
    """Layers one after another."""

    def __init__(self, layers: Sequence[Layer]):
        super().__init__()
        self.layers = layers

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Branches(tf.Module):
    """Layers side by side on the same input, their outputs concatenated by channel."""

    def __init__(self, branches: Sequence[Layer]):
        super().__init__()
        self.branches = branches

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, C] -> [B, H', W', sum of the branches' channels]."""
        return tf.concat([branch(x) for branch in self.branches], axis=-1)


class Residual(tf.Module):
    """Layers whose output, `outputs` channels, is added to their input or to what `shortcut` makes of it; then ReLU."""

    def __init__(self, layers: Layer, shortcut: Layer | None, outputs: int):
        super().__init__()
        self.layers, self.shortcut, self.outputs = layers, shortcut, outputs

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return tf.nn.relu(self.layers(x) + (self.shortcut(x) if self.shortcut else x))


class PooledLinear(tf.Module):
    """The mean over all positions, then a linear layer: the published classifier of ResNet and Inception.

    Its weights begin at zero, `shape` is theirs: [features, classes], or [1, 1, features, classes].
    """

    def __init__(self, variables: Variables, name: str, shape: Shape):
        super().__init__()
        self.weights = variables.weights(name, shape, gain=0.0)
        self.biases = variables.vector(f"{name}/biases", shape[-1])

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, features] -> [B, classes]."""
        features = tf.reduce_mean(x, axis=[1, 2])
        return tf.nn.bias_add(tf.matmul(features, tf.reshape(self.weights, self.weights.shape[-2:])), self.biases)


def convolve(x: tf.Tensor, weights: tf.Tensor, stride: int, padding: str) -> tf.Tensor:
    """`tf.nn.conv2d`, where it is faster with a gradient of our own: same values, other rounding of the gradient.

    Not for few channels, as in VGG's first layers: a twentieth of the step, for copies of the largest activations.
    """
    plain_3x3 = tuple(weights.shape[:2]) == (3, 3) and stride == 1 and padding == "SAME"
    if plain_3x3 and weights.shape[2] >= 128 and x.dtype == tf.float32 and devices.slow_filter_gradients():
        return convolve_3x3(x, weights)
    return tf.nn.conv2d(x, weights, strides=stride, padding=padding)


@tf.custom_gradient
def convolve_3x3(x: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """A 3x3 convolution with zeros around, [B, H, W, C] -> [B, H, W, outputs], which differentiates as products.

    The gradient of the filters is three products of matrices, one for each of their rows: dw[i, j] is the sum over all
    positions of x[y + i - 1, x + j - 1]^T dy[y, x]. With oneDNN on AVX2 that takes a quarter less time than its own.
    """

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        batch, height, width = tf.unstack(tf.shape(x)[:3])
        channels, outputs = weights.shape[2:]
        of_input = tf.raw_ops.Conv2DBackpropInput(
            input_sizes=tf.shape(x), filter=weights, out_backprop=upstream, strides=[1, 1, 1, 1], padding="SAME"
        )
        # The three columns side by side as channels, [positions, 3 * channels]. A row of the filters is then a shift
        # by whole rows of the image, a slice that TensorFlow does not copy; zeros below each image keep its
        # positions away from those of the next.
        with tf.control_dependencies([upstream]):  # else made on the way forward, and all layers' kept at once
            padded = pad(x, 1)
        columns = tf.concat([padded[:, :, j : j + width] for j in range(3)], axis=-1)
        columns = tf.reshape(columns, [-1, 3 * channels])
        upstream = tf.reshape(tf.pad(upstream, [[0, 0], [0, 2], [0, 0], [0, 0]]), [-1, outputs])
        count = batch * (height + 2) * width - 2 * width
        products = [
            tf.matmul(columns[i * width : i * width + count], upstream[:count], transpose_a=True) for i in range(3)
        ]
        return of_input, tf.reshape(tf.stack(products), weights.shape)

    return tf.nn.conv2d(x, weights, strides=1, padding="SAME"), gradient


def pad(x: tf.Tensor, pixels: int) -> tf.Tensor:
    """`pixels` rows and columns of zeros around [B, H, W, C]."""
    return tf.pad(x, [[0, 0], [pixels, pixels], [pixels, pixels], [0, 0]]) if pixels else x
