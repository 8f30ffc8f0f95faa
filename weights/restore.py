"""The strict restore: arrays → the variables of the same names, with a report that accounts for every name."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import tensorflow as tf

from console import UserError


def is_under(name: str, prefixes: Sequence[str]) -> bool:
    """Whether `name` is one of `prefixes` or below it, by whole path components: fc6 holds fc6/weights, not fc60."""
    return any(name == prefix or name.startswith(f"{prefix}/") for prefix in prefixes)


def _is_finite(array: np.ndarray, dtype: type) -> bool:
    with np.errstate(over="ignore"):  # a float64 that float32 can't hold becomes infinite and is found here
        return bool(np.isfinite(array.astype(dtype, copy=False)).all())


@dataclass
class RestoreReport:
    """What became of every variable of the model and of every name in the file."""

    restored: list[str] = field(default_factory=list)
    new: list[tuple[str, str]] = field(default_factory=list)  # (variable, "excluded" or "not in the file")
    unused: list[str] = field(default_factory=list)  # names in the file that no variable took
    # Empty unless the restore was refused; nothing was assigned then.
    wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # in file, in model
    refused: list[tuple[str, str]] = field(default_factory=list)  # (variable, why): missing, or no finite numbers

    def summary(self) -> str:
        """One line: how many variables were restored, are new and why, and how many names were left unused."""
        reasons = [reason for _, reason in self.new]
        new = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
        parts = [f"{len(self.restored)} restored", f"{len(reasons)} new" + (f" ({new})" if new else "")]
        return f"variables: {', '.join(parts)}; {len(self.unused)} names in the file unused"

    def problems(self) -> list[str]:
        """A phrase for each variable that could not be restored and had to be."""
        shapes = [f"{name} (shape {list(a)} in the file, {list(b)} in the model)" for name, a, b in self.wrong_shape]
        return shapes + [f"{name} ({reason})" for name, reason in self.refused]

    def lines(self) -> list[str]:
        """The whole report, a line per name."""
        restored = [f"restored    {name}" for name in self.restored]
        new = [f"new         {name} ({reason})" for name, reason in self.new]
        problems = [f"refused     {problem}" for problem in self.problems()]
        return restored + new + problems + [f"unused      {name}" for name in self.unused]

    def as_dict(self) -> dict[str, list]:
        """The report for JSON: its fields, with tuples as lists."""
        return {key: [list(v) if isinstance(v, tuple) else v for v in value] for key, value in asdict(self).items()}


class RestoreError(UserError):
    """A restore that was refused as a whole; `report` has every name."""

    def __init__(self, message: str, report: RestoreReport) -> None:
        super().__init__(message)
        self.report = report


def restore(
    variables: Mapping[str, tf.Variable],
    arrays: Mapping[str, np.ndarray],
    *,
    exclude: Sequence[str] = (),
    may_be_new: Sequence[str] = (),
    source: str = "the weight file",
) -> RestoreReport:
    """Assigns arrays to the variables of the same name, all of them or none, and accounts for every name.

    1. A variable under a prefix in `exclude` keeps its initial value, whatever the file has.
    2. One that the file has is restored; another shape, or values that are not finite numbers, is an error.
    3. One that the file lacks keeps its initial value when under a prefix in `may_be_new`, and is an error otherwise.

    Raises RestoreError, a UserError naming the variables and `source`; nothing has been assigned then.
    """
    report = RestoreReport()
    for name, variable in variables.items():
        array = arrays.get(name)
        if is_under(name, exclude):
            report.new.append((name, "excluded"))
        elif array is None and is_under(name, may_be_new):
            report.new.append((name, "not in the file"))
        elif array is None:
            report.refused.append((name, "not in the file"))
        elif array.shape != tuple(variable.shape):
            report.wrong_shape.append((name, array.shape, tuple(variable.shape)))
        elif not np.can_cast(array.dtype, np.float32, "same_kind"):
            report.refused.append((name, f"{array.dtype} values, not numbers"))
        elif not _is_finite(array, variable.dtype.as_numpy_dtype):
            report.refused.append((name, "values that are not finite"))
        else:
            report.restored.append(name)
    taken = {name for name, *_ in (*report.wrong_shape, *report.refused)}.union(report.restored)
    report.unused = sorted(set(arrays) - taken)
    if problems := report.problems():
        listed = ", ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")
        message = f"{len(problems)} of {len(variables)} variables cannot be restored from {source}: {listed}"
        raise RestoreError(f"{message}; give --pretrained a file of the same network, or none", report)
    for name in report.restored:
        variables[name].assign(arrays[name].astype(variables[name].dtype.as_numpy_dtype, copy=False))
    return report
