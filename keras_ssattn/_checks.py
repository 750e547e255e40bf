"""Checks of arguments. Each error names the argument, what was expected and what came."""

import difflib
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, get_args

import numpy as np
from keras import ops

from keras_ssattn._tensors import cast, dtype_of, is_known, to_tensor
from keras_ssattn._typing import ArrayLike, Axis, DType, Shape, Tensor

LARGEST_INT32 = 2**31 - 1


def check_integer(name: str, value: object, least: int = 1, optional: bool = False) -> int:
    """Returns `value`, an integer of at least `least`, as an `int`, or raises.

    `None` passes as it is if `optional`; the annotation leaves that case out.
    """
    if value is None and optional:
        return None  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        phrases = {0: "0 or a positive integer", 1: "a positive integer"}
        expected = phrases.get(least, f"an integer of {least} or more")
        raise ValueError(
            f"`{name}` must be {expected}{' or None' if optional else ''}. Received: "
            f"{name}={value!r}"
        )
    return int(value)


def check_number(
    name: str,
    value: object,
    expected: str = "a finite number",
    fits: Callable[[float], bool] = math.isfinite,
) -> float:
    """Returns `value`, a number for which `fits`, as a `float`, or raises."""
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    if isinstance(value, bool) or not fits(number):
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}")
    return number


def check_rate(name: str, value: object) -> float:
    return check_number(name, value, "a number in [0, 1)", lambda x: 0 <= x < 1)


def check_flag(name: str, value: object) -> bool:
    """Returns True or False, which NumPy may have made, or raises."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return bool(value)


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises unless `value` is one of the strings, or of those of a `Literal` type."""
    choices = get_args(choices) or tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}"
            f"{did_you_mean(value, choices)}"
        )


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """The end of a message that proposes the choice nearest to a string, if one is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(value).lower(), by_lower, n=1, cutoff=0.7)
    return f". Did you mean {by_lower[near[0]]!r}?" if isinstance(value, str) and near else ""


def check_padding_id(padding_id: int | None, vocabulary_size: int) -> int | None:
    """Returns `padding_id`, a token or `None`, or raises."""
    if padding_id is None:
        return None
    if (
        isinstance(padding_id, bool)
        or not isinstance(padding_id, numbers.Integral)
        or not 0 <= padding_id < vocabulary_size
    ):
        raise ValueError(
            "`padding_id` must be a token, from 0 to `vocabulary_size` - 1, or None. Received: "
            f"padding_id={padding_id!r}, vocabulary_size={vocabulary_size}"
        )
    return int(padding_id)


def check_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raises unless `value` is a multiple of `divisor`."""
    if value % divisor:
        raise ValueError(
            f"`{name}` must be a multiple of `{divisor_name}`. Received: {name}={value}, "
            f"{divisor_name}={divisor}"
        )


def check_heads(num_heads: object, num_kv_heads: object) -> tuple[int, int]:
    """Returns the numbers of query heads and of key heads, by default as many, or raises."""
    heads = check_integer("num_heads", num_heads)
    kv_heads = check_integer("num_kv_heads", num_kv_heads, optional=True) or heads
    if heads % kv_heads:
        raise ValueError(
            "`num_kv_heads` must divide `num_heads`. Received: "
            f"num_heads={heads}, num_kv_heads={kv_heads}"
        )
    return heads, kv_heads


def check_floating(name: str, x: Tensor) -> DType:
    """Returns the dtype of `x`, or raises if it is not a floating-point one."""
    dtype = dtype_of(x)
    if "float" not in dtype:
        raise TypeError(
            f"`{name}` must have a floating-point dtype. Received: {name} with dtype {dtype}"
        )
    return dtype


def check_integers(name: str, x: ArrayLike, expected: str = "integers") -> Tensor:
    """Returns `x` as a tensor of integers, or raises."""
    x = to_tensor(x)
    if "int" not in dtype_of(x):
        raise TypeError(f"`{name}` must be {expected}. Received: {name} with dtype {dtype_of(x)}")
    return x


def check_mask(
    name: str, mask: ArrayLike | None, rank: int | tuple[int, ...] | None = None
) -> Tensor:
    """Converts a mask (True = attend) to a boolean tensor; `None` stays.

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


def check_rank(name: str, x: Tensor, rank: int | tuple[int, ...]) -> None:
    ranks = (rank,) if isinstance(rank, int) else rank
    if len(x.shape) not in ranks:
        expected = " or ".join(str(r) for r in ranks)
        raise ValueError(
            f"`{name}` must have rank {expected}. Received: {name} with shape {tuple(x.shape)}"
        )


def check_broadcastable(name: str, shape: Shape, target: Shape, target_name: str) -> None:
    """Raises unless `shape` broadcasts to `target`; unknown sizes pass."""
    fits = len(shape) <= len(target) and all(
        not is_known(size) or size == 1 or not is_known(other) or size == other
        for size, other in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must be broadcastable to {target_name}, {tuple(target)}. "
            f"Received: {name} with shape {tuple(shape)}"
        )


def check_axis(axis: Axis) -> tuple[int, ...]:
    """Returns `axis`, an integer or several, as a tuple of them."""
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    for one in axes:
        if isinstance(one, bool) or not isinstance(one, numbers.Integral):
            raise TypeError(
                f"`axis` must be an integer or a tuple of them. Received: axis={axis!r}"
            )
    return axes


def normalize_axis(axis: Axis, rank: int) -> tuple[int, ...]:
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


def to_int32(name: str, x: ArrayLike, expected: str = "integers") -> Tensor:
    """Returns positions or indices as int32, or raises for others and for any beyond int32."""
    return cast(check_integers(name, check_fits_int32(name, x), expected), "int32")


def check_fits_int32(name: str, x: ArrayLike, room: int = 0) -> Tensor:
    """Returns `x` as a tensor, or raises for integers beyond int32, or within `room` of its end.

    The values of a tensor of the backend are not looked at: the device would have to wait.
    """
    if not hasattr(x, "dtype") or isinstance(x, (np.ndarray, np.generic)):
        array = np.asarray(x)
        is_integer = array.dtype.kind in "iu" and array.size
        if is_integer and (array.max() > LARGEST_INT32 - room or array.min() < -LARGEST_INT32):
            raise ValueError(
                f"`{name}` must leave all positions below 2^31. Received: {name} from "
                f"{array.min()} to {array.max()}"
            )
    return to_tensor(x)


def check_last_position(name: str, first: int, length: int) -> None:
    """Raises if int32 cannot hold the last of `length` positions."""
    if first + length - 1 > LARGEST_INT32:
        raise ValueError(
            f"`{name}` must leave all positions below 2^31. Received: {name}={first}, for {length} "
            "positions"
        )
