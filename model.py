"""A network as an ordered list of named stages and a head, and the table of all networks.

It may be entered and left between any two stages: `forward(x, first, last)`. Freezing, cached features, new heads and
heat maps are all such cuts.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from networks.inception import inception_v3
from networks.layers import Architecture, Layer, Shape, Stages, Variables, trace
from networks.resnet import keras_bottleneck, torchvision_basic
from networks.vgg import vgg

# VGG: the channels of the convolutions of each stage. ResNet: the blocks of each stage. A new row is a new network.
NETWORKS: dict[str, Architecture] = {
    "vgg_19": vgg((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
    "vgg_16": vgg((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    "vgg_face": vgg(
        *((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3), mean_rgb=(129.1863, 104.7624, 93.5940)
    ),
    "resnet_50": keras_bottleneck(3, 4, 6, 3),
    "resnet_34": torchvision_basic(3, 4, 6, 3),
    "resnet_18": torchvision_basic(2, 2, 2, 2),
    "inception_v3": inception_v3(),
    # Trains from scratch on a laptop: the baseline without ImageNet.
    "small": vgg((32,), (64,), (128,), (256,), (256,)),
}
HEADS = ("fc", "gap", "linear")

# Length of the vector that the gap and linear heads classify: the longest at which SGD at learning rate 1e-3 and
# momentum 0.9 is stable whatever the data: the loss curves by length^2 / 2 at most, and rate * curvature must be < 3.8.
FEATURE_NORM = 87.0
# Part of that vector's squared length that is spread evenly over the features. A square root's slope is infinite at 0:
# this bounds it at 4.5 (1 / sqrt(EVEN_SHARE)) times its value at a feature of mean size, so that channels that are
# almost dead do not rule the gradient that fine-tuning sends down.
EVEN_SHARE = 0.05

Dropout = Callable[[tf.Tensor, str], tf.Tensor]


class Network(tf.Module):
    """A network of the table with a head for some number of classes.

    Args:
        network: a row of `NETWORKS`.
        head: `fc` (the published classifier: fc6, fc7, fc8 of VGG; global average pooling and a linear layer of the
            others), `gap` (a linear layer on the normalised square root of the globally averaged features) or `linear`
            (the same on all features of all positions).
        class_count: number of classes, the width of the logits.
        image_size: side of the square input in pixels. The variables of `linear` depend on it.
        compute_dtype: float32 or bfloat16. Variables, pooled features and logits are float32 in any case.
        seed: for the initial values; those of the last layer are zero. None: all are zero, to be loaded at once.

    Attributes:
        stages: names in order, those of the head (`head_stages`) included.
        variables_by_name: {name: tf.Variable} in the order of the stages, the fixed statistics of batch normalisation
            included.

    Raises:
        ValueError: for an image size or a head that does not fit the network.
    """

    def __init__(
        self,
        network: str,
        head: str,
        class_count: int,
        image_size: int = 224,
        compute_dtype: tf.DType = tf.float32,
        seed: int | None = 0,
    ):
        super().__init__(name=network)
        self.network, self.head, self.class_count, self.image_size = network, head, class_count, image_size
        self.compute_dtype = compute_dtype
        row = NETWORKS[network]
        minimum = row.fc_min_size if head == "fc" else row.min_size
        if image_size < minimum:
            raise ValueError(f"image size {image_size} is too small for the {head} head: it takes {minimum} or more")
        if head not in row.heads:
            raise ValueError(f"{network} has no {head} head: it takes {', '.join(row.heads)}")
        head_stages = row.fc(class_count) if head == "fc" else _rooted_head(head, class_count)
        self.head_stages = tuple(head_stages)
        self.stages = (*row.stages, *self.head_stages)
        stages = {**row.stages, **head_stages}
        scope = row.scope or network
        self._input_shapes, _ = trace(stages, image_size, scope)
        variables = Variables(scope, seed)
        layers: dict[str, Layer] = {}
        stage_of: dict[str, str] = {}
        for stage, build in stages.items():
            layers[stage] = build(variables, self._input_shapes[stage])
            stage_of |= {name: stage for name in variables.by_name if name not in stage_of}
        # Whole: tf.Module wraps a dict that it is given, and a SavedModel can't be made where one has grown since.
        self._layers, self._stage_of, self.variables_by_name = layers, stage_of, variables.by_name

    def _dtype(self, stage: str) -> tf.DType:
        return tf.float32 if stage == self.stages[-1] else self.compute_dtype

    def stage_of(self, variable_name: str) -> str:
        """The stage that a variable of `variables_by_name` belongs to."""
        return self._stage_of[variable_name]

    def variables_from(self, stage: str) -> dict[str, tf.Variable]:
        """The variables of `stage` and all later stages that are trained, by name."""
        kept = self.stages[self.stages.index(stage) :]
        return {name: v for name, v in self.variables_by_name.items() if v.trainable and self._stage_of[name] in kept}

    def input_shape(self, stage: str) -> Shape:
        """The shape of one example where it enters `stage`."""
        return self._input_shapes[stage]

    def layer(self, stage: str) -> Layer:
        """What computes a stage."""
        return self._layers[stage]

    def pools(self, stage: str) -> bool:
        """Whether only the mean over positions of what enters `stage` counts, so that it may be kept instead."""
        return stage == "gap"

    def input_spec(self, stage: str) -> tf.TensorSpec:
        """The signature of a batch that enters `stage`, float32; one that pools takes any number of positions."""
        shape = self._input_shapes[stage]
        return tf.TensorSpec([None, None, None, shape[-1]] if self.pools(stage) else [None, *shape], tf.float32)

    def forward(
        self, x: tf.Tensor, first: str | None = None, last: str | None = None, dropout: Dropout | None = None
    ) -> tf.Tensor:
        """Runs the stages from `first` to `last`, both included.

        Args:
            x: what enters `first` (default: the first stage): images [B, H, W, 3] as `data.preprocess` makes them, or
                `[B, *input_shape(first)]`.
            last: default the last stage, whose output are the logits.
            dropout: applied while training to the outputs of the head's stages but the last, VGG's fc6 and fc7:
                (activations, stage) -> same.

        Returns:
            logits [B, class_count] float32, or the output of `last` in the compute dtype.
        """
        start = self.stages.index(first) if first else 0
        stop = self.stages.index(last) + 1 if last else len(self.stages)
        for stage in self.stages[start:stop]:
            x = self._layers[stage](tf.cast(x, self._dtype(stage)))
            if dropout and stage in self.head_stages[:-1]:
                x = dropout(x, stage)
        return x


def variable_shapes(network: str) -> dict[str, Shape]:
    """{name: shape} of the variables of `network` with its `fc` head for one class, in order; none is made."""
    row = NETWORKS[network]
    _, shapes = trace({**row.stages, **row.fc(1)}, row.fc_min_size, row.scope or network)
    return shapes


def _rooted_head(head: str, class_count: int) -> Stages:
    def build(variables: Variables, shape: Shape) -> Layer:
        features = shape[-1] if head == "gap" else math.prod(shape)
        return RootedLinear(variables, head, features, class_count)

    return {head: build}


class RootedLinear(tf.Module):
    """Softmax regression on square-rooted features of fixed length: the `gap` and the `linear` head.

    ReLU features are counts of a kind: a few channels are very large. Their square root (Arandjelović & Zisserman,
    "Three things everyone should know to improve object retrieval", 2012) and a fixed length make the problem well
    conditioned, so that plain SGD at the published learning rate reaches what a logistic regression reaches.

    Args:
        head: `gap`: the features are averaged over all positions first; `linear`: all features of all positions.
    """

    def __init__(self, variables: Variables, head: str, features: int, class_count: int):
        super().__init__()
        self.head = head
        # Zero: the first loss is log(classes), and the first gradients leave pretrained layers alone.
        self.weights = variables.weights(head, (features, class_count), gain=0.0)
        self.biases = variables.vector(f"{head}/biases", class_count)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, C] float32, none negative -> [B, classes]."""
        return tf.nn.bias_add(tf.matmul(self.features(x), self.weights), self.biases)

    def features(self, x: tf.Tensor) -> tf.Tensor:
        """[B, H, W, C] float32, none negative -> what is classified, [B, features] of length `FEATURE_NORM`."""
        pooled = self.head == "gap"
        features = tf.reduce_mean(x, axis=[1, 2]) if pooled else tf.reshape(x, [-1, math.prod(x.shape[1:])])
        share = features / (tf.reduce_sum(features, axis=1, keepdims=True) + 1e-6)  # [B, features], sums to 1
        share = (1.0 - EVEN_SHARE) * share + EVEN_SHARE / features.shape[1]
        return FEATURE_NORM * tf.sqrt(share)
