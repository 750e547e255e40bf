"""Length scales: how the logits grow with the number n of keys that a query sees."""

import math
import numbers

import keras
from keras import ops

from keras_ssattn._checks import check_floating, check_integer, check_number
from keras_ssattn._tensors import cast, dtype_of, to_tensor, widen
from keras_ssattn._typing import ArrayLike, Number, Tensor

LARGEST_EXPONENT = 88.0  # e^88 is finite in float32


def log_length_scale(n: ArrayLike, s: ArrayLike = 1.0, b: ArrayLike = 0.0) -> Number | Tensor:
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
    return linear_in_log(n, _parameter("s", s), _parameter("b", b))


def linear_in_log(n: ArrayLike, s: Number | Tensor, b: Number | Tensor = 0.0) -> Number | Tensor:
    """`log_length_scale` of s and b that have been checked; layers call it."""
    n = _check_count(n)
    tensors = [x for x in (s, b, n) if not isinstance(x, numbers.Real)]
    dtype = "float64" if "float64" in map(dtype_of, tensors) else "float32"
    s, b, n = (x if isinstance(x, numbers.Real) else cast(x, dtype) for x in (s, b, n))
    log_n = math.log(n) if isinstance(n, numbers.Real) else ops.log(ops.where(n > 1, n, 1.0))
    # No `ops.add`: on TensorFlow it adds a [H, 1] along the last axis where that has H entries.
    if any(map(keras.utils.is_keras_tensor, tensors)):
        s, log_n, minus_b = (ops.convert_to_tensor(x, dtype) for x in (s, log_n, -b))
        # Keras takes a symbolic product for a sparse tensor, and not a symbolic difference
        return ops.subtract(ops.multiply(s, log_n), minus_b)
    return s * log_n if isinstance(b, float) and b == 0 else s * log_n + b


def position_temperature(
    n: ArrayLike, beta: float = 0.1, original_length: int = 8192, first_position: int = 0
) -> Number | Tensor:
    r"""The temperature of Llama 4 and Ministral 3, :math:`1 + \beta \log(1 + \lfloor p/L \rfloor)`.

    p is the position of the query, and L is `original_length`. The position is taken to be that
    of the last of n visible keys, `n - 1`, as it is in a causal model without window or padding;
    elsewhere it is rather a measure of n.

    Args:
        n: the number of keys that each query sees: a positive integer or an integer tensor, in
            which 0 counts as 1.
        beta: the slope, a finite number.
        original_length: L, a positive integer: the steps between one value and the next.
        first_position: the number of the first position: 0 as in Ministral 3, whose scale leaves
            1 at `n = L + 1`, or 1 as in Llama 4, where it does so at `n = L`.

    Returns:
        A float32 tensor of the shape of `n`, or a Python float if `n` is a number.

    Raises:
        TypeError: for a boolean tensor `n`.
        ValueError: for any other argument that does not fit.

    Example:

    >>> from keras_ssattn import ops
    >>> [round(ops.position_temperature(n, 0.1, 16384), 4) for n in (16384, 16385)]
    [1.0, 1.0693]

    References: the published implementations of Llama 4 (`attn_scale`, `floor_scale`: on layers
    without rotary embedding) and Ministral 3 (`llama_4_scaling_beta`: on every layer).
    """
    beta = check_number("beta", beta)
    original_length = check_integer("original_length", original_length)
    if isinstance(first_position, bool) or first_position not in (0, 1):
        raise ValueError(
            f"`first_position` must be 0 or 1. Received: first_position={first_position!r}"
        )
    n = _check_count(n)
    if isinstance(n, numbers.Real):
        period = math.floor((float(n) - 1 + first_position) / original_length)
        return 1.0 + beta * math.log(1 + period)
    position = ops.maximum(ops.cast(n, "int32"), 1) - 1 + first_position
    period = ops.floor_divide(position, original_length)
    return 1.0 + beta * ops.log1p(ops.cast(period, "float32"))


def qwen_log_scale(n: ArrayLike, train_length: int) -> Number | Tensor:
    r"""Qwen's scale: :math:`\log_L n` where n is above L, else 1.

    L is `train_length`. Qwen takes for n the position of the query, counted from 1; here it is
    the number of keys that the query sees, the same in a causal model without window or padding.

    Args:
        n: the number of keys that each query sees: a positive integer or an integer tensor.
        train_length: L, an integer of 2 or more.

    Returns:
        A float32 tensor of the shape of `n`, or a Python float if `n` is a number.

    Raises:
        TypeError: for a boolean tensor `n`.
        ValueError: for a `train_length` or a number `n` that does not fit.

    Example:

    >>> from keras_ssattn import ops
    >>> [round(ops.qwen_log_scale(n, 2048), 4) for n in (1, 2048, 8192)]
    [1.0, 1.0, 1.1818]

    Reference: the published implementation of Qwen (`use_logn_attn`).
    """
    train_length = check_integer("train_length", train_length, least=2)
    n = _check_count(n)
    log_length = math.log(train_length)
    if isinstance(n, numbers.Real):
        return max(math.log(n) / log_length, 1.0)
    n = ops.maximum(ops.cast(n, "float32"), 1.0)
    return ops.where(n > train_length, ops.log(n) / log_length, 1.0)


def adaptive_log_scale(
    n: ArrayLike, beta: ArrayLike, gamma: ArrayLike, delta: ArrayLike = 1.0
) -> Number | Tensor:
    r"""ASEntmax's scale, :math:`\delta + \beta\,(\log(n + 1))^\gamma`.

    Args:
        n: the number of keys that each query sees: a positive integer or an integer tensor, in
            which 0 counts as 1.
        beta: a number or a tensor broadcastable against `n`; positive in the paper.
        gamma: the power, likewise. Above 0 the scale grows with n, below 0 it falls.
        delta: the scale's part that does not depend on n, likewise. Defaults to 1.

    Returns:
        A float32 (or float64) tensor of the broadcast shape, or a Python float if every argument
        is a number.

    Raises:
        TypeError: for a boolean tensor `n`.
        ValueError: if `n` is a number below 1, or another argument is a number that is not
            finite.

    Example:

    >>> from keras_ssattn import ops
    >>> [round(ops.adaptive_log_scale(n, beta=0.5, gamma=1.0), 4) for n in (1, 1000)]
    [1.3466, 4.4544]

    Reference: arXiv 2506.16640 has log n. Its implementation starts at log 2, as this does,
    since log 1 = 0 has no negative power.
    """
    given = {"beta": beta, "gamma": gamma, "delta": delta}
    parameters = [_parameter(k, x) for k, x in given.items()]
    n = _check_count(n)
    tensors = [x for x in (n, *parameters) if not isinstance(x, numbers.Real)]
    if not tensors:
        b, g, d = parameters
        exponent = g * math.log(math.log(n + 1))
        if exponent > LARGEST_EXPONENT:
            raise ValueError(
                "`gamma` must leave (log(n + 1))^gamma finite in float32. Received: "
                f"gamma={gamma!r} with n={n!r}"
            )
        return d + b * math.exp(exponent)
    dtype = "float64" if "float64" in map(dtype_of, tensors) else "float32"
    b, g, d = (ops.cast(x, dtype) for x in parameters)
    log_n = ops.log1p(ops.maximum(ops.cast(n, dtype), 1.0))
    return d + b * ops.exp(g * ops.log(log_n))


def _check_count(n: ArrayLike) -> Tensor:
    """Returns a number of keys, 1 or more, as it is, anything else as a tensor, or raises."""
    if isinstance(n, numbers.Real):
        check_number("n", n, "a number of keys, 1 or more", lambda x: 1 <= x < math.inf)
        return n
    if n is None or isinstance(n, str):
        raise TypeError(f"`n` must be a number or a tensor. Received: n={n!r}")
    n = to_tensor(n)
    if dtype_of(n) == "bool":
        raise TypeError("`n` must be a number of keys, not a mask. Received: n with dtype bool")
    return n


def _parameter(name: str, value: ArrayLike) -> Number | Tensor:
    """A finite number as a float, anything else as a tensor of float32 or wider."""
    if isinstance(value, numbers.Real):
        return check_number(name, value)
    if value is None or isinstance(value, str):
        raise TypeError(f"`{name}` must be a number or a tensor. Received: {name}={value!r}")
    value = to_tensor(value)
    check_floating(name, value)
    return widen(value)
