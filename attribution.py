"""Where a network looked: how much each position of its last convolution adds to the logit of a class."""

import tensorflow as tf

from model import EVEN_SHARE, FEATURE_NORM, Network, RootedLinear
from networks.layers import Layer, MaxPool, Sequential


def last_convolution(network: Network, x: tf.Tensor) -> tf.Tensor:
    """What leaves the last convolution, before a pool that may follow: images [B, H, W, 3] -> [B, h, w, C].

    14 x 14 positions of VGG at 224 px; in the compute dtype.
    """
    last = _last_stage(network)
    before = network.stages[network.stages.index(last) - 1]
    convolutions, _ = _without_pool(network)
    return convolutions(tf.cast(network.forward(x, last=before), network.compute_dtype))


def head_input(network: Network, activations: tf.Tensor) -> tf.Tensor:
    """What enters the head, [B, h', w', C], given what leaves the last convolution."""
    _, pool = _without_pool(network)
    return pool(activations)


def class_maps(network: Network, activations: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    """What each position adds to the logit of a class: activation times gradient, summed over the channels.

    Grad-CAM without the average of the gradients over positions, which mixes up positions that a head tells apart
    (Draelos & Carin 2020, "Use HiResCAM instead of Grad-CAM", arXiv:2011.08891).

    - The published heads of ResNet and Inception: exact; a map's sum and the bias are the logit. It is the class
      activation map of Zhou et al. 2016.
    - `gap` and `linear`: exact. Their logit is sum_k w_k phi_k with phi_k^2 = N^2 ((1 - e) share_k + e / K), where N is
      `FEATURE_NORM`, e `EVEN_SHARE`, and a share is a sum over positions. So w_k phi_k = (w_k / phi_k) phi_k^2 belongs
      to the positions in proportion to their part of share_k. The bias and the even part, N^2 e / K sum_k w_k / phi_k,
      belong to none. (The plain gradient would sum to zero: a brighter image has the same shares.)
    - `fc` of VGG, with ReLU between its layers: first order. The logit less a map's sum is what hidden biases add.

    Max pooling hands what a position after it adds to the one that was largest.

    Args:
        activations: of `last_convolution`; classes: integer [B].

    Returns:
        float32 [B, h, w]; above zero: for the class, below: against it.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(activations)
        x = head_input(network, activations)
        head = network.layer(network.stages[-1])
        if isinstance(head, RootedLinear):
            x = tf.cast(x, tf.float32)
            score = tf.reduce_sum(x * tf.stop_gradient(_rooted_weights(head, x, classes)))
        else:
            logits = network.forward(x, first=network.head_stages[0])
            score = tf.reduce_sum(tf.gather(logits, classes, batch_dims=1))
    gradient = tape.gradient(score, activations)
    return tf.reduce_sum(tf.cast(activations, tf.float32) * tf.cast(gradient, tf.float32), axis=-1)


def _rooted_weights(head: RootedLinear, x: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    """What one unit of an activation adds to the logit of a class: [B, h, w, C] -> [B, h, w, C] or [B, 1, 1, C]."""
    weights = tf.gather(tf.transpose(head.weights), classes)  # [B, features]
    total = tf.reduce_sum(x, axis=[1, 2, 3], keepdims=True) + 1e-6
    each = (1.0 - EVEN_SHARE) * FEATURE_NORM**2 * weights / head.features(x)
    return tf.reshape(each, [-1, 1, 1, x.shape[-1]] if head.head == "gap" else tf.shape(x)) / total


def _last_stage(network: Network) -> str:
    return network.stages[-len(network.head_stages) - 1]


def _without_pool(network: Network) -> tuple[Layer, Layer]:
    """The last stage before the head in two: all but the max pooling at its end, and that."""
    layer = network.layer(_last_stage(network))
    if isinstance(layer, Sequential) and isinstance(layer.layers[-1], MaxPool):
        return Sequential(layer.layers[:-1]), layer.layers[-1]
    return layer, tf.identity
