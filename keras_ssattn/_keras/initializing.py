"""Layers whose weights are about to be read from a file, built without random numbers."""

import contextlib
import contextvars
from collections.abc import Iterator

from keras_ssattn._typing import Identifier

_to_be_read: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "keras_ssattn_to_be_read", default=False
)


@contextlib.contextmanager
def weights_to_be_read() -> Iterator[None]:
    """While it lasts, kernels and embeddings start at zero: drawing them takes longer than reading.

    The parameters of normalizers and length scales, which a file may lack, start as ever.
    """
    token = _to_be_read.set(True)
    try:
        yield
    finally:
        _to_be_read.reset(token)


def unless_read(identifier: Identifier) -> Identifier:
    """The initializer given, or zeros where the weights are to be read."""
    return "zeros" if _to_be_read.get() else identifier
