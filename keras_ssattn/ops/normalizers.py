r"""Normalizers: functions that turn logits into attention weights.

Each one is :math:`w_j = f(x_j) / (c + \sum_k g(x_k))` along `axis`:

| function             | f(x)             | g(x)         | c   |
|----------------------|------------------|--------------|-----|
| `softmax`, `ssmax`   | exp(x)           | exp(x)       | 0   |
| `softpick`           | x                | abs(x)       | 1   |
| `rectified_softpick` | max(exp(x)-1, 0) | abs(exp(x)-1)| eps |

Common to all of them:

- `mask` is boolean, True = attend, broadcastable to the logits. A masked entry is absent from
  the numerator, the sum, the maximum and the count n; its weight is exactly 0.
- A row in which nothing is attended to has weights 0 and gradients 0.
- The arithmetic is float32 or wider, and the weights are cast back to the dtype of the logits.
- Logits must be finite. All finite logits of the dtype give finite weights and gradients.
"""

import functools
import numbers
import operator
from typing import Any

import numpy as np
from keras import ops

from keras_ssattn.ops._arguments import (
    check_broadcastable,
    check_floating,
    check_mask,
    dtype_of,
    normalize_axis,
    to_tensor,
    widen,
)
from keras_ssattn.ops.length_scale import log_length_scale

_LOWEST = -3.4e38  # about the lowest float32


def softmax(logits: Any, axis: Any = -1, mask: Any = None) -> Any:
    r"""Softmax, :math:`e^{x_j} / \sum_k e^{x_k}`, with a mask that removes entries.

    Unlike `keras.ops.softmax` it gives zeros, not a uniform row, where nothing is attended to.

    Args:
        logits: floating-point tensor of any shape.
        axis: the axis, or tuple of axes, to normalize over. Defaults to the last one.
        mask: boolean tensor broadcastable to `logits`, True = attend.

    Returns:
        Weights of the shape and dtype of `logits`, in [0, 1], that sum to 1.

    Raises:
        TypeError: for logits that are not floating-point, or a mask that is.
        ValueError: for an axis out of range, or a mask that does not broadcast.

    Example:

    >>> from keras_ssattn import ops
    >>> ops.softmax([0.0, 0.0, 0.0], mask=[True, True, False])  # [0.5, 0.5, 0.]
    """
    x, axis, mask, dtype = _prepare(logits, axis, mask)
    return ops.cast(_exponential_weights(_below_max(x, axis, mask), axis, mask), dtype)


def ssmax(
    logits: Any,
    s: Any = 1.0,
    n: Any = None,
    b: Any = 0.0,
    axis: Any = -1,
    mask: Any = None,
    formula: str = "scale",
) -> Any:
    r"""Scalable softmax, :math:`\mathrm{softmax}((s \log n + b)\, x)`.

    With `b = 0` this is :math:`n^{s x_j} / \sum_k n^{s x_k}`: the base of the exponential grows
    with the number of entries n, so that the largest weight does not fade as n grows. `s = 0`
    gives uniform weights; `s = 0, b = 1` gives softmax.

    Args:
        logits: floating-point tensor of any shape.
        s: the scale, a number or a tensor broadcastable to `logits` with size 1 along `axis`:
            for logits `[B, H, T, S]` and one value per head, shape `[H, 1, 1]`.
        n: the number of entries, an integer or an integer tensor shaped like `s` may be (one n
            per row of causal attention: `[T, 1]`). Defaults to the number of entries along
            `axis` that `mask` leaves. A 0 in a tensor stands for a row that attends to nothing.
        b: the bias, shaped like `s`.
        axis: the axis, or tuple of axes, to normalize over. Defaults to the last one.
        mask: boolean tensor broadcastable to `logits`, True = attend.
        formula: `"scale"` as above. `"shift"` computes `softmax(x - s log n)`, as the Elixir
            library Edifice documents it. Softmax ignores a shift, so this equals softmax for
            every s and n, and s receives no gradient. It is here for parity only.

    Returns:
        Weights of the shape and dtype of `logits`, in [0, 1], that sum to 1.

    Raises:
        TypeError: for logits that are not floating-point, or a mask that is.
        ValueError: for an axis out of range, a mask, `s`, `n` or `b` that does not broadcast,
            `n < 1`, `s` or `b` not finite, an unknown formula, or `b` with `formula="shift"`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn import ops
    >>> logits = np.full(1000, -2.0, "float32")
    >>> logits[0] = 3.0
    >>> float(ops.softmax(logits)[0])  # 0.129
    >>> float(ops.ssmax(logits, s=0.43)[0])  # 0.9996

    Reference: Nakanishi, "Scalable-Softmax Is Superior for Attention", arXiv 2501.19399.
    """
    if formula not in ("scale", "shift"):
        raise ValueError(f'`formula` must be "scale" or "shift". Received: formula={formula!r}')
    x, axis, mask, dtype = _prepare(logits, axis, mask)
    if n is None:
        n = entry_count(x, axis, mask)
        n = max(n, 1) if isinstance(n, int) else n
    n = _per_row("n", n, x, axis)
    if dtype_of(x) == "float64" and hasattr(n, "dtype") and dtype_of(n) != "bool":
        n = ops.cast(n, "float64")  # for all digits of its log
    s, b = _per_row("s", s, x, axis), _per_row("b", b, x, axis)
    if formula == "shift":
        if not (isinstance(b, numbers.Real) and b == 0):
            raise ValueError(f'`b` must be 0 with `formula="shift"`. Received: b={b!r}')
        x = x - _like(x, log_length_scale(n, s))
        return ops.cast(_exponential_weights(_below_max(x, axis, mask), axis, mask), dtype)
    scale = _like(x, log_length_scale(n, s, b))
    # a x - max(a x) = |a| (z - max z) with z = sign(a) x: taking the maximum first keeps the
    # largest finite logits finite. (sign is not ops.sign, whose 0 would end the gradient at a=0.)
    sign = _like(x, ops.where(scale < 0, -1.0, 1.0))
    x = _below_max(x * sign, axis, mask)
    x = ops.where(x < _LOWEST, _like(x, _LOWEST), x) * (scale * sign)
    return ops.cast(_exponential_weights(x, axis, mask), dtype)


def softpick(x: Any, axis: Any = -1, mask: Any = None) -> Any:
    r"""Signed softpick, :math:`x_j / (1 + \sum_k |x_k|)`.

    Keeps the sign, has no exponential and does not saturate. The magnitudes of a row sum to
    less than 1, so a row of small logits attends to little. (Magnitudes below 1e-31 count as 0.)

    Args:
        x: floating-point tensor of any shape.
        axis: the axis, or tuple of axes, to normalize over. Defaults to the last one.
        mask: boolean tensor broadcastable to `x`, True = attend.

    Returns:
        Weights of the shape and dtype of `x`, in (-1, 1).

    Raises:
        TypeError: for an `x` that is not floating-point, or a mask that is.
        ValueError: for an axis out of range, or a mask that does not broadcast.

    Example:

    >>> from keras_ssattn import ops
    >>> ops.softpick([1.0, -2.0, 0.0])  # [0.25, -0.5, 0.]

    Reference: `Blocks.Softpick` of the Elixir library Edifice, v0.2.0. The paper of the same
    name (arXiv 2504.20966) has a different function: `rectified_softpick`.
    """
    x, axis, mask, dtype = _prepare(x, axis, mask)
    if mask is not None:
        x = ops.where(mask, x, 0.0)
    # Numerator and denominator times 2^-24, which is exact: the sum of up to 2^24 of the
    # largest finite values does not overflow.
    x = x * 2.0**-24
    weights = x / (2.0**-24 + ops.sum(_magnitude(x), axis=axis, keepdims=True))
    return ops.cast(weights, dtype)


def rectified_softpick(x: Any, axis: Any = -1, mask: Any = None, epsilon: float = 1e-6) -> Any:
    r"""Rectified softpick, :math:`\max(e^{x_j}-1, 0) / (\epsilon + \sum_k |e^{x_k}-1|)`.

    Entries at or below 0 get weight exactly 0 and still receive gradient, through the sum.

    Args:
        x: floating-point tensor of any shape.
        axis: the axis, or tuple of axes, to normalize over. Defaults to the last one.
        mask: boolean tensor broadcastable to `x`, True = attend.
        epsilon: positive number added to the sum, in the units of the formula above.

    Returns:
        Weights of the shape and dtype of `x`, in [0, 1), that sum to at most 1.

    Raises:
        TypeError: for an `x` that is not floating-point, or a mask that is.
        ValueError: for an axis out of range, a mask that does not broadcast, or an `epsilon`
            that is not a positive number.

    Example:

    >>> import math
    >>> from keras_ssattn import ops
    >>> ops.rectified_softpick([math.log(3.0), -1e4, 0.0])  # [0.6667, 0., 0.]

    Reference: Zuhri et al., "Softpick: No Attention Sink, No Massive Activations with
    Rectified Softmax", arXiv 2504.20966.
    """
    check_epsilon(epsilon)
    x, axis, mask, dtype = _prepare(x, axis, mask)
    if mask is not None:
        x = ops.where(mask, x, 0.0)
    # Everything is multiplied by e^-m. |e^x - 1| = (1 - e^-|x|) e^max(x, 0) is free of
    # cancellation near 0 and of overflow far from it.
    m = ops.max(ops.stop_gradient(x), axis=axis, keepdims=True, initial=0.0)
    magnitude = -ops.expm1(-_magnitude(x)) * ops.exp(ops.relu(x) - m)
    total = epsilon * ops.exp(-m) + ops.sum(magnitude, axis=axis, keepdims=True)
    return ops.cast(ops.where(x > 0, magnitude, 0.0) / total, dtype)


def check_epsilon(epsilon: Any) -> None:
    """Raises unless `epsilon` is a positive number."""
    if (
        isinstance(epsilon, bool)
        or not isinstance(epsilon, numbers.Real)
        or not 2.0**-126 <= float(epsilon) < float("inf")
    ):
        raise ValueError(
            f"`epsilon` must be a positive number that float32 can hold. Received: "
            f"epsilon={epsilon!r}"
        )


def _prepare(x: Any, axis: Any, mask: Any) -> tuple[Any, tuple[int, ...], Any, str]:
    x = to_tensor(x)
    dtype = check_floating("logits", x)
    axes = normalize_axis(axis, len(x.shape))
    mask = check_mask("mask", mask)
    if mask is not None:
        check_broadcastable("mask", tuple(mask.shape), tuple(x.shape), "the shape of `logits`")
    return widen(x), axes, mask, dtype


def entry_count(x: Any, axis: Any = -1, mask: Any = None) -> Any:
    """The number of entries of `x` along `axis` that `mask` leaves.

    Returns:
        An int32 tensor shaped like `x` with size 1 along `axis`; an integer without a mask
        (a scalar tensor where the size is dynamic).
    """
    axes = normalize_axis(axis, len(x.shape))
    sizes = [ops.shape(x)[one] for one in axes]
    if mask is None and None not in sizes:
        return functools.reduce(operator.mul, sizes)
    ones = ops.ones_like(x, dtype="int32")
    return ops.sum(ones if mask is None else ops.where(mask, ones, 0), axis=axes, keepdims=True)


def _per_row(name: str, value: Any, x: Any, axis: tuple[int, ...]) -> Any:
    """Checks that `value` is a number or has one value per row of `x` along `axis`."""
    if isinstance(value, numbers.Real):
        return value
    value = to_tensor(value)
    row = tuple(1 if i - len(x.shape) in axis else size for i, size in enumerate(x.shape))
    check_broadcastable(
        name, tuple(value.shape), row, f"the shape of `logits` with size 1 along axis={axis}"
    )
    return value


def _like(x: Any, value: Any) -> Any:
    """`value`, a float or a tensor, as a tensor of the dtype of `x`."""
    dtype = dtype_of(x)
    if isinstance(value, float):  # by NumPy, for all its digits
        return ops.convert_to_tensor(np.asarray(value, dtype))
    return ops.cast(value, dtype)


def _magnitude(x: Any) -> Any:
    """|x| with derivative 0 at 0 on every backend; that of `ops.abs` is 1 on some."""
    return x * ops.sign(x)


def _below_max(x: Any, axis: tuple[int, ...], mask: Any) -> Any:
    """`x` less its largest attended entry: 0 at the maximum, negative elsewhere."""
    largest = x if mask is None else ops.where(mask, x, -float("inf"))
    largest = ops.stop_gradient(largest)
    largest = ops.max(largest, axis=axis, keepdims=True, initial=-float("inf"))
    if mask is not None:
        largest = ops.where(largest > -float("inf"), largest, 0.0)
        x = ops.where(mask, x, largest)
    return x - largest


def _exponential_weights(x: Any, axis: tuple[int, ...], mask: Any) -> Any:
    """exp(x) / sum exp(x) over the attended entries, for x with maximum 0."""
    e = ops.exp(x)
    if mask is None:
        return e / ops.sum(e, axis=axis, keepdims=True)
    e = ops.where(mask, e, 0.0)
    total = ops.sum(e, axis=axis, keepdims=True)
    return e / ops.where(total > 0, total, 1.0)
