"""Derivatives that can be differentiated again, on every backend."""

import keras
import numpy as np

from support.helpers import compiled, to_numpy


def derivative(function, x):
    """The gradient of a number, itself differentiable."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(jax.grad(function))(x)
    if backend == "tensorflow":
        import tensorflow as tf

        x = tf.convert_to_tensor(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x)
    import torch

    x = x if isinstance(x, torch.Tensor) else torch.tensor(x, requires_grad=True)
    return torch.autograd.grad(function(x), [x], create_graph=True)[0]


def penalty(function):
    """The square of the gradient of a function's squared norm, as in gradient penalties."""

    def squared_norm(x):
        return keras.ops.sum(function(x) ** 2)

    return lambda x: keras.ops.sum(derivative(squared_norm, x) ** 2)


def slope(function, x, direction, step=8e-3):
    """The derivative of a number in a direction, by central differences of the fourth order."""

    def difference(step):
        ahead, behind = (to_numpy(function(x + sign * step * direction)) for sign in (1, -1))
        return float(ahead - behind) / (2 * step)

    return (4 * difference(step) - difference(2 * step)) / 3


def assert_twice_differentiable(function, x, rng, tolerance=2e-2):
    """The derivative of `penalty(function)` is that of finite differences."""
    value = compiled(penalty(function))
    found = to_numpy(derivative(value, x))
    direction = rng.normal(size=x.shape).astype("float32")
    direction /= np.linalg.norm(direction)
    expected = slope(value, x, direction)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose((found * direction).sum(), expected, rtol=tolerance)
