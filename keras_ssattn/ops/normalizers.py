r"""Normalizers: functions that turn logits into attention weights.

Each one is :math:`w_j = f(x_j) / (c + \sum_k g(x_k))` along `axis`, with f, g and c of
`kernels.py`. Common to all of them:

- `mask` is boolean, True = attend, broadcastable to the logits. A masked entry is absent from
  the numerator, the sum, the maximum and the count n; its weight is exactly 0.
- A row in which nothing is attended to has weights 0 and gradients 0.
- The arithmetic is float32 or wider, and the weights are cast back to the dtype of the logits.
- Logits must be finite. All finite logits of the dtype give finite weights and gradients.
"""

import numbers

import numpy as np
from keras import ops

from keras_ssattn._checks import check_broadcastable, check_floating, check_mask, normalize_axis
from keras_ssattn._tensors import dtype_of, to_tensor, widen
from keras_ssattn._typing import ArrayLike, Axis, Number, Tensor
from keras_ssattn.ops import kernels
from keras_ssattn.ops.kernels import Kernel
from keras_ssattn.ops.length_scales import log_length_scale

_LOWEST = -3.4e38  # about the lowest float32


def softmax(logits: ArrayLike, axis: Axis = -1, mask: ArrayLike | None = None) -> Tensor:
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
    return apply(kernels.Softmax(), logits, axis, mask)


def ssmax(
    logits: ArrayLike,
    s: ArrayLike = 1.0,
    n: ArrayLike | None = None,
    b: ArrayLike = 0.0,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
) -> Tensor:
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

    Returns:
        Weights of the shape and dtype of `logits`, in [0, 1], that sum to 1.

    Raises:
        TypeError: for logits that are not floating-point, or a mask that is.
        ValueError: for an axis out of range, a mask, `s`, `n` or `b` that does not broadcast,
            `n < 1`, or `s` or `b` not finite.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn import ops
    >>> logits = np.full(1000, -2.0, "float32")
    >>> logits[0] = 3.0
    >>> float(ops.softmax(logits)[0])  # 0.129
    >>> float(ops.ssmax(logits, s=0.43)[0])  # 0.9996

    Reference: Nakanishi, "Scalable-Softmax Is Superior for Attention", arXiv 2501.19399.
    """
    x, axes, mask, dtype = _prepare(logits, axis, mask)
    if n is None:
        n = kernels.entry_count(x, axes, mask)
        n = max(n, 1) if isinstance(n, int) else n
    n = _per_row("n", n, x, axes)
    if dtype_of(x) == "float64" and hasattr(n, "dtype") and dtype_of(n) != "bool":
        n = ops.cast(n, "float64")  # for all digits of its log
    s, b = _per_row("s", s, x, axes), _per_row("b", b, x, axes)
    scale = _like(x, log_length_scale(n, s, b))
    # a x - max(a x) = |a| (z - max z) with z = sign(a) x: taking the maximum first keeps the
    # largest finite logits finite. (sign is not ops.sign, whose 0 would end the gradient at a=0.)
    sign = _like(x, ops.where(scale < 0, -1.0, 1.0))
    x = below_maximum(x * sign, axes, mask)
    x = ops.where(x < _LOWEST, _like(x, _LOWEST), x) * (scale * sign)
    return ops.cast(kernels.normalize(kernels.Softmax(), x, axes, mask), dtype)


def softpick(x: ArrayLike, axis: Axis = -1, mask: ArrayLike | None = None) -> Tensor:
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
    return apply(kernels.Softpick(), x, axis, mask)


def rectified_softpick(
    x: ArrayLike, axis: Axis = -1, mask: ArrayLike | None = None, epsilon: float = 1e-6
) -> Tensor:
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
    return apply(kernels.RectifiedSoftpick(epsilon), x, axis, mask)


def sink_softmax(
    logits: ArrayLike, sink: ArrayLike = 0.0, axis: Axis = -1, mask: ArrayLike | None = None
) -> Tensor:
    r"""Softmax with a sink, :math:`e^{x_j} / (e^s + \sum_k e^{x_k})`.

    The sink is one entry more, of logit s, whose weight goes nowhere: a row can attend to little.
    With `sink=0` this is "softmax off by one".

    Args:
        logits: floating-point tensor of any shape.
        sink: s, a number or a tensor broadcastable to `logits` with size 1 along `axis`: for
            logits `[B, H, T, S]` and one value per head, shape `[H, 1, 1]`.
        axis: the axis, or tuple of axes, to normalize over. Defaults to the last one.
        mask: boolean tensor broadcastable to `logits`, True = attend.

    Returns:
        Weights of the shape and dtype of `logits`, in [0, 1), that sum to less than 1.

    Raises:
        TypeError: for logits that are not floating-point, or a mask that is.
        ValueError: for an axis out of range, or a mask or sink that does not broadcast.

    Example:

    >>> from keras_ssattn import ops
    >>> ops.sink_softmax([0.0, 0.0, 0.0])  # [0.25, 0.25, 0.25]

    Reference: the published implementation of gpt-oss, with a learned s per head.
    """
    x, axes, mask, dtype = _prepare(logits, axis, mask)
    sink = _like(x, _per_row("sink", float(sink) if _is_number(sink) else sink, x, axes))
    return ops.cast(kernels.normalize(kernels.SinkSoftmax(sink), x, axes, mask), dtype)


def apply(kernel: Kernel, x: ArrayLike, axis: Axis, mask: ArrayLike | None) -> Tensor:
    """The weights of any kernel; the functions above are this one with their own."""
    x, axes, mask, dtype = _prepare(x, axis, mask)
    return ops.cast(kernels.normalize(kernel, kernels.scaled(kernel, x), axes, mask), dtype)


def _prepare(
    x: ArrayLike, axis: Axis, mask: ArrayLike | None
) -> tuple[Tensor, tuple[int, ...], Tensor | None, str]:
    x = to_tensor(x)
    dtype = check_floating("logits", x)
    axes = normalize_axis(axis, len(x.shape))
    mask = check_mask("mask", mask)
    if mask is not None:
        check_broadcastable("mask", tuple(mask.shape), tuple(x.shape), "the shape of `logits`")
    return widen(x), axes, mask, dtype


def _is_number(value: ArrayLike) -> bool:
    return isinstance(value, numbers.Real)


def _per_row(name: str, value: ArrayLike, x: Tensor, axis: tuple[int, ...]) -> Number | Tensor:
    """Checks that `value` is a number or has one value per row of `x` along `axis`."""
    if _is_number(value):
        return value
    value = to_tensor(value)
    row = tuple(1 if i - len(x.shape) in axis else size for i, size in enumerate(x.shape))
    check_broadcastable(
        name, tuple(value.shape), row, f"the shape of `logits` with size 1 along axis={axis}"
    )
    return value


def _like(x: Tensor, value: Number | Tensor) -> Tensor:
    """`value`, a float or a tensor, as a tensor of the dtype of `x`."""
    dtype = dtype_of(x)
    if isinstance(value, float):  # by NumPy, for all its digits
        return ops.convert_to_tensor(np.asarray(value, dtype))
    return ops.cast(value, dtype)


def below_maximum(x: Tensor, axis: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """`x` less its largest attended entry: 0 at the maximum, negative elsewhere."""
    kernel = kernels.Softmax()
    if mask is None:
        return x - kernels.maximum(kernel, x, axis)
    largest = kernels.maximum(kernel, ops.where(mask, x, kernel.absent), axis)
    return ops.where(mask, x, largest) - largest
