"""What a `keras.distribution` layout says of the tensors inside attention."""

import keras

HEADS = "keras_ssattn/heads"  # the key of their layout in a `LayoutMap`


def heads_layout() -> keras.distribution.TensorLayout | None:
    """The layout of `[B, T, H, D]`, if attention is to be split along time."""
    if keras.backend.backend() != "jax":
        return None
    distribution = keras.distribution.distribution()
    layout = None if distribution is None else distribution.get_tensor_layout(HEADS)
    if layout is None or len(layout.axes) != 4:  # a pattern for everything else may match as well
        return None
    return layout if size_of(layout, 1) > 1 else None


def size_of(layout: keras.distribution.TensorLayout, axis: int) -> int:
    """The number of devices over which an axis of a tensor is split."""
    mesh, name = layout.device_mesh, layout.axes[axis]
    return 1 if name is None else mesh.shape[mesh.axis_names.index(name)]
