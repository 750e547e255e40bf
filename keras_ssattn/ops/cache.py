"""A cache of keys and values for decoding, of a fixed length, so that a step compiles once."""

import math
import numbers
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_ssattn._checks import (
    check_broadcastable,
    check_integer,
    check_mask,
    check_rank,
    to_int32,
)
from keras_ssattn._frameworks import write as write_in_copy
from keras_ssattn._keras.exporting import is_exporting
from keras_ssattn._tensors import cast, dtype_of, is_known
from keras_ssattn._typing import ArrayLike, DType, Size, Tensor
from keras_ssattn.ops.sizes import steps
from keras_ssattn.ops.stacks import place, runs_eagerly


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

    key: Tensor
    value: Tensor
    mask: Tensor


class Carried(NamedTuple):
    """What a compiled loop carries of a `Cache`: each head in one piece, as attention reads it.

    Carried as `[B, S, K, D]`, XLA copies all of it for each token.

    Attributes:
        key: `[B * K, S, D]`, or of a single head `[S, D]`.
        value: the same, of `Dv`.
        mask: boolean `[B, S]`.
    """

    key: Tensor
    value: Tensor
    mask: Tensor

    @classmethod
    def of(cls, cache: Cache) -> "Carried":
        return cls(_piece(cache.key), _piece(cache.value), cache.mask)

    def cache(self) -> "CarriedCache":
        """The cache again, which is written in the order of the pieces."""
        batch = ops.shape(self.mask)[0]
        key, value = (_by_position(x, batch) for x in (self.key, self.value))
        return CarriedCache(key, value, self.mask)


class CarriedCache(Cache):
    """A `Cache` of what was `Carried`."""


def may_be_carried() -> bool:
    """Whether loops are compiled, and no axis of heads is split over devices: that stays one."""
    return not runs_eagerly() and keras.distribution.distribution() is None


def make_cache(
    batch_size: int,
    length: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    dtype: DType = "float32",
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
    keys, values = (
        # of each head in one piece, as PyTorch multiplies matrices
        ops.transpose(ops.zeros((batch_size, num_kv_heads, length, size), dtype), (0, 2, 1, 3))
        for size in (key_dim, value_dim or key_dim)
    )
    return Cache(keys, values, ops.ones((batch_size, length), "bool"))


def update_cache(
    cache: Cache, index: int | ArrayLike, key: Tensor, value: Tensor, mask: ArrayLike | None = None
) -> Cache:
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
    index = check_index(cache, index, ops.shape(key)[1])
    mask = ops.ones((1, 1), "bool") if mask is None else check_mask("mask", mask, rank=2)
    _check_part("mask", cache.mask, mask)
    mask = ops.broadcast_to(mask, ops.shape(key)[:2])  # a row of it may serve all
    key, value = write_cache(cache, index, key, value)
    return Cache(key, value, write_at(cache.mask, index, mask))


def write_cache(
    cache: Cache, index: int | Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys and values of `update_cache`, for an index that has been checked."""
    _check_part("key", cache.key, key)
    _check_part("value", cache.value, value)
    key, value = cast(key, dtype_of(cache.key)), cast(value, dtype_of(cache.value))
    pairs = (cache.key, key), (cache.value, value)
    if isinstance(cache, CarriedCache) and (isinstance(index, int) or len(index.shape) == 0):
        key, value = (_write_pieces(old, index, new) for old, new in pairs)
    else:
        key, value = _write(index, *pairs)
    return key, value


def by_head(x: Tensor) -> Tensor:
    """`[B, S, K, D]` as `[B * K, S, D]`."""
    batch, length, num_heads, size = ops.shape(x)
    return ops.reshape(ops.swapaxes(x, 1, 2), (batch * num_heads, length, size))


def _piece(x: Tensor) -> Tensor:
    """`by_head`, without an axis for a single one: XLA drops it, and then copies the rest."""
    x = by_head(x)
    return x[0] if x.shape[0] == 1 else x


def _by_position(x: Tensor, batch: Size) -> Tensor:
    """The inverse of `_piece`."""
    *count, length, size = ops.shape(x)
    num_heads = count[0] // batch if count else 1
    return ops.swapaxes(ops.reshape(x, (batch, num_heads, length, size)), 1, 2)


def _write_pieces(old: Tensor, index: int | Tensor, new: Tensor) -> Tensor:
    """`write_at` of `[B, S, K, D]`, at one index, in the order of a `CarriedCache`."""
    batch, old, new = ops.shape(old)[0], _piece(old), _piece(new)
    start = place(*(0 for _ in old.shape[2:]), index, 0)
    return _by_position(ops.slice_update(old, start, new), batch)


def write_at(old: Tensor, index: int | Tensor, new: Tensor) -> Tensor:
    """`old`, `[B, S, ...]`, with `new`, `[B, T, ...]`, at the positions from `index` on.

    Example:

    >>> import keras
    >>> from keras_ssattn.ops.cache import write_at
    >>> write_at(keras.ops.zeros((1, 4)), 1, keras.ops.ones((1, 2)))  # [[0., 1., 1., 0.]]
    """
    return _write(index, (old, new))[0]


def _write(index: int | Tensor, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """`write_at` of several pairs, old and new, of the same T."""
    if isinstance(index, int) or (len(index.shape) == 0 and not runs_eagerly()):
        return [_write_slice(old, index, new) for old, new in pairs]
    if len(index.shape) == 1:
        return [_write_by_row(old, index, new) for old, new in pairs]
    index = ops.cast(ops.reshape(index, (1,)), "int64")
    length = pairs[0][1].shape[1]
    if not is_known(length) or length != 1:
        index = index + ops.arange(0, length, dtype="int64")
    return [write_in_copy(old, index, new) for old, new in pairs]


def _write_slice(old: Tensor, index: int | Tensor, new: Tensor) -> Tensor:
    start = place(0, index, *(0 for _ in old.shape[2:]))
    if dtype_of(old) != "bool" or keras.backend.backend() != "tensorflow":
        return ops.slice_update(old, start, new)
    # TensorFlow does not update slices of booleans
    return ops.cast(ops.slice_update(ops.cast(old, "int32"), start, ops.cast(new, "int32")), "bool")


def check_index(cache: Cache, index: int | ArrayLike, length: Size) -> int | Tensor:
    """Returns the index, an `int` or int32, or raises if there is no room for `length` keys."""
    size = cache.key.shape[1]
    known = is_known(length) and is_known(size)
    if isinstance(index, np.ndarray) and index.ndim == 0:
        index = index[()]
    if isinstance(index, numbers.Integral):
        if known and not 0 <= int(index) <= size - length:
            raise ValueError(
                f"`index` must leave room for {length} positions in a cache of {size}. Received: "
                f"index={index}"
            )
        return check_integer("index", index, least=0)
    if known and length > size:
        raise ValueError(
            f"`key` must not be longer than the cache, {size} positions. Received: {length} "
            "positions"
        )
    index = to_int32("index", index, "an integer")
    check_rank("index", index, (0, 1))
    return index


def _check_part(name: str, old: Tensor, new: Tensor) -> None:
    target = (old.shape[0], new.shape[1], *old.shape[2:])
    check_broadcastable(name, tuple(new.shape), target, "the cache's shape at T positions")


def _write_by_row(old: Tensor, index: Tensor, new: Tensor) -> Tensor:
    step = steps(ops.shape(old)[1]) - ops.expand_dims(index, -1)  # [B, S]
    written = ops.logical_and(step >= 0, step < ops.shape(new)[1])
    extra = tuple(range(2, len(old.shape)))
    written = ops.expand_dims(written, extra)
    if is_known(new.shape[1]) and new.shape[1] == 1:
        return _choose(written, new, old)
    if is_exporting():
        new = _by_product(step, new)
    else:
        step = ops.expand_dims(ops.clip(step, 0, ops.shape(new)[1] - 1), extra)
        new = ops.take_along_axis(new, step, axis=1)
    return _choose(written, new, old)


def _choose(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    if dtype_of(old) != "bool":
        return ops.where(where, new, old)
    # ONNX Runtime does not choose between booleans
    kept = ops.logical_and(ops.logical_not(where), old)
    return ops.logical_or(ops.logical_and(where, new), kept)


def _by_product(step: Tensor, new: Tensor) -> Tensor:
    """`new` at steps `[B, S]`, by a product that is exact and that every runtime has."""
    batch, length = ops.shape(new)[:2]
    chosen = ops.expand_dims(step, 2) == steps(length)  # [B, S, T]
    dtype = "float32" if dtype_of(new) == "bool" else dtype_of(new)
    flat = ops.reshape(cast(new, dtype), (batch, length, math.prod(new.shape[2:])))
    found = ops.matmul(ops.cast(chosen, dtype), flat)
    return cast(ops.reshape(found, (batch, ops.shape(step)[1], *new.shape[2:])), dtype_of(new))
