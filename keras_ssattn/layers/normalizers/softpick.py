"""Softpick, signed and rectified, as layers on logits."""

import keras

from keras_ssattn._typing import Axis, Config, Identifier
from keras_ssattn.layers.normalizers.base import Normalizer
from keras_ssattn.ops import kernels


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Softpick(Normalizer):
    r"""Signed softpick, :math:`x_j / (1 + \sum_k |x_k|)`; see `keras_ssattn.ops.softpick`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        length_scale: a `LengthScale` layer, or `None`. "Scalable softpick" is
            `Softpick(length_scale=LogLengthScale())`.
        num_heads: an integer for one set of parameters per head; see `Normalizer`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import Softpick
    >>> Softpick()(np.array([[1.0, -2.0, 0.0]]))  # [[0.25, -0.5, 0.]]
    """

    def kernel(self) -> kernels.Kernel:
        return kernels.Softpick()


@keras.saving.register_keras_serializable(package="keras_ssattn")
class RectifiedSoftpick(Normalizer):
    r"""Rectified softpick, :math:`\max(e^{x_j}-1, 0) / (\epsilon + \sum_k |e^{x_k}-1|)`.

    See `keras_ssattn.ops.rectified_softpick`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        epsilon: positive number added to the sum.
        length_scale: a `LengthScale` layer, or `None`.
        num_heads: an integer for one set of parameters per head; see `Normalizer`.

    Raises:
        ValueError: for an `epsilon` that is not a positive number.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import RectifiedSoftpick
    >>> RectifiedSoftpick()(np.array([[1.0, 0.0, -5.0]]))  # [[0.6337, 0., 0.]]

    Reference: arXiv 2504.20966.
    """

    def __init__(
        self,
        axis: Axis = -1,
        epsilon: float = 1e-6,
        length_scale: Identifier = None,
        num_heads: int | None = None,
        **kwargs: object,
    ) -> None:
        kernels.RectifiedSoftpick(epsilon)  # checks it
        super().__init__(axis, length_scale, num_heads, **kwargs)
        self.epsilon = epsilon

    def kernel(self) -> kernels.Kernel:
        return kernels.RectifiedSoftpick(self.epsilon)

    def get_config(self) -> Config:
        return {**super().get_config(), "epsilon": self.epsilon}
