"""Attention layers replaced by this package's as they are made.

A layer of some other class makes its attention itself, in its constructor or in `build`, and
keeps it where it likes. What it holds cannot be exchanged afterwards, but what it is given when
it asks for a `keras.layers.MultiHeadAttention` can.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_ssattn._keras.tree import held_layers
from keras_ssattn.conversion import hub as convert_hub
from keras_ssattn.conversion import retrofit

_lock = threading.RLock()
_active: list[tuple[retrofit.Retrofit, list]] = []  # of the thread that holds the lock


def substitutes() -> dict[type, Callable]:
    """By class of a layer, the function of it and a `Retrofit` that makes its successor."""
    return {**retrofit.SUBSTITUTES, **convert_hub.substitutes()}


def is_foreign_attention(layer: Any) -> bool:
    """Whether a layer is attention, as far as one can see, and not this package's."""
    known = (*retrofit.SUBSTITUTES, keras.layers.Attention)
    return (
        isinstance(layer, known) or type(layer) in substitutes() or convert_hub.is_attention(layer)
    )


def refusal(layer: Any, wanted: retrofit.Retrofit) -> str | None:
    """Why a layer of attention cannot be converted, or `None`."""
    make = substitutes().get(type(layer))
    if make is None:
        return f"`{type(layer).__name__}` has a way of its own to compute attention"
    for projection in held_layers(layer).values():
        if getattr(projection, "quantization_mode", None) is not None:
            return f"quantized to {projection.quantization_mode}"
    is_keras = isinstance(layer, tuple(retrofit.SUBSTITUTES))
    reason = retrofit.refusal_of_options(layer) if is_keras else None
    reason = reason or convert_hub.refusal_of_options(layer)
    if reason is None:
        try:
            make(layer, wanted)
        except (TypeError, ValueError) as error:
            reason = str(error)
    return reason


@contextlib.contextmanager
def substituted(wanted: retrofit.Retrofit) -> Iterator[list]:
    """While it lasts, what this thread makes of those classes becomes this package's attention.

    Yields:
        A list that the new layers are added to.
    """
    with _lock, contextlib.ExitStack() as stack:
        if not _active:
            for target, function in substitutes().items():
                stack.callback(_restore, target, vars(target).get("__new__"))
                target.__new__ = _constructor(target, function)  # type: ignore[method-assign]
        made: list = []
        _active.append((wanted, made))
        stack.callback(_active.pop)
        yield made


def _constructor(target: Any, function: Callable) -> Callable:
    original, thread = target.__new__, threading.get_ident()

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        layer = original(cls, *args, **kwargs)
        if cls is not target or threading.get_ident() != thread:
            return layer
        layer.__init__(*args, **kwargs)
        wanted, made = _active[-1]
        made.append(function(layer, wanted))
        return made[-1]  # an instance of another class, so that `__init__` is not called on it

    return new


def _restore(target: Any, own: Any) -> None:
    if own is None:
        del target.__new__
    else:
        target.__new__ = own
