"""Observers: what watches the layers of this package while they run, such as `analysis.record`.

Layers ask `observer()` as they run and tell it what they did. It belongs to a context: other
threads, and code outside of the `with`, do not see it.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Protocol

import keras

from keras_ssattn._frameworks import is_compiling
from keras_ssattn._keras.tree import parents_first
from keras_ssattn._typing import Layer, Tensor


class Observer(Protocol):
    """What is told of each call of a layer."""

    def attended(self, layer: keras.Layer, weights: Tensor, visible: Tensor) -> None:
        """Attention has run, with weights and a boolean mask of the shape `[B, H, T, S]`."""

    def transformed(self, layer: keras.Layer, values: Tensor, mask: Tensor | None) -> None:
        """A block has given values `[B, T, E]`, of positions `[B, T]` that are no padding."""


_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    "keras_ssattn_observer", default=None
)


def observer() -> Observer | None:
    """The observer of this context, if there is one; none sees into `torch.compile`."""
    return None if is_compiling() else _observer.get()


@contextlib.contextmanager
def observed_by(observer: Observer | None) -> Iterator[None]:
    """While it lasts, layers in this context tell `observer` what they do."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def is_watched(model: Layer) -> bool:
    """Whether an observer, or a hook of PyTorch's on a layer, wants to see what layers compute."""
    if observer() is not None:
        return True
    if keras.backend.backend() != "torch":
        return False
    return any(x._forward_hooks or x._forward_pre_hooks for x in parents_first(model))
