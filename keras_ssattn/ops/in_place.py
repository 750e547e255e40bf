"""Functions of tiles, which on PyTorch write their result over their argument.

A tile is read and written once for each operation there, and memory that is written for the first
time is slower than the arithmetic. Elsewhere the functions are those of `keras.ops`, which the
compiler joins. The argument may not be used again, and nothing here is differentiated on PyTorch.
"""

from keras import ops

from keras_ssattn._typing import Size, Tensor
from keras_ssattn.ops import stacks


def exp(x: Tensor) -> Tensor:
    return x.exp_() if stacks.runs_eagerly() else ops.exp(x)


def expm1(x: Tensor) -> Tensor:
    """e^x - 1, as tanh(x / 2) (e^x + 1) on a CPU, where PyTorch's own takes twice the time.

    Both factors are exact to a rounding or two for every x, so the product is as exact near 0.
    """
    if not stacks.runs_eagerly():
        return ops.expm1(x)
    if x.device.type != "cpu":
        return x.expm1_()
    e = x.exp()
    e += 1.0
    x *= 0.5
    return x.tanh_().mul_(e)


def absolute(x: Tensor) -> Tensor:
    return x.abs_() if stacks.runs_eagerly() else abs(x)


def relu(x: Tensor) -> Tensor:
    return x.relu_() if stacks.runs_eagerly() else ops.relu(x)


def sign(x: Tensor) -> Tensor:
    return x.sign_() if stacks.runs_eagerly() else ops.sign(x)


def add_product(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`total + x @ y`, for matrices `[B, K, ...]`; it is `total` that is written over."""
    if not stacks.runs_eagerly():
        return total + x @ y
    total.view(-1, *total.shape[2:]).baddbmm_(x.flatten(0, 1), y.flatten(0, 1))
    return total


def add_product_to(tiles: Tensor, index: Size, x: Tensor, y: Tensor) -> Tensor:
    """The tiles with `x @ y` added to one of them."""
    if not stacks.runs_eagerly() or tiles[index] is None:
        return stacks.add(tiles, index, x @ y)
    add_product(tiles[index], x, y)
    return tiles
