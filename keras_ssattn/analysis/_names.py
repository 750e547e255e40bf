"""Short names of layers, that do not depend on the number of models made before."""

from collections.abc import Container
from typing import Any


def layer_name(path: str, model: Any, taken: Container[str] = ()) -> str:
    """The path of a layer or weight inside `model`, without the final `attention` of a block.

    `causal_lm/block_1/attention` is `block_1`. A name already taken, by a layer that runs twice
    or one of the same path in another part of the model, is followed by `#2` and so on.
    """
    name = path.removeprefix(f"{model.name}/").removesuffix("/attention")
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}#{count}"
    return unique
