"""Predictions with a trained run, for Python programs and for inference.py: files, bytes or arrays in, classes out."""

import contextlib
import itertools
import os
import zipfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import tensorflow as tf

import data
from attribution import class_maps, head_input, last_convolution
from console import UserError, cores, one_line
from dataset import images
from reports import metrics
from run import Run

Source = str | os.PathLike[str] | bytes | np.ndarray
BATCH_SIZE = 16
PICTURE_SIDE = 1024  # pixels, of the photograph that a heat map is drawn on


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Where the network looked for the most probable class of a photograph.

    values: float32 [h, w], what each position of the crop adds to the logit; see `attribution.class_maps`.
    size: height and width of the photograph, upright, in pixels; crop: top, left and side of the square that was seen.
        Of a photograph that was decoded at 1/n of its size, size and side are up to n - 1 less than it has.
    picture: uint8 [H', W', 3], the whole photograph, reduced to sides of at most `PICTURE_SIDE`.
    """

    values: np.ndarray
    size: tuple[int, int]
    crop: tuple[int, int, int]
    picture: np.ndarray


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a run says of one image.

    name: the path as given, "" for bytes and arrays; error: why the image can't be read, "" where it can.
    probabilities: float [classes], in the order of `class_names`.
    features: float32 [C], the activations that enter the head, averaged over all positions.
    heatmap: where the network looked; unknown: whether the image is unlike all training images. Each is None where it
    was not asked for.
    Of an image that can't be read both arrays are empty, and `top` is too.
    """

    name: str
    class_names: Sequence[str]
    error: str = ""
    probabilities: np.ndarray = field(default_factory=lambda: np.zeros(0))
    features: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    heatmap: HeatMap | None = None
    unknown: bool | None = None

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """(class name, probability) of the most probable classes, the first first."""
        best = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.class_names[i], float(self.probabilities[i])) for i in best]


@dataclass(frozen=True, eq=False)
class _Loaded:
    """An image as the network takes it, [views, S, S, 3] float32, or why it can't be read."""

    name: str
    views: tf.Tensor | None = None
    reduction: int = 1
    size: tuple[int, int] = (0, 0)
    picture: np.ndarray | None = None
    error: str = ""


class Predictor:
    """A trained run, ready to predict.

    Args:
        run: a `Run` or its folder.
        batch_size: images that the device computes at a time.
        tta: test-time augmentation: the probabilities are the mean of those of the central view, of its mirror image
            and of so many random views (crop and augmentation as in training), the same ones for every image:
            p = (p_central + p_mirror + p_1 + ... + p_tta) / (tta + 2). None: the central view alone.
        calibrated: logits are divided by the temperature of the run, where it has one.
        heatmaps: each prediction has a `HeatMap` of the central view.
        unknown_rate: an image is unknown where its features are less like those of the training images than this
            share of held-out known images are; see `training.known`.

    Raises UserError where the folder is no run or has no checkpoint, or keeps no features to tell unknown images by.
    """

    def __init__(
        self,
        run: Run | str | os.PathLike[str],
        *,
        batch_size: int = BATCH_SIZE,
        tta: int | None = None,
        calibrated: bool = True,
        heatmaps: bool = False,
        unknown_rate: float | None = None,
    ):
        if batch_size < 1 or (tta is not None and tta < 0):
            raise UserError(f"batch_size {batch_size} must be at least 1, and tta {tta} at least 0")
        run = run if isinstance(run, Run) else Run(run)
        config = run.config()
        self.class_names = config.class_names
        self._spec, self._batch_size, self._heatmaps = config.preprocessing, batch_size, heatmaps
        self._temperature = run.temperature() if calibrated else 1.0
        self._network = run.load_model()
        self._known = None if unknown_rate is None else _Known(run, unknown_rate)
        side = self._spec.image_size

        @tf.function(
            input_signature=[tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([], tf.int32)], autograph=False
        )
        def views(image: tf.Tensor, reduction: tf.Tensor) -> tf.Tensor:
            central = data.preprocess(image, self._spec, reduction=reduction)
            if tta is None:
                return central[tf.newaxis]
            random = tf.map_fn(
                lambda view: data.preprocess(image, self._spec, tf.stack([0, view]), reduction=reduction),
                tf.range(tta),
                fn_output_signature=tf.TensorSpec([side, side, 3], tf.float32),
            )
            return tf.concat([[central, central[:, ::-1]], random], axis=0)

        @tf.function(input_signature=[tf.TensorSpec([None, side, side, 3], tf.float32)], autograph=False)
        def forward(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            activations = last_convolution(self._network, x)
            entering = head_input(self._network, activations)
            features = tf.reduce_mean(tf.cast(entering, tf.float32), axis=[1, 2])
            return activations, features, self._network.forward(entering, first=self._network.head_stages[0])

        self._views, self._forward = views, forward

    def predict(self, sources: Source | Iterable[Source]) -> Iterator[Prediction]:
        """Yields the prediction of each image, in order, while threads read those that follow.

        Args:
            sources: one or many paths, contents of image files, or uint8 arrays [H, W, 3] in RGB. Few are held at a
                time, however many there are.

        Raises ValueError for an array of another shape or type.
        """
        with contextlib.closing(self._read_ahead(_as_many(sources))) as loaded:
            while batch := list(itertools.islice(loaded, self._batch_size)):
                answers = self._predict_batch([item for item in batch if not item.error])
                for item in batch:
                    yield Prediction(item.name, self.class_names, item.error) if item.error else next(answers)

    def _read_ahead(self, sources: Iterable[Source]) -> Generator[_Loaded, None, None]:
        pool = ThreadPoolExecutor(cores())
        try:
            pending: deque[Future[_Loaded]] = deque()
            for source in sources:
                pending.append(pool.submit(self._load, source))
                if len(pending) > self._batch_size + 2 * cores():
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, source: Source) -> _Loaded:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
        reduction, least = 1, self._spec.least_side
        try:
            if isinstance(source, np.ndarray):
                image = source
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                    raise ValueError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
            elif isinstance(source, bytes):
                image, reduction = images.decode_reduced(source, name, least)
            else:
                image, reduction = images.read_reduced(source, least)
        except images.ImageError as error:
            return _Loaded(name, error=error.reason)
        picture = None
        if self._heatmaps:
            reduced = PIL.Image.fromarray(image)
            reduced.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            picture = np.asarray(reduced)
        return _Loaded(name, self._views(image, reduction), reduction, image.shape[:2], picture)

    def _predict_batch(self, batch: Sequence[_Loaded]) -> Iterator[Prediction]:
        if not batch:
            return
        outputs = [
            self._forward(tf.stack(view)) for view in zip(*(tf.unstack(item.views) for item in batch), strict=True)
        ]
        probabilities = np.mean([metrics.softmax(logits.numpy() / self._temperature) for *_, logits in outputs], axis=0)
        activations, features, _ = outputs[0]
        maps = class_maps(self._network, activations, probabilities.argmax(axis=1)) if self._heatmaps else None
        unknown = self._known.are_beyond(features.numpy()).tolist() if self._known else [None] * len(batch)
        for row, item in enumerate(batch):
            heatmap = None
            if maps is not None and item.picture is not None:
                corner, side = data.central_crop(tf.constant(item.size), self._spec.crop_margin, item.reduction)
                height, width = ((n - 1) * item.reduction + 1 for n in item.size)  # surely inside the photograph
                top, left, length = (int(n) * item.reduction for n in (*corner, side))
                crop = top, left, min(length, height - top, width - left)
                heatmap = HeatMap(maps[row].numpy(), (height, width), crop, item.picture)
            of_image = probabilities[row], features[row].numpy()
            yield Prediction(item.name, self.class_names, "", *of_image, heatmap, unknown[row])


class _Known:
    """The training features that a run keeps, and how unlike them an unknown image is."""

    def __init__(self, run: Run, rate: float):
        from reports.neighbours import strangeness, unknown_threshold  # SciPy: no other prediction waits for it

        self._score = strangeness
        try:
            with np.load(run.path / "known.npz", allow_pickle=False) as kept:
                self._references, held_out = kept["references"].astype(np.float32), kept["held_out"]
                self._spreads, self._neighbour = kept["spreads"], int(kept["neighbour"])
        except FileNotFoundError:
            raise UserError(
                f"{run.path} keeps no features to tell unknown images by: train one with --train-from head, the gap "
                "head and cached views"
            ) from None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{run.path / 'known.npz'}: cannot be read ({one_line(error)}): train again") from None
        try:
            self._limit = unknown_threshold(held_out, rate)
        except ValueError as error:
            raise UserError(f"--unknown {rate:g}: {error}") from None

    def are_beyond(self, features: np.ndarray) -> np.ndarray:
        """Whether each of `features`, [B, C], is that of an unknown image, bool [B]."""
        return np.asarray(self._score(features, self._references, self._spreads, self._neighbour) > self._limit)


def _as_many(sources: Source | Iterable[Source]) -> Iterable[Source]:
    if isinstance(sources, str | os.PathLike | bytes) or (isinstance(sources, np.ndarray) and sources.ndim == 3):
        return [sources]
    return sources
