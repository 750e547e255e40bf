r"""Kernels: the one definition of each normalizer, for whole rows and for tiles of them.

A normalizer turns logits x into weights :math:`w_j = f(x_j) / Z` with
:math:`Z = c + \sum_k g(x_k)`:

===================== ================== =============== =======
kernel                f(x)               g(x)            c
===================== ================== =============== =======
`Softmax`             exp(x)             exp(x)          0
`SinkSoftmax`         exp(x)             exp(x)          exp(s)
`Softpick`            x                  abs(x)          1
`RectifiedSoftpick`   max(exp(x) - 1, 0) abs(exp(x) - 1) epsilon
===================== ================== =============== =======

f, g and c may all be multiplied by :math:`e^{-m}`, which cancels, where m is a maximum over the
entries seen so far. Attention is :math:`o_i = \sum_j f(x_{ij}) v_j / Z_i`. With
:math:`dN_i = dO_i / Z_i` and :math:`\delta_i = dN_i \cdot o_i`, its gradients are

.. math::
    dx_{ij} = f'(x_{ij}) (dN_i \cdot v_j) - g'(x_{ij}) \delta_i, \quad
    dv_j = \sum_i f(x_{ij}) dN_i, \quad dc = -\sum_i \delta_i

Whole rows differentiate `values` and `constant`; tiles use `gradient` and `constant_gradient`.
Where a tile is changed by augmented assignments, or by functions of `in_place`, PyTorch writes over
it, which spares it memory and time.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_ssattn._checks import check_choice, check_number
from keras_ssattn._frameworks import is_recording
from keras_ssattn._keras.exporting import is_exporting
from keras_ssattn._tensors import cast, dtype_of, is_known
from keras_ssattn._typing import DType, Number, Tensor
from keras_ssattn.ops import in_place, stacks


def magnitude(x: Tensor) -> Tensor:
    """`|x|` with derivative 0 at 0 on every backend; that of `ops.abs` is 1 on JAX."""
    if keras.backend.backend() == "jax":
        return x * ops.stop_gradient(ops.sign(x))
    return ops.abs(x)


def expm1(x: Tensor) -> Tensor:
    """e^x - 1, exact near 0, for x that does not overflow."""
    if not is_exporting():
        return ops.expm1(x)
    # ONNX and LiteRT have no such function: e^x - 1 = 2 t / (1 - t) with t = tanh(x / 2)
    t = ops.tanh(x * 0.5)
    near = abs(x) < 0.5
    return ops.where(near, 2.0 * t / (1.0 - ops.where(near, t, 0.0)), ops.exp(x) - 1.0)


class Functions(NamedTuple):
    """What the formulas are made of. Those of `TILES` may write over their first argument."""

    subtract: Callable[[Tensor, Tensor], Tensor]
    exp: Callable[[Tensor], Tensor]
    expm1: Callable[[Tensor], Tensor]
    absolute: Callable[[Tensor], Tensor]


ROWS = Functions(operator.sub, ops.exp, expm1, magnitude)
TILES = Functions(in_place.subtract, in_place.exp, in_place.expm1, in_place.absolute)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """What whole rows and tiles need of a normalizer; the functions are elementwise.

    Attributes:
        absent: a logit for which f, g and the gradient of the values are 0.
        has_constant: whether c keeps Z above 0 in every row, one without entries, too.
        linear: whether f(x) = x, for which tiles have a shorter way.
        prescale: what the logits are multiplied by before any other method sees them.
        headroom: how far a logit may pass m; `None` if the kernel has no use for m.
    """

    absent: ClassVar[float] = 0.0
    has_constant: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    prescale: ClassVar[float] = 1.0
    headroom: ClassVar[float | None] = None

    def start(self, dtype: DType) -> Number | Tensor:
        """What m is at least."""
        return 0.0

    def values(self, x: Tensor, m: Tensor, on: Functions) -> tuple[Tensor, Tensor]:
        """Returns f and g, on `ROWS`, which are differentiated, or on `TILES`."""
        raise NotImplementedError

    def sums(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f of a tile, and the sum of g over each of its rows; x may not be used again."""
        f, g = self.values(x, m, TILES)
        return f, in_place.row_sum(g)

    def gradient(
        self, x: Tensor, m: Tensor, upstream: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns f and dx of a tile; `upstream` is dN . v. Neither it nor x may be used again."""
        raise NotImplementedError

    def constant(self, m: Tensor) -> Number | Tensor:
        """Returns c."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The learned numbers in c, such as a sink, one per row of logits."""
        return ()

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "Kernel":
        return self

    def constant_gradient(self, m: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        """The gradient of each of `tensors`, one per row."""
        return ()


class Softmax(Kernel):
    """f = g = exp(x - m), c = 0, m the maximum."""

    absent = -float("inf")
    headroom = 0.0

    def start(self, dtype: DType) -> Number | Tensor:
        return float(np.finfo(dtype).min)  # finite, so that m - m is 0

    def values(self, x: Tensor, m: Tensor, on: Functions) -> tuple[Tensor, Tensor]:
        e = on.exp(on.subtract(x, m))
        return e, e

    def gradient(
        self, x: Tensor, m: Tensor, upstream: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        e, _ = self.values(x, m, TILES)
        upstream -= delta
        upstream *= e
        return e, upstream

    def constant(self, m: Tensor) -> Number | Tensor:
        return 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class SinkSoftmax(Softmax):
    """Softmax with one entry more, of logit s and without a value: c = exp(s - m), m >= s.

    Attributes:
        sink: s, a tensor that broadcasts to the rows of the logits.
    """

    has_constant: ClassVar[bool] = True
    sink: Tensor

    def start(self, dtype: DType) -> Number | Tensor:
        return cast(self.sink, dtype)

    def constant(self, m: Tensor) -> Number | Tensor:
        return ops.exp(ops.subtract(cast(self.sink, dtype_of(m)), m))  # also of symbols

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.sink,)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "Kernel":
        return SinkSoftmax(*tensors)

    def constant_gradient(self, m: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        return (-delta * self.constant(m),)


class Softpick(Kernel):
    """`f = x, g = |x|, c = 1`, all times 2^-24, so that sums of the largest logits do not overflow.

    f is linear, so over tiles that are seen whole the numerator needs no logits:
    sum_j (q . k_j) v_j = q . sum_j (k_j v_j^T).
    """

    has_constant = True
    linear = True
    prescale = 2.0**-24

    def values(self, x: Tensor, m: Tensor, on: Functions) -> tuple[Tensor, Tensor]:
        return x, on.absolute(x if on is ROWS else x + 0.0)

    def gradient(
        self, x: Tensor, m: Tensor, upstream: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        return x, in_place.subtract_product(upstream, ops.sign(x), delta)

    def constant(self, m: Tensor) -> Number | Tensor:
        return self.prescale


@dataclasses.dataclass(frozen=True, eq=False)
class RectifiedSoftpick(Kernel):
    """`f = max(d, 0), g = |d|, c = epsilon e^-m` with d = (e^x - 1) e^-m and m >= 0.

    m stays 0, and d = expm1(x) exact near 0, as long as no logit passes the headroom.

    Attributes:
        epsilon: positive number.
    """

    has_constant: ClassVar[bool] = True
    headroom: ClassVar[float | None] = 30.0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_number(
            "epsilon",
            self.epsilon,
            "a positive number that float32 can hold",
            lambda x: 2.0**-126 <= x < float("inf"),
        )

    def values(self, x: Tensor, m: Number | Tensor, on: Functions) -> tuple[Tensor, Tensor]:
        """With d as (e^(x - m) - 1) + (1 - e^-m), which does not overflow."""
        if isinstance(m, float):  # 0, of all rows: see `maximum`
            d = on.expm1(x)
        else:
            d = on.expm1(on.subtract(x, m))
            d = on.subtract(d, on.expm1(-m))
        f = ops.relu(d)
        return f, on.absolute(d)

    def gradient(
        self, x: Tensor, m: Tensor, upstream: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """With dx = (relu(s) dN . v - delta) s e^(x - m), s the sign of x."""
        s = ops.sign(x)
        d, e = in_place.expm1_and_exp(in_place.subtract(x, m))
        d -= in_place.expm1(-m)
        e *= s
        upstream *= in_place.relu(s)
        upstream -= delta
        upstream *= e
        return in_place.relu(d), upstream

    def constant(self, m: Number | Tensor) -> Number | Tensor:
        return self.epsilon * (1.0 if isinstance(m, float) else ops.exp(-m))


# What `normalizer=` names, everywhere; "ssmax" is softmax under a length scale of s log n.
KERNELS: dict[str, Callable[..., Kernel]] = {
    "softmax": Softmax,
    "ssmax": Softmax,
    "softpick": Softpick,
    "rectified_softpick": RectifiedSoftpick,
    "sink_softmax": SinkSoftmax,
}


def get(normalizer: str | Kernel, epsilon: float = 1e-6, sink: Tensor = 0.0) -> Kernel:
    """The kernel of that name; a kernel as it is."""
    if isinstance(normalizer, Kernel):
        return normalizer
    check_choice("normalizer", normalizer, KERNELS)
    if normalizer == "rectified_softpick":
        return RectifiedSoftpick(epsilon)
    return SinkSoftmax(sink) if normalizer == "sink_softmax" else KERNELS[normalizer]()


def name_of(kernel: Kernel) -> str:
    """The first name of a kernel's class, for messages."""
    known = {cls: name for name, cls in reversed(KERNELS.items())}
    return known.get(type(kernel), type(kernel).__name__)


def scaled(kernel: Kernel, x: Tensor) -> Tensor:
    """Logits times the kernel's `prescale`, for `normalize`."""
    return x if kernel.prescale == 1.0 else apart(x * kernel.prescale)


def normalize(kernel: Kernel, x: Tensor, axis: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """The weights of whole rows, along `axis`; entries that `mask` hides are absent.

    Args:
        kernel: of the normalizer.
        x: logits times the kernel's `prescale`, float32 or wider.
        axis: the axes to normalize over, from the end.
        mask: boolean, broadcastable to `x`, or `None`.
    """
    if mask is not None:
        x = ops.where(mask, x, kernel.absent)
    m = maximum(kernel, x, axis)
    f, g = kernel.values(x, m, ROWS)
    total = kernel.constant(m) + ops.sum(g, axis=axis, keepdims=True)
    if not kernel.has_constant:
        total = ops.where(total <= 0, 1.0, total)
    return f * reciprocal(total)


def reciprocal(z: Tensor) -> Tensor:
    """1 / z, for z > 0, by which f is multiplied.

    The derivative of a quotient f / z passes over f three times more. That of 1 / z has z^2, which
    may leave float32, unless it is written as a derivative at 1. For f up to z, f (1 / z) is at
    most 1, too: z times the rounded 1 / z is at most half a step above 1, and a tie goes to 1.
    """
    if is_exporting() or not is_recording():
        return 1.0 / z
    largest = float(np.finfo(dtype_of(z)).max)  # 1 / inf is 0
    constant = ops.stop_gradient(ops.minimum(z, largest))
    return apart(1.0 / (z / constant)) / constant


def apart(x: Tensor) -> Tensor:
    """x, such that XLA does not join factors of it with what it is multiplied by.

    Such a product may leave float32 where the result does not. A choice is not seen through: XLA
    cannot know that x equals itself, since a NaN, which stays one, does not.
    """
    if keras.backend.backend() == "torch" or is_exporting():
        return x
    return ops.where(ops.equal(x, x), x, -x)


def maximum(kernel: Kernel, x: Tensor, axis: tuple[int, ...]) -> Number | Tensor:
    """M of whole rows, for logits in which hidden entries are absent; it has no gradient.

    For `RectifiedSoftpick` it is the number 0 where PyTorch sees that no logit passes the headroom.
    """
    dtype = dtype_of(x)
    start = kernel.start(dtype)
    if kernel.headroom is None:
        return start
    x = ops.stop_gradient(x)
    is_empty = any(is_known(size) and size == 0 for size in x.shape)
    may_see = type(kernel) is RectifiedSoftpick and not is_empty and stacks.can_be_read(x)
    if may_see and ops.amax(x) <= kernel.headroom:
        return 0.0
    start = ops.stop_gradient(ops.convert_to_tensor(start, dtype))
    if is_empty:  # PyTorch has no maximum of it
        return start
    peak = ops.amax(x, axis=axis, keepdims=True) - kernel.headroom
    # Keras's maximum may round float64. In ONNX, TensorFlow's `where` multiplies: 0 times -inf.
    if dtype == "float64" and not is_exporting():
        return ops.where(peak > start, peak, start)
    return ops.maximum(peak, start)


def entry_count(x: Tensor, axis: tuple[int, ...], mask: Tensor | None = None) -> Tensor | int:
    """The number of entries of `x` along `axis` that `mask` leaves.

    Returns:
        An int32 tensor shaped like `x` with size 1 along `axis`; an integer without a mask
        (a scalar tensor where the size is dynamic).
    """
    sizes = [ops.shape(x)[one] for one in axis]
    if mask is None and None not in sizes:
        return functools.reduce(operator.mul, sizes)
    ones = ops.ones_like(x, dtype="int32")
    return ops.sum(ones if mask is None else ops.where(mask, ones, 0), axis=axis, keepdims=True)
