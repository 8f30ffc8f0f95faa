"""Exports answer what inference.py answers: each format in its own runtime, on photographs of many sizes and kinds."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import skimage
import tensorflow as tf
from PIL import Image

import data
import export
import train
from dataset.images import decode_image, read_image
from exporting import graph
from model import Network
from predictor import Predictor
from run import Run
from tests.conftest import call
from weights.names import load_pretrained

MISSING = "is not installed: pip install -r requirements-export.txt"
TRAIN = ["--network", "small", "--pretrained", "none", "--image-size", "32", "--precision", "float32", "--epochs", "1"]
# Height and width: smaller and larger than the network's 32 px, odd, narrow.
SIZES = [(20, 27), (32, 32), (33, 31), (64, 96), (101, 67), (333, 40), (2000, 3000)]

Files = dict[str, Path]


def photograph(height: int, width: int) -> Image.Image:
    """A photograph at any size, another one for each size."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    picture = getattr(skimage.data, names[(height + width) % len(names)])()
    return Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int, order: str = "II") -> bytes:
    """An EXIF block with a text before the orientation, in either byte order."""
    endian = "little" if order == "II" else "big"

    def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return tag.to_bytes(2, endian) + kind.to_bytes(2, endian) + count.to_bytes(4, endian) + value

    entries = [
        entry(0x010E, 2, 4, b"abc\0"),
        entry(0x0112, 3, 1, orientation.to_bytes(2, endian) + b"\0\0"),
    ]
    head = order.encode() + (42).to_bytes(2, endian) + (8).to_bytes(4, endian)
    return b"Exif\0\0" + head + len(entries).to_bytes(2, endian) + b"".join(entries) + bytes(4)


@pytest.fixture(scope="module")
def run(sample_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one epoch, whose last layer is then made decisive, so that a wrong export can't pass."""
    path = tmp_path_factory.mktemp("exported") / "run"
    assert call(train, sample_images, "--run", path, *TRAIN) == 0
    run = Run(path)
    arrays = {name: variable.numpy() for name, variable in run.load_model().variables_by_name.items()}
    # A last layer that is the identity shows what the last layer sees.
    features = Network("small", "gap", 256, image_size=32)
    for name, variable in features.variables_by_name.items():
        variable.assign(
            np.eye(256) if name == "small/gap/weights" else np.zeros(256) if "gap" in name else arrays[name]
        )
    pictures = [np.asarray(photograph(height, width)) for height, width in SIZES]
    seen = features.forward(tf.stack([data.preprocess(each, run.config().preprocessing) for each in pictures])).numpy()
    deviations = seen - seen.mean(axis=0)
    weights = np.random.default_rng(0).normal(size=(256, 12))
    direction = seen.mean(axis=0) / np.linalg.norm(seen.mean(axis=0))
    weights -= np.outer(direction, direction @ weights)  # what all pictures have in common decides nothing
    weights *= 2 / (deviations @ weights).std()
    (path / "calibration.json").unlink()  # of the weights before
    run.save("best", {**arrays, "small/gap/weights": weights.astype(np.float32)}, keep=1)
    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Photographs of many sizes, grey, and turned by EXIF."""
    folder = tmp_path_factory.mktemp("photographs")
    contents = {f"{height}x{width}": encoded(photograph(height, width), "JPEG") for height, width in SIZES}
    contents["grey"] = encoded(photograph(90, 121).convert("L"), "JPEG")
    contents["turned"] = encoded(photograph(90, 121), "JPEG", exif=exif(6))
    contents["alpha"] = encoded(with_alpha(photograph(50, 60)), "PNG")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


@pytest.fixture(scope="module")
def expected(run: Run, files: Files) -> dict[str, np.ndarray]:
    """What inference.py answers: {photograph: probabilities in the order of the classes}."""
    answers = {}
    for prediction, name in zip(Predictor(run).predict(files.values()), files, strict=True):
        assert not prediction.error, (prediction.name, prediction.error)
        answers[name] = prediction.probabilities
    assert 0.3 < np.mean([answer.max() for answer in answers.values()]) < 0.95  # else a wrong export could pass
    assert len({answer.argmax() for answer in answers.values()}) > 2
    return answers


def with_alpha(image: Image.Image) -> Image.Image:
    levels = np.random.default_rng(1).integers(0, 256, (image.height, image.width), dtype=np.uint8)
    image = image.convert("LA" if image.mode == "L" else "RGBA")
    image.putalpha(Image.fromarray(levels))
    return image


@pytest.fixture(scope="module")
def saved_model(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(run, tmp_path_factory.mktemp("saved_model"), "saved_model")


def exported(run: Run, tmp_path: Path, form: str, *flags: object) -> Path:
    out = tmp_path / "new" / f"out.{form}"  # in a folder that is not there
    assert call(export, "--run", run.path, "--format", form, out, *flags) == 0
    return out


# -- the maths -------------------------------------------------------------------------------------------------------


def noise(height: int, width: int) -> np.ndarray:
    """Black and white at random: the hardest picture to resize."""
    return np.random.default_rng(height * width).choice([0, 255], (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", [32, 64, 224, 299])
def test_area_resize_is_tensorflows(size: int) -> None:
    resize = tf.function(graph.portable_resize, reduce_retracing=True)
    sizes = [(1, 1), (1, 50), (7, 9), (31, 33), (size, size), (size - 1, size + 1), (2 * size, 3 * size), (700, 500)]
    more = np.random.default_rng(size).integers(1, 900, (12, 2)).tolist()
    tolerance = 0.01 if size <= 224 else 0.02  # TensorFlow's own rounding, as the next test shows
    for height, width in [*sizes, (3000, 2000), (101, 1999), *more]:
        image = noise(height, width)
        ours, theirs = resize(tf.constant(image), size), tf.image.resize(image, [size, size], method="area")
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=f"{height}x{width}")


@pytest.mark.parametrize(
    ("height", "width", "size"), [(1, 3, 32), (31, 33, 32), (70, 101, 32), (65, 63, 64), (298, 50, 299)]
)
def test_area_resize_is_exact(height: int, width: int, size: int) -> None:
    image = noise(height, width)
    # Every pixel `size` times, so that each new pixel is the mean of whole ones.
    rows = np.repeat(image.astype(np.float64), size, axis=0).reshape(size, height, width, 3).mean(axis=1)
    wanted = np.repeat(rows, size, axis=1).reshape(size, size, width, 3).mean(axis=2)
    np.testing.assert_allclose(graph.portable_resize(tf.constant(image), size), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("margin", [0, 10, 50])
def test_portable_preprocessing_is_ours(margin: int) -> None:
    spec = data.Preprocessing(64, margin, ("flip",), mean_rgb=(120.0, 110.0, 100.0), std_rgb=(58.0, 57.0, 0.5))
    for height, width in SIZES:
        image = np.asarray(photograph(height, width))
        wanted = data.preprocess(image, spec)
        np.testing.assert_allclose(
            data.preprocess(image, spec, resize=graph.portable_resize), wanted, rtol=0, atol=0.01 / 0.5
        )


# -- decoding inside a SavedModel ------------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(photograph(61, 83), "JPEG", quality=35),
    "jpeg 4:4:4": lambda: encoded(photograph(61, 83), "JPEG", quality=95, subsampling=0),
    "jpeg 4:2:2": lambda: encoded(photograph(61, 83), "JPEG", subsampling=1),
    "progressive jpeg": lambda: encoded(photograph(61, 83), "JPEG", progressive=True),
    "grey jpeg": lambda: encoded(photograph(61, 83).convert("L"), "JPEG"),
    "cmyk jpeg": lambda: encoded(photograph(61, 83).convert("CMYK"), "JPEG"),
    "png": lambda: encoded(photograph(61, 83), "PNG"),
    "grey png": lambda: encoded(photograph(61, 83).convert("L"), "PNG"),
    "1-bit png": lambda: encoded(photograph(61, 83).convert("1"), "PNG"),
    "palette png": lambda: encoded(photograph(61, 83).quantize(40), "PNG"),
    "transparent palette png": lambda: encoded(photograph(61, 83).quantize(40), "PNG", transparency=3),
    "alpha png": lambda: encoded(with_alpha(photograph(61, 83)), "PNG"),
    "grey alpha png": lambda: encoded(with_alpha(photograph(61, 83).convert("L")), "PNG"),
    "gif": lambda: encoded(photograph(61, 83).quantize(40), "GIF"),
    "animated gif": lambda: encoded(
        photograph(61, 83).quantize(40), "GIF", save_all=True, append_images=[photograph(61, 83).rotate(90).quantize(9)]
    ),
    "bmp": lambda: encoded(photograph(61, 83), "BMP"),
    "grey bmp": lambda: encoded(photograph(61, 83).convert("L"), "BMP"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_bytes_are_decoded_to_the_same_pixels(kind: str) -> None:
    contents = PICTURES[kind]()
    np.testing.assert_array_equal(graph.decode(tf.constant(contents)), decode_image(contents, kind))


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_followed(orientation: int, order: str) -> None:
    contents = encoded(photograph(61, 83), "JPEG", exif=exif(orientation, order))
    turned = tf.function(graph.decode)(tf.constant(contents))
    np.testing.assert_array_equal(turned, decode_image(contents, "photograph"))
    assert turned.shape == ((83, 61, 3) if 5 <= orientation <= 8 else (61, 83, 3))


@pytest.mark.parametrize("cut", [6, 9, 13, 14, 18, 21, 35, 40])
def test_damaged_exif_is_upright(cut: int) -> None:
    contents = encoded(photograph(61, 83), "JPEG", exif=exif(6, "MM")[:cut], comment=b"x" * 300)
    assert graph.decode(tf.constant(contents)).shape == decode_image(contents, "photograph").shape


# -- each format against inference.py --------------------------------------------------------------------------------


def test_saved_model_answers_as_inference(
    run: Run, files: Files, expected: dict[str, np.ndarray], saved_model: Path
) -> None:
    signatures = tf.saved_model.load(str(saved_model)).signatures
    names = [name.encode() for name in run.config().class_names]
    batch = signatures["serving_default"](image_bytes=tf.constant([path.read_bytes() for path in files.values()]))
    np.testing.assert_allclose(batch["probabilities"], list(expected.values()), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(batch["index"], [answer.argmax() for answer in expected.values()])
    np.testing.assert_array_equal(batch["class_names"], [names] * len(files))
    for name, path in files.items():
        pixels = read_image(path)
        two = signatures["images"](images=tf.constant(np.stack([pixels, pixels])))
        np.testing.assert_allclose(two["probabilities"], [expected[name]] * 2, rtol=0, atol=1e-5)
        x = data.preprocess(pixels, run.config().preprocessing)
        of_input = signatures["preprocessed"](x=x[tf.newaxis])
        np.testing.assert_allclose(of_input["probabilities"], [expected[name]], rtol=0, atol=1e-5)


def test_saved_model_runs_without_us(
    files: Files, expected: dict[str, np.ndarray], saved_model: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "photo.npy", np.array([files["turned"].read_bytes()]))
    command = str(Path(sys.executable).with_name("saved_model_cli"))
    arguments = ["run", "--dir", str(saved_model), "--tag_set", "serve", "--signature_def", "serving_default"]
    result = subprocess.run(
        [command, *arguments, "--inputs", f"image_bytes={tmp_path / 'photo.npy'}", "--outdir", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy"), [expected["turned"]], rtol=0, atol=1e-5)


def tflite_answers(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(model_content=path.read_bytes())
    # A signature is asked by the names that are in the README.
    (details,) = interpreter.get_input_details()

    def answer(image: np.ndarray) -> np.ndarray:
        interpreter.resize_tensor_input(details["index"], image.shape)
        return np.asarray(interpreter.get_signature_runner("serving_default")(image=image)["probabilities"])

    return answer


@pytest.mark.parametrize(("quantize", "tolerance"), [("none", 1e-4), ("float16", 0.02), ("int8", 0.2)])
def test_tflite_answers_as_inference(
    quantize: str, tolerance: float, run: Run, files: Files, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip("ai_edge_litert", reason=f"ai-edge-litert {MISSING}")
    out = exported(run, tmp_path, "tflite", "--quantize", quantize)
    bytes_of_weights = {"none": 4, "float16": 2, "int8": 1}[quantize]
    parameters = sum(np.prod(v.shape) for v in run.load_model().variables_by_name.values())
    assert out.stat().st_size == pytest.approx(parameters * bytes_of_weights, rel=0.05)
    answer = tflite_answers(out)
    for name, path in files.items():
        np.testing.assert_allclose(answer(read_image(path)[np.newaxis]), [expected[name]], rtol=0, atol=tolerance)
    with zipfile.ZipFile(out) as archive:
        assert archive.read("classes.txt").decode().split("\n")[:-1] == list(run.config().class_names)


def test_onnx_answers_as_inference(run: Run, files: Files, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("tf2onnx", reason=f"tf2onnx {MISSING}")
    onnx = pytest.importorskip("onnx", reason=f"onnx {MISSING}")
    onnxruntime = pytest.importorskip("onnxruntime", reason=f"onnxruntime {MISSING}")
    out = exported(run, tmp_path, "onnx")
    onnx.checker.check_model(str(out), full_check=True)
    assert onnx.load(out).opset_import[0].version >= 17
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(run.config().class_names)
    for name, path in files.items():
        (answer,) = session.run(["probabilities"], {"image": read_image(path)[np.newaxis]})
        np.testing.assert_allclose(answer, [expected[name]], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("size", [32, 50])
def test_a_fixed_input_is_the_crop(size: int, run: Run, files: Files, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason=f"ai-edge-litert {MISSING}")
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(
        str(exported(run, tmp_path, "tflite", "--input-size", size))
    )
    (details,) = interpreter.get_input_details()
    assert details["shape"].tolist() == details["shape_signature"].tolist() == [1, size, size, 3]
    spec = run.config().preprocessing
    for path in files.values():
        pixels = read_image(path)
        side = min(pixels.shape[:2]) - 2 * min(spec.crop_margin, min(pixels.shape[:2]) // 4)
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        crop = Image.fromarray(pixels[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BOX)
        # The network itself on that crop; only the last resize is between.
        x = tf.image.resize(np.asarray(crop), [32, 32], method="area") - spec.mean_rgb
        wanted = tf.nn.softmax(run.load_model().forward(x[tf.newaxis]))
        answer = interpreter.get_signature_runner("serving_default")(image=np.asarray(crop)[np.newaxis])
        np.testing.assert_allclose(answer["probabilities"], wanted, rtol=0, atol=1e-4)


def test_npz_holds_the_variables_and_is_trained_on(run: Run, sample_images: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path, "npz")
    arrays = load_pretrained(str(out), "small")
    variables = run.load_model().variables_by_name
    assert set(arrays) == set(variables)
    for name, variable in variables.items():
        np.testing.assert_array_equal(arrays[name], variable)
    again = tmp_path / "again"
    assert call(train, sample_images, "--run", again, *TRAIN, "--pretrained", out, "--train-from", "head") == 0
    frozen = Run(again).load_model().variables_by_name["small/conv1/conv1_1/weights"]
    np.testing.assert_array_equal(frozen, arrays["small/conv1/conv1_1/weights"])


def test_probabilities_are_calibrated(run: Run, files: Files, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    calibrated = tmp_path / "calibrated"
    shutil.copytree(run.path, calibrated)
    (calibrated / "calibration.json").write_text('{"temperature": 2.0}')
    signatures = tf.saved_model.load(str(exported(Run(calibrated), tmp_path, "saved_model"))).signatures
    answer = signatures["serving_default"](image_bytes=tf.constant([files["grey"].read_bytes()]))
    softened = np.sqrt(expected["grey"])  # exp(logit / 2)
    np.testing.assert_allclose(answer["probabilities"], [softened / softened.sum()], rtol=0, atol=1e-5)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_wrong_resize_is_refused_and_nothing_is_left(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ai_edge_litert", reason=f"ai-edge-litert {MISSING}")
    nearest = lambda image, size: tf.image.resize(tf.cast(image, tf.float32), [size, size], method="nearest")  # noqa: E731
    monkeypatch.setattr(graph, "portable_resize", nearest)
    assert call(export, "--run", run.path, "--format", "tflite", tmp_path / "out.tflite") == 2
    error = capsys.readouterr().err
    assert "differ from ours" in error
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_text("mine")
    cases = {
        ("--format", "npz", tmp_path / "there"): "is there already",
        ("--format", "npz", "/proc/no/out"): "can't be written",
        ("--format", "saved_model", tmp_path / "a[b]"): "TensorFlow loads no SavedModel",
        ("--format", "onnx", tmp_path / "out", "--quantize", "int8"): "--quantize is for --format tflite, not for onnx",
        ("--format", "npz", tmp_path / "out", "--input-size", "64"): "--input-size is for --format tflite and onnx",
        ("--format", "tflite", tmp_path / "out", "--input-size", "31"): "the network sees 32 px",
        ("--format", "keras", tmp_path / "out"): "invalid choice",
    }
    for arguments, words in cases.items():
        assert call(export, "--run", run.path, *arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"


@pytest.mark.parametrize(
    ("form", "name"),
    [("tflite", "ai_edge_litert.interpreter"), ("onnx", "tf2onnx"), ("onnx", "onnx"), ("onnx", "onnxruntime")],
)
def test_a_missing_package_is_named(
    form: str, name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tf2onnx", ModuleType("tf2onnx"))
    monkeypatch.setitem(sys.modules, name, None)
    assert call(export, "--run", run.path, "--format", form, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert name in error
    assert "pip install -r requirements-export.txt" in error
    assert list(tmp_path.iterdir()) == []


def test_without_the_data_other_photographs_are_compared(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run.path, moved)
    config = json.loads((moved / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(config))
    exported(Run(moved), tmp_path, "npz")
    assert "compared   6 photographs of scikit-image" in capsys.readouterr().out


def test_a_bfloat16_run_is_exported_in_float32(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tmp_path / "bfloat16"
    shutil.copytree(run.path, changed)
    config = json.loads((changed / "config.json").read_text())
    config["precision"] = "bfloat16"
    (changed / "config.json").write_text(json.dumps(config))
    exported(Run(changed), tmp_path, "saved_model")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("compared   16 validation images")
    assert lines[1] == "decoding   TensorFlow makes the same pixels of 16 of these 16 files as inference.py"
    (precision,) = (line for line in lines if line.startswith("precision  bfloat16"))
    assert 1e-5 < float(precision.split()[-1]) < 0.2


def test_a_run_that_decodes_scaled_is_exported_so(
    run: Run, files: Files, expected: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "scaled"
    shutil.copytree(run.path, changed)
    config = json.loads((changed / "config.json").read_text())
    config["preprocessing"]["decode"] = "scaled"
    (changed / "config.json").write_text(json.dumps(config))
    predictor = Predictor(Run(changed), heatmaps=True)
    signatures = tf.saved_model.load(str(exported(Run(changed), tmp_path, "saved_model"))).signatures
    turned = tmp_path / "turned.jpg"
    turned.write_bytes(encoded(photograph(640, 1001), "JPEG", exif=exif(6)))
    for path in (*files.values(), turned):
        (answer,) = predictor.predict([path])
        batch = signatures["serving_default"](image_bytes=tf.constant([path.read_bytes()]))
        np.testing.assert_allclose(batch["probabilities"][0], answer.probabilities, rtol=0, atol=1e-5)
        assert answer.heatmap is not None
        if path == turned:  # decoded at 1/4: the crop is 160 - 2 * 3 of the pixels there
            assert answer.heatmap.size == (1001, 637)  # 251 x 160 there, so at least this
            assert answer.heatmap.crop == (192, 12, 4 * 154)
        elif path == files["2000x3000"]:  # at 1/8, so that another answer shows that it was
            assert np.abs(answer.probabilities - expected["2000x3000"]).max() > 1e-4
        else:
            np.testing.assert_allclose(answer.probabilities, expected[path.name], rtol=0, atol=1e-5)


def test_the_crop_of_a_reduced_photograph_lies_inside_it(run: Run, tmp_path: Path) -> None:
    changed = tmp_path / "scaled"
    shutil.copytree(run.path, changed)
    config = json.loads((changed / "config.json").read_text())
    config["preprocessing"] |= {"decode": "scaled", "crop_margin": 0}
    (changed / "config.json").write_text(json.dumps(config))
    photo = tmp_path / "odd.jpg"
    photo.write_bytes(encoded(photograph(1025, 2001), "JPEG"))  # 129 x 251 at 1/8
    (answer,) = Predictor(Run(changed), heatmaps=True).predict([photo])
    assert answer.heatmap is not None
    assert answer.heatmap.size == (1025, 2001)
    assert answer.heatmap.crop == (0, 8 * 61, 1025)
