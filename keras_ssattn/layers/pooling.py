"""One vector from a sequence, with regard to its padding."""

from typing import Any

import keras
from keras import ops

from keras_ssattn.ops._arguments import check_mask, widen


@keras.saving.register_keras_serializable(package="keras_ssattn")
class LastTimestep(keras.layers.Layer):
    """The last step, `[B, T, E]` to `[B, E]`; with a mask, the last step that it leaves.

    Call arguments:
        inputs: `[B, T, E]`.
        mask: boolean `[B, T]`, False at padding. Defaults to the mask attached to `inputs`.

    Returns:
        `[B, E]`; zeros for a sequence of nothing but padding.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import LastTimestep
    >>> x = np.array([[[1.0], [2.0], [3.0]]])
    >>> float(LastTimestep()(x, mask=np.array([[True, True, False]]))[0, 0])
    2.0
    """

    def call(self, inputs: Any, mask: Any = None) -> Any:
        mask = check_mask("mask", mask, rank=2)
        if mask is None:
            return inputs[:, -1]
        steps = ops.arange(1, ops.shape(inputs)[1] + 1, dtype="int32")
        last = ops.max(ops.where(mask, steps, 0), axis=1, keepdims=True)  # [B, 1], 0 if none
        return ops.sum(ops.where((steps == last)[:, :, None], inputs, 0.0), axis=1)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None

    def compute_output_shape(self, input_shape: Any) -> tuple:
        return (input_shape[0], *input_shape[2:])


@keras.saving.register_keras_serializable(package="keras_ssattn")
class MeanPool(keras.layers.Layer):
    """The mean over time, `[B, T, E]` to `[B, E]`, of the steps that a mask leaves.

    Unlike `keras.layers.GlobalAveragePooling1D` it gives zeros, not NaN, for a sequence of
    nothing but padding, and sums in float32.

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

    def call(self, inputs: Any, mask: Any = None) -> Any:
        mask = check_mask("mask", mask, rank=2)
        x = widen(inputs)
        if mask is None:
            return ops.cast(ops.mean(x, axis=1), inputs.dtype)
        count = ops.sum(ops.cast(mask, x.dtype), axis=1, keepdims=True)
        total = ops.sum(ops.where(mask[:, :, None], x, 0.0), axis=1)
        return ops.cast(total / ops.maximum(count, 1.0), inputs.dtype)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None

    def compute_output_shape(self, input_shape: Any) -> tuple:
        return (input_shape[0], *input_shape[2:])
