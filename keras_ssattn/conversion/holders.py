"""Converts layers and models that make their attention themselves: the holders of attention.

The configuration of a holder does not mention its attention. From it, Keras would make the old
attention, and drop a trained s without an error. So a converted holder belongs to a subclass of
its class. The subclass makes the new attention, and writes into its configuration which one.
"""

import contextlib
import contextvars
import copy
import dataclasses
import functools
import importlib
import inspect
import json
from collections.abc import Callable
from typing import Any

import keras

from keras_ssattn._keras.serialization import Specification
from keras_ssattn._keras.tree import walk
from keras_ssattn._typing import Config, Identifier, Layer
from keras_ssattn.conversion import attention, hub
from keras_ssattn.conversion.substitution import substituted
from keras_ssattn.layers import MultiHeadAttention, SSMax
from keras_ssattn.layers.length_scales.log import s_like_softmax


def substitutes() -> dict[type, Callable[[Config, Identifier], keras.Layer]]:
    """For each attention class, the function of options and a normalizer that replaces it."""
    keras_classes = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
    return {**dict.fromkeys(keras_classes, attention.make_attention), **hub.substitutes()}


def refusal(layer: keras.Layer, normalizer: Identifier) -> str | None:
    """Says why an attention layer cannot be converted, or returns `None`."""
    options = attention.options_of_layer(layer)
    if type(layer) not in substitutes():
        return hub.refusal_of_class(layer, options)
    for _, projection in walk(layer):
        mode = getattr(projection, "quantization_mode", None)
        if projection is not layer and mode is not None:
            return f"quantized to {mode}"
    return hub.refusal_of_options(type(layer), options, normalizer)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Says which attention a model gets, and which classes hold it.

    Conversions with equal arguments are equal. This is why a normalizer layer is kept as JSON.

    Args:
        normalizer, train_length, causal: of `convert_attention`.
        holders: the classes of the layers that make attention themselves.
    """

    normalizer: str
    train_length: int | None
    causal: bool
    holders: frozenset[type] = frozenset()

    @classmethod
    def from_config(cls, config: Config, holders: frozenset[type]) -> "Conversion":
        normalizer = config["normalizer"]
        if isinstance(normalizer, Specification):
            normalizer = normalizer.serialize()
        if not isinstance(normalizer, str):
            normalizer = json.dumps(normalizer, sort_keys=True)
        return cls(normalizer, config["train_length"], config["causal"], holders)

    def get_config(self) -> Config:
        is_config = self.normalizer.startswith("{")
        normalizer = json.loads(self.normalizer) if is_config else self.normalizer
        return {"normalizer": normalizer, "train_length": self.train_length, "causal": self.causal}

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Inside this context, layers that this thread makes are converted from the start."""
        makers: dict[type, Callable[..., object]] = {
            cls: functools.partial(self._make_attention, cls) for cls in substitutes()
        }
        for cls in self.holders:
            converted: Any = class_for(cls, self)
            makers[cls] = functools.partial(converted.__new__, converted)
        return substituted(makers)

    def _make_attention(self, cls: type, *args: object, **kwargs: object) -> keras.Layer:
        options = attention.options_of_call(cls, *args, **kwargs)
        normalizer = self.get_config()["normalizer"]
        reason = hub.refusal_of_options(cls, options, normalizer)
        if reason is not None:
            raise ValueError(
                f"`{cls.__name__}` must have options that can be converted. Received: {reason}"
            )
        if self.train_length is not None:
            window = hub.window_of(cls, options)
            normalizer = SSMax(init_s=s_like_softmax(self.train_length, self.causal, window))
        return substitutes()[cls](options, normalizer)


def is_foreign_attention(layer: keras.Layer) -> bool:
    """Whether a layer looks like attention, and is not this package's."""
    known = (keras.layers.Attention, *substitutes())
    return isinstance(layer, known) or hub.is_attention(layer)


def foreign_below(layer: keras.Layer) -> list[tuple[str, keras.Layer]]:
    """The paths and layers of attention below a layer that is not this package's."""
    return [(path, found) for path, found in walk(layer) if is_foreign_attention(found)]


def converted_below(layer: keras.Layer) -> list[MultiHeadAttention]:
    """This package's attention layers below a layer."""
    return [found for _, found in walk(layer) if isinstance(found, MultiHeadAttention)]


def holders_below(layer: keras.Layer, holds: Callable[[keras.Layer], object]) -> frozenset[type]:
    """The classes of the layers below a layer for which `holds` is true.

    Leaves out converted layers, and the classes of Keras and of this package: their configurations
    contain those of the layers that they hold.
    """
    others = [
        found
        for _, found in walk(layer)
        if type(found).__module__.split(".")[0] not in ("keras", "keras_ssattn")
        and not isinstance(found, Converted)
        and not is_foreign_attention(found)
    ]
    return frozenset(type(found) for found in others if holds(found))


# The conversion of the layer that is writing its configuration
_writing: contextvars.ContextVar[Conversion | None] = contextvars.ContextVar("writing")
# The key under which a configuration inside that one names the original class
CLASS = "keras_ssattn>class"


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Converted:
    """The first base of the class of each converted holder; the original class is the second.

    Files name this one class for all of them. The configuration contains the one that the
    original layer would have (`layer`), the new attention (`retrofit`), the number of attention
    layers, and the names of all classes that hold attention (`holders`).
    """

    _original: type
    _conversion: Conversion
    _expected: int | None = None  # number of attention layers, if the first call has to make some

    def get_config(self) -> Config:
        if _writing.get(None) == self._conversion:
            # The layer around this one is converted, too, and will make this one again. Its class
            # may pass the configuration to the original class, so it must be the original one.
            config = super().get_config()  # type: ignore[misc]
            return {**config, CLASS: _names_of(self._original)}
        context = contextvars.copy_context()
        context.run(_writing.set, self._conversion)
        layer = context.run(keras.saving.serialize_keras_object, self)
        _name_originals(layer)
        layer.pop("compile_config", None)  # stands beside this configuration
        return {
            "layer": layer,
            "retrofit": self._conversion.get_config(),
            "num_attentions": self._expected or len(converted_below(self)),
            "holders": sorted(map(_names_of, self._conversion.holders), key=str),
        }

    @classmethod
    def from_config(cls, config: Config) -> keras.Layer:
        of_class = getattr(cls, "_conversion", None)  # `Converted` itself has none
        known: frozenset[type] = of_class.holders if of_class else frozenset()
        num_attentions = config["num_attentions"]
        with scope_with({keras.saving.get_registered_name(x): x for x in known}):
            named = [_class_named(x) for x in (config["layer"], *config.get("holders", ()))]
            holders = known.union(x for x in named if x is not None)
            layer = _make(config, holders)
            if "holders" not in config or None in named:
                # A file of 0.1.0, or a class that is not registered: look for the holders
                complete = len(converted_below(layer)) == num_attentions
                missed = holders_below(layer, lambda x: not complete or converted_below(x))
                layer = _make(config, holders | missed) if missed else layer
        if len(converted_below(layer)) != num_attentions:
            layer._expected = num_attentions
        return layer

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self._expected is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with self._conversion.active():
            outputs = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if len(converted_below(self)) != self._expected:
            raise ValueError(
                f"`{self._original.__name__}` must make {self._expected} attention layers, "
                f"as when it was converted. Received: {len(converted_below(self))} of them"
            )
        self._expected = None
        return outputs


@functools.cache
def class_for(original: Any, conversion: Conversion) -> type:
    """Makes the subclass of a class that makes the new attention."""

    @functools.wraps(original.__init__)
    def init(*args: object, **kwargs: object) -> None:
        with conversion.active():
            original.__init__(*args, **kwargs)

    if not hasattr(original.__init__, "__wrapped__"):  # Keras does not look below a decorator
        init.__signature__ = inspect.signature(original.__init__)  # type: ignore[attr-defined]

    @functools.wraps(original.get_config)  # copies the mark that Keras sets on its own methods
    def get_config(self: Layer) -> Config:
        return Converted.get_config(self)

    attributes = {
        "_original": original,
        "_conversion": conversion,
        "__new__": _new,
        "__init__": init,
        "get_config": get_config,
    }
    if hasattr(original, "save_to_preset"):
        attributes["save_to_preset"] = hub.refuse_preset
    cls = type(original.__name__, (Converted, original), attributes)
    cls.__qualname__ = f"Converted[{original.__qualname__}]"
    # A file names a class as it is registered. The first line has files name `Converted` instead
    # of this class; the second has the name find `Converted` again.
    register = keras.saving.register_keras_serializable("keras_ssattn", "Converted")
    register(cls)
    register(Converted)
    return cls


def _new(cls: Any, *args: object, **kwargs: object) -> Layer:
    layer = super(Converted, cls).__new__(cls, *args, **kwargs)
    build = layer.build  # Keras, too, wraps the `build` of each layer here

    @functools.wraps(build)
    def converted_build(*args: object, **kwargs: object) -> None:
        with cls._conversion.active():
            build(*args, **kwargs)

    layer.build = converted_build
    return layer


def _make(config: Config, holders: frozenset[type]) -> Layer:
    layer = copy.deepcopy(config["layer"])  # some classes change it
    with Conversion.from_config(config["retrofit"], holders).active():
        return keras.saving.deserialize_keras_object(layer)


def scope_with(custom_objects: dict[str, type]) -> contextlib.AbstractContextManager[object]:
    """A scope of custom objects inside which those of the scope around it are still known."""
    with keras.saving.custom_object_scope({}) as scope:
        around = scope.backup
    return keras.saving.custom_object_scope({**around, **custom_objects})


def original_class(layer: keras.Layer) -> type:
    """The class of a layer, or the one it had before it was converted."""
    return getattr(type(layer), "_original", type(layer))


def _names_of(cls: type) -> dict[str, str]:
    """The entries with which a configuration names a class."""
    names = {"module": cls.__module__, "class_name": cls.__name__}
    return {**names, "registered_name": keras.saving.get_registered_name(cls)}


def _class_named(config: Config) -> type | None:
    """The class that a configuration names, or `None` if it is not registered."""
    found = keras.saving.get_registered_object(config["registered_name"])
    if found is None and hub.is_of_kerashub(config["module"]):
        found = vars(importlib.import_module(config["module"])).get(config["class_name"])
    return found if isinstance(found, type) else None


def _name_originals(config: Any) -> None:
    """Has each configuration inside another name the original class."""
    if isinstance(config, dict):
        if isinstance(config.get("config"), dict):
            config.update(config["config"].pop(CLASS, {}))
        config.pop(CLASS, None)
    if isinstance(config, (dict, list, tuple)):
        for child in config.values() if isinstance(config, dict) else config:
            _name_originals(child)
