"""Brings faces that are already cut out to one size: grey, equalised, resized, as networks for expressions take them.

Writes the pictures, faces.csv, which train.py reads, and left-out.csv, the images that cannot be read, with the reason.
A command that was stopped goes on where it was.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from PIL import Image

from console import ArgumentParser, run_script
from tools.face_pictures import Picture, add_flags, check_flags, make_pictures, to_grey


def prepare(image: np.ndarray, flags: argparse.Namespace) -> list[Picture]:
    """The picture of one face, with its shorter side --size pixels long (cubic) and its proportions kept."""
    face = Image.fromarray(to_grey(image, flags))
    scale = flags.size / min(face.size)
    width, height = (max(flags.size, round(side * scale)) for side in face.size)
    return [Picture(np.asarray(face.resize((width, height), Image.Resampling.BICUBIC)), {})]


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prepares the faces."""
    parser = ArgumentParser(prog="python -m tools.prepare_faces", description=__doc__)
    add_flags(parser)
    flags = parser.parse_args(argv)
    check_flags(flags)
    return make_pictures(flags, prepare, [])


if __name__ == "__main__":
    run_script(main)
