"""Short names of layers, that do not depend on the number of models made before."""

from collections.abc import Iterable

from keras_ssattn._keras.tree import walk
from keras_ssattn._typing import Layer
from keras_ssattn.layers import LengthScale, MultiHeadAttention, TransformerBlock


def layer_names(model: Layer, others: Iterable[Layer] = ()) -> dict[int, str]:
    """The names of attention layers, blocks and length scales that are built, by their `id`.

    A name is the path of the layer inside `model`: `causal_lm/block_1/attention` is `block_1`, as
    are the block and the length scale. Layers of one path are told apart by the order in which the
    model holds them: the second is `block_1#2`. `others` may be layers that it does not hold.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    for layer in (*(layer for _, layer in walk(model)), *others):
        named = isinstance(layer, (TransformerBlock, MultiHeadAttention, LengthScale))
        if not named or layer.path is None:
            continue
        path = _path_inside(model, layer)
        name = names.get(id(layer)) or _not_taken(path, taken)
        taken.add(name)
        names[id(layer)] = name
        part = None
        if isinstance(layer, TransformerBlock):
            part = layer.attention
        elif isinstance(layer, MultiHeadAttention):
            part = layer.normalizer.length_scale
        if part is not None and _path_inside(model, part) == path:
            names[id(part)] = name
    return names


def _path_inside(model: Layer, layer: Layer) -> str:
    path = layer.path.removesuffix("/length_scale").removesuffix("/normalizer")
    return path.removeprefix(f"{model.name}/").removesuffix("/attention")


def _not_taken(path: str, taken: set[str]) -> str:
    name, count = path, 1
    while name in taken:
        count += 1
        name = f"{path}#{count}"
    return name
