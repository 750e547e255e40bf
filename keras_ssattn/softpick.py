"""Signed softpick under the names of Edifice's `Blocks.Softpick`."""

import keras

from keras_ssattn import layers, models, ops
from keras_ssattn._typing import ArrayLike, Axis, Option, Tensor
from keras_ssattn.models import output_size
from keras_ssattn.models.sequence import build_attention

__all__ = ["build", "build_softpick_attention", "compute", "layer", "output_size"]


def compute(x: ArrayLike, axis: Axis = -1) -> Tensor:
    """Signed softpick, `x / (1 + sum |x|)`; see `keras_ssattn.ops.softpick`.

    Example:

    >>> from keras_ssattn import softpick
    >>> softpick.compute([1.0, -2.0, 0.0])  # [0.25, -0.5, 0.]
    """
    return ops.softpick(x, axis)


def layer(inputs: ArrayLike, name: str = "softpick", axis: Axis = -1, **options: Option) -> Tensor:
    """Applies a new `Softpick` layer to a tensor.

    Args:
        inputs: symbolic or eager tensor of any shape.
        name: of the layer.
        axis: the axis, or axes, to normalize over.
        **options: of `keras_ssattn.layers.Softpick`.

    Returns:
        A tensor of the shape of `inputs`.

    Example:

    >>> import keras
    >>> from keras_ssattn import softpick
    >>> softpick.layer(keras.Input((10,))).shape
    (None, 10)
    """
    return layers.Softpick(name=name, axis=axis, **options)(inputs)


def build(embed_dim: int, **options: Option) -> keras.Model:
    """`keras_ssattn.build` with `normalizer="softpick"`; takes its other options.

    Example:

    >>> from keras_ssattn import softpick
    >>> softpick.build(embed_dim=32, hidden_size=64, num_layers=1).output_shape
    (None, 64)
    """
    return models.build(embed_dim, normalizer="softpick", **options)


def build_softpick_attention(
    inputs: ArrayLike, hidden_size: int = 256, num_heads: int = 4, name: str = "softpick_attn"
) -> Tensor:
    """Applies new causal multi-head self-attention with signed softpick to `[B, T, E]`.

    Args:
        inputs: symbolic or eager tensor `[B, T, E]`.
        hidden_size: of queries, keys, values and the output; a multiple of `num_heads`.
        num_heads: number of heads.
        name: of the layer.

    Returns:
        `[B, T, hidden_size]`.

    Raises:
        ValueError: for sizes that do not fit.

    Example:

    >>> import keras
    >>> from keras_ssattn import softpick
    >>> softpick.build_softpick_attention(keras.Input((60, 32))).shape
    (None, 60, 256)
    """
    return build_attention(inputs, "softpick", hidden_size, num_heads, name)
