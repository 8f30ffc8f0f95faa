"""Predicts the classes of images with a trained run: python inference.py IMAGE|FOLDER|GLOB|- ... [--run DIR]."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import contextlib
import glob
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator

from console import ArgumentParser, UserError, one_line, progress_bar, quiet_tensorflow, run_script

quiet_tensorflow()

from tqdm import tqdm

import devices
from answers import Details, csv_header, embedding_file, format_prediction, result_file, write_results
from dataset.walk import summary, walk
from files import check_folder, check_writable
from predictor import BATCH_SIZE, Prediction, Predictor
from run import Run, newest_run


def find_files(patterns: list[str]) -> list[str] | Iterator[str]:
    """The image files that the arguments name: a file as it is, the images below a folder, the matches of a glob.

    "-" stands for the paths on standard input, a line each; with it the files come as they are read.
    """
    parts: list[Iterable[str]] = []
    for pattern in patterns:
        if pattern == "-":
            parts.append(_paths_on_stdin())
        elif os.path.isdir(pattern):
            listing = walk(pattern)
            if ignored := summary([*listing.ignored, *listing.ours]):
                print(f"{one_line(pattern)}: {ignored}", file=sys.stderr)
            parts.append([os.path.join(pattern, name) for name in listing.names()])
            if not parts[-1]:
                raise UserError(f"{pattern}: no image in this folder")
        elif os.path.lexists(pattern) or not glob.has_magic(pattern):
            parts.append([pattern])  # one that is missing is reported like any other bad image
        else:
            parts.append(sorted(glob.glob(pattern, recursive=True)))
            if not parts[-1]:
                raise UserError(f"{pattern}: no file matches")
    files = itertools.chain.from_iterable(parts)
    return files if "-" in patterns else list(files)


def check_not_replaced(photographs: list[str], places: list[str]) -> bool:
    """True; raises UserError where one of the photographs lies at one of the `places` of results."""
    if places and (lost := set(places).intersection(map(os.path.realpath, photographs))):
        raise UserError(f"{min(lost)}: one of the images to predict: name another file for the results")
    return True


def _paths_on_stdin() -> Iterator[str]:
    count = 0
    for line in sys.stdin.buffer:
        if path := os.fsdecode(line.rstrip(b"\r\n")):
            count += 1
            yield path
    if not count:
        raise UserError("-: no path on standard input")


class Illustrator:
    """Draws the heat maps that --heatmap asks for, and finds the boxes of --boxes."""

    def __init__(self, folder: str | None, boxes: bool):
        from reports import heatmap  # with matplotlib and SciPy: no prediction without heat maps waits for them

        self._heatmap, self._folder, self._boxes = heatmap, folder, boxes

    def details(self, number: int, prediction: Prediction) -> Details:
        """Of the image `number` of the list, from 0: its box, and the picture that is drawn of it."""
        found: Details = {}
        if (seen := prediction.heatmap) is None:
            return found
        box = self._heatmap.strongest_box(seen.values, seen.crop) if self._boxes else None
        if self._boxes:
            found["box"] = box
        if self._folder is not None:
            stem = os.path.splitext(os.path.basename(prediction.name))[0][:50]  # 50 characters are at most 200 bytes
            path = os.path.join(self._folder, f"{number + 1:06d}-{stem}.jpg")
            self._heatmap.draw_heatmap(path, seen.picture, seen.values, seen.size, seen.crop, box)
            found["heatmap"] = path
        return found


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Predict the classes of images with a trained run.")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, folders or globs; - reads a list of paths from stdin"
    )
    parser.add_argument("--run", help="run directory of train.py; default: the newest below checkpoints/")
    answer = parser.add_argument_group("answers")
    answer.add_argument("--top", type=int, default=5, help="classes to show for each image (default: 5)")
    answer.add_argument(
        "--threshold", type=float, metavar="P", help="name no class where the largest probability is below P"
    )
    answer.add_argument(
        "--unknown",
        type=float,
        metavar="RATE",
        help="say which images are unlike the training images; RATE, such as 0.05: the share of known ones called so",
    )
    answer.add_argument("--raw", action="store_true", help="probabilities without the run's calibration")
    answer.add_argument(
        "--tta",
        type=int,
        metavar="N",
        help="mean probabilities of the central view, its mirror image and N random views of the image",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=("text", "json", "csv"), default="text", help="default: text")
    output.add_argument("--output", metavar="FILE", help="file to write, when all is done, instead of standard output")
    output.add_argument("--embeddings", metavar="FILE.npz", help="write the features that enter the head, averaged")
    output.add_argument("--heatmap", metavar="DIR", help="draw where the network looked, one picture an image")
    output.add_argument("--boxes", action="store_true", help="the box around the strongest region of the heat map")
    work = parser.add_argument_group("work")
    work.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, help=f"images computed at a time (default: {BATCH_SIZE})"
    )
    work.add_argument("--shard", metavar="I/N", help="every N-th image from the I-th on: one of N hosts' part")
    arguments = parser.parse_args()
    for flag, value, least in (
        ("--top", arguments.top, 1),
        ("--tta", arguments.tta, 0),
        ("--batch-size", arguments.batch_size, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{flag} {value}: must be at least {least}")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold {arguments.threshold:g}: must be a probability, from 0 to 1")
    if arguments.boxes and arguments.format == "csv" and not arguments.heatmap:
        raise UserError("--boxes: a CSV has no place for boxes; add --heatmap DIR or take --format json")
    for flag in ("output", "embeddings"):
        if path := getattr(arguments, flag):
            check_writable(f"--{flag}", path)
            if os.path.islink(path):
                setattr(arguments, flag, os.path.realpath(path))
    both = [os.path.realpath(path) for path in (arguments.output, arguments.embeddings) if path]
    if len(set(both)) < len(both):
        raise UserError(f"--embeddings {arguments.embeddings}: the file of --output; name another")
    if arguments.heatmap is not None:
        check_folder("--heatmap", arguments.heatmap)
    return arguments


def shard_of(text: str | None) -> tuple[int, int]:
    """The first image, from 0, and the step between the images of a shard given as I/N."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: must be I/N with I from 1 to N, such as 1/4")
    return int(match[1]) - 1, int(match[2])


def predictions_with_bar(predictions: Iterable[Prediction], total: int | None, shown: bool) -> Iterator[Prediction]:
    """`predictions`, under a bar on stderr where that is a terminal and the results do not go to one."""
    if not shown:
        yield from predictions
        return
    with progress_bar(total, 0, "predicting", leave=False) as bar:  # type: ignore[arg-type]  # None: not known
        for prediction in predictions:
            yield prediction
            bar.update()


def main() -> int:
    arguments = parse_arguments()
    first, step = shard_of(arguments.shard)
    run = newest_run() if arguments.run is None else Run(arguments.run)
    files = find_files(arguments.images)
    places = [os.path.realpath(path) for path in (arguments.output, arguments.embeddings) if path]
    if isinstance(files, list):
        check_not_replaced(files, places)
    else:
        files = (path for path in files if check_not_replaced([path], places))
    devices.grow_gpu_memory()
    drawing = arguments.heatmap is not None or arguments.boxes
    illustrator = Illustrator(arguments.heatmap, arguments.boxes) if drawing else None
    predictor = Predictor(
        run,
        batch_size=arguments.batch_size,
        tta=arguments.tta,
        calibrated=not arguments.raw,
        heatmaps=drawing,
        unknown_rate=arguments.unknown,
    )
    total = len(range(first, len(files), step)) if isinstance(files, list) else None
    predictions = predictions_with_bar(
        predictor.predict(itertools.islice(files, first, None, step)),
        total,
        bool(arguments.output) or not sys.stdout.isatty(),
    )
    count, failed, with_unknown = 0, 0, arguments.unknown is not None
    with contextlib.ExitStack() as files_of_results:
        write = embed = None
        if arguments.embeddings:
            embed = files_of_results.enter_context(embedding_file(arguments.embeddings))
        if arguments.output:
            write = files_of_results.enter_context(result_file(arguments.output))
        write = write or write_results
        if arguments.format == "csv":
            write(csv_header(with_unknown))
        for count, prediction in enumerate(predictions, start=1):
            if prediction.error:
                failed += 1
                tqdm.write(f"error: {one_line(prediction.name)}: {prediction.error}", file=sys.stderr)
            elif embed:
                embed(prediction)
            details = illustrator.details(first + step * (count - 1), prediction) if illustrator else {}
            shown = format_prediction(
                prediction, arguments.format, arguments.top, arguments.threshold, details, with_unknown
            )
            write(shown)
    # Some bad images are a partial result; with none that can be read there is no result.
    return 0 if not failed else 2 if failed == count else 1


if __name__ == "__main__":
    run_script(main)
