"""Calls of layers from inside the call of another."""

import keras

from keras_ssattn._tensors import dtype_of
from keras_ssattn._typing import Layer, Tensor

EAGER = keras.backend.backend() == "torch"


def call_inside(layer: Layer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """`layer(x, ...)`, without what Keras does around a call where that changes nothing.

    On PyTorch, which runs eagerly, that takes longer than many a product. It changes nothing for
    a built layer inside one of the same dtype, which has set up autocasting, training and masks.
    """
    if (
        EAGER
        and layer.built
        and layer.variable_dtype == layer.compute_dtype == dtype_of(x)
        and not (layer._forward_hooks or layer._forward_pre_hooks)  # of PyTorch's modules
        and layer.quantization_mode is None
        and layer.activity_regularizer is None
    ):
        return layer.call(x, *args, **kwargs)
    return layer(x, *args, **kwargs)
