"""Length scales that stay 1 up to the length trained on, and grow from there."""

import math
import numbers
from typing import Any

from keras import ops

from keras_ssattn.ops._arguments import check_count


def position_temperature(
    n: Any, beta: float = 0.1, original_length: int = 8192, first_position: int = 0
) -> Any:
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
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real) or not math.isfinite(beta):
        raise ValueError(f"`beta` must be a finite number. Received: beta={beta!r}")
    original_length = _check_length("original_length", original_length, 1)
    if isinstance(first_position, bool) or first_position not in (0, 1):
        raise ValueError(
            f"`first_position` must be 0 or 1. Received: first_position={first_position!r}"
        )
    n = check_count(n)
    if isinstance(n, numbers.Real):
        period = math.floor((n - 1 + first_position) / original_length)
        return 1.0 + float(beta) * math.log(1 + period)
    position = ops.maximum(ops.cast(n, "int32"), 1) - 1 + first_position
    period = ops.floor_divide(position, original_length)
    return 1.0 + float(beta) * ops.log1p(ops.cast(period, "float32"))


def qwen_log_scale(n: Any, train_length: int) -> Any:
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
    train_length = _check_length("train_length", train_length, 2)
    n = check_count(n)
    log_length = math.log(train_length)
    if isinstance(n, numbers.Real):
        return max(math.log(n) / log_length, 1.0)
    n = ops.maximum(ops.cast(n, "float32"), 1.0)
    return ops.where(n > train_length, ops.log(n) / log_length, 1.0)


def _check_length(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of {least} or more. Received: {name}={value!r}"
        )
    return int(value)
