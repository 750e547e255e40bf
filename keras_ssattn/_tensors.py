"""Tensors of any backend: their dtypes, and sizes that may be unknown.

A known size is an `int`. Anything else (`None`, a tensor, the symbol of a tracer) is unknown: it
is never compared in Python, and never decides which path is taken.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_ssattn._frameworks import is_compiling
from keras_ssattn._typing import ArrayLike, DType, Size, Tensor


def to_tensor(x: ArrayLike) -> Tensor:
    """Converts arrays, lists and numbers to a tensor; leaves symbolic ones alone."""
    return x if keras.utils.is_keras_tensor(x) else ops.convert_to_tensor(x)


def dtype_of(x: Tensor) -> DType:
    return keras.utils.standardize_dtype(x.dtype)


def cast(x: Tensor, dtype: DType) -> Tensor:
    """`ops.cast`, at no cost where there is nothing to do: eager decoding is made of such calls."""
    return x if dtype_of(x) == dtype else ops.cast(x, dtype)


def widen(x: Tensor) -> Tensor:
    """Casts to float32, the precision of all arithmetic here; float64 stays."""
    return x if dtype_of(x) == "float64" else cast(x, "float32")


def multiply_wide(x: Tensor, factor: Tensor) -> Tensor:
    """`x` times a factor, in float32 or, where x has it, float64."""
    x = widen(x)
    return x * cast(factor, dtype_of(x))


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """`ops.matmul`, which on PyTorch computes float64 in float32."""
    return x @ y if dtype_of(x) == "float64" else ops.matmul(x, y)


def split(x: Tensor, sizes: list[Size]) -> Sequence[Tensor]:
    """Parts of the last axis, of these sizes.

    The gradient of slices is slow on TensorFlow: it fills zeros around each, on one thread. Keras's
    own function makes the sizes a tensor on PyTorch, which no trace follows.
    """
    if keras.backend.backend() == "torch" and not keras.utils.is_keras_tensor(x):
        return x.split(sizes, dim=-1)
    return ops.split(x, [*itertools.accumulate(sizes)][:-1], axis=-1)


class KeptProperty:
    """`functools.cached_property`, without the lock in it up to Python 3.11.

    `torch.compile` cannot see through that.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.func, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        value = self.func(instance)
        object.__setattr__(instance, self.name, value)
        return value


def is_known(size: Size) -> bool:
    return isinstance(size, int)


def size_tensor(size: Size) -> Tensor:
    """A size as an int32 tensor; those of PyTorch's traces are no tensors, and cannot be cast.

    In `torch.compile` a cast would make the graph one of that size alone.
    """
    if not is_compiling() and (is_known(size) or hasattr(size, "dtype")):
        return ops.cast(size, "int32")
    return ops.cast(ops.sum(ops.ones((size,), "int32")), "int32")


def may_be_equal(size: Size, other: Size) -> bool:
    """False if both sizes are known and differ."""
    return not (is_known(size) and is_known(other)) or size == other


def zero_if_equal(size: Size, other: Size) -> Tensor:
    """0.0, for two sizes of which one is unknown, computed so that it fails if they differ.

    Add it to something that is used: a graph leaves out what is not. Ranges of 2 or more cannot be
    added unless they are as long. (A reshape, or zeros, TensorFlow would simplify away; and its
    XLA broadcasts a length to any multiple.)
    """
    steps = ops.arange(0, size + 2, dtype="int32") + ops.arange(0, other + 2, dtype="int32")
    return ops.cast(steps[0], "float32")
