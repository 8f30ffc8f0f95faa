"""The formats of an export: each is written from a `graph.Model`, and opened again in its own runtime."""

import importlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from console import UserError, one_line
from data import preprocess
from exporting import graph
from weights.names import load_pretrained
from weights.restore import restore

QUANTIZE = ("none", "float16", "int8")
OPSET = 18  # of ONNX


@dataclass(frozen=True, eq=False)
class Photograph:
    """An image file and its picture: uint8 [H, W, 3]."""

    path: str
    pixels: np.ndarray


Answer = Callable[[Photograph], np.ndarray]  # -> probabilities [K, classes], a row for each of K ways to ask


@dataclass(frozen=True)
class Options:
    """quantize: of `QUANTIZE`; input_size: side of a fixed square input, pixels (None: any size)."""

    quantize: str = "none"
    input_size: int | None = None


@dataclass(frozen=True)
class Format:
    """write(path, model, options) writes an export; open(path, model) loads it again in its own runtime.

    tolerance: the largest difference of a probability from ours that is taken for rounding.
    flags: names of the options that it has; packages: what it needs beyond requirements.txt.
    """

    write: Callable[[Path, graph.Model, Options], None]
    open: Callable[[Path, graph.Model], Answer]
    tolerance: float
    flags: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


def package(name: str) -> Any:
    """A module of requirements-export.txt; UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} can't be imported ({error}): pip install -r requirements-export.txt") from None


def write_saved_model(path: Path, model: graph.Model, options: Options) -> None:
    module, functions = model.module(), graph.signatures(model)
    module.functions = list(functions.values())
    tf.saved_model.save(module, str(path), signatures=functions)


def open_saved_model(path: Path, model: graph.Model) -> Answer:
    loaded = tf.saved_model.load(str(path)).signatures

    def answer(photograph: Photograph) -> np.ndarray:
        image = tf.constant(photograph.pixels)
        # Whatever the files are, the signature that decodes is asked about the same picture, at its full size.
        alike = is_decoded_alike(photograph, model.preprocessing.least_side)
        contents = tf.io.read_file(photograph.path) if alike else tf.io.encode_png(image)
        answers = (
            loaded["serving_default"](image_bytes=contents[tf.newaxis]),
            loaded["images"](images=image[tf.newaxis]),
            loaded["preprocessed"](x=preprocess(image, model.preprocessing)[tf.newaxis]),
        )
        return np.concatenate([each["probabilities"].numpy() for each in answers])

    return answer


def is_decoded_alike(photograph: Photograph, least: int = 0) -> bool:
    """Whether an export makes the same pixels of the file as we do, and those of its full size."""
    try:
        contents = tf.io.read_file(photograph.path)
        pixels = graph.decode(contents, graph.jpeg_reduction(contents, least))
        return np.array_equal(pixels, photograph.pixels)
    except tf.errors.OpError:
        return False


def write_tflite(path: Path, model: graph.Model, options: Options) -> None:
    function = graph.portable_function(model, options.input_size).get_concrete_function()
    # A converter keeps state between calls: one for each.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], model.module())
    if options.quantize != "none":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if options.quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    path.write_bytes(converter.convert())
    # As TFLite's own metadata keep labels: a zip archive at the end of the file, which interpreters do not look at.
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("classes.txt", "".join(f"{one_line(name)}\n" for name in model.class_names))


def open_tflite(path: Path, model: graph.Model) -> Answer:
    interpreter = package("ai_edge_litert.interpreter").Interpreter(model_path=str(path))
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def answer(photograph: Photograph) -> np.ndarray:
        interpreter.resize_tensor_input(source, [1, *photograph.pixels.shape])
        interpreter.allocate_tensors()
        interpreter.set_tensor(source, photograph.pixels[np.newaxis])
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(target))

    return answer


def write_onnx(path: Path, model: graph.Model, options: Options) -> None:
    """Converts with tf2onnx, which has no maintainer: it is pinned, and used nowhere else.

    It takes 35 times the memory of a graph's constants. So it is given a graph whose variables are inputs, and their
    values become the initial values of these inputs afterwards.
    """
    convert, onnx = package("tf2onnx").convert, package("onnx")
    function, values = _variables_as_inputs(graph.portable_function(model, options.input_size))
    converted, _ = convert.from_function(function, function.input_signature, opset=OPSET)
    (image,) = (each for each in converted.graph.input if each.name not in values)
    del converted.graph.input[:]
    converted.graph.input.append(image)
    # TensorFlow's order of a convolution's weights is not ONNX's.
    for node in [node for node in converted.graph.node if node.op_type == "Transpose" and node.input[0] in values]:
        values[node.output[0]] = values[node.input[0]].transpose(node.attribute[0].ints)
        converted.graph.node.remove(node)
    used = {name for node in converted.graph.node for name in node.input}
    for name in used & set(values):
        converted.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values[name]), name))
    onnx.helper.set_model_props(converted, {"class_names": json.dumps(model.class_names)})
    path.write_bytes(converted.SerializeToString())


def _variables_as_inputs(function: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A function of `function`'s input and of the values of its variables, and these values by the inputs' names."""
    whole = tf.compat.v1.wrap_function(function.python_function, function.input_signature)
    handles = {id(inside): outside for outside, inside in whole.graph.captures}
    variables = {id(variable.handle): variable for variable in whole.graph.variables}
    reads = [op for op in whole.graph.get_operations() if op.type == "ReadVariableOp"]
    values = {f"variable_{n}": variables[id(handles[id(op.inputs[0])])].numpy() for n, op in enumerate(reads)}
    pruned = whole.prune([*whole.inputs[:1], *(op.outputs[0] for op in reads)], whole.structured_outputs)
    inputs = [tf.TensorSpec(value.shape, value.dtype, name) for name, value in values.items()]
    return tf.function(pruned, input_signature=[*function.input_signature, *inputs]), values


def open_onnx(path: Path, model: graph.Model) -> Answer:
    session = package("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda photograph: np.asarray(session.run(["probabilities"], {"image": photograph.pixels[np.newaxis]})[0])


def write_npz(path: Path, model: graph.Model, options: Options) -> None:
    with open(path, "wb") as file:  # a path would be given the suffix .npz
        arrays: dict[str, Any] = {name: v.numpy() for name, v in model.network.variables_by_name.items()}
        np.savez(file, **arrays)


def open_npz(path: Path, model: graph.Model) -> Answer:
    """Gives the model's own network, on purpose, what is read back the way `--pretrained` reads it."""
    arrays = load_pretrained(str(path), model.network.network)
    restore(model.network.variables_by_name, arrays, source=path.name)
    return lambda photograph: model.probabilities(preprocess(photograph.pixels, model.preprocessing)[None]).numpy()


FORMATS = {
    "saved_model": Format(write_saved_model, open_saved_model, 1e-5),
    "tflite": Format(write_tflite, open_tflite, 1e-4, ("quantize", "input_size"), ("ai_edge_litert.interpreter",)),
    "onnx": Format(write_onnx, open_onnx, 1e-4, ("input_size",), ("tf2onnx", "onnx", "onnxruntime")),
    "npz": Format(write_npz, open_npz, 1e-5),
}
