"""Copies of layers, made from their configurations, and what they have learned."""

import functools
import tempfile
from typing import Any

import keras
import numpy as np

from keras_ssattn._keras.tree import held_layers, parents_first, walk
from keras_ssattn.conversion import hub as convert_hub
from keras_ssattn.conversion.converted import converted_below, original_class
from keras_ssattn.conversion.substitution import is_foreign_attention


class Copies:
    """The copy of each layer of a model: one, however often the layer is used.

    Args:
        paths: those of the model's layers, by their ids.
    """

    def __init__(self, paths: dict[int, str]) -> None:
        self.paths = paths
        self.pairs: dict[int, tuple[Any, Any]] = {}

    def make(self, layer: Any) -> Any:
        """The copy of a layer or operation, without its weights."""
        if id(layer) not in self.pairs:
            self.pairs[id(layer)] = (layer, self._make(layer))
        return self.pairs[id(layer)][1]

    def _make(self, layer: Any) -> Any:
        if type(layer) is _functional_class():
            return self._make_functional(layer)
        if type(layer) is keras.Sequential:
            return self._make_sequential(layer)
        try:
            task = convert_hub.remake_task(layer)
            return _make_from_config(layer) if task is None else task
        except Exception as error:
            raise ValueError(
                "`model` must consist of layers that can be made again from their configuration. "
                f"Received: {self._name(layer)}: {error}"
            ) from error

    def _make_functional(self, model: Any) -> Any:
        layers = {id(layer.output): layer for layer in _input_layers(model)}
        inputs = keras.tree.map_structure(
            lambda x: _make_from_config(layers[id(x)]).output, model.input
        )
        uncompiled = keras.Model(model.input, model.output, name=model.name)
        return keras.models.clone_model(uncompiled, inputs, clone_function=self.make)

    def _make_sequential(self, model: Any) -> Any:
        inputs = [_make_from_config(layer) for layer in _input_layers(model)]
        layers = [self.make(layer) for layer in model.layers]
        return keras.Sequential([*inputs, *layers], name=model.name)

    def copy_state(self, model: Any, new: Any) -> None:
        """Copies weights, vocabularies and trainable flags of each layer to its copy."""
        graphs = (_functional_class(), keras.Sequential)
        for old, copy in list(self.pairs.values()):
            if isinstance(old, keras.Layer) and type(old) not in graphs:
                self._pair_below(old, copy)
        layers = parents_first(model)  # as a layer sets the flags of all that it holds
        copied = [self.pairs[id(x)] for x in layers if id(x) in self.pairs]
        copied = [(old, copy) for old, copy in copied if old is not copy]
        for old, copy in copied:
            self._check_kind(old, copy)
            if copy.trainable != old.trainable:
                copy.trainable = old.trainable
        for old, copy in copied:
            try:
                _copy_state(old, copy)
            except (KeyError, ValueError) as error:
                raise ValueError(
                    "`model` must consist of layers whose copies take their weights. "
                    f"Received: {self._name(old)}: {error}"
                ) from error
        if _num_weights(new) != _num_weights(model):
            alone = [w.path for x in layers if id(x) not in self.pairs for w in x.weights]
            raise ValueError(
                "`model` must have the weights that its configuration makes. Received: "
                f"{_num_weights(model)} weights, and {_num_weights(new)} in a copy, which lacks "
                f"{', '.join(dict.fromkeys(alone)) or 'none'}"
            )

    def _pair_below(self, old: Any, copy: Any) -> None:
        """Finds the copies of the layers that a layer holds."""
        if is_foreign_attention(old):
            held = {x.name: x for _, x in walk(old) if isinstance(x, keras.layers.EinsumDense)}
            [attention] = converted_below(copy)
            copies = {x.name: x for x in (attention.projections() if attention.built else [])}
        else:
            held, copies = held_layers(old), held_layers(copy)
        for child in {id(x): x for x in held.values()}.values():
            keys = [key for key, x in held.items() if x is child and key in copies]
            # Keras's own list goes by when an attribute was set, as the attributes do not
            named = [key for key in keys if key[0] != "_layers"]
            found = [copies[key] for key in named or keys]
            if id(child) in self.pairs:
                found.append(self.pairs[id(child)][1])
            if not found and not copy.built:
                raise ValueError(
                    "`model` must consist of layers that can be built from their configuration. "
                    f"Received: {self._name(old)}, whose copy is not built: the class that holds "
                    "it needs a `build`, or a `get_build_config` and `build_from_config`"
                )
            if not found or any(x is not found[0] for x in found):
                raise ValueError(
                    "`model` must share layers only as their configurations say. Received: "
                    f"{self._name(child)}, of which there is no copy, or more than one"
                )
            if id(child) not in self.pairs:
                self.pairs[id(child)] = (child, found[0])
                if child is not found[0]:
                    self._pair_below(child, found[0])

    def _check_kind(self, old: Any, copy: Any) -> None:
        """Raises unless class and dtypes are those of before."""
        if original_class(copy) is not original_class(old) and not is_foreign_attention(old):
            raise ValueError(
                "`model` must consist of layers whose configuration makes their class. Received: "
                f"{self._name(old)}, of which the copy is a `{_full_name(type(copy))}`"
            )
        if isinstance(old, (_functional_class(), keras.Sequential)):
            return  # only their layers compute
        dtypes = [(layer.variable_dtype, layer.compute_dtype) for layer in (old, copy)]
        if dtypes[0] != dtypes[1]:
            raise ValueError(
                "`model` must have its dtype policies in its configuration, or be converted under "
                "the global one that it was made under, `keras.config.set_dtype_policy`. Received: "
                f"{self._name(old)}, which keeps {dtypes[0][0]} and computes in {dtypes[0][1]}, "
                f"and a copy of {dtypes[1][0]} and {dtypes[1][1]}"
            )

    def _name(self, layer: Any) -> str:
        return f"{self.paths.get(id(layer), layer.name)}, a `{type(layer).__name__}`"


def custom_objects(model: Any) -> dict[str, type]:
    """The classes of a model's layers that are not Keras's, by the names that files give them."""
    classes: dict[str, type] = {}
    for _, layer in walk(model):
        cls = original_class(layer)
        if cls.__module__.split(".")[0] == "keras":
            continue
        name = keras.saving.get_registered_name(cls)
        if classes.setdefault(name, cls) is not cls:
            raise ValueError(
                "`model` must have classes that files can tell apart, by their names or those that "
                "`keras.saving.register_keras_serializable` gives them. Received: "
                f"`{_full_name(classes[name])}` and `{_full_name(cls)}`, both of them {name!r}"
            )
    return classes


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def _functional_class() -> type:
    x = keras.Input((1,), name="x")
    return type(keras.Model(x, x, name="identity"))


def _input_layers(model: Any) -> list[Any]:
    held = {id(x): x for x in held_layers(model).values() if isinstance(x, keras.layers.InputLayer)}
    return list(held.values())


def _make_from_config(layer: Any) -> Any:
    if type(layer) is keras.layers.Lambda:
        # Its configuration has no function that Keras makes again, or not what it refers to
        return keras.layers.Lambda(
            layer.function,
            output_shape=layer.get_config().get("output_shape"),
            mask=getattr(layer, "mask", None),
            arguments=layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
    # Serialized, lest the copy share an object that the configuration holds
    config = keras.saving.serialize_keras_object(layer.get_config())
    copy = type(layer).from_config(config)
    copy.name = layer.name  # which a class may keep out of its configuration
    return copy


def _copy_state(old: Any, copy: Any) -> None:
    if is_foreign_attention(old):
        return  # its weights are those of its projections
    store: dict[str, Any] = {}
    old.save_own_variables(store)
    # Arrays of their own: a step of training on JAX takes over those that it is given
    copy.load_own_variables(
        {name: np.array(keras.ops.convert_to_numpy(x)) for name, x in store.items()}
    )
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            copy.load_assets(folder)
    for weight, other in zip(_own_weights(old), _own_weights(copy), strict=True):
        if other.trainable != weight.trainable:
            other.trainable = weight.trainable


def _own_weights(layer: Any) -> list[Any]:
    """A layer's weights without those of the layers that it holds."""
    below = {id(weight) for held in held_layers(layer).values() for weight in held.weights}
    return [weight for weight in layer.weights if id(weight) not in below]


def _num_weights(model: Any) -> int:
    """The number of a model's weights, without those of its attention's normalizers."""
    own = sum(len(attention.normalizer.weights) for attention in converted_below(model))
    return len(model.weights) - own
