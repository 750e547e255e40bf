"""Operations on tiles, which on PyTorch write their result over their argument.

PyTorch runs them one by one. There, memory that is new costs more than the arithmetic, and so does
Keras's dispatch for small tiles: a method of the tensor has neither. Elsewhere a compiler joins
the operations of `keras.ops`. An argument that is written over may not be used again. PyTorch
differentiates none of this.
"""

from keras import ops

from keras_ssattn._typing import Size, Tensor
from keras_ssattn.ops import stacks


def subtract(x: Tensor, y: Tensor) -> Tensor:
    """`x - y`, for y that broadcasts to x; it is x that is written over."""
    return x.sub_(y) if stacks.runs_eagerly() else x - y


def exp(x: Tensor) -> Tensor:
    """e^x."""
    return x.exp_() if stacks.runs_eagerly() else ops.exp(x)


def expm1(x: Tensor) -> Tensor:
    """e^x - 1."""
    return expm1_and_exp(x)[0]


def expm1_and_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """e^x - 1 and e^x.

    On a CPU PyTorch's own e^x - 1 takes three times as long as tanh(x / 2) (e^x + 1), which is the
    same. Both factors are exact to a rounding or two at every x, so the product is exact near 0.
    """
    if stacks.runs_on_cpu_eagerly(x):
        e = x.exp()
        x *= 0.5
        x.tanh_()
        return x.addcmul_(x, e), e
    d = x.expm1_() if stacks.runs_eagerly() else ops.expm1(x)
    return d, d + 1.0


def subtract_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """`x - y z`, for z that broadcasts to x and y; it is x that is written over."""
    return x.addcmul_(y, z, value=-1) if stacks.runs_eagerly() else x - y * z


def hide(x: Tensor, visible: Tensor, absent: float) -> Tensor:
    """`absent` where x is not visible, `[B|1, K|1, rows, columns]`."""
    if stacks.runs_eagerly():
        _apart(x, visible).masked_fill_(visible.logical_not(), absent)
        return x
    return ops.where(visible, x, absent)


def _apart(x: Tensor, visible: Tensor) -> Tensor:
    """A view of `fold`ed matrices to which a mask broadcasts."""
    if x.ndim == visible.ndim or visible.ndim < 4:
        return x
    batch, heads = visible.shape[:2]
    return x.view(*((-1, heads) if heads > 1 else (batch, -1)), *x.shape[-2:])


def absolute(x: Tensor) -> Tensor:
    """|x|."""
    return x.abs_() if stacks.runs_eagerly() else abs(x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return x.relu_() if stacks.runs_eagerly() else ops.relu(x)


def sign(x: Tensor) -> Tensor:
    """The sign of x, 0 for 0."""
    return x.sign_() if stacks.runs_eagerly() else ops.sign(x)


def fold(x: Tensor) -> Tensor:
    """Stacks of matrices as one stack on PyTorch, whose products are of such."""
    return x.flatten(0, -3) if stacks.runs_eagerly() and x.ndim > 3 else x


def unfold(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `fold`, with the first axes of `like`."""
    return x.unflatten(0, like.shape[:-2]) if stacks.runs_eagerly() else x


def _folded_to_write(x: Tensor) -> Tensor:
    """The same in the memory of `x`, or an error."""
    return x if x.ndim == 3 else x.view(-1, *x.shape[-2:])


def room(x: Tensor, columns: int) -> Tensor:
    """Memory for one `product` after another, with the rows of x; `None` where none is needed."""
    return x.new_empty((*x.shape[:-1], columns)) if stacks.runs_eagerly() else None


def product(x: Tensor, y: Tensor, into: Tensor) -> Tensor:
    """`x @ y`, for stacks of matrices; what is written over is `into`, of `room`."""
    if not stacks.runs_eagerly():
        return x @ y
    _folded_to_write(into).baddbmm_(fold(x), fold(y), beta=0)
    return into


def add_product(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`total + x @ y`, for stacks of matrices; it is `total`, contiguous, that is written over."""
    if not stacks.runs_eagerly():
        return total + x @ y
    _folded_to_write(total).baddbmm_(fold(x), fold(y))
    return total


def add_product_to(tiles: Tensor, index: Size, x: Tensor, y: Tensor) -> Tensor:
    """The stack of tiles with `x @ y` added to one of them."""
    if not stacks.runs_eagerly():
        return stacks.add(tiles, index, x @ y)
    add_product(tiles[index], x, y)
    return tiles


# These write over nothing.


def row_sum(x: Tensor) -> Tensor:
    """The sum over the last axis, which stays."""
    if stacks.runs_eagerly():
        return x.sum(-1, keepdim=True)
    return ops.sum(x, axis=-1, keepdims=True)


def row_maximum(x: Tensor) -> Tensor:
    """The maximum over the last axis, which stays."""
    if stacks.runs_eagerly():
        return x.amax(-1, keepdim=True)
    return ops.max(x, axis=-1, keepdims=True)


def maximum(x: Tensor, y: Tensor) -> Tensor:
    """The greater of x and y; y where x is NaN. Keras's own may round float64."""
    return x.where(x > y, y) if stacks.runs_eagerly() else ops.where(x > y, x, y)


def transpose(x: Tensor) -> Tensor:
    """Exchanges the last two axes."""
    return x.mT if stacks.runs_eagerly() else ops.swapaxes(x, -1, -2)
