"""Finds the faces in every image of a data set and cuts them out, upright, with the eyes and the nose at one place.

faces.csv lists every face (box, five landmarks, score; in pixels of the upright image) and is what train.py reads;
left-out.csv lists every image that gave none, with the reason. A command that was stopped goes on where it was.
"""

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from skimage.transform import SimilarityTransform, estimate_transform, warp

import console
from console import ArgumentParser, UserError, run_script
from tools.face_pictures import Picture, add_flags, check_flags, make_pictures, to_grey

LANDMARKS = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")  # left and right as seen in the image
# Eyes and nose in a picture without margin, as shares of its side: ArcFace's reference points (arXiv:1801.07698), made
# symmetric. The corners of the mouth are left out, since they move with the expression.
TEMPLATE = np.array([[0.342, 0.461], [0.658, 0.461], [0.500, 0.6405]])
SEARCH_SIDE = 800  # pixels of the longer side in which faces are searched
MIN_FACE = 20  # pixels there: smaller faces are not searched
PATCH_SIDE, PATCH_MARGIN = 256, 0.15  # of the upright picture in which landmarks are found again
COLUMNS = ["left", "top", "right", "bottom", "score", *(f"{name}_{axis}" for name in LANDMARKS for axis in "xy")]


@dataclass(frozen=True)
class Face:
    """A face in pixels of its image (x right, y down, the centre of the first pixel is 0, 0)."""

    box: np.ndarray  # left, top, right, bottom
    score: float  # the detector's, up to 1
    landmarks: np.ndarray  # [5, 2], in the order of LANDMARKS


@functools.cache
def detector() -> Any:
    """MTCNN with the weights of its package, on one thread of the CPU: each core has a process of its own."""
    console.quiet_tensorflow()
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    return importlib.import_module("mtcnn").MTCNN()


def find_faces(image: np.ndarray, min_score: float) -> list[Face]:
    """The faces in uint8 [H, W, 3], the largest box first.

    A longer side above SEARCH_SIDE pixels is reduced to it for the search, not for the landmarks.
    """
    height, width = image.shape[:2]
    scale = max(1.0, max(height, width) / SEARCH_SIDE)
    size = max(1, round(width / scale)), max(1, round(height / scale))
    small = image if scale == 1 else np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    faces = []
    for row in _detect([small], threshold_onet=min_score):
        points = (_points(row) + 0.5) * scale - 0.5
        box = np.clip(row[1:5] * scale, 0, [width, height, width, height])
        faces.append(Face(box, float(row[5]), find_again(image, points)))
    return sorted(faces, key=lambda face: -float(np.prod(face.box[2:] - face.box[:2])))


def find_again(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """More accurate landmarks [5, 2]: found again in an upright picture of the face and in its mirror image, averaged.

    MTCNN's own are off by up to a tenth of the eye distance in faces that are not upright.
    """
    transform = placement(points, PATCH_SIDE, PATCH_MARGIN)
    patch, expected = cut(image, transform, PATCH_SIDE), transform(points)
    seen = []
    for row in _detect([patch, patch[:, ::-1]]):
        again = _points(row)
        if row[0] == 1:  # the mirror image
            again = np.stack([PATCH_SIDE - 1 - again[:, 0], again[:, 1]], axis=1)[[1, 0, 2, 4, 3]]
        if np.linalg.norm(again - expected, axis=1).max() < np.linalg.norm(expected[0] - expected[1]) / 2:
            seen.append(again)  # not another face beside it
    return transform.inverse(np.mean(seen, axis=0)) if seen else points


def placement(points: np.ndarray, size: int, margin: float) -> SimilarityTransform:
    """The similarity transform (Umeyama's least squares) from landmarks to TEMPLATE in a picture of `size` pixels.

    `margin` is the share of TEMPLATE's square that is added on each side of it.
    """
    target = (TEMPLATE + margin) / (1 + 2 * margin) * size - 0.5
    return estimate_transform("similarity", points[: len(TEMPLATE)], target)


def cut(image: np.ndarray, transform: SimilarityTransform, size: int) -> np.ndarray:
    """The picture uint8 [size, size, 3] that `transform` makes of `image`; beyond the image its edge is repeated.

    Cubic interpolation, after an area reduction by a whole number where the picture is smaller than the face.
    """
    height, width = image.shape[:2]
    factor = max(1, int(1 / transform.scale))
    corners = transform.inverse(np.array([[0, 0], [size, 0], [0, size], [size, size]]))
    # Only this part is made into floats: a photograph of 100 million pixels would take gigabytes.
    low = np.clip(np.floor(corners.min(axis=0)).astype(int) - 4 * factor, 0, [width - 1, height - 1])
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 4 * factor, low + 1, [width, height])
    part = Image.fromarray(image[low[1] : high[1], low[0] : high[0]]).reduce(factor)
    from_part = SimilarityTransform(scale=factor, translation=low + (factor - 1) / 2)
    inverse = (from_part + transform).inverse
    pixels = warp(np.asarray(part), inverse, output_shape=(size, size), order=3, mode="edge", preserve_range=True)
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def _detect(images: list[np.ndarray], **thresholds: float) -> np.ndarray:
    """MTCNN's rows [N, 16]: index of the image, box, score, x and then y of the five landmarks."""
    return detector().detect_faces(
        images, output_type="numpy", box_format="xyxy", fit_to_image=False, min_face_size=MIN_FACE, **thresholds
    )


def _points(row: np.ndarray) -> np.ndarray:
    return np.stack([row[6:11], row[11:16]], axis=1).astype(float)


def align(image: np.ndarray, flags: argparse.Namespace) -> list[Picture] | str:
    """The aligned faces of one image, or why there are none."""
    faces = find_faces(image, flags.min_score)
    if not faces:
        return "no face found"
    if flags.faces == "one" and len(faces) > 1:
        return f"{len(faces)} faces found"
    pictures = []
    for face in faces if flags.faces == "all" else faces[:1]:
        pixels = cut(image, placement(face.landmarks, flags.size, flags.margin), flags.size)
        numbers = [*face.box.round(1), round(face.score, 4), *face.landmarks.ravel().round(2)]
        pictures.append(Picture(to_grey(pixels, flags), dict(zip(COLUMNS, map(float, numbers), strict=True))))
    return pictures


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and aligns the faces."""
    parser = ArgumentParser(prog="python -m tools.align_faces", description=__doc__)
    add_flags(parser)
    parser.add_argument(
        "--faces",
        choices=("largest", "all", "one"),
        default="largest",
        help="which to cut out; one: an image with several is left out as well (default %(default)s)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.2,
        help="space on each side, as a share of the square from the eyebrows to the chin; the eyes come to lie at "
        "(0.342 + M) / (1 + 2 M) and (0.658 + M) / (1 + 2 M) of the width and (0.461 + M) / (1 + 2 M) of the height, "
        "the nose at 0.5 and (0.6405 + M) / (1 + 2 M) (default %(default)s)",
    )
    parser.add_argument(
        "--min-score", type=float, default=0.9, help="least score of a face, 0 to 1 (default %(default)s)"
    )
    flags = parser.parse_args(argv)
    check_flags(flags)
    if not 0 <= flags.margin <= 2 or not 0 <= flags.min_score < 1:
        raise UserError(f"--margin {flags.margin} and --min-score {flags.min_score}: give 0 to 2 and 0 to below 1")
    if importlib.util.find_spec("mtcnn") is None:
        raise UserError("the face detector is not installed: pip install -r requirements-faces.txt")
    return make_pictures(flags, align, COLUMNS)


if __name__ == "__main__":
    run_script(main)
