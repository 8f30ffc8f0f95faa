"""What people would use instead of our training step and forward pass, on the same images; for tools.benchmark.

Each function gives (train, forward): candidates that do one step, or one forward pass, of a batch. All train VGG19 end
to end by momentum SGD from random weights; what a network computes does not change how long it takes.
"""

import math
import time
from importlib.util import find_spec

import numpy as np
import tensorflow as tf

from console import cores
from tools.timing import Candidate

WIDTHS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
FC_UNITS = 4096
DECAY, MOMENTUM, RATE = 5e-4, 0.9, 1e-3

Pair = tuple[Candidate, Candidate]


def keras_vgg19(x: np.ndarray, labels: np.ndarray, classes: int, precision: str) -> Pair:
    """Keras' own VGG19, `train_on_batch` and `predict_on_batch`: no dropout and no L2, so less work than ours."""
    import keras

    keras.mixed_precision.set_global_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    model = keras.applications.VGG19(weights=None, input_shape=x.shape[1:], classes=classes, classifier_activation=None)
    model.compile(
        optimizer=keras.optimizers.SGD(RATE, momentum=MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    keras.mixed_precision.set_global_policy("float32")

    def train() -> int:
        model.train_on_batch(x, labels)
        return len(x)

    def forward() -> int:
        model.predict_on_batch(x)
        return len(x)

    return train, forward


def published_vgg19(x: np.ndarray, labels: np.ndarray, classes: int, precision: str) -> Pair:
    """The step of the published Food-101 script, in TensorFlow 2: fc6 is a 7x7 convolution, L2 is part of the loss.

    The update is written out in single ops. Float32 alone, as published.
    """
    shapes = []
    channels = 3
    for width in (width for stage in WIDTHS for width in stage):
        shapes.append((3, 3, channels, width))
        channels = width
    shapes += [(7, 7, channels, FC_UNITS), (1, 1, FC_UNITS, FC_UNITS), (1, 1, FC_UNITS, classes)]
    weights = [tf.Variable(tf.random.normal(s, stddev=math.sqrt(2 / math.prod(s[:-1])))) for s in shapes]
    biases = [tf.Variable(tf.zeros(shape[-1])) for shape in shapes]
    variables = [*weights, *biases]
    momenta = [tf.Variable(tf.zeros_like(v)) for v in variables]
    ends_of_stages = set(np.cumsum([len(stage) for stage in WIDTHS]) - 1)

    def network(y: tf.Tensor, dropout: float) -> tf.Tensor:
        for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
            is_convolution = layer < len(weights) - 3
            y = tf.nn.conv2d(y, w, 1, "SAME" if is_convolution else "VALID") + b
            y = tf.nn.relu(y) if layer < len(weights) - 1 else y
            y = tf.nn.max_pool2d(y, 2, 2, "VALID") if layer in ends_of_stages else y
            y = tf.nn.dropout(y, dropout) if dropout and len(weights) - 3 <= layer < len(weights) - 1 else y
        return tf.squeeze(y, [1, 2])

    @tf.function(autograph=False)
    def step(images: tf.Tensor, of_images: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            plain = tf.nn.sparse_softmax_cross_entropy_with_logits(of_images, network(images, 0.5))
            loss = tf.reduce_mean(plain) + DECAY * tf.add_n([tf.nn.l2_loss(w) for w in weights])
        for v, m, g in zip(variables, momenta, tape.gradient(loss, variables), strict=True):
            m.assign(MOMENTUM * m + g)
            v.assign_sub(RATE * m)
        return loss

    predict = tf.function(lambda images: network(images, 0.0), autograph=False)
    images, of_images = tf.constant(x), tf.constant(labels)

    def train() -> int:
        step(images, of_images).numpy()
        return len(x)

    def forward() -> int:
        predict(images).numpy()
        return len(x)

    return train, forward


def pytorch_vgg19(
    x: np.ndarray, labels: np.ndarray, classes: int, precision: str, device: str = "cpu", compiled: bool = False
) -> Pair:
    """VGG19 as torchvision has it, in PyTorch: channels_last, autocast for bfloat16, L2 in its optimiser."""
    import torch
    from torch import nn

    torch.set_num_threads(cores())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as TensorFlow's default
    torch.backends.cudnn.benchmark = True
    layers: list[nn.Module] = []
    channels = 3
    for stage in WIDTHS:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    side = x.shape[1] // 32
    layers += [nn.Flatten(), nn.Linear(channels * side * side, FC_UNITS), nn.ReLU(inplace=True), nn.Dropout()]
    layers += [nn.Linear(FC_UNITS, FC_UNITS), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(FC_UNITS, classes)]
    model: nn.Module = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
    model = torch.compile(model) if compiled else model
    images = torch.from_numpy(x).to(device).permute(0, 3, 1, 2)  # in memory it is channels_last already
    of_images = torch.from_numpy(labels).to(device)
    cast = torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def train() -> int:
        model.train()
        with cast:
            loss = nn.functional.cross_entropy(model(images).float(), of_images)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        loss.item()
        return len(x)

    def forward() -> int:
        model.eval()
        with torch.inference_mode(), cast:
            model(images).float().cpu().numpy()
        return len(x)

    return train, forward


def peers(x: np.ndarray, labels: np.ndarray, classes: int, precision: str) -> dict[str, Pair]:
    """{name: (train, forward)} of all that are installed and that compute in `precision`."""
    import keras

    found = {f"Keras {keras.__version__}": keras_vgg19(x, labels, classes, precision)}
    if precision == "float32":
        found["published script"] = published_vgg19(x, labels, classes, precision)
    if find_spec("torch"):
        from torch import __version__

        found[f"PyTorch {__version__}"] = pytorch_vgg19(x, labels, classes, precision)
    return found


def print_pytorch_rate(batch_size: int, image_size: int, device: str, compiled: bool) -> None:
    """Prints the images/s of PyTorch's step and forward pass in bfloat16; called in a process of its own on a GPU."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 60, (batch_size, image_size, image_size, 3)).astype(np.float32)
    rates = []
    for work in pytorch_vgg19(x, rng.integers(0, 101, batch_size), 101, "bfloat16", device, compiled):
        work()
        work()
        begin, rounds = time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - begin < 1.5:
            work()
            rounds += 1
        rates.append(rounds * batch_size / (time.perf_counter() - begin))
    print(*rates)
