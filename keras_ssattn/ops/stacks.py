"""Tensors cut into tiles along time, and loops over them that every backend runs well.

Tiles are stacked along a first axis. TensorFlow and JAX read and write them by a traced index.
PyTorch runs such loops eagerly, and writes into the stack itself.
"""

from collections.abc import Callable

import keras
from keras import ops

from keras_ssattn._frameworks import is_compiling, is_plain, is_transforming
from keras_ssattn._keras.exporting import is_exporting
from keras_ssattn._tensors import is_known, widen
from keras_ssattn._typing import DType, Shape, Size, Tensor

EAGERLY = keras.backend.backend() == "torch"


def runs_eagerly() -> bool:
    """Whether loops are Python's own, with integers for indices."""
    return EAGERLY


def runs_on_cpu_eagerly(x: Tensor) -> bool:
    """Whether loops are so, and a core's cache may hold what an operation leaves to the next."""
    return runs_eagerly() and x.device.type == "cpu"


def can_be_read(x: Tensor) -> bool:
    """Whether what follows may depend on the numbers in `x`.

    So it is where PyTorch computes them on a CPU, and nothing writes down or maps what runs.
    """
    return (
        runs_eagerly()
        and not (is_compiling() or is_transforming() or is_exporting())
        and is_plain(x)
        and runs_on_cpu_eagerly(x)
    )


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


def matrices(x: Tensor) -> Tensor | list[Tensor]:
    """Tiles of numbers to `read`, many times each: of half precision compilers widen one by one.

    PyTorch's have one axis in place of batch and heads, as `in_place.fold` makes it.
    """
    if not runs_eagerly():
        return x
    x = widen(x)
    if x.shape[1] > 1:  # of one batch, no product copies them
        x = x.contiguous()
    return unstack(x.flatten(1, 2))


def read(tiles: Tensor | list[Tensor], index: Size) -> Tensor:
    """One of `matrices`, float32 or wider."""
    return tiles[index] if runs_eagerly() else widen(tiles[index])


def read_once(tiles: Tensor | list[Tensor], index: Size) -> Tensor:
    """A tile of any stack, float32 or wider."""
    x = widen(tiles[index])
    return x.contiguous() if runs_eagerly() else x


def empty(count: Size, shape: Shape, dtype: DType) -> Tensor:
    """A stack to write to: zeros. PyTorch's lies in memory as `merge` wants it."""
    if runs_eagerly():
        batch, heads, rows, width = shape
        return ops.zeros((batch, count, rows, heads, width), dtype).permute(1, 0, 3, 2, 4)
    return ops.zeros((count, *shape), dtype)


def collect(make: Callable, count: Size, shape: Shape, dtype: DType) -> Tensor:
    """The stack of what `make` gives for each index; PyTorch writes nothing over."""
    if runs_eagerly():
        return ops.stack([make(i) for i in range(count)])
    tiles = ops.zeros((count, *shape), dtype)
    return ops.fori_loop(0, count, lambda i, tiles: write(tiles, i, make(i)), tiles)


def write(tiles: Tensor, index: Size, x: Tensor) -> Tensor:
    """The stack with one tile replaced."""
    if runs_eagerly():
        tiles[index] = x
        return tiles
    return ops.slice_update(tiles, place(index, *(0 for _ in x.shape)), ops.expand_dims(x, 0))


def add(tiles: Tensor, index: Size, x: Tensor) -> Tensor:
    """The stack with `x` added to one tile."""
    if runs_eagerly():
        tiles[index] += x
        return tiles
    return write(tiles, index, tiles[index] + x)


def add_between(tiles: Tensor, start: Size, stop: Size, x: Tensor) -> Tensor:
    """The stack with `x` added to its tiles from `start` to `stop`, without it."""
    if runs_eagerly():
        tiles[start:stop] += x
        return tiles
    return loop(start, stop, lambda j, tiles: add(tiles, j, x), tiles)


def sum_between(tiles: Tensor, start: Size, stop: Size) -> Tensor:
    """The sum of the tiles of a stack from `start` to `stop`, without it."""
    if runs_eagerly():
        return tiles[start:stop].sum(0)
    zeros = ops.zeros(ops.shape(tiles)[1:], tiles.dtype)
    return loop(start, stop, lambda j, total: total + tiles[j], zeros)


def place(*index: Size) -> tuple[Size, ...]:
    """Casts indices to int32: JAX wants one dtype, and 64-bit mode mixes two."""
    return index if runs_eagerly() else tuple(ops.cast(x, "int32") for x in index)
