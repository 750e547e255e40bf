"""The layers below a layer, wherever it keeps them."""

from collections.abc import Iterator
from typing import Any

import keras


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
