"""Loss, learning-rate schedule, momentum SGD, and the train step.

A step is two things that stay apart: gradients, which change nothing and may be those of a share of a batch, and one
update, once all shares have been added up.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

import devices
from model import Network
from replicas import ONE_DEVICE, Replicas
from run_config import Phase

# The learning rate at a step: int64 scalar -> float32 scalar.
Schedule = Callable[[tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class Optimisation:
    """Settings of the optimiser; the defaults are the published recipe.

    weight_decay: factor of the L2 penalty 0.5 * decay * sum(w^2), on weights and not on biases.
    new_layer_rate: factor on the learning rate of newly initialised variables.
    clip_norm: the gradient (penalty included) is scaled down to this global norm; 0: never.
    accumulate: parts that a batch is computed in, one after another; the step stays that of the whole batch.
    class_weights: factor on the loss of each class, [classes]; None: all 1.
    compile: `on`, `off` or `auto`: whether XLA compiles the step, once for each size of a batch; see `devices.use_xla`.
    deterministic: the same bits on every run on one GPU; `auto` is then `off`.
    """

    learning_rate: float = 1e-3
    end_learning_rate: float = 1e-7
    momentum: float = 0.9
    weight_decay: float = 5e-4
    dropout: float = 0.5
    label_smoothing: float = 0.0
    new_layer_rate: float = 1.0
    clip_norm: float = 0.0
    accumulate: int = 1
    class_weights: tuple[float, ...] | None = None
    compile: str = "auto"
    deterministic: bool = False


def polynomial_decay(step: tf.Tensor, decay_steps: int, start: float, end: float) -> tf.Tensor:
    """Learning rate at `step` (int64 scalar), float32: `tf.compat.v1.train.polynomial_decay` with power 1."""
    left = 1.0 - tf.cast(tf.minimum(step, decay_steps), tf.float32) / float(decay_steps)
    return (start - end) * left + end


def decay_over(phase: Phase, settings: Optimisation) -> Schedule:
    """Each phase decays from the start to the end learning rate."""
    steps = phase.end_step - phase.first_step
    return lambda step: polynomial_decay(
        step - phase.first_step, steps, settings.learning_rate, settings.end_learning_rate
    )


def stateless_dropout(x: tf.Tensor, rate: float, seed: tf.Tensor, first_row: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Inverted dropout of rows `first_row` ... of a batch of `rows`: a part gets the mask that the whole would give it.

    Args:
        x: [b, ...]; seed: int [2].
    """
    shape = tf.concat([[rows], tf.shape(x)[1:]], axis=0)
    uniform = tf.random.stateless_uniform(shape, seed)[first_row : first_row + tf.shape(x)[0]]
    return x * tf.cast(uniform >= rate, x.dtype) * tf.cast(1.0 / (1.0 - rate), x.dtype)


class Trainer(tf.Module):
    """A model, its optimiser's state, and the sums for the training curve; all of it lives on the device.

    Args:
        model: the network, already holding the values to start from.
        settings: see `Optimisation`.
        phases: in order; a variable that any of them trains has a momentum.
        new_variables: names that `settings.new_layer_rate` applies to.
        seed: of dropout.
        replicas: the devices that a step is computed on; the model was made in their scope.

    Attributes:
        step: int64, steps done.
        momenta: {variable's name: accumulator of the same shape}.
        sums: loss, right predictions and examples since the last log event, float64 [3].
        bad_step: int64, the first step whose loss or gradient was not finite, or -1; from there on no variable changes.
    """

    def __init__(
        self,
        model: Network,
        settings: Optimisation,
        phases: list[Phase],
        new_variables: frozenset[str],
        seed: int,
        replicas: Replicas = ONE_DEVICE,
    ):
        super().__init__()
        self.model, self.settings, self.phases = model, settings, phases
        self.new_variables, self.seed, self.replicas = new_variables, seed, replicas
        trained = {name: v for phase in phases for name, v in model.variables_from(phase.train_from).items()}
        with replicas.scope():
            self.momenta = {
                name: tf.Variable(tf.zeros(v.shape), name=f"{name}/Momentum", trainable=False)
                for name, v in model.variables_by_name.items()
                if name in trained
            }
            self.step = tf.Variable(0, dtype=tf.int64, name="global_step", trainable=False)
            self.sums = tf.Variable(tf.zeros([3], tf.float64), name="sums", trainable=False)
            self.bad_step = tf.Variable(-1, dtype=tf.int64, name="bad_step", trainable=False)

    def state(self) -> dict[str, tf.Variable]:
        """Everything that a resumed run needs, under the names of its checkpoint."""
        momenta = {f"{name}/Momentum": v for name, v in self.momenta.items()}
        return {**self.model.variables_by_name, **momenta, "global_step": self.step, "sums": self.sums}

    def steps_done(self) -> int:
        """Reads the device."""
        return int(self.step.numpy())

    def train_step(self, phase: Phase, schedule: Schedule) -> Callable[[tf.Tensor, tf.Tensor], None]:
        """The compiled step of a phase: (x [B, *input], labels int64 [B]) -> updates the variables in place.

        Where several workers share a batch, x is this one's rows, perhaps none, and labels those of the whole batch.
        """
        names = list(self.model.variables_from(phase.train_from))
        trained = [self.model.variables_by_name[name] for name in names]
        spec = self.model.input_spec(phase.input_stage)

        def on_device(x: tf.Tensor, first: tf.Tensor | int, labels: tf.Tensor) -> None:
            rows = tf.shape(labels)[0]
            first += self.replicas.share.bounds(rows)[0]  # in the whole batch
            own_labels = labels[first : first + tf.shape(x)[0]]
            *gradients, loss, correct = self.replicas.sum(self._accumulate(x, own_labels, first, rows, phase, trained))
            self._update(names, gradients, loss, schedule(self.step))
            sums = [tf.cast(value, tf.float64) for value in (loss, correct, rows)]
            self.sums.assign_add(tf.stack(sums))
            self.step.assign_add(1)

        @tf.function(
            input_signature=[spec, tf.TensorSpec([None], tf.int64)], autograph=False, jit_compile=self._is_compiled()
        )
        def step(x: tf.Tensor, labels: tf.Tensor) -> None:
            self.replicas.run(on_device, x, labels)

        return step

    def _is_compiled(self) -> bool:
        """Whether XLA compiles the step: not on several devices, nor in parts, whose sizes only the run knows."""
        settings, several = self.settings, self.replicas.count > 1
        return settings.accumulate == 1 and not several and devices.use_xla(settings.compile, settings.deterministic)

    def _accumulate(
        self, x: tf.Tensor, labels: tf.Tensor, first_row: tf.Tensor, rows: tf.Tensor, phase: Phase, trained: list
    ) -> list[tf.Tensor]:
        """What the examples `first_row` ... of a batch of `rows` add to the results of the batch.

        Those are the gradients of its mean loss, its summed loss and its number of right predictions.
        """
        own_rows = tf.shape(x)[0]
        zeros = [tf.zeros(v.shape) for v in trained] + [tf.constant(0.0), tf.constant(0.0)]
        if self.settings.accumulate == 1:
            compute = functools.partial(self._gradients, x, labels, first_row, rows, phase, trained)
            if self.replicas.count == 1:
                return compute()
            return list(tf.cond(own_rows > 0, compute, lambda: zeros))  # oneDNN fails on an empty share
        part = -(-own_rows // self.settings.accumulate)

        def add_part(start: tf.Tensor, sums: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
            stop = start + part
            new = self._gradients(x[start:stop], labels[start:stop], first_row + start, rows, phase, trained)
            return stop, [total + more for total, more in zip(sums, new, strict=True)]

        # One part at a time, since running them side by side would need the memory of the whole batch.
        _, sums = tf.while_loop(
            lambda start, _: start < own_rows, add_part, [tf.constant(0), zeros], parallel_iterations=1
        )
        return list(sums)

    def _gradients(
        self, x: tf.Tensor, labels: tf.Tensor, first_row: tf.Tensor, rows: tf.Tensor, phase: Phase, trained: list
    ) -> list[tf.Tensor]:
        """As `_accumulate`, at once."""

        def dropout(activations: tf.Tensor, stage: str) -> tf.Tensor:
            key = tf.stack([tf.constant(self.seed, tf.int64), self.step])
            key = tf.random.experimental.stateless_fold_in(key, self.model.stages.index(stage))
            return stateless_dropout(activations, self.settings.dropout, key, first_row, rows)

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trained)
            logits = self.model.forward(x, first=phase.input_stage, dropout=dropout if self.settings.dropout else None)
            plain = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)  # [b]
            objective = tf.reduce_sum(self._objective(plain, labels, logits)) / tf.cast(rows, tf.float32)
        gradients = tape.gradient(objective, trained)
        correct = tf.math.count_nonzero(tf.argmax(logits, axis=1) == labels, dtype=tf.float32)
        return [*gradients, tf.reduce_sum(plain), correct]

    def _objective(self, plain: tf.Tensor, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """What is minimised for each example, [b]; the curves show `plain`, which compares with validation."""
        loss = plain
        if self.settings.label_smoothing:
            uniform = tf.reduce_logsumexp(logits, axis=1) - tf.reduce_mean(logits, axis=1)
            loss = (1.0 - self.settings.label_smoothing) * plain + self.settings.label_smoothing * uniform
        if self.settings.class_weights:
            loss *= tf.gather(tf.constant(self.settings.class_weights, tf.float32), labels)
        return loss

    def _update(self, names: list[str], gradients: list[tf.Tensor], loss: tf.Tensor, rate: tf.Tensor) -> None:
        """L2, clipping, then a = momentum * a + g and w = w - rate * a, as tf.compat.v1.train.MomentumOptimizer.

        `gradients` and `loss` are those of the whole batch. On a CPU the time is that of reading and writing memory, so
        TensorFlow's fused op applies the last two. A step that is not finite runs it too, with factors that change
        nothing: a branch on its result would make the host wait for the device.
        """
        variables = [self.model.variables_by_name[name] for name in names]
        total = [
            g + self.settings.weight_decay * v if self.settings.weight_decay and name.endswith("/weights") else g
            for name, g, v in zip(names, gradients, variables, strict=True)
        ]
        norm = tf.linalg.global_norm(total)
        # The gradient too: variables that it made infinite could be saved before a loss shows it.
        finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
        first_bad = tf.where(finite | (self.bad_step >= 0), self.bad_step, self.step)
        self.bad_step.assign(first_bad)
        good, clip = tf.cast(first_bad < 0, tf.float32), self.settings.clip_norm
        scale = tf.where(first_bad < 0, clip / tf.maximum(norm, clip), 0.0) if clip else good
        for name, variable, gradient in zip(names, variables, total, strict=True):
            factor = self.settings.new_layer_rate if name in self.new_variables else 1.0
            tf.raw_ops.ResourceApplyMomentum(
                var=variable.handle,
                accum=self.momenta[name].handle,
                lr=good * rate * factor,
                grad=tf.math.multiply_no_nan(gradient, scale),  # 0 where `scale` is, even for NaN
                momentum=good * self.settings.momentum + (1.0 - good),
            )

    def take_sums(self) -> tuple[float, float]:
        """Mean loss and accuracy of the training examples since the last call."""
        loss, correct, examples = self.sums.numpy()
        self.sums.assign(tf.zeros_like(self.sums))
        return float(loss / examples), float(correct / examples)


def compiled_forward(
    model: Network, input_stage: str | None = None, replicas: Replicas = ONE_DEVICE
) -> Callable[[tf.Tensor], tf.Tensor]:
    """The compiled network from `input_stage` (default: images): x [B, *input] -> logits [B, classes] float32.

    The devices of this process divide a batch among them.
    """

    def on_device(rows: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
        return tf.cond(  # oneDNN fails on an empty batch
            tf.shape(rows)[0] > 0,
            lambda: model.forward(rows, first=input_stage),
            lambda: tf.zeros([0, model.class_count]),
        )

    @tf.function(input_signature=[model.input_spec(input_stage or model.stages[0])], autograph=False)
    def forward(x: tf.Tensor) -> tf.Tensor:
        if replicas.count == 1:
            return model.forward(x, first=input_stage)
        return tf.concat(replicas.run(on_device, x), axis=0)

    return forward


def predict(forward: Callable[[tf.Tensor], tf.Tensor], batches: Iterable[tuple[tf.Tensor, ...]]) -> np.ndarray:
    """Logits, float32 [N, classes], of every example of `batches` ((x, ...) tuples; at least one batch), in order."""
    return np.concatenate([forward(x).numpy() for x, *_ in batches])
