"""VGG: five stages of 3x3 convolutions, with TF-Slim's names and shapes, so that its checkpoints restore by name.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015, table 1.
"""

import functools

import tensorflow as tf

from networks.layers import Architecture, Convolution, Layer, MaxPool, Sequential, Shape, Stages, Variables

MEAN_RGB = (123.68, 116.78, 103.94)  # of ImageNet's training images; what TF-Slim's VGG checkpoints were trained with
PIXEL_DEVIATION = 64.0  # about the standard deviation of a photograph's values in 0..255


def vgg(
    *widths: tuple[int, ...], fc_units: int = 4096, mean_rgb: tuple[float, float, float] = MEAN_RGB
) -> Architecture:
    """A VGG network, given the channels of the convolutions of each of its stages."""
    stages = {f"conv{n}": functools.partial(_stage, f"conv{n}", of_stage) for n, of_stage in enumerate(widths, start=1)}
    return Architecture(stages, functools.partial(_fc, fc_units), fc_min_size=224, mean_rgb=mean_rgb)


def _stage(stage: str, widths: tuple[int, ...], variables: Variables, shape: Shape) -> Layer:
    layers: list[Layer] = []
    channels = shape[-1]
    for number, width in enumerate(widths, start=1):
        # He et al. assume inputs of variance 1; without this VGG from scratch diverges.
        gain = 1.0 / PIXEL_DEVIATION if stage == "conv1" and number == 1 else 1.0
        layers.append(Convolution(variables, f"{stage}/{stage}_{number}", (3, 3), channels, width, gain=gain))
        channels = width
    return Sequential([*layers, MaxPool(2, 2)])  # [B, H/2, W/2, width]


def _fc(units: int, class_count: int) -> Stages:
    def hidden(stage: str, side: int, variables: Variables, shape: Shape) -> Layer:
        return FullyConnected(variables, stage, (side, side, shape[-1], units))

    def last(variables: Variables, shape: Shape) -> Layer:
        return FullyConnected(variables, "fc8", (1, 1, shape[-1], class_count), is_last=True)

    return {"fc6": functools.partial(hidden, "fc6", 7), "fc7": functools.partial(hidden, "fc7", 1), "fc8": last}


class FullyConnected(tf.Module):
    """A layer that is fully connected at 224 px, as a convolution over larger images; ReLU but for the last one.

    The last one's weights begin at zero: the first loss is log(classes), and the first gradients leave pretrained
    layers alone. Its outputs for the positions of a larger image are averaged.
    """

    def __init__(self, variables: Variables, name: str, shape: Shape, is_last: bool = False):
        super().__init__()
        self.is_last = is_last
        self.weights = variables.weights(name, shape, gain=0.0 if is_last else 1.0)
        self.biases = variables.vector(f"{name}/biases", shape[-1])

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, inputs] -> [B, h, w, units], or [B, classes] from the last layer."""
        weights, biases = tf.cast(self.weights, x.dtype), tf.cast(self.biases, x.dtype)
        height, width, inputs, units = weights.shape
        if x.shape[1:3] == (height, width):
            # As a matrix product it takes a third less time to train on CPU.
            x = tf.matmul(tf.reshape(x, [-1, height * width * inputs]), tf.reshape(weights, [-1, units]))
            x = tf.reshape(tf.nn.bias_add(x, biases), [-1, 1, 1, units])
        else:
            x = tf.nn.bias_add(tf.nn.conv2d(x, weights, strides=1, padding="VALID"), biases)
        return tf.reduce_mean(x, axis=[1, 2]) if self.is_last else tf.nn.relu(x)
