"""Weights that a distribution splits over devices."""

import keras

from keras_ssattn._keras.heads_layout import size_of
from keras_ssattn._typing import Layer, Shape


def check_split(owner: Layer, name: str, shape: Shape, change: str) -> None:
    """Raises if the distribution in force splits a weight into parts that are not equal.

    Args:
        owner: the layer that is being built.
        name: path of the weight below it.
        shape: of the weight.
        change: the argument that gives the size which `layout_map` splits.
    """
    distribution, path = keras.distribution.distribution(), f"{owner.path}/{name}"
    layout = distribution and distribution.get_tensor_layout(path)
    if layout is None:
        return
    # a layout of the user's own may be of another rank, of which Keras makes what it can
    for i, (size, axis) in enumerate(zip(shape, layout.axes, strict=False)):
        devices = size_of(layout, i)
        if size % devices:
            raise ValueError(
                f"`{path}`, of shape {tuple(shape)}, must be divisible by the {devices} devices "
                f"of the axis {axis!r} where it is split. Change {change}, or the devices of that "
                f"axis. Received: a size of {size}"
            )
