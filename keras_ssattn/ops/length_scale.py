"""Length scales: how the logits grow with the number of keys that a query sees."""

import math
import numbers
from typing import Any

import keras
from keras import ops

from keras_ssattn.ops._arguments import (
    cast,
    check_count,
    check_floating,
    dtype_of,
    to_tensor,
    widen,
)


def log_length_scale(n: Any, s: Any = 1.0, b: Any = 0.0) -> Any:
    r"""SSMax's length scale, :math:`a = s \log n + b`.

    Multiply the logits, or more cheaply the query, by it. Natural logarithm; computed in
    float32 (float64 if an argument is), whatever the compute dtype of the model.

    Args:
        n: the number of keys that each query sees: a positive integer or an integer tensor.
            Where a tensor holds 0 (a query that sees no key) `log n` is taken as 0.
        s: the scale, a number or a tensor broadcastable against `n`. Defaults to 1.
        b: the bias, likewise. Defaults to 0. `s=0, b=1` gives ordinary softmax.

    Returns:
        A float32 (or float64) tensor of the broadcast shape, or a Python float if every argument
        is a number.

    Raises:
        ValueError: if `n` is a number below 1, or `s` or `b` is a number that is not finite.

    Example:

    >>> round(log_length_scale(1000, s=0.43), 4)
    2.9703

    Reference: Nakanishi, "Scalable-Softmax Is Superior for Attention", arXiv 2501.19399,
    equation of SSMax (`s log n`) and its variant with a bias (`s log n + b`).
    """
    s = _parameter("s", s)
    b = _parameter("b", b)
    n = check_count(n)
    tensors = [x for x in (s, b, n) if not isinstance(x, numbers.Real)]
    dtype = "float64" if "float64" in map(dtype_of, tensors) else "float32"
    s, b, n = (x if isinstance(x, numbers.Real) else cast(x, dtype) for x in (s, b, n))
    log_n = math.log(n) if isinstance(n, numbers.Real) else ops.log(ops.where(n > 1, n, 1.0))
    # No `ops.add`: on TensorFlow it adds a [H, 1] along the last axis where that has H entries.
    if any(map(keras.utils.is_keras_tensor, tensors)):
        s, log_n, minus_b = (ops.convert_to_tensor(x, dtype) for x in (s, log_n, -b))
        return ops.subtract(ops.multiply(s, log_n), minus_b)  # a product counts as sparse
    return s * log_n if isinstance(b, float) and b == 0 else s * log_n + b


def _parameter(name: str, value: Any) -> Any:
    """A finite number as a float, anything else as a tensor of float32 or wider."""
    if isinstance(value, numbers.Real):
        if isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number. Received: {name}={value!r}")
        return float(value)
    value = to_tensor(value)
    check_floating(name, value)
    return widen(value)
