"""Cuts a small image data set from the photographs that the installed scikit-image package carries (no download).

Every class is one photograph. Training pictures are cut from one end of it and validation pictures from the other,
with a gap between, so no pixel of a validation picture was seen in training.
"""

import argparse
import importlib.util
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from skimage.transform import resize
from skimage.util import img_as_ubyte
from tqdm import tqdm

from console import ArgumentParser, UserError, run_script

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive


@dataclass(frozen=True)
class Photograph:
    """A photograph of scikit-image, and how it is shared out so that both splits show what the class is named for."""

    file: str
    area: Box | None = None  # the part that is used; None: all of it
    val_first: bool = False  # validation pictures come from the left or top end, not from the right or bottom


# Left out: drawings, and photographs whose two ends show different things.
PHOTOGRAPHS = {
    "brick": Photograph("brick.png"),
    "cat": Photograph("chelsea.png", val_first=True),
    "coffee": Photograph("coffee.png", area=(80, 0, 500, 400)),  # without the bare table beside the saucer
    "coins": Photograph("coins.png"),
    "galaxies": Photograph("hubble_deep_field.jpg"),
    "grass": Photograph("grass.png"),
    "gravel": Photograph("gravel.png"),
    "moon": Photograph("moon.png", val_first=True),
    "motorcycle": Photograph("motorcycle_left.png"),
    "page": Photograph("page.png", area=(0, 0, 384, 150)),  # without the empty margin
    "retina": Photograph("retina.jpg"),
    "tissue": Photograph("ihc.png"),
}
# The part of a photograph's longer side that belongs to each split; what is left between them belongs to neither.
SHARES = {"train": 0.60, "val": 0.36}

SHORT_SIDE = (60, 300)  # pixels of the pictures written
MAX_ASPECT = 1.8
MIN_COVER = 0.55  # of the largest crop that fits: smaller ones of a smooth photograph show nothing
JPEG_QUALITY = 90
MANIFEST = "sample.json"


@dataclass(frozen=True)
class Picture:
    """One picture to write: where it is cut from and how large it is saved."""

    path: str  # relative to the data set's folder: split/class/name.jpg
    photograph: str  # file name
    box: Box
    size: tuple[int, int]  # width, height


def photograph_folder() -> Path:
    """The folder of scikit-image's own data files, found without importing the package."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError("scikit-image is not installed: run make, or pip install -r requirements.txt")
    folder = Path(spec.origin).parent / "data"
    missing = [source.file for source in PHOTOGRAPHS.values() if not (folder / source.file).is_file()]
    if missing:
        raise UserError(
            f"scikit-image at {folder} lacks {', '.join(missing)}: reinstall it with "
            "pip install --force-reinstall --no-deps scikit-image"
        )
    return folder


def region(area: Box, split: str, val_first: bool) -> Box:
    """The part of `area` that `split` may cut from: one end of its longer side."""
    left, top, right, bottom = area
    at_start = (split == "val") == val_first
    if right - left >= bottom - top:
        share = int((right - left) * SHARES[split])
        return (left, top, left + share, bottom) if at_start else (right - share, top, right, bottom)
    share = int((bottom - top) * SHARES[split])
    return (left, top, right, top + share) if at_start else (left, bottom - share, right, bottom)


def draw_picture(path: str, photograph: str, within: Box, seed: int) -> Picture:
    """Draws the crop for `path` inside `within`; it depends on (seed, path) alone, not on how many others there are."""
    random = np.random.default_rng([seed, zlib.crc32(path.encode())])
    left, top, right, bottom = within
    aspect = math.exp(random.uniform(-math.log(MAX_ASPECT), math.log(MAX_ASPECT)))  # width / height
    # The largest box of this aspect that fits, then a part of it that is not too small to save.
    height = min(bottom - top, (right - left) / aspect)
    height *= random.uniform(max(MIN_COVER, SHORT_SIDE[0] / min(height, height * aspect)), 1.0)
    crop_width, crop_height = round(height * aspect), round(height)
    x = int(random.integers(left, right - crop_width, endpoint=True))
    y = int(random.integers(top, bottom - crop_height, endpoint=True))
    # Saved smaller than cut, never larger.
    short = min(crop_width, crop_height)
    scale = random.integers(SHORT_SIDE[0], min(SHORT_SIDE[1], short), endpoint=True) / short
    size = round(crop_width * scale), round(crop_height * scale)
    return Picture(path, photograph, (x, y, x + crop_width, y + crop_height), size)


def plan(folder: Path, train: int, val: int, seed: int) -> Iterator[Picture]:
    """Every picture of the data set, class by class, with `train` and `val` pictures per class."""
    for class_name, source in PHOTOGRAPHS.items():
        height, width = iio.improps(folder / source.file).shape[:2]
        area = source.area or (0, 0, width, height)
        for split, count in (("train", train), ("val", val)):
            within = region(area, split, source.val_first)
            for index in range(count):
                path = f"{split}/{class_name}/{class_name}_{index:03d}.jpg"
                yield draw_picture(path, source.file, within, seed)


def write_pictures(pictures: Sequence[Picture], photographs: Path, out: Path) -> None:
    """Cuts and saves `pictures` under `out`; greyscale photographs stay greyscale JPEG files."""
    opened: dict[str, np.ndarray] = {}
    for picture in tqdm(pictures, desc="sample pictures", unit="picture", disable=None):
        if picture.photograph not in opened:
            # One at a time: the plan goes class by class.
            opened = {picture.photograph: iio.imread(photographs / picture.photograph)}
        target = out / picture.path
        target.parent.mkdir(parents=True, exist_ok=True)
        left, top, right, bottom = picture.box
        cut = opened[picture.photograph][top:bottom, left:right]
        small = resize(cut, picture.size[::-1], anti_aliasing=True)  # float, 0..1
        iio.imwrite(target, img_as_ubyte(small), quality=JPEG_QUALITY)


def already_made(out: Path, settings: dict[str, int], pictures: Sequence[Picture]) -> bool:
    """Whether `out` holds this very data set, complete; an error where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        made_with = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError(f"{out} exists and is not a sample data set: name another folder, or remove it") from None
    if made_with != settings:
        raise UserError(f"{out} was made with {made_with}, not {settings}: name another folder, or remove it")
    missing = [picture.path for picture in pictures if not (out / picture.path).is_file()]
    if missing:
        raise UserError(f"{out} lacks {len(missing)} of its pictures ({missing[0]}): remove it and run this again")
    return True


def make_sample(out: Path, train: int = 10, val: int = 5, seed: int = 0) -> bool:
    """Makes the data set at `out`; False where it was there already, complete and made with the same settings.

    Raises:
        UserError: `out` holds something else, or scikit-image's photographs are not to be found.
    """
    photographs = photograph_folder()
    pictures = list(plan(photographs, train, val, seed))
    settings = {"train": train, "val": val, "seed": seed}
    if already_made(out, settings, pictures):
        return False
    # Written aside and renamed: a folder of this name is a complete one.
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
            half_made = Path(aside) / "sample"
            write_pictures(pictures, photographs, half_made)
            (half_made / MANIFEST).write_text(json.dumps(settings) + "\n")
            os.replace(half_made, out)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot make {out} ({error.strerror}): name another folder") from None
    return True


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def seed_number(text: str) -> int:
    """An argparse type: a whole number from 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, not {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and makes the data set."""
    parser = ArgumentParser(prog="python -m tools.sample_data", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make: OUT/train/<class>/, OUT/val/<class>/")
    parser.add_argument("--train", type=positive, default=10, help="training pictures per class (default %(default)s)")
    parser.add_argument("--val", type=positive, default=5, help="validation pictures per class (default %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=0, help="draws other crops (default %(default)s)")
    flags = parser.parse_args(argv)

    made = make_sample(flags.out, flags.train, flags.val, flags.seed)
    classes = len(PHOTOGRAPHS)
    print(
        f"{flags.out}: {classes} classes, {classes * flags.train} training and {classes * flags.val} validation "
        f"pictures cut from scikit-image's photographs{'' if made else ' (there already: left alone)'}"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
