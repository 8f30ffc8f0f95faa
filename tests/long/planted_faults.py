"""Plants known faults in a data set, and scores what tools.clean_data finds: docs/results.md has the numbers.

python -m tests.long.planted_faults plant DATA OTHER OUT [--seed N]    writes OUT/list.csv, OUT/truth.json, OUT/images/
python -m tools.clean_data OUT/list.csv --output OUT/cleaning [flags]
python -m tests.long.planted_faults score OUT OUT/cleaning

3 % of the labels are flipped, 10 images are re-encoded at another size and quality into the other split, and 5 images
of OTHER, another data set, are added under a random label.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset import layouts
from dataset.images import read_image
from files import write_csv, write_json
from tests.conftest import rows_of

FLIPPED, COPIES, STRANGERS = 0.03, 10, 5


def plant(data: str, other: str, out: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, strangers = layouts.find_images(data), layouts.find_images(other)
    classes = found.class_names
    rows: list[list[Any]] = []  # path, label, split
    for split, examples in found.splits.items():
        for path, label in zip(examples.paths, examples.labels.tolist(), strict=True):
            name = f"images/{len(rows):05d}{Path(path).suffix}"
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / name)
            rows.append([name, label, split])
    originals = len(rows)
    flipped = {}
    for i in rng.choice(originals, round(FLIPPED * originals), replace=False):
        flipped[rows[i][0]] = classes[rows[i][1]]
        rows[i][1] = int((rows[i][1] + rng.integers(1, len(classes))) % len(classes))
    copies = {}
    unflipped = [i for i in range(originals) if rows[i][0] not in flipped]
    for i in rng.choice(unflipped, COPIES, replace=False):
        source, label, split = rows[i]
        picture = Image.fromarray(read_image(out / source))
        scale = rng.uniform(0.5, 0.9)
        name = f"images/{len(rows):05d}.jpg"
        size = [max(1, round(side * scale)) for side in picture.size]
        picture.resize(size, Image.Resampling.LANCZOS).save(out / name, quality=int(rng.integers(40, 85)))
        copies[name] = source
        rows.append([name, label, "val" if split == "train" else "train"])
    added = []
    train = strangers.splits["train"].paths
    for i in rng.choice(len(train), STRANGERS, replace=False):
        name = f"images/{len(rows):05d}{Path(train[i]).suffix}"
        shutil.copy(train[i], out / name)
        added.append(name)
        rows.append([name, int(rng.integers(len(classes))), "train"])
    write_csv(out / "list.csv", ["path", "label", "split"], [[p, classes[label], s] for p, label, s in rows])
    write_json(out / "truth.json", {"flipped": flipped, "copies": copies, "strangers": added})


def score(out: Path, cleaning: Path) -> None:
    truth = json.loads((out / "truth.json").read_text())
    issues = {row["image"]: row for row in rows_of(cleaning / "label-issues.csv")}
    hits = truth["flipped"].keys() & issues
    right = sum(issues[name]["suggested"] == truth["flipped"][name] for name in hits)
    strangers = len(issues.keys() & truth["strangers"])
    print(
        f"label issues   {len(issues)} listed: {len(hits)} of {len(truth['flipped'])} flips ({right} with the right "
        f"label suggested), {strangers} of {STRANGERS} strangers, {len(issues) - len(hits) - strangers} others"
    )
    groups: dict[str, set[str]] = {}
    for row in rows_of(cleaning / "duplicates.csv"):
        groups.setdefault(row["group"], set()).add(row["image"])
    found = sum(any({copy, source} <= group for group in groups.values()) for copy, source in truth["copies"].items())
    planted = {name for pair in truth["copies"].items() for name in pair}
    others = sum(not group & planted for group in groups.values())
    print(f"duplicates     {len(groups)} groups: {found} of {COPIES} copies, {others} groups of other images")
    outliers = [row["image"] for row in rows_of(cleaning / "outliers.csv")]
    known = len(set(outliers) & set(truth["strangers"]))
    print(f"outliers       {len(outliers)} listed: {known} of {STRANGERS} strangers, {len(outliers) - known} others")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    planting = commands.add_parser("plant")
    planting.add_argument("data")
    planting.add_argument("other")
    planting.add_argument("out", type=Path)
    planting.add_argument("--seed", type=int, default=0)
    scoring = commands.add_parser("score")
    scoring.add_argument("out", type=Path)
    scoring.add_argument("cleaning", type=Path)
    flags = parser.parse_args()
    if flags.command == "plant":
        plant(flags.data, flags.other, flags.out, flags.seed)
    else:
        score(flags.out, flags.cleaning)
