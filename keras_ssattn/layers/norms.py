"""The normalizations that a block or a model may have."""

import math

import keras
from keras import ops

from keras_ssattn._checks import check_number
from keras_ssattn._keras.exporting import is_exporting
from keras_ssattn._keras.loading import NoWeights
from keras_ssattn._keras.serialization import policy_for
from keras_ssattn._tensors import cast, dtype_of, widen
from keras_ssattn._typing import Axis, Config, Layer, NormName, Option, Shape, Tensor

NORM_EPSILON = 1e-5  # Edifice's


@keras.saving.register_keras_serializable(package="keras_ssattn")
class OffsetRMSNormalization(keras.layers.Layer):
    r"""RMS normalization whose weight is the distance of its factor from 1.

    :math:`y = (1 + w)\, x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`, over the last axis, in float32
    or wider. w starts at 0, so that weight decay pulls the factor to 1; half precision has more
    digits for w than for 1 + w.

    Args:
        epsilon: a number of 0 or more, added to the mean square. Defaults to 1e-6.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        x: `[..., E]`.

    Returns:
        A tensor of the shape and dtype of `x`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers.norms import OffsetRMSNormalization
    >>> OffsetRMSNormalization()(np.array([[3.0, 3.0]], "float32"))  # [[1.0, 1.0]]

    Reference: the published implementation of Gemma (arXiv 2403.08295).
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.epsilon = epsilon

    def build(self, x_shape: Shape) -> None:
        self.scale = self.add_weight(name="scale", shape=(x_shape[-1],), initializer="zeros")

    def call(self, x: Tensor) -> Tensor:
        wide = widen(x)
        factor = ops.rsqrt(ops.mean(ops.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scale = 1.0 + cast(ops.convert_to_tensor(self.scale), dtype_of(wide))
        return cast(wide * factor * scale, dtype_of(x))

    def compute_output_shape(self, x_shape: Shape) -> Shape:
        return tuple(x_shape)

    def get_config(self) -> Config:
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable(package="keras_ssattn")
class LayerNormalization(keras.layers.LayerNormalization):
    """Keras's own layer over the last axis, which in export is written in plain operations.

    On PyTorch it is one operation, that ONNX takes of sizes known beforehand alone.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers.norms import LayerNormalization
    >>> LayerNormalization()(np.array([[3.0, 1.0]], "float32"))  # [[1.0, -1.0]]
    """

    def call(self, x: Tensor) -> Tensor:
        plain = self.center and self.scale and _is_last(self.axis, x)
        if not is_exporting() or not plain:
            return super().call(x)
        wide = widen(x)
        wide = wide - ops.mean(wide, axis=-1, keepdims=True)
        factor = ops.rsqrt(ops.mean(ops.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scale, shift = (
            cast(ops.convert_to_tensor(w), dtype_of(wide)) for w in (self.gamma, self.beta)
        )
        return cast(wide * factor * scale + shift, dtype_of(x))


@keras.saving.register_keras_serializable(package="keras_ssattn")
class RMSNormalization(keras.layers.RMSNormalization):
    """Keras's own layer, which on PyTorch is one operation that formats for export may not have.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers.norms import RMSNormalization
    >>> RMSNormalization()(np.array([[3.0, 3.0]], "float32"))  # [[1.0, 1.0]]
    """

    def call(self, x: Tensor) -> Tensor:
        if not is_exporting() or not _is_last(self.axis, x):
            return super().call(x)
        wide = widen(x)
        factor = ops.rsqrt(ops.mean(ops.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scale = cast(ops.convert_to_tensor(self.scale), dtype_of(wide))
        return cast(wide * factor * scale, dtype_of(x))


def _is_last(axis: Axis, x: Tensor) -> bool:
    """Whether a layer of Keras normalizes over the last axis alone."""
    axes = [axis] if isinstance(axis, int) else [*axis]
    return axes in ([-1], [len(x.shape) - 1])


NORMS: dict[str, type[keras.Layer]] = {
    "layer_norm": LayerNormalization,
    "rms_norm": RMSNormalization,
    "offset_rms_norm": OffsetRMSNormalization,
}


def make_norm(
    kind: NormName, shape: Shape, epsilon: float | None = None, **options: Option
) -> keras.Layer:
    """A built normalization that passes masks on."""
    norm = NORMS[kind](epsilon=NORM_EPSILON if epsilon is None else epsilon, **options)
    norm.supports_masking = True
    norm.build(shape)
    return norm


def head_norm(attention: Layer, name: str, num_heads: int) -> Layer:
    """The normalization of an attention layer's query or key heads; without `qk_norm`, none."""
    policy = policy_for(attention, name)
    if not attention.qk_norm:
        return NoWeights(name=name, dtype=policy)
    shape = (None, None, num_heads, attention.key_dim)
    return make_norm("rms_norm", shape, attention.norm_epsilon or 1e-6, name=name, dtype=policy)


def check_epsilon(value: float | None) -> float | None:
    """Returns `norm_epsilon`, a positive number, as a `float`, or `None`, or raises."""
    if value is None:
        return None
    return check_number(
        "norm_epsilon", value, "a positive number or None", lambda x: 0 < x < math.inf
    )
