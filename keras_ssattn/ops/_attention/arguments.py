"""The arguments of attention, checked once."""

import dataclasses
import math
import numbers
from collections.abc import Sequence

from keras import ops

from keras_ssattn._checks import check_broadcastable, check_floating, check_rank
from keras_ssattn._tensors import cast, dtype_of, to_tensor, widen
from keras_ssattn._typing import ArrayLike, Number, Option, Tensor
from keras_ssattn.ops import kernels
from keras_ssattn.ops.kernels import Kernel
from keras_ssattn.ops.length_scales import log_length_scale
from keras_ssattn.ops.sizes import Sizes
from keras_ssattn.ops.visibility import Visibility


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """The arguments of attention, checked: what every implementation takes."""

    query: Tensor
    key: Tensor
    value: Tensor
    kernel: Kernel
    factor: Number | Tensor
    visibility: Visibility


def prepare(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    normalizer: str | Kernel = "softmax",
    scale: float | None = None,
    *visible: Option,
    segment_ids: ArrayLike | Sequence[ArrayLike] | None = None,
    length_scale: ArrayLike | None = None,
    epsilon: float = 1e-6,
    sink: ArrayLike = 0.0,
    **visibility_options: Option,
) -> Prepared:
    """Checks the arguments of `attention`."""
    query, key = _check_rank_4("query", query), _check_rank_4("key", key)
    value = _check_rank_4("value", value)
    sizes = check_sizes(query, key, value)
    visibility = Visibility.of(  # type: ignore[misc]
        sizes.queries, sizes.keys, *visible, segment_ids=segment_ids, batch_size=sizes.batch,
        num_heads=sizes.heads, guard=sizes.guard, **visibility_options,
    )  # fmt: skip
    kernel = kernels.get(normalizer, epsilon, sink)
    kernel = kernel.with_tensors(tuple(_by_head(x, query) for x in kernel.tensors))
    scale = check_scale(scale, query.shape[-1])
    if normalizer == "ssmax" and length_scale is None:
        length_scale = log_length_scale(ops.cast(visibility.count, dtype_of(widen(query))))
    if length_scale is None:
        return Prepared(query, key, value, kernel, scale, visibility)
    length_scale = cast(to_tensor(length_scale), dtype_of(widen(query)))
    target = (sizes.batch, sizes.heads, sizes.queries)
    check_broadcastable("length_scale", tuple(length_scale.shape), target, "[B, H, T]")
    return Prepared(query, key, value, kernel, factor_of_query(length_scale, scale), visibility)


def factor_of_query(length_scale: Tensor, scale: float) -> Tensor:
    """A length scale broadcastable to `[B, H, T]`, and a scale, as a factor `[B|1, T|1, H|1, 1]`.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> ops.factor_of_query(keras.ops.ones((4, 7)), 0.25).shape
    (1, 7, 4, 1)
    """
    while len(length_scale.shape) < 3:
        length_scale = ops.expand_dims(length_scale, 0)
    return ops.expand_dims(ops.transpose(length_scale * scale, (0, 2, 1)), -1)


def check_scale(scale: float | None, size: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(size)
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"`scale` must be a finite number or None. Received: scale={scale!r}")
    return float(scale)


def check_sizes(query: Tensor, key: Tensor, value: Tensor) -> Sizes:
    """The sizes of `[B, T, H, D]`, `[B, S, K, D]` and `[B, S, K, Dv]`, or raises."""
    batch, length, num_heads, _ = ops.shape(query)
    key_batch, key_length, num_kv_heads, _ = ops.shape(key)
    sizes = Sizes(batch, num_heads, length, key_length)
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if not (
        sizes.match(key_batch, batch)
        and (value is key or sizes.match(ops.shape(value)[0], key_batch))
    ):
        raise ValueError(
            "`query`, `key` and `value` must have the same batch size. Received: shapes "
            f"{shapes[0]}, {shapes[1]}, {shapes[2]}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "`query` and `key` must have the same last dimension. Received: query with shape "
            f"{shapes[0]}, key with shape {shapes[1]}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            "the number of heads of `query` must be a multiple of that of `key`. Received: query "
            f"with shape {shapes[0]}, key with shape {shapes[1]}"
        )
    if value.shape[2] != num_kv_heads or not (
        value is key or sizes.match(ops.shape(value)[1], key_length)
    ):
        raise ValueError(
            "`key` and `value` must have the same length and number of heads. Received: key with "
            f"shape {shapes[1]}, value with shape {shapes[2]}"
        )
    return sizes


def _check_rank_4(name: str, x: ArrayLike) -> Tensor:
    x = to_tensor(x)
    check_floating(name, x)
    check_rank(name, x, 4)
    return x


def _by_head(sink: ArrayLike, query: Tensor) -> Tensor:
    """A sink for each head, `[H]`, in float32 or wider."""
    heads = query.shape[2]
    sink = cast(to_tensor(sink), dtype_of(widen(query)))
    check_broadcastable("sink", tuple(sink.shape), (heads,), "[H]")
    return ops.broadcast_to(sink, (heads,))
