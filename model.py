"""VGG as an ordered list of named stages, with TF-Slim's variable names and shapes.

The network may be entered and left between any two stages: `forward(x, first, last)`. Freezing, cached features and new
heads are all such cuts. Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
2015, table 1; names and shapes follow the `vgg_16` and `vgg_19` of TF-Slim, so that its checkpoints restore by name.
"""

import math
from collections.abc import Callable

import tensorflow as tf

# Convolution widths, a tuple per stage; each stage ends with a 2x2 max pool. A new row is a new network.
NETWORKS: dict[str, tuple[tuple[int, ...], ...]] = {
    "vgg_19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
    "vgg_16": ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    "small": ((32,), (64,), (128,), (256,), (256,)),  # trains from scratch on a laptop: the baseline without ImageNet
}
HEADS: dict[str, tuple[str, ...]] = {"fc": ("fc6", "fc7", "fc8"), "gap": ("gap",), "linear": ("linear",)}

FC_UNITS = 4096
PIXEL_DEVIATION = 64.0  # about the standard deviation of a photograph's values in 0..255
# Length of the vector that the gap and linear heads classify: the longest at which SGD at learning rate 1e-3 and
# momentum 0.9 is stable whatever the data: the loss curves by length^2 / 2 at most, and rate * curvature must be < 3.8.
FEATURE_NORM = 87.0
# Part of that vector's squared length that is spread evenly over the features. A square root's slope is infinite at 0:
# this bounds it at 4.5 (1 / sqrt(EVEN_SHARE)) times its value at a feature of mean size, so that channels that are
# almost dead do not rule the gradient that fine-tuning sends down.
EVEN_SHARE = 0.05

Dropout = Callable[[tf.Tensor, str], tf.Tensor]


class Network(tf.Module):
    """A VGG network.

    Args:
        network: a row of `NETWORKS`.
        head: `fc` (fc6, fc7, fc8, as published), `gap` (global average pooling and one linear layer) or `linear`
            (one linear layer on the flattened output of conv5).
        class_count: number of classes, the width of the logits.
        image_size: side of the square input in pixels. The variables of `linear` depend on it; `fc` needs 224 or more.
        compute_dtype: float32 or bfloat16. Variables, pooled features and logits are float32 in any case.
        seed: for the initial values: He et al. 2015 (normal, variance 2 / fan in), biases and the last layer zero.

    Attributes:
        stages: names in order, `conv1` ... `conv5` and those of the head.
        variables_by_name: {TF-Slim name: tf.Variable}, in the order of the stages.

    Raises:
        ValueError: for an image size that the network or its head can't take.
    """

    def __init__(
        self,
        network: str,
        head: str,
        class_count: int,
        image_size: int = 224,
        compute_dtype: tf.DType = tf.float32,
        seed: int = 0,
    ):
        super().__init__(name=network)
        self.network, self.head, self.class_count, self.image_size = network, head, class_count, image_size
        self.compute_dtype = compute_dtype
        self._widths = dict(zip((f"conv{n}" for n in range(1, 6)), NETWORKS[network], strict=True))
        self.head_stages = HEADS[head]
        self.stages = (*self._widths, *self.head_stages)
        minimum = 224 if head == "fc" else 32
        if image_size < minimum:
            raise ValueError(f"image size {image_size} is too small for the {head} head: it takes {minimum} or more")
        self.variables_by_name: dict[str, tf.Variable] = {}
        for name, shape in self._weight_shapes().items():
            self._add_layer(name, shape, seed)

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """{layer's full name: shape of its weights}, in order; convolutions are [height, width, in, out]."""
        shapes: dict[str, tuple[int, ...]] = {}
        channels = 3
        for stage, widths in self._widths.items():
            for number, width in enumerate(widths, start=1):
                shapes[f"{self.network}/{stage}/{stage}_{number}"] = (3, 3, channels, width)
                channels = width
        heads: dict[str, dict[str, tuple[int, ...]]] = {
            "fc": {
                "fc6": (7, 7, channels, FC_UNITS),
                "fc7": (1, 1, FC_UNITS, FC_UNITS),
                "fc8": (1, 1, FC_UNITS, self.class_count),
            },
            "gap": {"gap": (channels, self.class_count)},
            "linear": {"linear": ((self.image_size // 32) ** 2 * channels, self.class_count)},
        }
        for stage, shape in heads[self.head].items():
            shapes[f"{self.network}/{stage}"] = shape
        return shapes

    def _add_layer(self, name: str, shape: tuple[int, ...], seed: int) -> None:
        deviation = math.sqrt(2.0 / math.prod(shape[:-1]))
        if name.endswith("conv1_1"):
            deviation /= PIXEL_DEVIATION  # He assumes inputs of variance 1; without this VGG from scratch diverges
        if name == f"{self.network}/{self.stages[-1]}":
            deviation = 0.0  # the first loss is log(classes) and the first gradients leave pretrained layers alone
        key = (seed, len(self.variables_by_name))
        weights = deviation * tf.random.stateless_normal(shape, seed=key)
        self.variables_by_name[f"{name}/weights"] = tf.Variable(weights, name=f"{name}/weights")
        self.variables_by_name[f"{name}/biases"] = tf.Variable(tf.zeros(shape[-1:]), name=f"{name}/biases")

    def stage_of(self, variable_name: str) -> str:
        """The stage that a variable of `variables_by_name` belongs to."""
        return variable_name.split("/")[1]

    def variables_from(self, stage: str) -> dict[str, tf.Variable]:
        """The variables of `stage` and all later stages, by name."""
        kept = self.stages[self.stages.index(stage) :]
        return {name: v for name, v in self.variables_by_name.items() if self.stage_of(name) in kept}

    def input_shape(self, stage: str) -> tuple[int, ...]:
        """The shape of one example where it enters `stage`."""
        index = self.stages.index(stage)
        if index <= 5:
            side = self.image_size // 2**index
            return (side, side, NETWORKS[self.network][index - 1][-1] if index else 3)
        side = self.image_size // 32 - 6
        return (side, side, FC_UNITS)

    def forward(
        self, x: tf.Tensor, first: str | None = None, last: str | None = None, dropout: Dropout | None = None
    ) -> tf.Tensor:
        """Runs the stages from `first` to `last`, both included.

        Args:
            x: what enters `first` (default conv1): images [B, H, W, 3] minus the mean, or `[B, *input_shape(first)]`.
            last: default the last stage, whose output are the logits.
            dropout: applied to the outputs of fc6 and fc7 while training: (activations [B, h, w, 4096], stage) -> same.

        Returns:
            logits [B, class_count] float32, or the output of `last` in the compute dtype.
        """
        start = self.stages.index(first) if first else 0
        stop = self.stages.index(last) + 1 if last else len(self.stages)
        for stage in self.stages[start:stop]:
            if stage in self._widths:
                x = self._convolutions(tf.cast(x, self.compute_dtype), stage)
            elif stage in ("fc6", "fc7"):
                x = tf.nn.relu(self._fully_connected(tf.cast(x, self.compute_dtype), stage))
                x = dropout(x, stage) if dropout else x
            elif stage == "fc8":
                # One prediction a position; their mean for images larger than 224 px (one position at 224 px).
                x = tf.reduce_mean(self._fully_connected(tf.cast(x, tf.float32), stage), axis=[1, 2])
            else:
                x = self._linear(tf.cast(x, tf.float32), stage)
        return x

    def _parameters(self, layer: str, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
        weights = self.variables_by_name[f"{self.network}/{layer}/weights"]
        biases = self.variables_by_name[f"{self.network}/{layer}/biases"]
        return tf.cast(weights, dtype), tf.cast(biases, dtype)

    def _convolutions(self, x: tf.Tensor, stage: str) -> tf.Tensor:
        for number in range(1, len(self._widths[stage]) + 1):
            weights, biases = self._parameters(f"{stage}/{stage}_{number}", x.dtype)
            x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, weights, strides=1, padding="SAME"), biases))
        return tf.nn.max_pool2d(x, ksize=2, strides=2, padding="VALID")  # [B, H/2, W/2, width]

    def _fully_connected(self, x: tf.Tensor, stage: str) -> tf.Tensor:
        """A VALID convolution; as a matrix product, a third faster to train on CPU, where it covers its whole input."""
        weights, biases = self._parameters(stage, x.dtype)
        if x.shape[1:3] != weights.shape[0:2]:
            return tf.nn.bias_add(tf.nn.conv2d(x, weights, strides=1, padding="VALID"), biases)  # [B, h, w, units]
        units = weights.shape[-1]
        y = tf.matmul(tf.reshape(x, [-1, math.prod(weights.shape[:-1])]), tf.reshape(weights, [-1, units]))
        return tf.reshape(tf.nn.bias_add(y, biases), [-1, 1, 1, units])

    def _linear(self, x: tf.Tensor, stage: str) -> tf.Tensor:
        """Softmax regression on square-rooted features of fixed length.

        ReLU features are counts of a kind: a few channels are very large. Their square root (Arandjelović & Zisserman,
        "Three things everyone should know to improve object retrieval", 2012) and a fixed length make the problem well
        conditioned, so that plain SGD at the published learning rate reaches what a logistic regression reaches.
        """
        features = tf.reduce_mean(x, axis=[1, 2]) if stage == "gap" else tf.reshape(x, [-1, math.prod(x.shape[1:])])
        share = features / (tf.reduce_sum(features, axis=1, keepdims=True) + 1e-6)  # [B, features], sums to 1
        share = (1.0 - EVEN_SHARE) * share + EVEN_SHARE / features.shape[1]
        rooted = FEATURE_NORM * tf.sqrt(share)
        weights, biases = self._parameters(stage, tf.float32)
        return tf.nn.bias_add(tf.matmul(rooted, weights), biases)  # [B, classes]
