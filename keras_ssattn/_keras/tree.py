"""The layers below a layer, wherever it keeps them."""

import types
from collections.abc import Iterator
from typing import Any

import keras

SETTINGS = (bool, int, float, str, types.FunctionType, type(None))
# Those that change in training, and change no output of a layer.
STATES = ("built", "stop_evaluating", "stop_predicting", "stop_training", "trainable", "training")


def held_layers(layer: Any) -> dict[tuple, Any]:
    """The layers in a layer's attributes, and in lists and dictionaries there, by where."""
    held: dict[tuple, Any] = {}

    def collect(where: tuple, value: Any) -> None:
        if isinstance(value, keras.Layer):
            held[where] = value
        elif isinstance(value, dict):
            for name, item in list(value.items()):
                collect((*where, name), item)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                collect((*where, i), item)

    attributes = {**vars(layer)}
    attributes.update(attributes.pop("_modules", {}))  # where PyTorch keeps most, but not all
    collect((), attributes)
    return held


def parents_first(layer: Any) -> list[Any]:
    """A layer and all layers below it, each after all that hold it."""
    seen: set[int] = set()
    children_first: list[Any] = []

    def visit(layer: Any) -> None:
        if id(layer) not in seen:
            seen.add(id(layer))
            for child in held_layers(layer).values():
                visit(child)
            children_first.append(layer)

    visit(layer)
    return children_first[::-1]


def walk(layer: Any, path: str = "", seen: set | None = None) -> Iterator[tuple[str, Any]]:
    """A layer and all layers below it, each once, with their paths of names."""
    seen = set() if seen is None else seen
    if id(layer) in seen:
        return
    seen.add(id(layer))
    path = f"{path}/{layer.name}" if path else layer.name
    yield path, layer
    # A model's own list first: users know the paths that it gives
    own = layer.layers if isinstance(layer, keras.Model) else []
    for child in [*own, *held_layers(layer).values()]:
        yield from walk(child, path, seen)


def settings_of(layer: Any) -> tuple:
    """The plain public attributes of a layer and all below it, on which a graph of it depends."""
    return tuple(
        (name, value)
        for x in parents_first(layer)
        for name, value in vars(x).items()
        if not name.startswith("_") and name not in STATES and isinstance(value, SETTINGS)
    )


def foreign_part(model: Any) -> str | None:
    """What in a model is code of the user's own, which may do more than compute tensors."""
    for layer in parents_first(model):
        if not _is_known(type(layer)):
            return f"{type(layer).__name__}, a class of your own,"
        own = [name for name in vars(layer) if name in ("call", "__call__", "next_logits")]
        if own:
            return f"`{own[0]}`, set on a {type(layer).__name__},"
        activation = getattr(layer, "activation", None)
        if activation is not None and not _is_known(activation):
            return f"the activation {activation!r}"
    return None


def _is_known(value: Any) -> bool:
    """Whether a class or a function, or the class of an object, is Keras's or this package's."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return module.split(".")[0] in ("keras", "keras_ssattn")
