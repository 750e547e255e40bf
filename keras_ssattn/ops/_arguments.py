"""Checks and conversions that every function of `keras_ssattn.ops` shares."""

import math
import numbers
from typing import Any

import keras
from keras import ops


def to_tensor(x: Any) -> Any:
    """Converts arrays, lists and numbers to a tensor; leaves symbolic ones alone."""
    return x if keras.utils.is_keras_tensor(x) else ops.convert_to_tensor(x)


def dtype_of(x: Any) -> str:
    return keras.utils.standardize_dtype(x.dtype)


def cast(x: Any, dtype: str) -> Any:
    """`ops.cast`, at no cost where there is nothing to do: eager decoding is made of such calls."""
    return x if dtype_of(x) == dtype else ops.cast(x, dtype)


def widen(x: Any) -> Any:
    """Casts to float32, the precision of all arithmetic here; float64 stays."""
    return x if dtype_of(x) == "float64" else cast(x, "float32")


def scaled(x: Any, factor: Any) -> Any:
    """`x` times a factor, in float32 or, where x has it, float64."""
    x = widen(x)
    return x * cast(factor, dtype_of(x))


def check_count(n: Any) -> Any:
    """Returns a number of keys, 1 or more, as it is, anything else as a tensor, or raises."""
    if isinstance(n, numbers.Real):
        if isinstance(n, bool) or not float(n) >= 1 or math.isinf(n):
            raise ValueError(f"`n` must be a number of keys, 1 or more. Received: n={n!r}")
        return n
    n = to_tensor(n)
    if dtype_of(n) == "bool":
        raise TypeError("`n` must be a number of keys, not a mask. Received: n with dtype bool")
    return n


def check_floating(name: str, x: Any) -> str:
    """Returns the dtype of `x`, or raises if it is not a floating-point one."""
    dtype = dtype_of(x)
    if "float" not in dtype:
        raise TypeError(
            f"`{name}` must have a floating-point dtype. Received: {name} with dtype {dtype}"
        )
    return dtype


def check_mask(name: str, mask: Any, rank: int | tuple[int, ...] | None = None) -> Any:
    """Converts a mask (True = attend) to a boolean tensor.

    Integers 0 and 1, the output of most tokenizers, are accepted. A float mask is refused:
    it may be an additive one, in which 0 means attend.
    """
    if mask is None:
        return None
    mask = to_tensor(mask)
    dtype = dtype_of(mask)
    if dtype != "bool":
        if "int" not in dtype:
            raise TypeError(
                f"`{name}` must be a boolean mask (True = attend); additive masks are not "
                f"accepted. Received: {name} with dtype {dtype}"
            )
        mask = ops.cast(mask, "bool")
    if rank is not None:
        check_rank(name, mask, rank)
    return mask


def check_rank(name: str, x: Any, rank: int | tuple[int, ...]) -> None:
    ranks = (rank,) if isinstance(rank, int) else rank
    if len(x.shape) not in ranks:
        expected = " or ".join(str(r) for r in ranks)
        raise ValueError(
            f"`{name}` must have rank {expected}. Received: {name} with shape {tuple(x.shape)}"
        )


def check_broadcastable(name: str, shape: tuple, target: tuple, target_name: str) -> None:
    """Raises unless `shape` broadcasts to `target`; unknown sizes pass."""
    fits = len(shape) <= len(target) and all(
        size in (1, None) or other is None or size == other
        for size, other in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must be broadcastable to {target_name}, {target}. "
            f"Received: {name} with shape {shape}"
        )


def check_axis(axis: Any) -> tuple[int, ...]:
    """Returns `axis`, an integer or several, as a tuple of them."""
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    for one in axes:
        if isinstance(one, bool) or not isinstance(one, numbers.Integral):
            raise TypeError(
                f"`axis` must be an integer or a tuple of them. Received: axis={axis!r}"
            )
    return axes


def normalize_axis(axis: Any, rank: int) -> tuple[int, ...]:
    """Returns `axis`, an integer or several, as distinct negative axes."""
    axes = check_axis(axis)
    for one in axes:
        if not -rank <= int(one) < rank:
            raise ValueError(
                f"`axis` must lie in [-{rank}, {rank}) for a tensor of rank {rank}. "
                f"Received: axis={axis}"
            )
    axes = tuple(int(one) - rank if one >= 0 else int(one) for one in axes)
    if not axes or len(set(axes)) != len(axes):
        raise ValueError(f"`axis` must name one or more distinct axes. Received: axis={axis}")
    return axes
