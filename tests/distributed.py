"""`train.py`, once for each list of arguments in a JSON text, in one process that has a narrow network for an fc head.

A process of its own, since TensorFlow's devices are decided once in a process.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from console import quiet_tensorflow, run_script

quiet_tensorflow()

import model
from networks.vgg import vgg

model.NETWORKS["narrow"] = vgg((4,), (4,), (6, 6), (8,), (8,), fc_units=16)  # before the flags are made of the table

import train
from tests.conftest import call


def main() -> int:
    for arguments in json.loads(sys.argv[1]):
        if status := call(train, *arguments):
            return status
    return 0


if __name__ == "__main__":
    run_script(main)
