"""Scores a trained run on a split of its data or of another data set: python evaluate.py [--run DIR] [--data DATA]."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

from console import ArgumentParser, quiet_tensorflow, run_script

quiet_tensorflow()

from run import Run, newest_run
from training.evaluation import evaluate


def main() -> int:
    parser = ArgumentParser(description="Score a trained run, and write tables and pictures into its directory.")
    parser.add_argument("--run", help="run directory of train.py; default: the newest below checkpoints/")
    parser.add_argument(
        "--data",
        help="another data set with the same class names (its results go to a folder of their own), or the new place "
        "of the run's data; default: what the run was trained on",
    )
    parser.add_argument("--split", help="train, val, test or all of them (default: val; of other data all)")
    parser.add_argument("--image-root", help="folder that the paths of a CSV are relative to; default: the CSV's own")
    parser.add_argument(
        "--on-bad-image",
        choices=("fail", "skip"),
        default="fail",
        help="a file that can't be decoded: stop, or name it and score the others (default: fail)",
    )
    parser.add_argument("--raw", action="store_true", help="probabilities as trained, not calibrated")
    arguments = parser.parse_args()
    run = newest_run() if arguments.run is None else Run(arguments.run)
    skip = arguments.on_bad_image == "skip"
    folder, split, results = evaluate(run, arguments.data, arguments.split, arguments.image_root, skip, arguments.raw)
    print((folder / f"results-{split}.txt").read_text(encoding="utf-8"), end="")
    print(f"\naccuracy {results['accuracy']:.4f}; tables and pictures in {folder}")
    return 0


if __name__ == "__main__":
    run_script(main)
