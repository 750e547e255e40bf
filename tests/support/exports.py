"""Models written to files of other runtimes, read by these, and run there."""

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_ssattn

SHORT, LONG = (2, 5), (3, 731)  # batch and length, below and above what tiles begin at
FORMATS = {
    "tensorflow": ("tf_saved_model", "onnx", "openvino", "litert"),
    "jax": ("tf_saved_model", "onnx"),  # OpenVINO reads not even Keras's own attention
    "torch": ("torch", "onnx", "openvino"),
}[keras.backend.backend()]
SUFFIXES = {
    "tf_saved_model": "", "onnx": ".onnx", "openvino": ".xml", "litert": ".tflite", "torch": ".pt2",
}  # fmt: skip

Runner = Callable[..., list[np.ndarray]]

WARNINGS = [  # of exporters, which their users see as well
    "ignore:The `native_serialization` parameter is deprecated:DeprecationWarning",
    "ignore:In the future `np.object` will be defined as:FutureWarning",
    "ignore:.torch.jit.trace. is deprecated:DeprecationWarning",
    "ignore:.torch.jit.trace_method. is deprecated:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
    # of PyTorch's traces: sizes that are Python's, of heads and features, are the same in all
    "ignore:Converting a tensor to a Python:Warning",
    "ignore:torch.as_tensor results are registered as constants:Warning",
    "ignore:Iterating over a tensor might cause:Warning",
    "ignore:Constant folding - Only steps=1:UserWarning",
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
]
MARKS = [pytest.mark.filterwarnings(x) for x in WARNINGS]


def need(name: str, used_for: str):
    return pytest.importorskip(name, reason=f"{used_for} needs the package {name}")


def export(model: keras.Model, folder: Path, form: str, names: list[str], **options) -> Runner:
    """Exports a model, and returns what runs it in the runtime of that format.

    `names` are those of its inputs, in order.
    """
    check_installed(form)
    path = str(folder / f"model{SUFFIXES[form]}")
    model.export(path, format=form, verbose=False, **options)
    return READERS[form](path, names)


def check_installed(form: str) -> None:
    """Skips the test if a package is missing."""
    backend = keras.backend.backend()
    if form == "tf_saved_model":
        need("tensorflow", "SavedModel")
    if form == "onnx":
        need("onnxruntime", "ONNX")
        need({"tensorflow": "tf2onnx", "jax": "jax2onnx", "torch": "onnxscript"}[backend], "ONNX")
    if form == "openvino":
        need("openvino", "OpenVINO")
    if form == "litert":
        need("ai_edge_litert", "LiteRT")


def read_saved_model(path: str, names: list[str]) -> Runner:
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    return lambda *xs: [np.array(y) for y in tf.nest.flatten(loaded.serve(*map(tf.constant, xs)))]


def read_onnx(path: str, names: list[str]) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    inputs = [x.name for x in session.get_inputs()]
    if set(names) == set(inputs):  # else they are in order
        inputs = names
    return lambda *xs: session.run(None, dict(zip(inputs, xs, strict=True)))


def read_openvino(path: str, names: list[str]) -> Runner:
    import openvino

    # without a hint it takes bfloat16 where the processor has it
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", precise)
    return lambda *xs: list(compiled(list(xs)).values())


def read_litert(path: str, names: list[str]) -> Runner:
    from ai_edge_litert.interpreter import Interpreter  # which has no operations of TensorFlow

    run = Interpreter(path).get_signature_runner()

    def call(*xs: np.ndarray) -> list[np.ndarray]:
        inputs = names if len(xs) > 1 else list(run.get_input_details())
        results = run(**dict(zip(inputs, xs, strict=True)))
        return [results[name] for name in sorted(results, key=lambda x: int(x.split("_")[-1]))]

    return call


def read_torch(path: str, names: list[str]) -> Runner:
    import torch

    module = torch.export.load(path).module()
    return lambda *xs: [y.detach().numpy() for y in flat(module(*map(torch.from_numpy, xs)))]


READERS = {
    "tf_saved_model": read_saved_model,
    "onnx": read_onnx,
    "openvino": read_openvino,
    "litert": read_litert,
    "torch": read_torch,
}


def flat(x) -> list:
    return [z for y in x for z in flat(y)] if isinstance(x, (list, tuple)) else [x]


def dynamic(form: str, shapes: list[tuple[str | None, ...]]) -> dict:
    """Options of `export` for unknown sizes, named, of each input: PyTorch wants to be told."""
    if form != "torch":
        return {}
    import torch

    names = sorted({name for shape in shapes for name in shape if name})
    dims = {name: torch.export.Dim(name, min=2 if name == "time" else 1) for name in names}
    specs = tuple({i: dims[x] for i, x in enumerate(shape) if x} for shape in shapes)
    return {"dynamic_shapes": [specs]}


def outputs(results: list[np.ndarray], expected: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a model: OpenVINO adds some inner values of models of TensorFlow's."""
    if len(results) > len(expected) == 1:
        return [next(x for x in results if x.shape == expected[0].shape)]
    return results[: len(expected)]


def assert_same(model: keras.Model, run: Runner, *inputs: np.ndarray) -> None:
    expected = [keras.ops.convert_to_numpy(x) for x in flat(model(*inputs))]
    results = outputs(run(*inputs), expected)
    for found, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def exporting(form: str):
    """As a user's own models need it: not for SavedModel, not on PyTorch."""
    import contextlib

    if form == "tf_saved_model" or keras.backend.backend() == "torch":
        return contextlib.nullcontext()
    return keras_ssattn.ops.exporting()
