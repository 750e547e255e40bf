"""Layers and models of other classes that hold converted attention, and stay so when saved."""

import functools
from typing import Any

import keras

from keras_ssattn.layers import MultiHeadAttention
from keras_ssattn.models.held import walk
from keras_ssattn.models.retrofit import Retrofit
from keras_ssattn.models.substitution import is_foreign_attention, substituted


def foreign_below(layer: Any) -> list[tuple[str, Any]]:
    """The attention below a layer that is not this package's, with the paths."""
    return [(path, found) for path, found in walk(layer) if is_foreign_attention(found)]


def converted_below(layer: Any) -> list[Any]:
    """This package's attention layers below a layer."""
    return [found for _, found in walk(layer) if isinstance(found, MultiHeadAttention)]


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Converted:
    """Goes before the class of a layer that makes its attention itself.

    Such a layer's configuration says nothing of the attention, and Keras would make the old one
    from it: a trained s would be lost without a word. This class's says both, the layer's own
    configuration and what its attention is to become.
    """

    _original: type
    _retrofit: Retrofit
    _num_attentions: int
    _complete = True  # whether all attention is there, which a layer may make when first called

    def get_config(self) -> dict[str, Any]:
        converted = type(self)
        object.__setattr__(self, "__class__", self._original)
        try:
            layer = keras.saving.serialize_keras_object(self)
        finally:
            object.__setattr__(self, "__class__", converted)
        layer.pop("compile_config", None)  # stands beside this configuration
        retrofit = self._retrofit.get_config()
        return {"layer": layer, "retrofit": retrofit, "num_attentions": self._num_attentions}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        retrofit = Retrofit.from_config(config["retrofit"])
        original = getattr(cls, "_original", None)
        scope = {} if original is None else {original.__name__: original}
        with substituted(retrofit), keras.saving.custom_object_scope(scope):
            layer = keras.saving.deserialize_keras_object(config["layer"])
        mark(layer, retrofit)
        _become_converted(layer, retrofit, config["num_attentions"])
        layer._complete = layer._is_complete()
        return layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._complete:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with substituted(self._retrofit):
            outputs = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if not self._is_complete():
            raise ValueError(
                f"`{self._original.__name__}` must make {self._num_attentions} attention layers, "
                f"as when it was converted. Received: {len(converted_below(self))} of them"
            )
        mark(self, self._retrofit)
        self._complete = True
        return outputs

    def _is_complete(self) -> bool:
        return len(converted_below(self)) == self._num_attentions and not foreign_below(self)


def mark(layer: Any, retrofit: Retrofit) -> None:
    """Makes a `Converted` of each layer that holds converted attention, itself included.

    But not of Keras's own, whose configurations have those of what they hold.
    """
    for _, holder in list(walk(layer)):
        count = len(converted_below(holder))
        if count and type(holder).__module__.split(".")[0] not in ("keras", "keras_ssattn"):
            _become_converted(holder, retrofit, count)


def _become_converted(layer: Any, retrofit: Retrofit, num_attentions: int) -> None:
    if not isinstance(layer, Converted):
        cls: Any = type(layer)
        object.__setattr__(layer, "__class__", _converted_class(cls))
    layer._retrofit = retrofit
    layer._num_attentions = num_attentions


@functools.cache
def _converted_class(original: type) -> type:
    cls = type(original.__name__, (Converted, original), {"_original": original})
    cls.__qualname__ = f"Converted[{original.__qualname__}]"
    # Files name one class, whatever the original; the last registered is the one found
    register = keras.saving.register_keras_serializable("keras_ssattn", "Converted")
    register(cls)
    register(Converted)
    return cls
