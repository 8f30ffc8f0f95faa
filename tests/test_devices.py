"""GPUs that can't be used, told by drivers and libraries that are made for the test, and memory growth."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorflow as tf

import devices
from files import warn_once
from tests.conftest import ROOT

TOOLKIT = "--gpus all"
KERNEL_535 = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12\n"
)
KERNEL_470 = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  470.82.01  Release Build\n"


def driver(init: int = 0, cuda: int = 12040) -> SimpleNamespace:
    """libcuda.so.1: what its two functions answer."""

    def get_version(pointer: object) -> int:
        pointer._obj.value = cuda  # type: ignore[attr-defined]
        return init if init == 34 else 0  # a stub has no version

    return SimpleNamespace(cuInit=lambda flags: init, cuDriverGetVersion=get_version)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes this a machine with a kernel driver, device files, libraries by name and GPUs that TensorFlow sees."""

    def make(
        kernel: str = KERNEL_535, gpus: int = 0, device_files: int = 1, missing: str = "", **libraries: object
    ) -> None:
        for index in range(device_files):
            (tmp_path / f"nvidia{index}").touch()
        (tmp_path / "version").write_text(kernel)
        monkeypatch.setattr(devices, "KERNEL_DRIVER", tmp_path / ("version" if kernel else "none"))
        monkeypatch.setattr(devices, "DEVICE_FILES", f"{tmp_path}/nvidia[0-9]*")

        def load(name: str) -> object:
            library = libraries.get(name.removeprefix("lib").split(".")[0], "missing" if name == missing else None)
            if library == "missing":
                raise OSError(f"{name}: cannot open shared object file: No such file or directory")
            if isinstance(library, OSError):
                raise library
            return library

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"GPU:{i}" for i in range(gpus)])
        monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: True)
        build = {
            "cuda_version": "12.5.1",
            "cuda_compute_capabilities": ["sm_60", "sm_70", "sm_80", "sm_89", "compute_90"],
        }
        monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: build)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def explained() -> str:
    line = devices.explain_gpu()
    assert line is not None
    assert "\n" not in line
    return line


def test_no_driver(machine: Callable[..., None]) -> None:
    machine(kernel="", device_files=0, cuda="missing")
    assert "no NVIDIA driver" in explained()
    assert TOOLKIT in explained()


@pytest.mark.parametrize(("kernel", "device_files"), [(KERNEL_535, 1), (KERNEL_535, 0), ("", 1)])
def test_a_driver_on_the_host_that_is_not_in_the_container(
    machine: Callable[..., None], kernel: str, device_files: int
) -> None:
    machine(kernel=kernel, device_files=device_files, cuda="missing")
    assert ("driver 535.104.05" in explained()) == bool(kernel)
    assert "libcuda.so.1 is missing" in explained()
    assert TOOLKIT in explained()


def test_a_library_of_the_driver_without_a_device(machine: Callable[..., None]) -> None:
    for status in (100, 999):
        machine(device_files=0, cuda=driver(status))
        assert "has no GPU here" in explained()
        assert TOOLKIT in explained()


def test_an_old_driver(machine: Callable[..., None]) -> None:
    machine(kernel=KERNEL_470, cuda=driver(cuda=11040))
    assert explained().startswith("the NVIDIA driver 470.82.01 is too old (CUDA 11.4, not 12): install 525.60 or newer")
    machine(cuda=driver(cuda=12000), missing="libcudnn.so.9")  # what 525.60 has
    assert "too old" not in explained()


def test_a_driver_that_answers_with_an_error(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for status, words in ((34, "stub"), (802, "nvidia-fabricmanager"), (803, "restart the host"), (999, "error 999")):
        machine(cuda=driver(status))
        assert words in explained()
    machine(cuda=OSError("/usr/lib/libcuda.so.1: file too short"))
    assert "file too short" in explained()
    machine(cuda=driver(100))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert explained() == "CUDA_VISIBLE_DEVICES=-1 hides every GPU"


def test_a_cuda_library_that_is_missing(machine: Callable[..., None]) -> None:
    machine(cuda=driver(), missing="libcudnn.so.9")
    assert explained() == f"TensorFlow can't load libcudnn.so.9: pip install 'tensorflow[and-cuda]=={tf.__version__}'"
    machine(cuda=driver())
    assert "TF_CPP_MIN_LOG_LEVEL=0" in explained()


def test_a_tensorflow_without_cuda(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(cuda=driver())
    monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: False)
    assert "built without CUDA" in explained()


def needed_cudnn() -> int:
    """The number that cuDNN of the least version that this TensorFlow asks for gives itself."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    found = [Requirement(text) for text in requires("tensorflow") or ()]
    (cudnn,) = {r.specifier for r in found if r.name == "nvidia-cudnn-cu12"}
    (least,) = (clause.version for clause in cudnn if clause.operator == ">=")
    major, minor, patch = (int(part) for part in least.split(".")[:3])
    return major * 10000 + minor * 100 + patch


def test_cudnn_of_another_version_than_tensorflow_was_built_with(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: {"compute_capability": (8, 6)})
    for number in (needed_cudnn() - needed_cudnn() % 100, needed_cudnn() + 1400):  # the same minor version, and later
        machine(gpus=1, cudnn=SimpleNamespace(cudnnGetVersion=lambda n=number: n))
        assert devices.explain_gpu() is None
    machine(gpus=1, cudnn=SimpleNamespace(cudnnGetVersion=lambda: 90102))
    assert explained().startswith("cuDNN 9.1 is loaded, and this TensorFlow needs 9.3 or newer")


@pytest.mark.parametrize(
    ("capabilities", "works"),
    [
        ([(5, 2)], False),
        ([(6, 0)], True),
        ([(6, 1)], True),
        ([(7, 5)], True),
        ([(8, 6)], True),
        ([(9, 0)], True),
        ([(10, 0)], True),  # from PTX
        ([(3, 7), (7, 0)], True),  # TensorFlow leaves out the first
        ([(3, 7), (5, 0)], False),
    ],
)
def test_compute_capabilities_that_tensorflow_has_code_for(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capabilities: list[tuple[int, int]],
    works: bool,
) -> None:
    machine(gpus=len(capabilities), cudnn="missing")
    details = {f"GPU:{i}": {"compute_capability": c, "device_name": f"Model {i}"} for i, c in enumerate(capabilities)}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details.get)
    if works:
        assert devices.explain_gpu() is None
    else:
        major, minor = capabilities[-1]
        assert f"Model {len(capabilities) - 1} has compute capability {major}.{minor}" in explained()
        assert "6.0, 7.0, 8.0, 8.9, 9.0" in explained()


def test_memory_of_every_gpu_grows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    growing: dict[str, bool] = {}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0", "GPU:1"])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", growing.__setitem__)
    devices.grow_gpu_memory()
    assert growing == {"GPU:0": True, "GPU:1": True}

    def too_late(gpu: str, enable: bool) -> None:
        raise RuntimeError("Physical devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", too_late)
    warn_once.cache_clear()
    devices.grow_gpu_memory()
    assert capsys.readouterr().err.count("warning: ") == 1


def compiled(folder: Path, name: str, code: str) -> Path:
    """A shared library of C code."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
    subprocess.run(command, input=code, text=True, check=True)
    return folder / name


def test_real_libraries_are_called_as_their_headers_say(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda = "int cuDriverGetVersion(int *version) { *version = 11080; return 0; }"
    cudnn = "#include <stddef.h>\nsize_t cudnnGetVersion(void) { return 90102; }"
    loaded = {name: ctypes.CDLL(str(compiled(tmp_path, name, code))) for name, code in (("a", cuda), ("b", cudnn))}
    machine(cuda=loaded["a"])
    assert "CUDA 11.8" in explained()
    machine(gpus=1, cudnn=loaded["b"])
    assert "cuDNN 9.1 is loaded" in explained()


def test_the_entrypoint_says_why_tensorflow_itself_finds_no_gpu(tmp_path: Path) -> None:
    """TensorFlow loads the same driver, which is made for the test, in a process of its own."""
    compiled(
        tmp_path, "libcuda.so.1", "int cuInit(unsigned f) { return 803; } int cuDriverGetVersion(int *v) { return 1; }"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "docker" / "entrypoint.py"), "echo", "done"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert ran.stdout == "done\n"
    line = f"TensorFlow {tf.__version__} runs on the CPU: the NVIDIA driver was updated while an older one is running"
    assert line in ran.stderr
