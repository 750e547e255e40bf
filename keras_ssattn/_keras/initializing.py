"""Layers whose weights start at what a file has, and not at random numbers."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import keras
from keras import ops

from keras_ssattn._typing import DType, Identifier, Layer, Shape, Tensor

# Gives the weight of a layer, by the layer's path, with this shape and dtype; `None` if it cannot.
Source = Callable[[str, Shape, DType], Tensor]
_source: contextvars.ContextVar[Source | None] = contextvars.ContextVar(
    "keras_ssattn_source", default=None
)


@contextlib.contextmanager
def weights_from(source: Source) -> Iterator[None]:
    """While it lasts, kernels and embeddings start at what `source` gives, or at zero.

    Drawing numbers takes longer than reading them, and what is made once needs no second place.
    The parameters of normalizers and length scales, which a file may lack, start as ever.
    """
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


@keras.saving.register_keras_serializable(package="keras_ssattn")
class FromSource(keras.initializers.Zeros):
    """Starts the weight of one layer at what a source gives; made anew from its config, at zero."""

    def __init__(self, source: Source | None = None, path: str = "") -> None:
        self.source, self.path = source, path

    def __call__(self, shape: Shape, dtype: DType | None = None) -> Tensor:
        dtype = keras.utils.standardize_dtype(dtype)
        value = None if self.source is None else self.source(self.path, shape, dtype)
        return ops.zeros(shape, dtype) if value is None else value


def unless_read(identifier: Identifier, owner: Layer, name: str) -> Identifier:
    """The initializer given for the part `name` of a layer; or one that reads its weight."""
    source = _source.get()
    return identifier if source is None else FromSource(source, f"{owner.path}/{name}")
