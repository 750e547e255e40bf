"""One vector from a sequence, with regard to its padding."""

import keras
from keras import ops

from keras_ssattn._checks import check_mask
from keras_ssattn._tensors import is_known, widen
from keras_ssattn._typing import Shape, Tensor
from keras_ssattn.ops.sizes import steps


@keras.saving.register_keras_serializable(package="keras_ssattn")
class LastTimestep(keras.layers.Layer):
    """The last step, `[B, T, E]` to `[B, E]`; with a mask, the last step that it leaves.

    Call arguments:
        inputs: `[B, T, E]`.
        mask: boolean `[B, T]`, False at padding. Defaults to the mask attached to `inputs`.

    Returns:
        `[B, E]`; zeros for a sequence of no steps, or of nothing but padding.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import LastTimestep
    >>> x = np.array([[[1.0], [2.0], [3.0]]])
    >>> float(LastTimestep()(x, mask=np.array([[True, True, False]]))[0, 0])
    2.0
    """

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = check_mask("mask", mask, rank=2)
        if mask is None and is_known(inputs.shape[1]) and inputs.shape[1] > 0:
            return inputs[:, -1]
        if mask is None:  # a length that is unknown until a graph runs may be 0
            mask = ops.ones(ops.shape(inputs)[:2], "bool")
        step = steps(ops.shape(inputs)[1]) + 1  # counted from 1
        seen = ops.where(mask, step, 0)
        last = ops.amax(ops.pad(seen, ((0, 0), (0, 1))), axis=1, keepdims=True)  # 0 for no steps
        is_last = ops.logical_and(mask, step == last)
        return ops.sum(ops.where(ops.expand_dims(is_last, 2), inputs, 0.0), axis=1)

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None) -> None:
        return None

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], *input_shape[2:])


@keras.saving.register_keras_serializable(package="keras_ssattn")
class MeanPool(keras.layers.Layer):
    """The mean over time, `[B, T, E]` to `[B, E]`, of the steps that a mask leaves.

    Unlike `keras.layers.GlobalAveragePooling1D` it gives zeros, not NaN, for a sequence of no
    steps or of nothing but padding, and sums in float32.

    Call arguments:
        inputs: `[B, T, E]`.
        mask: boolean `[B, T]`, False at padding. Defaults to the mask attached to `inputs`.

    Returns:
        `[B, E]`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import MeanPool
    >>> x = np.array([[[1.0], [2.0], [6.0]]])
    >>> float(MeanPool()(x, mask=np.array([[True, True, False]]))[0, 0])
    1.5
    """

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = check_mask("mask", mask, rank=2)
        x = widen(inputs)
        if mask is None and is_known(x.shape[1]) and x.shape[1] > 0:
            return ops.cast(ops.mean(x, axis=1), inputs.dtype)
        if mask is None:  # a length that is unknown until a graph runs may be 0
            mask = ops.ones(ops.shape(inputs)[:2], "bool")
        count = ops.sum(ops.cast(mask, x.dtype), axis=1, keepdims=True)
        total = ops.sum(ops.where(ops.expand_dims(mask, 2), x, 0.0), axis=1)
        return ops.cast(total / ops.maximum(count, 1.0), inputs.dtype)

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None) -> None:
        return None

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], *input_shape[2:])
