"""The picture of where a network looked in a photograph, and the box around the strongest region."""

import os

import numpy as np
import scipy.ndimage
from matplotlib import colormaps
from PIL import Image, ImageDraw

from files import replace_file

BOX_SHARE = 0.4  # of the largest value: what the box encloses
# Standard deviation of a Gaussian, in sides of a map: one position of 14. Max pooling hands all to single positions,
# and a position sees far more of the photograph than its own square.
SMOOTHING = 1 / 14
BOX_STEPS = 16  # places that a box may begin at within a position of the map
Box = tuple[int, int, int, int]


def strongest_box(values: np.ndarray, crop: tuple[int, int, int]) -> Box | None:
    """The box around the strongest region of a map: (left, top, right, bottom) in pixels of the photograph.

    The region is what is connected with the largest value of the smoothed map and at least `BOX_SHARE` of it, between
    positions interpolated linearly. `right` and `bottom` are the first column and row outside.

    Args:
        values: float [h, w]; crop: top, left and side of the square that the map covers.

    Returns:
        None where the smoothed map is nowhere above zero.
    """
    rows, columns = values.shape
    fine = _smooth(values, columns * BOX_STEPS, rows * BOX_STEPS)
    if not fine.max() > 0:
        return None
    regions, _ = scipy.ndimage.label(fine >= BOX_SHARE * fine.max())
    strongest = regions[np.unravel_index(fine.argmax(), fine.shape)]
    down, across = scipy.ndimage.find_objects(regions)[strongest - 1]
    top, left, side = crop
    y, x = side / fine.shape[0], side / fine.shape[1]
    return (
        left + int(across.start * x),
        top + int(down.start * y),
        left + int(np.ceil(across.stop * x)),
        top + int(np.ceil(down.stop * y)),
    )


def draw_heatmap(
    path: str | os.PathLike[str],
    picture: np.ndarray,
    values: np.ndarray,
    size: tuple[int, int],
    crop: tuple[int, int, int],
    box: Box | None = None,
) -> None:
    """Draws a smoothed map over a photograph: the more a place speaks for the class, the more it glows.

    What lies outside the crop, which the network did not see, is pale. What speaks against the class is left as it is.

    Args:
        path: the file, whose ending says the format.
        picture: uint8 [H', W', 3], the whole photograph at any scale; size: its height and width in pixels.
        values: float [h, w]; crop: top, left and side of the square that it covers, and box: both in those pixels.
    """
    height, width = picture.shape[:2]
    y, x = height / size[0], width / size[1]
    top, left = round(crop[0] * y), round(crop[1] * x)
    seen_height, seen_width = max(1, round(crop[2] * y)), max(1, round(crop[2] * x))
    strength = np.maximum(_smooth(values, seen_width, seen_height), 0)
    strength /= max(float(strength.max()), 1e-30)
    glow = colormaps["inferno"](0.25 + 0.75 * strength)[..., :3] * 255
    seen = np.s_[top : top + seen_height, left : left + seen_width]
    shown = 255 - (255 - picture.astype(np.float32)) * 0.4
    part = picture[seen].astype(np.float32)
    alpha = 0.75 * strength[: part.shape[0], : part.shape[1], np.newaxis]
    shown[seen] = (1 - alpha) * part + alpha * glow[: part.shape[0], : part.shape[1]]
    image = Image.fromarray(np.rint(shown).astype(np.uint8))
    if box:
        corners = (box[0] * x, box[1] * y, max(box[2] * x - 1, box[0] * x), max(box[3] * y - 1, box[1] * y))
        ImageDraw.Draw(image).rectangle(corners, outline=(0, 255, 0), width=max(1, round(max(height, width) / 250)))
    with replace_file(path) as aside:
        image.save(aside)


def _smooth(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """float32 [height, width]: smoothed, with nothing outside, then resized bilinearly."""
    smoothed = scipy.ndimage.gaussian_filter(
        np.asarray(values, np.float32), [SMOOTHING * side for side in values.shape], mode="constant"
    )
    return np.array(Image.fromarray(smoothed).resize((width, height), Image.Resampling.BILINEAR))
