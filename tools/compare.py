"""A table of training runs, the best first: what differs between their settings, and how each one went.

Complete runs that differ only in their seed are summed up by mean and standard deviation (of a sample, n - 1). Best is
the checkpoint of the highest validation accuracy, and the loss is that checkpoint's; final is the last validation.
Seconds are those of training, validation included; images/s is the median of what training logged.

Runs that answered the same validation images are compared with the best of them image by image: the difference of the
two accuracies with its 95 % bootstrap interval, and the p-value of McNemar's exact test, multiplied as Holm (1979) does
where several runs are compared. A difference is real where p is below 0.05. It says nothing of other seeds, and the
best of many runs looks better than it is: confirm it on a test split.
"""

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from console import ArgumentParser, UserError, one_line, run_script
from files import csv_text, defused, write_text
from reports.significance import accuracy_difference_interval, mcnemar
from reports.tables import markdown_table, table
from tools.run_summary import BEST, SCORES, RunSummary, read_run

LEVEL = 0.05  # of p: below it a difference is called real
DIFFERENCES = ("run", "difference", "95 % interval", "only it is right", "only the best is right", "p", "real")


def differing(runs: Sequence[RunSummary]) -> list[str]:
    """The settings that are not the same in all runs that have settings, in the order of the first config."""
    known = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    return [name for name in names if len({json.dumps(s.get(name), sort_keys=True) for s in known}) > 1]


def data_names(runs: Sequence[RunSummary]) -> dict[str, str]:
    """{digest: what to call that data set}, empty where all runs have the same; the shortest names that differ."""
    paths = {run.data_digest: run.data_path for run in runs if run.data_digest}
    if len(paths) < 2:
        return {}
    for names in ({digest: Path(path).name for digest, path in paths.items()}, paths):
        if len(set(names.values())) == len(names):
            return names
    return {digest: f"{path} ({digest[:6]})" for digest, path in paths.items()}


def seed_groups(runs: Sequence[RunSummary]) -> list[list[RunSummary]]:
    """Complete runs that differ only in their seed, one for each seed: a repetition says nothing new."""
    groups: dict[str, dict[int, RunSummary]] = defaultdict(dict)
    for run in runs:
        seed = run.settings.get("seed")
        if isinstance(seed, int) and BEST in run.scores and not run.notes:
            groups[run.group_key()].setdefault(seed, run)
    return [list(by_seed.values()) for by_seed in groups.values() if len(by_seed) > 1]


def summaries(group: Sequence[RunSummary]) -> tuple[RunSummary, RunSummary]:
    """The mean and the sample standard deviation of a group, as two more rows; of the scores that all its runs have."""
    first, seeds = group[0], sorted(run.settings["seed"] for run in group)
    settings = {**first.settings, "seed": " ".join(map(str, seeds))}
    mean = RunSummary(f"mean of {len(group)} seeds", settings, first.data_path, first.data_digest)
    spread = RunSummary("standard deviation", settings, first.data_path, first.data_digest)
    for column in SCORES:
        values = [run.scores[column] for run in group if column in run.scores]
        if len(values) == len(group):
            mean.scores[column], spread.scores[column] = statistics.fmean(values), statistics.stdev(values)
    return mean, spread


@dataclass(frozen=True)
class Difference:
    """A run against the best: its accuracy minus the best's, the interval of that, and the corrected p-value."""

    run: RunSummary
    value: float
    low: float
    high: float
    only_run: int  # images that it alone gets right
    only_best: int
    p_value: float

    @property
    def real(self) -> bool:
        return self.p_value < LEVEL


def same_images(runs: Sequence[RunSummary]) -> list[list[RunSummary]]:
    """Runs that answered the same validation images, of the same classes: two or more of them together."""
    groups: dict[frozenset[tuple[str, str]], list[RunSummary]] = defaultdict(list)
    for run in runs:
        if run.answers:
            groups[frozenset((image, label) for image, (label, _) in run.answers.items())].append(run)
    return [group for group in groups.values() if len(group) > 1]


def differences(runs: Sequence[RunSummary]) -> list[Difference]:
    """Each run against the first, the best of those that answered the same images."""
    best = runs[0].answers
    right = np.array([answer for _, answer in best.values()])
    found = []
    for run in runs[1:]:
        answers = np.array([run.answers[image][1] for image in best])
        test, interval = mcnemar(answers, right), accuracy_difference_interval(right, answers)
        value = float(answers.mean() - right.mean())
        found.append(Difference(run, value, *interval, test.only_first, test.only_second, test.p_value))
    corrected, least = {}, 0.0
    for place, difference in enumerate(sorted(found, key=lambda d: d.p_value)):
        least = max(least, min(1.0, (len(found) - place) * difference.p_value))
        corrected[difference.run.name] = least
    return [dataclasses.replace(difference, p_value=corrected[difference.run.name]) for difference in found]


def difference_rows(found: Sequence[Difference]) -> list[list[Any]]:
    """The differences as rows of a table with the columns DIFFERENCES."""
    return [
        [
            *(d.run.name, f"{d.value:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}", d.only_run, d.only_best),
            *(Decimal(f"{d.p_value:.2g}"), "yes" if d.real else "no"),
        ]
        for d in found
    ]


def setting_cell(value: Any) -> Any:
    """A setting as a table shows it: numbers with the digits that were typed."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return Decimal(repr(value)) if math.isfinite(value) else str(value)
    return str(value) if isinstance(value, bool | str) else value


def score_cells(run: RunSummary, columns: Sequence[str], exact: bool) -> list[Any]:
    """Scores as they are, or rounded to the digits that one compares (a Decimal keeps its own in a table)."""
    values = [run.scores.get(column) for column in columns]
    if exact:
        return list(values)
    shown = [(value, SCORES[column]) for value, column in zip(values, columns, strict=True)]
    return [None if value is None else Decimal(f"{value:.{digits}f}") for value, digits in shown]


def render(runs: Sequence[RunSummary], format: str) -> str:
    """The comparison as text, Markdown or CSV, the highest validation accuracy first."""
    exact = format == "csv"
    runs = sorted(runs, key=lambda run: -run.scores.get(BEST, -1.0))
    settings, data = differing(runs), data_names(runs)
    scores = [column for column in SCORES if exact or any(column in run.scores for run in runs)]
    header = ["run", *settings, *(["data"] if data else []), *scores]

    def row(run: RunSummary) -> list[Any]:
        of_settings = [setting_cell(run.settings.get(name)) for name in settings]
        of_data = [data.get(run.data_digest)] if data else []
        return [run.name, *of_settings, *of_data, *score_cells(run, scores, exact)]

    rows, notes = [row(run) for run in runs], ["; ".join(run.notes) for run in runs]
    groups = sorted(map(summaries, seed_groups(runs)), key=lambda pair: -pair[0].scores[BEST])
    group_rows = [row(run) for pair in groups for run in pair]
    compared = [(group[0], differences(group)) for group in same_images(runs)]
    if exact:
        paired = {d.run.name: [d.value, d.low, d.high, d.p_value] for _, found in compared for d in found}
        kinds = ["mean", "standard deviation"] * len(groups)
        none = [None] * 4
        of_runs = [
            ["run", *cells, *paired.get(run.name, none), note]
            for run, cells, note in zip(runs, rows, notes, strict=True)
        ]
        of_groups = [[kind, *cells, *none, ""] for kind, cells in zip(kinds, group_rows, strict=True)]
        against = ("difference from best", "difference low", "difference high", "p")
        lines = [["kind", *header, *against, "note"], *of_runs, *of_groups]
        return csv_text([[defused(cell) for cell in line] for line in lines])
    draw = markdown_table if format == "markdown" else table
    if any(notes):
        header, rows = [*header, "note"], [[*cells, note] for cells, note in zip(rows, notes, strict=True)]
    parts = [draw(rows, header)]
    for best, found in compared:
        parts.append(f"Against {one_line(best.name)}, on the same {len(best.answers)} validation images:")
        parts.append(draw(difference_rows(found), DIFFERENCES))
    if groups:
        parts += ["Complete runs that differ only in their seed:", draw(group_rows, header[: len(group_rows[0])])]
    return "\n\n".join(parts) + "\n"


def run_folders(arguments: Sequence[str]) -> list[Path]:
    """The run directories that are named, each once; of a folder of runs, those in it."""
    folders: dict[Path, Path] = {}
    for argument in arguments:
        path = Path(argument)
        if not path.exists():
            raise UserError(f"no such run: {argument!r}: name run directories, such as checkpoints/*")
        inside = [] if (path / "config.json").exists() else sorted(file.parent for file in path.glob("*/config.json"))
        folders |= {folder.resolve(): folder for folder in inside or [path] if folder.is_dir()}
    if not folders:
        raise UserError("these are files, not run directories: name folders such as checkpoints/*")
    return list(folders.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, reads the runs, prints or writes the table."""
    parser = ArgumentParser(prog="python -m tools.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or a folder of them")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text", help="(default %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there instead of printing it")
    flags = parser.parse_args(argv)
    folders = run_folders(flags.runs)
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    text = render([read_run(folder, name) for folder, name in zip(folders, names, strict=True)], flags.format)
    if flags.output is None:
        print(text.encode("utf-8", "backslashreplace").decode(), end="")  # a name may hold bytes that are no text
        return 0
    try:
        write_text(flags.output, text)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {str(flags.output)!r} ({error.strerror}): name another place") from None
    return 0


if __name__ == "__main__":
    run_script(main)
