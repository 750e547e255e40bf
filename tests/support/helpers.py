"""What several tests do: gradients of a plain function, a step of training, saving and loading."""

import functools
import os
import subprocess
import sys

import keras
import numpy as np

from support import TESTS
from support.cases import randomize

FORMATS = [".keras", ".weights.h5"]


def to_numpy(x):
    if isinstance(x, float):
        return np.asarray(x)
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float32") if _is_bfloat16(x) else x)


def _is_bfloat16(x):
    return keras.utils.standardize_dtype(x.dtype) == "bfloat16"


def gradients(function, arrays, cotangent, eager=False):
    """Gradients of sum(function(*arrays) * cotangent) with respect to each array, as NumPy.

    On JAX they are one program, which compiles faster than its operations, unless `eager`.
    """
    tensors = [keras.ops.convert_to_tensor(a) for a in arrays]
    cotangent = keras.ops.convert_to_tensor(cotangent, "float32")

    def total(*xs):
        return keras.ops.sum(keras.ops.cast(function(*xs), "float32") * cotangent)

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = total(*tensors)
        zero = tf.UnconnectedGradients.ZERO
        found = tape.gradient(y, tensors, unconnected_gradients=zero)
    elif backend == "jax":
        import jax

        gradient = jax.grad(total, argnums=tuple(range(len(tensors))))
        found = (gradient if eager else jax.jit(gradient))(*tensors)
    else:
        import torch

        tensors = [t.detach().clone().requires_grad_(True) for t in tensors]
        found = torch.autograd.grad(total(*tensors), tensors, allow_unused=True)
        found = [
            torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)
        ]
    return [np.asarray(to_numpy(g), "float64") for g in found]


def compiled(function):
    """One program on JAX, where an eager call compiles each operation by itself."""
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)


def in_one_program(function):
    """As XLA compiles it, which joins and reorders operations; PyTorch has none of this."""
    if keras.backend.backend() != "tensorflow":
        return compiled(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


def relative_error(actual, expected):
    """Largest error relative to the largest expected magnitude."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    if not expected.size:
        return 0.0
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)


def predict(model, *inputs, eager=False):
    """The output in inference mode as float32, by a call, which JAX compiles unless `eager`."""
    function = functools.partial(model, training=False)
    found = (function if eager else compiled(function))(*inputs)
    return to_numpy(keras.ops.cast(found, "float32"))


def train(model, x, y, learning_rate=0.5, **options):
    model.compile(keras.optimizers.SGD(learning_rate), "mse")
    options = {"batch_size": len(x), "epochs": 1, "shuffle": False, "verbose": 0, **options}
    return model.fit(x, y, **options).history["loss"]


def values(weights):
    return {weight.path: to_numpy(weight) for weight in weights}


def changed(before, after):
    return {path for path in before if np.abs(before[path] - after[path]).max() > 1e-6}


def reload(model, path, make):
    """Saves a model and loads it, into a new `make()` where the file has weights only."""
    if path.name.endswith(".keras"):
        model.save(path)
        return keras.saving.load_model(path)
    model.save_weights(path)
    fresh = make()
    fresh.load_weights(path)
    return fresh


def assert_survives(make, path, x, change=randomize):
    model = change(make())
    loaded = reload(model, path, make)
    assert type(loaded) is type(model)
    assert [w.shape for w in loaded.weights] == [w.shape for w in model.weights]
    np.testing.assert_allclose(predict(loaded, x), predict(model, x), rtol=1e-6, atol=1e-6)


def twins(theirs, ours, *shapes):
    """Builds two layers for inputs of these shapes, with the same weights, off their initial ones.

    They may differ in their normalizers, of which each keeps its own.
    """
    for layer in (theirs, ours):
        layer.build(*shapes)
    randomize(theirs)
    parts = ("query_dense", "key_dense", "_gate_dense", "value_dense", "output_dense")
    for name in parts:
        if hasattr(theirs, name):
            getattr(ours, name).set_weights(getattr(theirs, name).get_weights())
    return theirs, ours


def launch(*arguments, **environment):
    """Runs Python with these arguments to its end, or fails with what it wrote."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
