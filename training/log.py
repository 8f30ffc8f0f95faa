"""What a run writes down while it trains: metrics.jsonl, timing.jsonl, event files and curves."""

import time
from collections.abc import Callable

from reports.events import EventWriter
from reports.pictures import draw_curves, draw_strengths
from run import Run

DUTY = 20.0  # checkpoints, and pictures, take at most one part in so many of the time


class Pacer:
    """Says when something that costs time is due again, so that it takes at most 1 / DUTY of the time.

    cost: seconds that it is taken to cost the first time.
    """

    def __init__(self, cost: float = 0.0) -> None:
        self._last, self._cost = time.monotonic(), cost

    def elapsed(self) -> float:
        return time.monotonic() - self._last

    def due(self) -> bool:
        return self.elapsed() >= DUTY * self._cost

    def timed(self, action: Callable[[], None]) -> None:
        begin = time.monotonic()
        action()
        self._last = time.monotonic()
        self._cost = self._last - begin


class Log:
    """The logs of a run, resumed after their first `lines` lines.

    What a killed process logged after its last checkpoint is dropped, since those steps are about to be done again;
    the event files are begun anew with what remains. metrics.jsonl holds values that depend on the seed alone.

    Attributes:
        lines: lines of metrics.jsonl.
        events: for pictures.
    """

    def __init__(self, run: Run, lines: int):
        self._run, self.lines = run, lines
        lost = lines - len(run.read_lines("metrics.jsonl"))
        if lost > 0:  # by something else than a kill, which leaves what was written before the checkpoint
            print(f"warning: metrics.jsonl has lost {lost} lines", flush=True)
            self.lines -= lost
        for name in ("metrics.jsonl", "timing.jsonl"):
            run.keep_lines(name, self.lines)
        timing = run.read_lines("timing.jsonl")
        seconds = timing[-1].get("seconds", 0.0) if timing else 0.0
        self._begin = time.monotonic() - seconds
        config = run.config()
        metrics = run.read_lines("metrics.jsonl")
        self.events = EventWriter(run.path, config.settings, metrics, timing, adopt_unmarked=config.format < 2)
        self._draws = Pacer(cost=1.0)  # a run of seconds draws its curves once, in the end
        self.restart_clock(0)

    def restart_clock(self, images: int) -> None:
        """The next training record's images/s counts from here; `images` were seen before."""
        self._clock, self._images = time.monotonic(), images

    def pause_clock(self, seconds: float) -> None:
        """Leaves out a time in which nothing was trained."""
        self._clock += seconds

    def training(self, record: dict, images: int) -> None:
        """Logs a training record; `images` have been seen in all."""
        seconds = max(time.monotonic() - self._clock, 1e-9)
        self._write(record, (images - self._images) / seconds)
        self.restart_clock(images)

    def validation(self, record: dict, images_per_second: float) -> None:
        """Logs a validation record, and draws the curves when it is time."""
        self._write(record, images_per_second)
        self.events.flush()
        if self._draws.due():
            self._draws.timed(self.draw_curves)

    def _write(self, record: dict, images_per_second: float) -> None:
        timing = {"seconds": time.monotonic() - self._begin, "images_per_second": images_per_second}
        self._run.append_line("metrics.jsonl", record)
        self._run.append_line("timing.jsonl", {"step": record["step"], "split": record["split"], **timing})
        self.lines += 1
        self.events.scalars({**record, **timing})

    def draw_curves(self) -> None:
        """Draws curves.png, and head-strengths.png once: the strengths of a solved head do not change any more."""
        lines = self._run.read_lines("metrics.jsonl")
        draw_curves(self._run.path / "curves.png", lines)
        if not (strengths := self._run.path / "head-strengths.png").exists():
            draw_strengths(strengths, lines)


class NoLog:
    """The log of a worker that writes nothing."""

    lines = 0

    def restart_clock(self, images: int) -> None:
        pass

    def pause_clock(self, seconds: float) -> None:
        pass

    def training(self, record: dict, images: int) -> None:
        pass

    def validation(self, record: dict, images_per_second: float) -> None:
        pass
