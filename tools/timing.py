"""Measures candidates that take turns, and shows medians and ratios: machines are shared and their speed drifts."""

import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from console import StopSignals, cores
from reports.tables import table

# Does a round of work, waits for its end, and returns the number of images that it was.
Candidate = Callable[[], int]


@dataclass(frozen=True)
class Round:
    """Seconds of one round: of the clock, and of all cores together; `images` are what was done in it."""

    wall: float
    cpu: float
    images: int


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def take_turns(
    candidates: Mapping[str, Candidate], rounds: int, warm_up: int, stop: StopSignals
) -> dict[str, list[Round]]:
    """`rounds` rounds of each candidate, A B C A B C ..., after `warm_up` that are not counted."""
    measured: dict[str, list[Round]] = {name: [] for name in candidates}
    for number in range(warm_up + rounds):
        for name, work in candidates.items():
            stop.check()
            cpu, begin = _cpu_seconds(), time.perf_counter()
            images = work()
            wall = time.perf_counter() - begin
            if number >= warm_up:
                measured[name].append(Round(wall, _cpu_seconds() - cpu, images))
    return measured


def comparison(measured: Mapping[str, Sequence[Round]]) -> str:
    """A table: rates, CPU time of an image, and the medians over the rounds of how much faster the first one is."""
    first = next(iter(measured.values()))
    rows = []
    for name, rounds in measured.items():
        rates = np.array([r.images / r.wall for r in rounds])
        cpu = np.array([r.cpu / r.images for r in rounds])
        ratio = np.array([r.images / r.wall for r in first]) / rates
        cpu_ratio = cpu / np.array([r.cpu / r.images for r in first])
        spread = f"{rates.min():.4g} to {rates.max():.4g}"
        medians = [f"{np.median(cpu):.4g}", f"{np.median(ratio):.3f}", f"{np.median(cpu_ratio):.3f}"]
        rows.append([name, f"{np.median(rates):.4g}", spread, *medians])
    header = [
        "",
        "images/s",
        "slowest to fastest",
        "CPU s/image",
        f"{next(iter(measured))} is faster by",
        "by CPU time",
    ]
    return table(rows, header)


def machine(versions: Mapping[str, str]) -> str:
    """A line: the date, the processor, its cores and what it computes with, and the versions of the software."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:  # not on Linux
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    units = " ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags)
    processor = f"{fields.get('model name', platform.machine())} ({units})" if units else platform.machine()
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{date.today()}, {cores()} cores of {processor}, {software}"


def record(path: str, where: str, text: str) -> None:
    """Appends a result to a file, with the command that gave it."""
    command = shlex.join(["python", "-m", "tools.benchmark", *sys.argv[1:]])
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{where}\n\n```\n{command}\n{text}\n```\n")
