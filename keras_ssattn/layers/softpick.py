"""Softpick, signed and rectified, as layers on logits."""

from typing import Any

import keras

from keras_ssattn.layers.normalizer import Normalizer
from keras_ssattn.ops import normalizers


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Softpick(Normalizer):
    r"""Signed softpick, :math:`x_j / (1 + \sum_k |x_k|)`; see `keras_ssattn.ops.softpick`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        length_scale: a `LengthScale` layer, or `None`. "Scalable softpick" is
            `Softpick(length_scale=LogLengthScale())`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import Softpick
    >>> Softpick()(np.array([[1.0, -2.0, 0.0]]))  # [[0.25, -0.5, 0.]]
    """

    kernel = "softpick"


@keras.saving.register_keras_serializable(package="keras_ssattn")
class RectifiedSoftpick(Normalizer):
    r"""Rectified softpick, :math:`\max(e^{x_j}-1, 0) / (\epsilon + \sum_k |e^{x_k}-1|)`.

    See `keras_ssattn.ops.rectified_softpick`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        epsilon: positive number added to the sum.
        length_scale: a `LengthScale` layer, or `None`.

    Raises:
        ValueError: for an `epsilon` that is not a positive number.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import RectifiedSoftpick
    >>> RectifiedSoftpick()(np.array([[1.0, 0.0, -5.0]]))  # [[0.6337, 0., 0.]]

    Reference: arXiv 2504.20966.
    """

    kernel = "rectified_softpick"

    def __init__(
        self, axis: Any = -1, epsilon: float = 1e-6, length_scale: Any = None, **kwargs: Any
    ) -> None:
        normalizers.check_epsilon(epsilon)
        super().__init__(axis, length_scale, **kwargs)
        self.epsilon = epsilon

    def kernel_options(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}
