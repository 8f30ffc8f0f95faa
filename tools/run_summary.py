"""What a run directory tells of its run, whatever is missing or broken in it; for tools.compare."""

import csv
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCORES = {  # what is compared: how many digits of it are shown in text
    "epochs done": 2,
    "best val accuracy": 4,
    "best val loss": 4,
    "final val accuracy": 4,
    "test accuracy": 4,
    "seconds": 0,
    "train images/s": 1,
}
BEST = "best val accuracy"
# Where things lie; what matters of them is in the digest of the data.
PLACES = {"cache_dir", "image_root", "relabel"}


@dataclass
class RunSummary:
    """What is known of one run; what is not known is missing from the dictionaries.

    answers: {image: (its class, whether the best checkpoint says so)} of the validation images.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    data_path: str = ""
    data_digest: str = ""
    scores: dict[str, float] = field(default_factory=dict)  # by the names of SCORES
    notes: list[str] = field(default_factory=list)
    answers: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def group_key(self) -> str:
        """Equal for runs that differ in nothing but their seed."""
        settings = {name: value for name, value in self.settings.items() if name not in {"seed", *PLACES}}
        return json.dumps([settings, self.data_digest], sort_keys=True)


def number(record: dict[str, Any], key: str) -> float | None:
    """A finite number of a record, or None."""
    value = record.get(key)
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; {} where there is none, with a note where there is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is damaged")
        return {}
    return value


def read_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of a JSON-lines file that can be read; a last line without its line end is still being written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError:
        lines = [""]
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            records.append(None)
    good = [record for record in records if isinstance(record, dict)]
    if len(good) < len(records):
        notes.append(f"{path.name} is damaged")
    return good


def read_answers(path: Path, notes: list[str]) -> dict[str, tuple[str, bool]]:
    """What a predictions CSV says of each image; {} where there is none, with a note where it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            return {row["image"]: (row["true"], {"0": False, "1": True}[row["correct"]]) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, csv.Error):
        notes.append(f"{path.name} is damaged")
        return {}


def rank(record: dict[str, Any]) -> tuple[float, float]:
    """Greater for a better validation: as the best checkpoint is chosen, equal accuracies by the loss."""
    loss = number(record, "loss")
    return float(record["accuracy"]), -math.inf if loss is None else -loss


def read_run(path: Path, name: str) -> RunSummary:
    """All that a run directory tells, whatever is missing or broken in it."""
    run = RunSummary(name)
    config = read_object(path / "config.json", run.notes)
    if not (path / "config.json").exists():
        run.notes.append("no config.json")
    settings, data = config.get("settings"), config.get("data")
    run.settings = settings if isinstance(settings, dict) else {}
    if isinstance(data, dict):
        run.data_path, run.data_digest = str(data.get("path") or data.get("root") or ""), str(data.get("digest", ""))
    records = read_records(path / "metrics.jsonl", run.notes)
    timing = read_records(path / "timing.jsonl", run.notes)
    results = read_object(path / "results-val.json", run.notes)
    val = [record for record in records if record.get("split") == "val" and number(record, "accuracy") is not None]
    # The log is what training saw; the results may be of another data set, scored later.
    best = max(val, key=rank) if val else {}
    of_train = [number(record, "images_per_second") for record in timing if record.get("split") == "train"]
    speeds = [speed for speed in of_train if speed is not None]
    values = {
        "epochs done": max((e for record in records if (e := number(record, "epoch")) is not None), default=None),
        BEST: number(best or results, "accuracy"),
        "best val loss": number(best, "loss") if best else number(results, "log_loss"),
        "final val accuracy": number(val[-1], "accuracy") if val else None,
        "test accuracy": number(read_object(path / "results-test.json", run.notes), "accuracy"),
        "seconds": max((s for record in timing if (s := number(record, "seconds")) is not None), default=None),
        "train images/s": statistics.median(speeds) if speeds else None,
    }
    run.answers = read_answers(path / "predictions-val.csv", run.notes)
    run.scores = {key: value for key, value in values.items() if value is not None}
    epochs = number(run.settings, "epochs")
    # A run that stopped early by --patience is complete too: the results are written last.
    if not results and not (epochs and run.scores.get("epochs done", 0) >= epochs):
        run.notes.append(f"incomplete{f' ({epochs:g} epochs planned)' if epochs else ''}")
    return run
