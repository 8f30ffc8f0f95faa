"""Writes a trained run as a file that other programs run: python export.py [--run DIR] --format FORMAT OUT."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

from console import ArgumentParser, quiet_tensorflow, run_script

quiet_tensorflow()

from exporting.export import export
from exporting.formats import FORMATS, QUANTIZE, Options
from run import Run, newest_run


def main() -> int:
    parser = ArgumentParser(
        description="Write a trained run with its preprocessing for other programs, checked against our own answers."
    )
    parser.add_argument("out", metavar="OUT", help="file to write, or folder of a SavedModel; must not be there yet")
    parser.add_argument("--run", help="run directory of train.py; default: the newest below checkpoints/")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        required=True,
        help="saved_model: TensorFlow and TensorFlow Serving; tflite: LiteRT on phones; onnx: ONNX Runtime; "
        "npz: the variables by name, which --pretrained reads",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZE,
        default="none",
        help="tflite: weights as float16 (half the size) or int8 (a quarter); default: none",
    )
    parser.add_argument(
        "--input-size",
        type=int,
        metavar="N",
        help="tflite and onnx: an input of fixed size, the central crop of a photograph at N x N pixels; "
        "default: whole photographs of any size",
    )
    arguments = parser.parse_args()
    run = newest_run() if arguments.run is None else Run(arguments.run)
    export(run, arguments.out, arguments.format, Options(arguments.quantize, arguments.input_size))
    return 0


if __name__ == "__main__":
    run_script(main)
