"""Length scales without parameters, that stay 1 up to the length trained on."""

import keras

from keras_ssattn._typing import Config, Tensor
from keras_ssattn.layers.length_scales.base import LengthScale
from keras_ssattn.ops import position_temperature, qwen_log_scale


@keras.saving.register_keras_serializable(package="keras_ssattn")
class PositionTemperature(LengthScale):
    """The temperature of Llama 4 and Ministral 3; see `keras_ssattn.ops.position_temperature`.

    Give it to a normalizer: `Softmax(length_scale=PositionTemperature(original_length=16384))`.

    Args:
        beta: the slope, a finite number. Defaults to 0.1.
        original_length: positive integer, the steps between one value and the next.
        first_position: 0, as in Ministral 3, or 1, as in Llama 4.
        num_heads: has no effect; attention layers give theirs.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        n: int32 tensor, the number of keys that each query sees. Its position is taken as
            `n - 1`.

    Returns:
        A float32 tensor of the shape of `n`.

    Raises:
        ValueError: for arguments that do not fit.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import PositionTemperature
    >>> scale = PositionTemperature(beta=0.1, original_length=16384)
    >>> [round(float(a), 4) for a in scale(np.array([16384, 16385]))]
    [1.0, 1.0693]
    """

    uses_count = True

    def __init__(
        self,
        beta: float = 0.1,
        original_length: int = 8192,
        first_position: int = 0,
        num_heads: int | None = None,
        **kwargs: object,
    ) -> None:
        position_temperature(1, beta, original_length, first_position)  # checks them
        super().__init__(num_heads=num_heads, **kwargs)
        self.beta = float(beta)
        self.original_length = int(original_length)
        self.first_position = int(first_position)

    def call(self, n: Tensor) -> Tensor:
        return position_temperature(n, self.beta, self.original_length, self.first_position)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "beta": self.beta,
            "original_length": self.original_length,
            "first_position": self.first_position,
        }


@keras.saving.register_keras_serializable(package="keras_ssattn")
class QwenLogScale(LengthScale):
    """Qwen's log n scale; see `keras_ssattn.ops.qwen_log_scale`.

    Args:
        train_length: integer of 2 or more, up to which the scale is 1.
        num_heads: has no effect; attention layers give theirs.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        n: int32 tensor, the number of keys that each query sees.

    Returns:
        A float32 tensor of the shape of `n`.

    Raises:
        ValueError: for a `train_length` that does not fit.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import QwenLogScale
    >>> [round(float(a), 4) for a in QwenLogScale(2048)(np.array([1, 2048, 8192]))]
    [1.0, 1.0, 1.1818]
    """

    uses_count = True

    def __init__(self, train_length: int, num_heads: int | None = None, **kwargs: object) -> None:
        qwen_log_scale(1, train_length)  # checks it
        super().__init__(num_heads=num_heads, **kwargs)
        self.train_length = int(train_length)

    def call(self, n: Tensor) -> Tensor:
        return qwen_log_scale(n, self.train_length)

    def get_config(self) -> Config:
        return {**super().get_config(), "train_length": self.train_length}
