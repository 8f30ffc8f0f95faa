"""Fine-tunes an ImageNet-pretrained network on your own images: python train.py DATA [flags]."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import hashlib
import json
import shlex
import sys
import time

from console import ArgumentParser, Stopped, UserError, quiet_tensorflow, run_script

quiet_tensorflow()

from devices import explain_gpu
from replicas import read_cluster
from run import Run
from training.session import train
from training.settings import Settings, add_flags


def parse_arguments(arguments: list[str]) -> tuple[str, str | None, Settings]:
    """DATA, --run, and the settings."""
    parser = ArgumentParser(description="Fine-tune an ImageNet-pretrained network on your own images.")
    layouts = "a folder (Food-101, split folders, a folder per class) or a CSV (path,label[,split])"
    parser.add_argument("data", metavar="DATA", help=layouts)
    parser.add_argument("--run", help="run directory; one that exists is resumed (default: checkpoints/<time>-<hash>)")
    parser.add_argument("--require-gpu", action="store_true", help="an error, with the cause, where no GPU can be used")
    add_flags(parser)
    values = vars(parser.parse_args(arguments))
    if values.pop("require_gpu") and (problem := explain_gpu()):
        raise UserError(f"--require-gpu: {problem}")
    return values.pop("data"), values.pop("run"), Settings.from_dict(values)


def main() -> int:
    data, run, settings = parse_arguments(sys.argv[1:])
    if run is None and read_cluster():
        raise UserError("TF_CONFIG names several workers: give all of them the same --run DIR, which they share")
    if run is None:
        key = json.dumps([data, settings.as_dict()], sort_keys=True)
        run = f"checkpoints/{time.strftime('%Y%m%d-%H%M%S')}-{hashlib.sha256(key.encode()).hexdigest()[:6]}"
    try:
        results = train(settings, data, Run(run), sys.argv)
    except Stopped as stopped:
        print(f"{stopped}; resume with the same command and --run {shlex.quote(run)}", file=sys.stderr)
        return 128 + stopped.signal_number
    print(
        f"validation accuracy of the best checkpoint {results['accuracy']:.4f}, loss {results['log_loss']:.4f}\n"
        f"results    {run}\n"
        f"predict    python inference.py IMAGE --run {shlex.quote(run)}\n"
        f"watch      tensorboard --logdir checkpoints/"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
