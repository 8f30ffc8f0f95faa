"""Lists images to look at before training: wrong labels, near-duplicates, leaks between splits, outliers.

All images of the data set are judged, those of every split. Wrong labels: by confident learning, from a linear head
that is fitted on the features of a pretrained network, out of fold: no image is judged by a head that trained on it.
Near-duplicates: images that are the same in 12 x 12 pixels. Outliers: the images whose features are farthest from all
others, one in a hundred or more: look whether they belong there.

Nothing is changed: you decide. Write `drop` or another class into the column `action` of a list, for the rows that are
wrong, and train with --relabel LIST. The features are kept on disk, where train.py --train-from head finds them.
"""

import argparse
import csv
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from console import ArgumentParser, StopSignals, UserError, one_line, quiet_tensorflow, run_script

quiet_tensorflow()

from files import check_folder, defused, defused_path, write_csv
from tools.clean_findings import Findings, Images, all_features, all_images, find, severity
from tools.clean_page import write_pages
from training.evaluation import readable_failures
from training.preparation import prepare
from training.session import refuse_inside
from training.settings import Settings, add_flags

FLAGS = (  # of train.py: those that say what the features are
    *("pretrained", "network", "image_size", "crop_margin", "decode", "augment", "cached_views", "cache_dir"),
    *("precision", "val_fraction", "test_fraction", "image_root", "relabel", "on_bad_image", "seed"),
)
LISTS = ("label-issues.csv", "duplicates.csv", "outliers.csv")


def write_lists(folder: Path, images: Images, found: Findings) -> None:
    """Writes the three CSVs, each with an empty column for decisions."""
    names = [defused_path(name) for name in images.names]
    classes = [defused(name) for name in images.class_names]
    of_image = [classes[label] for label in images.labels]
    issues = [(names[i.index], classes[i.given], classes[i.suggested], f"{i.score:.4f}", "") for i in found.issues]
    write_csv(folder / LISTS[0], ["image", "label", "suggested", "score", "action"], issues)
    copies = [
        (number, names[i], images.splits[i], of_image[i], "")
        for number, rows in enumerate(found.groups, 1)
        for i in rows
    ]
    write_csv(folder / LISTS[1], ["group", "image", "split", "label", "action"], copies)
    far = [(names[i], images.splits[i], of_image[i], f"{found.distances[i]:.4f}", "") for i in found.outliers]
    write_csv(folder / LISTS[2], ["image", "split", "label", "distance", "action"], far)


def check_undecided(folder: Path) -> None:
    """Raises UserError where a list of an earlier call holds decisions, which a new one would replace."""
    for name in LISTS:
        try:
            with open(folder / name, encoding="utf-8-sig", errors="replace", newline="") as file:
                decided = any((row.get("action") or "").strip() for row in csv.DictReader(file))
        except FileNotFoundError:
            continue
        except csv.Error:
            decided = True
        if decided:
            raise UserError(f"{folder / name} holds decisions in its column action: name another folder with --output")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, looks at the data, writes lists, pictures and a page."""
    parser = ArgumentParser(
        prog="python -m tools.clean_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", help="a data set in any layout that train.py takes")
    parser.add_argument("--output", type=Path, default=Path("cleaning"), help="folder to write (default: %(default)s)")
    add_flags(parser, without=tuple(f.name for f in dataclasses.fields(Settings) if f.name not in FLAGS))
    values = vars(parser.parse_args(argv))
    data, output = values.pop("data"), values.pop("output")
    settings = Settings.from_dict({**values, "head": "gap", "train_from": "head"})
    if settings.pretrained == "none" or settings.cached_views == 0:
        raise UserError("labels are judged by cached features of a pretrained network: give --pretrained and a view")
    refuse_inside(data, {"--output": output, "--cache-dir": Path(settings.cache_dir)})
    check_folder("--output", output)
    check_undecided(output)
    prepared = prepare(settings, data)
    if remarks := prepared.found.remarks():
        print(f"note       {remarks}")
    images = all_images(prepared)
    with StopSignals() as stop, readable_failures():
        features, groups = all_features(prepared, stop)
        found = find(images, features, groups, settings.seed, stop)
    write_lists(output, images, found)
    page = write_pages(output, data, images, found)
    leaks = sum(severity(images, rows) == 2 for rows in found.groups)
    root = f" --image-root {shlex.quote(settings.image_root)}" if settings.image_root else ""
    again = f"{shlex.quote(data)}{root}"
    print(
        f"labels     {len(found.issues)} of {len(images.names)} are probably wrong; out-of-fold accuracy "
        f"{found.accuracy:.4f} ± {found.accuracy_error:.4f}\n"
        f"copies     {len(found.groups)} groups of near-duplicates, {leaks} of them in several splits\n"
        f"outliers   {len(found.outliers)} images farthest from all others\n"
        f"look at    {one_line(page)}\n"
        f"correct    write drop or a class into the column action of {one_line(output / LISTS[0])}, then\n"
        f"           python train.py {one_line(again)} --relabel {one_line(shlex.quote(str(output / LISTS[0])))}"
    )
    if leaks:
        lists = one_line(shlex.quote(str(output / LISTS[1])))
        print(f"split      python -m tools.split_data {one_line(again)} split.csv --keep-groups {lists}")
    return 0


if __name__ == "__main__":
    run_script(main)
