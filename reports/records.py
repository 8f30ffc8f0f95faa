"""Records of a run's logs, metrics.jsonl and timing.jsonl, as reports read them: whatever is odd in one is left out."""

import math
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


def usable_records(lines: Iterable[Any]) -> list[Record]:
    """The records among parsed lines, in the order of their steps, each split and step once.

    A record is {"split": "train" or "val", "step": a number of steps, ...}. Of two for the same split and step, as a
    resumed run may leave, the last counts.
    """
    unique = {(line["split"], line["step"]): line for line in lines if is_record(line)}
    return sorted(unique.values(), key=lambda record: int(record["step"]))


def is_record(line: Any) -> bool:
    """Whether a parsed line of a log says of which split and step it is."""
    if not isinstance(line, dict) or line.get("split") not in ("train", "val"):
        return False
    step = line.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**63


def number(record: Record, key: str) -> float:
    """A value of a record; NaN where it is missing, no number or not finite (from 1e300 on no axis can show it)."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return math.nan
    return float(value)


def phase_of(record: Record) -> str | None:
    """The phase of training that a record belongs to; earlier versions called it a stage."""
    name = record.get("phase", record.get("stage"))
    return name if isinstance(name, str) else None
