"""What tests need of a backend and Keras does not offer: gradients of a plain function."""

import keras
import numpy as np


def to_numpy(x):
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float32") if _is_bfloat16(x) else x)


def _is_bfloat16(x):
    return keras.utils.standardize_dtype(x.dtype) == "bfloat16"


def gradients(function, arrays, cotangent):
    """Gradients of sum(function(*arrays) * cotangent) with respect to each array, as NumPy."""
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

        found = jax.grad(total, argnums=tuple(range(len(tensors))))(*tensors)
    else:
        import torch

        tensors = [t.detach().clone().requires_grad_(True) for t in tensors]
        found = torch.autograd.grad(total(*tensors), tensors, allow_unused=True)
        found = [
            torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)
        ]
    return [np.asarray(to_numpy(g), "float64") for g in found]


def relative_error(actual, expected):
    """Largest error relative to the largest expected magnitude."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    if not expected.size:
        return 0.0
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
