"""Options that all layers of a model share, or of which each layer has its own."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from keras_ssattn._checks import check_integer
from keras_ssattn._keras.serialization import Specification
from keras_ssattn._typing import Config, Identifier, Layer, Option
from keras_ssattn.layers.rotary import RotaryEmbedding, serialize_rotary, specify

T = TypeVar("T")


def for_each_layer(
    name: str, value: object, count: int, check: Callable[[Any], T]
) -> tuple[T, ...]:
    """One for each of `count` layers: of a list each its own, of anything else all the same."""
    if not isinstance(value, (list, tuple)):
        return (check(value),) * count
    if len(value) != count:
        raise ValueError(
            f"`{name}` must have one entry for each layer, if it is a list. Received: "
            f"{len(value)} entries for {count} layers"
        )
    return tuple(check(x) for x in value)


def one_or_each(entries: Sequence[Option]) -> Option:
    """The entry of all layers, or where they differ a list of those of each."""
    return entries[0] if all(entry == entries[0] for entry in entries) else list(entries)


def check_window(window: int | None) -> int | None:
    """Returns the `sliding_window` of a layer, or raises."""
    return check_integer("sliding_window", window, optional=True)


def specify_rotary(rotary: Identifier) -> Specification | None:
    """The specification of the rotary positions of a layer, which may be `"default"`."""
    if isinstance(rotary, str | bool):
        if rotary != "default":
            raise ValueError(
                '`rotary` must be "default", a `RotaryEmbedding` layer, its serialized config, or '
                f"None. Received: rotary={rotary!r}"
            )
        rotary = RotaryEmbedding()
    return specify(rotary)


def serialize_rotaries(
    rotaries: Sequence[Specification | None], layers: list[Layer]
) -> Config | list[Config | None] | None:
    """The config of the rotary positions given, with what was set since on the layers' own."""
    if all(rotary is rotaries[0] for rotary in rotaries):
        return serialize_rotary(rotaries[0], layers)
    pairs = zip(rotaries, layers, strict=True)
    return [serialize_rotary(rotary, [layer]) for rotary, layer in pairs]
