"""Calls of layers from inside the call of another."""

import keras

from keras_ssattn._tensors import dtype_of
from keras_ssattn._typing import Layer, Tensor

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EAGER = keras.backend.backend() == "torch"


def call_inside(owner: Layer, layer: Layer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """`layer(x, ...)` in the call of its owner, without Keras's own work where it changes nothing.

    On PyTorch, which runs eagerly, that work takes longer than a small product.
    """
    call = layer.call if adds_nothing(owner, layer, x) else layer
    return call(x, *args, **kwargs)


def adds_nothing(owner: Layer, layer: Layer, x: Tensor) -> bool:
    """Whether calling a layer is no more than its `call`, on PyTorch.

    So it is for a built layer of its owner's dtype: the owner has set up autocasting, training
    and masks.
    """
    return (
        EAGER
        and layer.built
        and owner.compute_dtype == layer.compute_dtype == layer.variable_dtype == dtype_of(x)
        and not any(getattr(layer, hooks) for hooks in HOOKS)
        and layer.quantization_mode is None
        and layer.activity_regularizer is None
    )
