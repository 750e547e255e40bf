"""Makes layers again from their configurations, and copies their weights."""

import functools
import re
import tempfile
from typing import Any

import keras
import numpy as np

from keras_ssattn._keras.tree import held_layers, parents_first, walk
from keras_ssattn._typing import Layer
from keras_ssattn.conversion import hub
from keras_ssattn.conversion.holders import (
    converted_below,
    foreign_below,
    is_foreign_attention,
    original_class,
)


class Clones:
    """One clone for each layer of a model, even if the model uses the layer more than once."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.paths = {id(layer): path for path, layer in walk(model)}
        self.pairs: dict[int, tuple[Layer, Layer]] = {}  # a layer and its clone

    def make(self, layer: Layer) -> Layer:
        """The clone of a layer or operation, without its weights."""
        if id(layer) not in self.pairs:
            self.pairs[id(layer)] = (layer, self._make(layer))
        return self.pairs[id(layer)][1]

    def original_of(self, clone: Layer) -> Layer:
        """The layer that another is the clone of."""
        return next(old for old, new in self.pairs.values() if new is clone)

    def copy_state(self, clone: keras.Model) -> None:
        """Copies weights, vocabularies and trainable flags from each layer to its clone."""
        graphs = (_functional_class(), keras.Sequential)
        for old, new in list(self.pairs.values()):
            if isinstance(old, keras.Layer) and type(old) not in graphs:
                self._pair_below(old, new)
        layers = parents_first(self.model)  # setting a layer's flag sets those of what it holds
        pairs = [self.pairs[id(layer)] for layer in layers if id(layer) in self.pairs]
        pairs = [(old, new) for old, new in pairs if old is not new]
        for old, new in pairs:
            self._check_kind(old, new)
            if new.trainable != old.trainable:
                new.trainable = old.trainable
        for old, new in pairs:
            try:
                _copy_own_state(old, new)
            except (KeyError, ValueError) as error:
                expected = "consist of layers whose copies take their weights"
                raise self._error(expected, old, f": {error}") from error
        counts = _num_weights(self.model), _num_weights(clone)
        if counts[0] != counts[1]:
            alone = [w.path for x in layers if id(x) not in self.pairs for w in x.weights]
            raise ValueError(
                "`model` must have the weights that its configuration makes. Received: "
                f"{counts[0]} weights, and {counts[1]} in a copy, which lacks "
                f"{', '.join(dict.fromkeys(alone)) or 'none'}"
            )

    def _make(self, layer: Layer) -> Layer:
        if type(layer) is _functional_class():
            return self._make_functional(layer)
        if type(layer) is keras.Sequential:
            inputs = [_make_from_config(x) for x in _input_layers(layer)]
            return keras.Sequential([*inputs, *map(self.make, layer.layers)], name=layer.name)
        try:
            task = hub.remake_task(layer)
            return _make_from_config(layer) if task is None else task
        except Exception as error:
            expected = "consist of layers that can be made again from their configuration"
            raise self._error(expected, layer, f": {error}") from error

    def _make_functional(self, model: Layer) -> Layer:
        layers = {id(layer.output): layer for layer in _input_layers(model)}
        inputs = keras.tree.map_structure(
            lambda x: _make_from_config(layers[id(x)]).output, model.input
        )
        uncompiled = keras.Model(model.input, model.output, name=model.name)
        return keras.models.clone_model(uncompiled, inputs, clone_function=self.make)

    def _pair_below(self, old: Layer, new: Layer) -> None:
        """Pairs each layer that `old` holds with the one that `new` holds in the same place."""
        held, clones = _held_by_both(old, new)
        for child in {id(x): x for x in held.values()}.values():
            places = [place for place, x in held.items() if x is child and place in clones]
            # Keras's own list is ordered by when attributes were set, which may differ
            named = [place for place in places if place[0] != "_layers"]
            found = [clones[place] for place in named or places]
            is_new = id(child) not in self.pairs
            if not is_new:
                found.append(self.pairs[id(child)][1])
            if not found and not new.built:
                raise self._error(
                    "consist of layers that can be built from their configuration",
                    old,
                    ", whose copy is not built: the class that holds it needs a `build`, or a "
                    "`get_build_config` and `build_from_config`",
                )
            if not found or any(x is not found[0] for x in found):
                expected = "share layers only as their configurations say"
                raise self._error(expected, child, ", of which there is no copy, or more than one")
            self.pairs[id(child)] = (child, found[0])
            if is_new and child is not found[0]:
                self._pair_below(child, found[0])

    def _check_kind(self, old: Layer, new: Layer) -> None:
        """Raises unless a layer and its clone have the same class and dtypes."""
        is_replaced = is_foreign_attention(old) or hub.is_head_norm(old)
        if original_class(new) is not original_class(old) and not is_replaced:
            expected = "consist of layers whose configuration makes their class"
            raise self._error(expected, old, f", of which the copy is a `{_full_name(type(new))}`")
        dtypes, others = [(x.variable_dtype, x.compute_dtype) for x in (old, new)]
        graphs = (_functional_class(), keras.Sequential)  # which compute nothing themselves
        if dtypes != others and not isinstance(old, graphs):
            raise self._error(
                "have its dtype policies in its configuration, or be converted under the global "
                "one that it was made under, `keras.config.set_dtype_policy`",
                old,
                f", which keeps {dtypes[0]} and computes in {dtypes[1]}, and a copy of {others[0]} "
                f"and {others[1]}",
            )

    def _error(self, expected: str, layer: Layer, received: str) -> ValueError:
        name = f"{self.paths.get(id(layer), layer.name)}, a `{type(layer).__name__}`"
        return ValueError(f"`model` must {expected}. Received: {name}{received}")


def custom_objects(model: keras.Model) -> dict[str, type]:
    """The classes of a model's layers that are not Keras's, by their names in files."""
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


def _input_layers(model: keras.Model) -> list[Layer]:
    held = [x for x in held_layers(model).values() if isinstance(x, keras.layers.InputLayer)]
    return list({id(x): x for x in held}.values())


def _make_from_config(layer: Layer) -> Layer:
    if type(layer) is keras.layers.Lambda:
        # Its configuration lacks the function, or what the function refers to
        return keras.layers.Lambda(
            layer.function,
            output_shape=layer.get_config().get("output_shape"),
            mask=getattr(layer, "mask", None),
            arguments=layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
    # Serialized, so that the layers do not share objects in the configuration
    config = keras.saving.serialize_keras_object(layer.get_config())
    clone = type(layer).from_config(config)
    clone.name = layer.name  # a configuration may lack it
    return clone


def _held_by_both(old: Layer, new: Layer) -> tuple[dict[Any, Layer], dict[Any, Layer]]:
    """The layers that a layer and its clone hold, by their places, which are the same in both."""
    if is_foreign_attention(old):
        return hub.parts(old), _parts_of_converted(new)
    return held_layers(old), held_layers(new)


def _parts_of_converted(layer: Layer) -> dict[str, Layer]:
    """The layers with weights of a converted attention, by name."""
    [attention] = converted_below(layer)
    if not attention.built:
        return {}
    parts = (*attention.projections(), attention.query_norm, attention.key_norm)
    return {x.name: x for x in parts}


def _copy_own_state(old: Layer, new: Layer) -> None:
    """Copies the state of a layer, without that of the layers it holds."""
    if is_foreign_attention(old):  # all its weights but sinks are in its projections and norms
        hub.copy_sinks(old, converted_below(new)[0])
        return
    store: dict[str, np.ndarray] = {}
    old.save_own_variables(store)
    # Copies: on JAX, a training step may reuse the memory of the arrays it gets
    arrays = {name: np.array(keras.ops.convert_to_numpy(x)) for name, x in store.items()}
    if isinstance(old, keras.layers.EinsumDense) and old.equation != new.equation:
        arrays["0"] = arrays["0"].transpose(_kernel_axes(old.equation))
    new.load_own_variables(arrays)
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    for weight, other in zip(_own_weights(old), _own_weights(new), strict=True):
        if other.trainable != weight.trainable:
            other.trainable = weight.trainable


def _kernel_axes(equation: str) -> list[int]:
    """The axes of a kernel in the order of this package's: the summed ones, then the others."""
    x, kernel, y = re.split(",|->", equation)
    axes = sorted(kernel, key=lambda axis: (axis in y, (x + y).index(axis)))
    return [kernel.index(axis) for axis in axes]


def _own_weights(layer: Layer) -> list[keras.Variable]:
    below = {id(weight) for held in held_layers(layer).values() for weight in held.weights}
    return [weight for weight in layer.weights if id(weight) not in below]


def _num_weights(model: keras.Model) -> int:
    """The number of a model's weights, without those of normalizers, or that normalizers get."""
    added = sum(len(attention.normalizer.weights) for attention in converted_below(model))
    sinks = sum(len(_own_weights(attention)) for _, attention in foreign_below(model))
    return len(model.weights) - added - sinks
