"""Layers and models of other classes that hold converted attention, and stay so when saved."""

import functools
from typing import Any

import keras

from keras_ssattn._keras.tree import walk
from keras_ssattn.conversion.retrofit import Retrofit
from keras_ssattn.conversion.substitution import is_foreign_attention, substituted
from keras_ssattn.layers import MultiHeadAttention


def foreign_below(layer: Any) -> list[tuple[str, Any]]:
    """The attention below a layer that is not this package's, with the paths."""
    return [(path, found) for path, found in walk(layer) if is_foreign_attention(found)]


def converted_below(layer: Any) -> list[Any]:
    """This package's attention layers below a layer."""
    return [found for _, found in walk(layer) if isinstance(found, MultiHeadAttention)]


def scope_with(custom_objects: dict[str, Any]) -> Any:
    """A scope of custom objects that keeps those of the scope around it, as Keras's does not."""
    with keras.saving.custom_object_scope({}) as scope:
        around = scope.backup
    return keras.saving.custom_object_scope({**around, **custom_objects})


def original_class(layer: Any) -> type:
    """The class that a layer has, or had before it was converted."""
    return getattr(type(layer), "_original", type(layer))


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
        # What is below, and is to become the same, becomes it when this is made again. Its
        # configuration is the old one, which this one's class may give to the old class itself.
        same = [
            (holder, type(holder))
            for _, holder in walk(self)
            if isinstance(holder, Converted) and holder._retrofit == self._retrofit
        ]
        for holder, converted in same:
            object.__setattr__(holder, "__class__", converted._original)
        try:
            layer = keras.saving.serialize_keras_object(self)
        finally:
            for holder, converted in same:
                object.__setattr__(holder, "__class__", converted)
        layer.pop("compile_config", None)  # stands beside this configuration
        retrofit = self._retrofit.get_config()
        return {"layer": layer, "retrofit": retrofit, "num_attentions": self._num_attentions}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        retrofit = Retrofit.from_config(config["retrofit"])
        original = getattr(cls, "_original", None)
        known = {} if original is None else {keras.saving.get_registered_name(original): original}
        with substituted(retrofit), scope_with(known):
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


def cannot_be_loaded(model: Any) -> list[tuple[str, str]]:
    """The layers that hold converted attention and that no file would bring back, and why."""
    converted = [(path, x) for path, x in walk(model) if isinstance(x, Converted)]
    inside = {id(y) for _, x in converted for _, y in walk(x) if y is not x}
    reasons = []
    for path, layer in converted:
        # KerasHub's are large, and all alike
        if id(layer) in inside or layer._original.__module__.split(".")[0] == "keras_hub":
            continue
        config = keras.saving.serialize_keras_object(layer.get_config())
        config["layer"].pop("build_config", None)  # spares the memory of its weights
        try:
            type(layer).from_config(config)
        except Exception as error:
            name = layer._original.__name__
            reasons.append((path, f"`{name}`, once converted, could not be loaded: {error}"))
    return reasons


def _become_converted(layer: Any, retrofit: Retrofit, num_attentions: int) -> None:
    if not isinstance(layer, Converted):
        cls: Any = type(layer)
        object.__setattr__(layer, "__class__", _converted_class(cls))
    layer._retrofit = retrofit
    layer._num_attentions = num_attentions


@functools.cache
def _converted_class(original: type) -> type:
    attributes: dict[str, Any] = {"_original": original}
    if hasattr(original, "save_to_preset"):
        attributes["save_to_preset"] = _refuse_preset
    cls = type(original.__name__, (Converted, original), attributes)
    cls.__qualname__ = f"Converted[{original.__qualname__}]"
    # Files name one class, whatever the original; the last registered is the one found
    register = keras.saving.register_keras_serializable("keras_ssattn", "Converted")
    register(cls)
    register(Converted)
    return cls


def _refuse_preset(self: Any, *_: Any, **__: Any) -> None:
    raise ValueError(
        "A converted model must be saved with `.save()`, as KerasHub loads presets of its own "
        f"attention only. Received: `save_to_preset` of a converted `{self._original.__name__}`"
    )
