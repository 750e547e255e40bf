"""Tensors cut into tiles along time, and loops over them that every backend runs well.

TensorFlow and JAX keep the tiles of a tensor stacked along a first axis and read and write them
by a traced index. PyTorch runs such loops eagerly, where a write would copy the whole stack: it
keeps a list of tiles.
"""

from collections.abc import Callable

import keras
from keras import ops

from keras_ssattn._tensors import is_known
from keras_ssattn._typing import DType, Shape, Size, Tensor


def runs_eagerly() -> bool:
    """Whether loops are Python's own, with integers for indices."""
    return keras.backend.backend() == "torch"


def runs_on_cpu_eagerly(x: Tensor) -> bool:
    """Whether loops are so, and a core's cache may hold what an operation leaves to the next."""
    return runs_eagerly() and x.device.type == "cpu"


def loop(start: Size, stop: Size, step: Callable, carry: Tensor) -> Tensor:
    """`ops.fori_loop`; Keras's own, on PyTorch, looks at every tile of lists first."""
    if not runs_eagerly():
        return ops.fori_loop(start, stop, step, carry)
    for i in range(start, stop):
        carry = step(i, carry)
    return carry


def count_of(length: Size, size: Size) -> Size:
    """The number of tiles that hold `length` positions; 1 or more, if it is known."""
    count = -(-length // size)
    return max(count, 1) if is_known(count) else count


def split(x: Tensor, size: Size, group_size: int = 1) -> Tensor:
    """Cuts `[B, T, K * G, D]` into a stack `[n, B, K, G * size, D]`, padded by zeros.

    The G = `group_size` query heads that share a key head become rows of one matrix.
    """
    batch, length = ops.shape(x)[:2]
    num_heads, width = x.shape[2:]
    num_heads //= group_size
    count = count_of(length, size)
    padding = count * size - length
    if not is_known(padding) or padding:
        x = ops.concatenate([x, ops.zeros((batch, padding, *x.shape[2:]), x.dtype)], axis=1)
    x = ops.reshape(x, (batch, count, size, num_heads, group_size, width))
    x = ops.transpose(x, (1, 0, 3, 4, 2, 5))  # [n, B, K, G, size, D]
    return ops.reshape(x, (count, batch, num_heads, group_size * size, width))


def merge(x: Tensor, length: Size, group_size: int = 1) -> Tensor:
    """The inverse of `split`: a stack `[n, B, K, G * size, D]` to `[B, T, K * G, D]`."""
    count, batch, _, rows, _ = ops.shape(x)
    num_heads, width = x.shape[2], x.shape[4]
    x = ops.reshape(x, (count, batch, num_heads, group_size, rows // group_size, width))
    x = ops.transpose(x, (1, 0, 4, 2, 3, 5))  # [B, n, size, K, G, D]
    x = ops.reshape(x, (batch, count * (rows // group_size), num_heads * group_size, width))
    return x[:, :length]


def split_vector(x: Tensor, size: Size) -> Tensor:
    """Cuts `[B, T]` of integers or booleans into a stack `[n, B, 1, 1, size]`."""
    is_bool = keras.utils.standardize_dtype(x.dtype) == "bool"
    stack = split(ops.expand_dims(ops.cast(x, "int32") if is_bool else x, (2, 3)), size)
    stack = ops.swapaxes(stack, -1, -2)
    return ops.cast(stack, "bool") if is_bool else stack


def unstack(x: Tensor) -> Tensor | list[Tensor]:
    """Tiles to read by index."""
    return list(ops.unstack(x)) if runs_eagerly() else x


def empty(count: Size, shape: Shape, dtype: DType) -> Tensor | list[None]:
    """Tiles to write: zeros of `shape`."""
    return [None] * count if runs_eagerly() else ops.zeros((count, *shape), dtype)


def write(tiles: Tensor, index: Size, x: Tensor) -> Tensor:
    """The tiles with one of them replaced."""
    if runs_eagerly():
        tiles[index] = x
        return tiles
    return ops.slice_update(tiles, place(index, *(0 for _ in x.shape)), ops.expand_dims(x, 0))


def place(*index: Size) -> tuple[Size, ...]:
    """Casts indices to int32: JAX wants one dtype, and 64-bit mode mixes two."""
    return index if runs_eagerly() else tuple(ops.cast(x, "int32") for x in index)


def add(tiles: Tensor, index: Size, x: Tensor) -> Tensor:
    """The tiles with `x` added to one of them."""
    if runs_eagerly() and tiles[index] is None:
        return write(tiles, index, x)
    return write(tiles, index, tiles[index] + x)


def stack(tiles: Tensor, shape: Shape, dtype: DType) -> Tensor:
    """The tiles as one tensor; those never written are zeros of `shape`."""
    if runs_eagerly():
        return ops.stack([ops.zeros(shape, dtype) if x is None else x for x in tiles])
    return tiles
