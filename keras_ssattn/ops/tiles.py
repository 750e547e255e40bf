"""Tensors cut into tiles along time, and loops over them that every backend runs well.

TensorFlow and JAX keep the tiles of a tensor stacked along a first axis and read and write them
by a traced index. PyTorch runs such loops eagerly, where a write would copy the whole stack: it
keeps a list of tiles.
"""

from typing import Any

import keras
from keras import ops


def runs_eagerly() -> bool:
    """Whether loops are Python's own, with integers for indices."""
    return keras.backend.backend() == "torch"


def count_of(length: Any, size: int) -> Any:
    """The number of tiles that hold `length` positions; 1 or more, if it is known."""
    count = -(-length // size)
    return max(count, 1) if isinstance(count, int) else count


def split(x: Any, size: int, groups: int = 1) -> Any:
    """Cuts `[B, T, K * groups, D]` into a stack `[n, B, K, groups * size, D]`, padded by zeros.

    The `groups` query heads that share a key head become rows of one matrix.
    """
    batch, length = ops.shape(x)[:2]
    num_heads, width = x.shape[2:]
    num_heads //= groups
    count = count_of(length, size)
    padding = count * size - length
    if not isinstance(length, int) or padding:
        x = ops.concatenate([x, ops.zeros((batch, padding, *x.shape[2:]), x.dtype)], axis=1)
    x = ops.reshape(x, (batch, count, size, num_heads, groups, width))
    x = ops.transpose(x, (1, 0, 3, 4, 2, 5))
    return ops.reshape(x, (count, batch, num_heads, groups * size, width))


def merge(x: Any, length: Any, groups: int = 1) -> Any:
    """The inverse of `split`: a stack `[n, B, K, groups * size, D]` to `[B, T, K * groups, D]`."""
    count, batch, _, rows, _ = ops.shape(x)
    num_heads, width = x.shape[2], x.shape[4]
    x = ops.reshape(x, (count, batch, num_heads, groups, rows // groups, width))
    x = ops.transpose(x, (1, 0, 4, 2, 3, 5))
    x = ops.reshape(x, (batch, count * (rows // groups), num_heads * groups, width))
    return x[:, :length]


def unstack(x: Any) -> Any:
    """Tiles to read by index."""
    return list(ops.unstack(x)) if runs_eagerly() else x


def empty(count: Any, shape: tuple, dtype: Any) -> Any:
    """Tiles to write: zeros of `shape`."""
    return [None] * count if runs_eagerly() else ops.zeros((count, *shape), dtype)


def write(tiles: Any, index: Any, x: Any) -> Any:
    """The tiles with one of them replaced."""
    if runs_eagerly():
        tiles[index] = x
        return tiles
    return ops.slice_update(tiles, place(index, *(0 for _ in x.shape)), ops.expand_dims(x, 0))


def place(*index: Any) -> tuple:
    """Where to read or write, of one dtype: JAX wants that, and in 64 bits has two of them."""
    return index if runs_eagerly() else tuple(ops.cast(x, "int32") for x in index)


def add(tiles: Any, index: Any, x: Any) -> Any:
    """The tiles with `x` added to one of them."""
    if runs_eagerly() and tiles[index] is None:
        return write(tiles, index, x)
    return write(tiles, index, tiles[index] + x)


def stack(tiles: Any, shape: tuple, dtype: Any) -> Any:
    """The tiles as one tensor; those never written are zeros of `shape`."""
    if runs_eagerly():
        return ops.stack([ops.zeros(shape, dtype) if x is None else x for x in tiles])
    return tiles
