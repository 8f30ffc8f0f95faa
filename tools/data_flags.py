"""The flags of the tools that read a data set, and what they give to `layouts.find_images`."""

import argparse

from dataset import layouts


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """DATA and how to split it, with the names and defaults of train.py."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a folder (Food-101, split folders, a folder per class) or a CSV (path,label[,split])",
    )
    parser.add_argument("--image-root", help="folder that the paths of a CSV are relative to; default: the CSV's own")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.2,
        help="share of images to validate on where DATA has no such split (default %(default)s)",
    )
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=0.0,
        help="share of images to keep for a test split where DATA has none (default %(default)s)",
    )


def find_images(flags: argparse.Namespace) -> layouts.LabelledImages:
    """The data set that `add_data_flags` names."""
    return layouts.find_images(
        flags.data,
        val_fraction=flags.val_fraction,
        test_fraction=flags.test_fraction,
        image_root=flags.image_root or None,
    )
