"""A cache of keys and values for decoding, of a fixed length, so that a step compiles once."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_ssattn.ops._arguments import (
    cast,
    check_broadcastable,
    check_mask,
    check_rank,
    dtype_of,
    to_tensor,
)


class Cache(NamedTuple):
    """What attention keeps of the positions it has seen.

    Attributes:
        key: `[B, S, K, D]`, projected, normalized and rotated as they are attended to.
        value: `[B, S, K, Dv]`.
        mask: boolean `[B, S]`, False at padding.

    Example:

    >>> from keras_ssattn import ops
    >>> cache = ops.make_cache(batch_size=2, length=32, num_kv_heads=4, key_dim=16)
    >>> cache.key.shape
    (2, 32, 4, 16)
    """

    key: Any
    value: Any
    mask: Any


def make_cache(
    batch_size: int,
    length: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    dtype: str = "float32",
) -> Cache:
    """An empty cache for `length` positions.

    Args:
        batch_size: B.
        length: S, the most positions that it holds.
        num_kv_heads: K.
        key_dim: D.
        value_dim: Dv. Defaults to `key_dim`.
        dtype: of keys and values.

    Returns:
        A `Cache` of zeros.

    Example:

    >>> from keras_ssattn import ops
    >>> ops.make_cache(2, 32, 4, 16, value_dim=8).value.shape
    (2, 32, 4, 8)
    """
    shape = (batch_size, length, num_kv_heads)
    return Cache(
        ops.zeros((*shape, key_dim), dtype),
        ops.zeros((*shape, value_dim or key_dim), dtype),
        ops.ones((batch_size, length), "bool"),
    )


def update_cache(cache: Any, index: Any, key: Any, value: Any, mask: Any = None) -> Cache:
    """Writes T positions into a cache, from `index` on.

    Args:
        cache: a `Cache`, or its three tensors.
        index: where the first of them goes: an integer, or an integer tensor, scalar or `[B]`,
            one for each row. The caller sees to it that `index + T` does not pass S.
        key: `[B, T, K, D]`.
        value: `[B, T, K, Dv]`.
        mask: boolean `[B, T]`, False at padding. `None` for no padding.

    Returns:
        The new `Cache`.

    Raises:
        TypeError: for an index that is not an integer.
        ValueError: for shapes that do not fit, or an integer index that leaves no room.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> cache = ops.make_cache(2, 32, 4, 16)
    >>> step = keras.ops.ones((2, 1, 4, 16))
    >>> float(keras.ops.sum(ops.update_cache(cache, 5, step, step).key[:, 5]))
    128.0
    """
    cache = Cache(*cache)
    length, size = key.shape[1], cache.key.shape[1]
    if isinstance(index, int) and None not in (length, size) and not 0 <= index <= size - length:
        raise ValueError(
            f"`index` must leave room for {length} positions in a cache of {size}. Received: "
            f"index={index}, key with shape {tuple(key.shape)}"
        )
    index = to_tensor(index)
    if "int" not in dtype_of(index):
        raise TypeError(f"`index` must be an integer. Received: dtype {dtype_of(index)}")
    index = cast(index, "int32")
    check_rank("index", index, (0, 1))
    if None not in (length, size) and length > size:
        raise ValueError(
            f"`key` must not be longer than the cache, {size} positions. Received: key with shape "
            f"{tuple(key.shape)}"
        )
    mask = ops.ones((1, 1), "bool") if mask is None else check_mask("mask", mask, rank=2)
    for name, old, new in zip(cache._fields, cache, (key, value, mask), strict=True):
        target = (old.shape[0], new.shape[1], *old.shape[2:])
        check_broadcastable(name, tuple(new.shape), target, "the cache's shape at T positions")
    mask = ops.broadcast_to(mask, ops.shape(key)[:2])  # a row of it may serve all
    new = Cache(cast(key, dtype_of(cache.key)), cast(value, dtype_of(cache.value)), mask)
    write = _write_at if len(index.shape) == 0 else _write_by_row
    return Cache(*(write(x, index, y) for x, y in zip(cache, new, strict=True)))


def _write_at(old: Any, index: Any, new: Any) -> Any:
    start = (0, index, *(0 for _ in old.shape[2:]))
    if dtype_of(old) != "bool" or keras.backend.backend() != "tensorflow":
        return ops.slice_update(old, start, new)
    # TensorFlow does not update slices of booleans
    return ops.cast(ops.slice_update(ops.cast(old, "int32"), start, ops.cast(new, "int32")), "bool")


def _write_by_row(old: Any, index: Any, new: Any) -> Any:
    step = ops.arange(ops.shape(old)[1], dtype="int32") - ops.expand_dims(index, -1)  # [B, S]
    written = ops.logical_and(step >= 0, step < ops.shape(new)[1])
    step = ops.clip(step, 0, ops.shape(new)[1] - 1)
    extra = tuple(range(2, len(old.shape)))
    written, step = ops.expand_dims(written, extra), ops.expand_dims(step, extra)
    return ops.where(written, ops.take_along_axis(new, step, axis=1), old)
