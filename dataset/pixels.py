"""A Pillow image of any mode -> upright uint8 RGB."""

from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageFile, JpegImagePlugin, TiffImagePlugin

BAND_PIXELS = 1 << 22  # the largest piece that is converted at once


def upright(pixels: np.ndarray, image: ImageFile.ImageFile) -> np.ndarray:
    """Pixels [H, W, 3] turned as the EXIF (or XMP) orientation of their image says; what cannot be parsed is upright.

    Of an image that Pillow has loaded, what its reader has turned by itself is not turned again.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def scale_transparency(image: ImageFile.ImageFile, depth: int) -> None:
    """Brings a PNG's transparent colour, which Pillow keeps as stored, to the 8 bits to which it brings the pixels."""
    key = image.info.get("transparency")
    if image.mode == "L" and depth < 8 and isinstance(key, int):
        image.info["transparency"] = key * (255 // (2**depth - 1))
    elif image.mode == "RGB" and depth == 16 and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """The image in bands of rows, each with the rows that it covers, so that no copies of a whole image pile up."""
    width, height = image.size
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield slice(top, bottom), image if rows >= height else image.crop((0, top, width, bottom))


def rgb(image: ImageFile.ImageFile) -> np.ndarray:
    """A loaded image of any mode as uint8 [H, W, 3]."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_grey_rgb(image)
    inverted = image.mode == "CMYK" and isinstance(image, JpegImagePlugin.JpegImageFile) and "adobe" not in image.info
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, band in _bands(image):
        if inverted:  # Pillow takes every CMYK JPEG for Adobe's
            band = ImageChops.invert(band)
        if band.mode == "La":
            band = band.convert("LA")
        if band.has_transparency_data:
            layer = band.convert("RGBA")
            band = Image.new("RGB", layer.size, "white")
            band.paste(layer, mask=layer)
        elif band.mode != "RGB":
            band = band.convert("RGB")
        pixels[rows] = np.asarray(band)
    return pixels


def _wide_grey_rgb(image: ImageFile.ImageFile) -> np.ndarray:
    """A loaded image of 16-bit grey as uint8 [H, W, 3]; raises ValueError for grey of other numbers."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = np.max(tags.get(TiffImagePlugin.BITSPERSAMPLE, 16))
    # Pillow before 11.0 gives the 16 bits of a PNG as 32.
    if (tags and not image.mode.startswith("I;16")) or image.mode == "F" or bits != 16:
        raise ValueError("grey values that are not unsigned integers of 8 or 16 bits: save it as such")
    key = image.info.get("transparency")  # of a PNG: the level that is transparent
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, band in _bands(image):
        values = np.asarray(band)
        grey = np.rint(values / 257.0).astype(np.uint8)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # the least is white, which Pillow leaves to us
            grey = 255 - grey
        if isinstance(key, int):
            grey[values == key] = 255
        pixels[rows] = grey[..., None]
    return pixels
