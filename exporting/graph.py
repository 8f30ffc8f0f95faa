"""From a photograph to probabilities as TensorFlow functions that can be saved and converted."""

import functools
from dataclasses import dataclass

import tensorflow as tf

from data import Preprocessing, preprocess
from dataset.jpeg import REDUCTIONS
from model import Network

HEADER_BYTES = 1 << 18  # of a JPEG, in which its EXIF block is looked for; each block before it has at most 64 KiB
EXIF = b"Exif\0\0"
ORIENTATION = 0x0112  # EXIF's number for it


@dataclass(frozen=True, eq=False)
class Model:
    """What is exported: a network, and all that lies between a photograph and its answer.

    temperature: the logits are divided by it before the softmax.
    """

    network: Network
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    temperature: float = 1.0

    def probabilities(self, x: tf.Tensor) -> tf.Tensor:
        """The network's input [B, S, S, 3] float32 -> [B, classes] float32."""
        return tf.nn.softmax(self.network.forward(x) / self.temperature)

    def module(self) -> tf.Module:
        """An object that owns the variables, as saving and converting want."""
        module = tf.Module()
        module.kept = list(self.network.variables_by_name.values())
        return module


# -- for TFLite and ONNX ---------------------------------------------------------------------------------------------


def portable_resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """[H, W, 3] of any type -> float32 [size, size, 3]: each pixel the mean of the area it covers.

    The same as `data.area_resize` to 0.01 grey levels, but as two matrix products,
    since TFLite has no ResizeArea and tf2onnx makes nearest neighbour of it without saying so.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    rows = tf.reshape(tf.cast(image, tf.float32), [height, width * 3])
    rows = tf.reshape(tf.matmul(_overlaps(height, size), rows), [size, width, 3])
    columns = tf.reshape(tf.transpose(rows, [1, 0, 2]), [width, size * 3])
    columns = tf.reshape(tf.matmul(_overlaps(width, size), columns), [size, size, 3])
    return tf.transpose(columns, [1, 0, 2])


def _overlaps(count: tf.Tensor, size: int) -> tf.Tensor:
    """The share of each of `count` pixels in each of `size` pixels over the same length, float32 [size, count].

    In units of 1 / (count * size) of the length all borders are whole numbers, so that nothing is rounded on the way.
    """
    n = tf.cast(count, tf.float32)
    old, new = tf.range(n), tf.range(float(size))[:, tf.newaxis]
    common = tf.minimum((new + 1.0) * n, (old + 1.0) * size) - tf.maximum(new * n, old * size)
    return tf.maximum(common, 0.0) / n


def portable_function(model: Model, input_size: int | None) -> tf.types.experimental.PolymorphicFunction:
    """image uint8 [1, H, W, 3] -> {"probabilities": float32 [1, classes]}, of operations that TFLite and ONNX have.

    With `input_size` N the image is [1, N, N, 3].
    """

    @tf.function(
        input_signature=[tf.TensorSpec([1, input_size, input_size, 3], tf.uint8, name="image")], autograph=False
    )
    def answer(image: tf.Tensor) -> dict[str, tf.Tensor]:
        x = preprocess(image[0], model.preprocessing, resize=portable_resize)
        return {"probabilities": model.probabilities(x[tf.newaxis])}

    return answer


# -- for a SavedModel ------------------------------------------------------------------------------------------------


def signatures(model: Model) -> dict[str, tf.types.experimental.PolymorphicFunction]:
    """The functions of a SavedModel. Each answers, for B images,

    probabilities float32 [B, classes], index int64 [B] of the greatest, class_names string [B, classes].

    serving_default: image_bytes string [B], see `decode`; images: images uint8 [B, H, W, 3], RGB, of any size;
    preprocessed: x float32 [B, S, S, 3], what the network sees.
    """
    spec, size = model.preprocessing, model.preprocessing.image_size
    network_input = tf.TensorSpec([size, size, 3], tf.float32)
    names = [name.encode("utf-8", "backslashreplace") for name in model.class_names]

    def answer(x: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = model.probabilities(tf.ensure_shape(x, [None, size, size, 3]))
        # A row of names an image, since TensorFlow Serving splits every output into the images of the batch.
        class_names = tf.tile(tf.constant([names]), [tf.shape(x)[0], 1])
        return {
            "probabilities": probabilities,
            "index": tf.argmax(probabilities, axis=1),
            "class_names": class_names,
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")], autograph=False)
    def of_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        def prepare(contents: tf.Tensor) -> tf.Tensor:
            reduction = jpeg_reduction(contents, spec.least_side)
            return preprocess(decode(contents, reduction), spec, reduction=reduction)

        return answer(tf.map_fn(prepare, image_bytes, fn_output_signature=network_input))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")], autograph=False)
    def of_images(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return answer(tf.map_fn(lambda image: preprocess(image, spec), images, fn_output_signature=network_input))

    @tf.function(input_signature=[tf.TensorSpec([None, size, size, 3], tf.float32, name="x")], autograph=False)
    def of_preprocessed(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return answer(x)

    return {"serving_default": of_bytes, "images": of_images, "preprocessed": of_preprocessed}


def jpeg_reduction(contents: tf.Tensor, least: int) -> tf.Tensor | int:
    """What `dataset.images.decode_reduced` divides the sides of a picture by, int32 []; 1 where `least` is 0."""
    if not least:
        return 1

    def of_jpeg() -> tf.Tensor:
        height, width, channels = tf.unstack(tf.image.extract_jpeg_shape(contents), 3)
        reductions = tf.constant(REDUCTIONS)
        possible = (tf.minimum(height, width) >= least * reductions) & (channels != 4)  # CMYK is left to Pillow there
        return tf.reduce_max(tf.where(possible, reductions, 1))

    return tf.cond(_is_jpeg(contents), of_jpeg, lambda: 1)


def _is_jpeg(contents: tf.Tensor) -> tf.Tensor:
    return tf.strings.substr(contents, 0, 3) == b"\xff\xd8\xff"


def decode(contents: tf.Tensor, reduction: tf.Tensor | int = 1) -> tf.Tensor:
    """The picture in the bytes of a JPEG, PNG, GIF or BMP file: string [] -> uint8 [H, W, 3] RGB, upright.

    Of a JPEG at 1/`reduction` of its size. As `dataset.images.decode_reduced` reads it: JPEG with the accurate DCT and
    its EXIF orientation, PNG over white, of a GIF the first frame. It differs where TensorFlow's decoders do: a GIF's
    transparency is black, a BMP's palette is taken for grey, of 16-bit grey the high byte is taken, and an orientation
    in XMP or in a PNG is not seen.
    """

    def jpeg_at(ratio: int) -> tf.Tensor:
        return tf.io.decode_jpeg(contents, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE")

    def jpeg() -> tf.Tensor:
        if isinstance(reduction, int):
            image = jpeg_at(reduction)
        else:
            place = tf.reduce_sum(tf.cast(tf.constant(REDUCTIONS) < reduction, tf.int32))
            image = tf.switch_case(place, [functools.partial(jpeg_at, ratio) for ratio in REDUCTIONS])
        return _upright(image, _orientation(contents))

    def png() -> tf.Tensor:
        rgba = tf.cast(tf.io.decode_png(contents, channels=4), tf.int32)
        depth, kind = tf.unstack(tf.cast(tf.io.decode_raw(tf.strings.substr(contents, 24, 2), tf.uint8), tf.int32), 2)
        rgb, alpha = rgba[..., :3], rgba[..., 3:]
        # libpng fills in an opaque alpha as 1, 3 or 15 where grey is stored in 1, 2 or 4 bits.
        opaque = tf.where((kind == 0) & (depth < 8), 2**depth - 1, 255)
        alpha = tf.minimum(alpha * (255 // opaque), 255)
        return tf.cast((rgb * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)

    def other() -> tf.Tensor:
        return tf.io.decode_image(contents, channels=3, expand_animations=False)

    is_png = tf.strings.substr(contents, 0, 4) == b"\x89PNG"
    return tf.ensure_shape(tf.cond(_is_jpeg(contents), jpeg, lambda: tf.cond(is_png, png, other)), [None, None, 3])


def _orientation(contents: tf.Tensor) -> tf.Tensor:
    """The EXIF orientation of a JPEG, int64 []; 1 where there is none (Exif 2.3, sections 4.5.4 and 4.6.2)."""
    header = tf.cast(tf.io.decode_raw(tf.strings.substr(contents, 0, HEADER_BYTES), tf.uint8), tf.int64)
    header = tf.pad(header, [[0, 1]])  # whatever lies beyond the end is read as this zero
    last = tf.size(header, tf.int64) - 1

    def number(at: tf.Tensor, length: int, little: tf.Tensor | bool = False) -> tf.Tensor:
        places = tf.range(length, dtype=tf.int64)
        powers = 256 ** tf.where(little, places, length - 1 - places)
        at = tf.minimum(at[..., tf.newaxis] + places, last)
        return tf.reduce_sum(tf.gather(header, at) * powers, axis=-1)

    def is_exif(at: tf.Tensor) -> tf.Tensor:
        starts = number(at + 4, len(EXIF)) == int.from_bytes(EXIF, "big")
        return (number(at, 2) == 0xFFE1) & starts

    def is_other_block(at: tf.Tensor) -> tf.Tensor:
        return (number(at, 1) == 0xFF) & (number(at, 2) != 0xFFDA) & ~is_exif(at)  # FFDA: the picture itself begins

    start = tf.constant(2, tf.int64)
    (block,) = tf.while_loop(is_other_block, lambda at: [at + 2 + number(at + 2, 2)], [start])
    tiff = block + 4 + len(EXIF)
    little = number(tiff, 1) == ord("I")
    table = tiff + number(tiff + 4, 4, little)
    entries = table + 2 + 12 * tf.range(number(table, 2, little))
    found = tf.boolean_mask(number(entries + 8, 2, little), number(entries, 2, little) == ORIENTATION)
    return tf.where(is_exif(block), tf.concat([found, [1]], axis=0)[0], 1)


def _upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """`image` [H, W, 3] turned as its EXIF orientation asks; see `dataset.images.UPRIGHT`."""

    def one_of(*values: int) -> tf.Tensor:
        return tf.reduce_any(orientation == tf.constant(values, tf.int64))

    image = tf.cond(one_of(3, 4, 6, 7), lambda: image[::-1], lambda: image)
    image = tf.cond(one_of(2, 3, 7, 8), lambda: image[:, ::-1], lambda: image)
    return tf.cond(one_of(5, 6, 7, 8), lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
