"""What inference.py writes: predictions as text, JSON or CSV, and the files of --output and --embeddings."""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator

import numpy as np

from console import NO_SPACE, Stopped, UserError, one_line
from files import append, csv_text, defused, defused_path, replace_file, unnamed_beside
from predictor import Prediction

Details = dict[str, object]  # what a JSON object holds besides the image and its predictions


def csv_header(with_unknown: bool) -> str:
    """The first line of a CSV."""
    return csv_text([["image", "rank", "class", "probability", "error", *(["unknown"] if with_unknown else [])]])


def format_prediction(
    prediction: Prediction, form: str, top: int, threshold: float | None, details: Details, with_unknown: bool = False
) -> str:
    """One prediction as text, as a JSON object or as CSV rows: see `csv_header`.

    Where the most probable class is below `threshold`, text and CSV name no class: the CSV has one row of rank 1, with
    an empty class and the probability of the best. JSON keeps the predictions and says so. With `with_unknown` JSON and
    CSV say of each image that could be read whether it is unknown, true or false.
    """
    name, error, pairs = prediction.name, prediction.error, prediction.top(top)
    below = threshold is not None and not error and prediction.top(1)[0][1] < threshold
    if form == "json":
        if error:
            return json.dumps({"image": name, "error": error}) + "\n"
        found = [{"class": class_name, "probability": probability} for class_name, probability in pairs]
        extra = {} if threshold is None else {"below_threshold": below}
        extra |= {"unknown": bool(prediction.unknown)} if with_unknown else {}
        return json.dumps({"image": name, "predictions": found, **extra, **details}) + "\n"
    if form == "csv":
        last = ["" if error else json.dumps(bool(prediction.unknown))] if with_unknown else []
        if error:
            return csv_text([[defused_path(name), "", "", "", defused(error), *last]])
        shown = [("", pairs[0][1])] if below else pairs
        rows = [[defused_path(name), n, defused(c), f"{p:.6f}", "", *last] for n, (c, p) in enumerate(shown, start=1)]
        return csv_text(rows)
    if error:
        return f"{one_line(name)}\n   error  {error}\n"
    if below:
        ((best, probability),) = prediction.top(1)
        lines = [f"   none above {threshold:g} (the best: {probability:.4f}  {one_line(best)})"]
    else:
        lines = [f"  {probability:7.4f}  {one_line(class_name)}" for class_name, probability in pairs]
    if prediction.unknown:
        lines.insert(0, "   unknown: unlike the training images")
    if isinstance(box := details.get("box"), tuple):
        lines.append("   box  left {}, top {}, right {}, bottom {}".format(*box))
    return "".join(f"{line}\n" for line in (one_line(name), *lines))


def write_results(piece: str) -> None:
    """Writes to standard output, where odd bytes of a file name go out as they came in."""
    _to_stdout(piece.encode(errors="surrogateescape"))


def _to_stdout(content: bytes) -> None:
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        raise Stopped(signal.SIGPIPE) from None  # nobody reads them


@contextlib.contextmanager
def result_file(path: str) -> Iterator[Callable[[str], None]]:
    """Gives the function that writes the text of `path`: beside it, and renamed when the block ends.

    Where the system refuses a file meanwhile, what was computed goes to standard output, and UserError says so.
    """
    size, rest = 0, b""

    def write(piece: str) -> None:
        nonlocal size, rest
        rest = piece.encode(errors="backslashreplace")
        assert file is not None
        append(file, rest)
        size, rest = size + len(rest), b""

    file: io.FileIO | None = None
    try:
        with replace_file(path) as aside:
            file = open(aside, "wb+", buffering=0)  # noqa: SIM115  (it can be read whatever becomes of its name)
            yield write
    except OSError as error:
        if file is None:
            raise
        file.seek(0)
        for start in range(0, size, 1 << 20):
            _to_stdout(file.read(min(size - start, 1 << 20)))
        _to_stdout(rest)
        what = f"--output {path}" if error.filename is None else os.fsdecode(error.filename)
        raise UserError(f"{what}: {error.strerror}; the results are on standard output") from None
    finally:
        if file:
            file.close()


@contextlib.contextmanager
def embedding_file(path: str) -> Iterator[Callable[[Prediction], None]]:
    """Gives the function that adds to the npz `path`, which gets its name, as `result_file` does, where any is added.

    It holds `images`, str [N], and `features`, float32 [N, C].
    """
    names: list[str] = []
    with unnamed_beside(path) as rows:

        def add(prediction: Prediction) -> None:
            append(rows, prediction.features.tobytes())
            names.append(prediction.name)

        yield add
        if names:
            features = np.memmap(rows, np.float32, "r").reshape(len(names), -1)
            with replace_file(path) as aside, open(aside, "wb") as file:
                np.savez(file, images=np.array(names), features=features)
