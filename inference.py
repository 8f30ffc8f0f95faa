"""Predicts the classes of images with a trained run: python inference.py IMAGE|FOLDER|GLOB ... [--run DIR]."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from console import ArgumentParser, Stopped, UserError, cores, one_line, quiet_tensorflow, run_script

quiet_tensorflow()

import numpy as np
import tensorflow as tf

import data
import devices
from dataset import images
from dataset.walk import summary, walk
from files import check_writable, defused, defused_path, write_text
from reports import metrics
from run import Run, newest_run
from training.step import compiled_forward

BATCH_SIZE = 16
Prediction = list[tuple[str, float]] | str  # (class name, probability), most probable first; or what is wrong


def find_files(patterns: list[str]) -> list[str]:
    """The image files that the arguments name: a file as it is, the images below a folder, the matches of a glob."""
    files: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            listing = walk(pattern)
            found = [os.path.join(pattern, name) for name in listing.names()]
            if ignored := summary([*listing.ignored, *listing.ours]):
                print(f"{one_line(pattern)}: {ignored}", file=sys.stderr)
            if not found:
                raise UserError(f"{pattern}: no image in this folder")
        elif os.path.lexists(pattern) or not glob.has_magic(pattern):
            found = [pattern]  # one that is missing is reported like any other bad image
        else:
            found = sorted(glob.glob(pattern, recursive=True))
            if not found:
                raise UserError(f"{pattern}: no file matches")
        files += found
    return files


def predict(run: Run, files: list[str], top: int) -> Iterator[tuple[str, Prediction]]:
    """Yields each file, in order, with its prediction or with the reason why there is none."""
    config = run.config()
    devices.use_threads(config.threads)
    class_names, spec, model = config.class_names, config.preprocessing, run.load_model()
    forward = compiled_forward(model)

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)])
    def prepare(image: tf.Tensor) -> tf.Tensor:
        return data.preprocess(image, spec)

    def read(path: str) -> tf.Tensor | str:
        try:
            return prepare(images.read_image(path))
        except images.ImageError as error:
            return error.reason

    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(files), BATCH_SIZE):
            names = files[start : start + BATCH_SIZE]
            inputs = list(pool.map(read, names))
            good = [x for x in inputs if not isinstance(x, str)]
            rows = iter(metrics.softmax(forward(tf.stack(good)).numpy()) if good else ())
            for name, x in zip(names, inputs, strict=True):
                if isinstance(x, str):
                    yield name, x
                else:
                    row = next(rows)
                    best = np.argsort(-row, kind="stable")[:top]
                    yield name, [(class_names[i], float(row[i])) for i in best]


def format_prediction(name: str, prediction: Prediction, form: str) -> str:
    """One prediction as text, as a JSON object or as CSV rows (image, rank, class, probability, error)."""
    if form == "json":
        if isinstance(prediction, str):
            return json.dumps({"image": name, "error": prediction}) + "\n"
        pairs = [{"class": class_name, "probability": probability} for class_name, probability in prediction]
        return json.dumps({"image": name, "predictions": pairs}) + "\n"
    if form == "csv":
        text = io.StringIO()
        rows = (
            [[defused_path(name), "", "", "", defused(prediction)]]
            if isinstance(prediction, str)
            else [
                [defused_path(name), rank, defused(c), f"{p:.6f}", ""]
                for rank, (c, p) in enumerate(prediction, start=1)
            ]
        )
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()
    if isinstance(prediction, str):
        return f"{one_line(name)}\n   error  {prediction}\n"
    return f"{one_line(name)}\n" + "".join(f"  {p:7.4f}  {one_line(c)}\n" for c, p in prediction)


def write_results(pieces: list[str]) -> None:
    """Writes to standard output, where odd bytes of a file name go out as they came in."""
    try:
        sys.stdout.buffer.write("".join(pieces).encode(errors="surrogateescape"))
        sys.stdout.buffer.flush()
    except (OSError, ValueError):
        raise Stopped(signal.SIGPIPE) from None  # nobody reads them


def main() -> int:
    parser = ArgumentParser(description="Predict the classes of images with a trained run.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders or globs")
    parser.add_argument("--run", help="run directory of train.py; default: the newest below checkpoints/")
    parser.add_argument("--top", type=int, default=5, help="classes to show for each image (default: 5)")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="default: text")
    parser.add_argument("--output", help="file to write instead of standard output")
    arguments = parser.parse_args()
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: must be at least 1")
    if arguments.output:
        check_writable("--output", arguments.output)
    run = newest_run() if arguments.run is None else Run(arguments.run)
    pieces = ["image,rank,class,probability,error\n"] if arguments.format == "csv" else []
    failed = 0
    files = find_files(arguments.images)
    for name, prediction in predict(run, files, arguments.top):
        if isinstance(prediction, str):
            failed += 1
            print(f"error: {one_line(name)}: {prediction}", file=sys.stderr)
        pieces.append(format_prediction(name, prediction, arguments.format))
        if not arguments.output:
            write_results(pieces)
            pieces.clear()
    if arguments.output:
        try:
            write_text(arguments.output, "".join(pieces))
        except OSError as error:
            write_results(pieces)  # what was computed is not lost
            raise UserError(
                f"--output {arguments.output}: {error.strerror}; the results are on standard output"
            ) from None
    # Some bad images are a partial result; with none that can be read there is no result.
    return 0 if not failed else 2 if failed == len(files) else 1


if __name__ == "__main__":
    run_script(main)
