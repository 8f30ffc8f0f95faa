"""Scores a trained run on a split of its data or of another data set: python evaluate.py [--run DIR] [--data DATA]."""

from console import ArgumentParser, quiet_tensorflow, run_script

quiet_tensorflow()

from run import Run, newest_run
from training.session import evaluate


def main() -> int:
    parser = ArgumentParser(description="Score a trained run, and write tables and pictures into its directory.")
    parser.add_argument("--run", help="run directory of train.py; default: the newest below checkpoints/")
    parser.add_argument(
        "--data", help="another data set with the same class names; default: what the run was trained on"
    )
    parser.add_argument("--split", default="val", help="train, val, test or all of them (default: val)")
    arguments = parser.parse_args()
    run = Run(arguments.run) if arguments.run else newest_run()
    results = evaluate(run, arguments.data, arguments.split)
    print((run.path / f"results-{arguments.split}.txt").read_text(encoding="utf-8"), end="")
    print(f"\naccuracy {results['accuracy']:.4f}; tables and pictures in {run.path}")
    return 0


if __name__ == "__main__":
    run_script(main)
