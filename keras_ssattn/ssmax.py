"""SSMax under the names of Edifice's `Blocks.SSMax`."""

from typing import Any

import keras

from keras_ssattn import layers, models, ops
from keras_ssattn.models import output_size
from keras_ssattn.models.sequence import build_attention

__all__ = ["build", "build_ssmax_attention", "compute", "layer", "output_size"]


def compute(logits: Any, s: Any, seq_len: Any, formula: str = "scale") -> Any:
    """Scalable softmax of `logits` over the last axis, with n = `seq_len`.

    Args:
        logits: floating-point `[..., n]`.
        s: the scale, a number or a tensor with size 1 along the last axis.
        seq_len: n, a positive integer or integer tensor.
        formula: `"scale"` for the paper's `softmax(s log(n) x)`, `"shift"` for the formula
            that Edifice documents, which equals softmax. See `keras_ssattn.ops.ssmax`.

    Returns:
        Weights of the shape and dtype of `logits`.

    Example:

    >>> from keras_ssattn import ssmax
    >>> ssmax.compute([[1.0, 1.0, 1.0, 1.0]], s=1.0, seq_len=4)  # [[0.25, 0.25, 0.25, 0.25]]
    """
    return ops.ssmax(logits, s, seq_len, formula=formula)


def layer(inputs: Any, name: str = "ssmax", init_s: float | str = 1.0, **options: Any) -> Any:
    """Applies a new `SSMax` layer, with learned scalar s, to a tensor of logits.

    Args:
        inputs: logits, a symbolic tensor `[..., n]`, or an eager one.
        name: of the layer.
        init_s: initial s.
        **options: of `keras_ssattn.layers.SSMax`.

    Returns:
        A tensor of the shape of `inputs`.

    Example:

    >>> import keras
    >>> from keras_ssattn import ssmax
    >>> ssmax.layer(keras.Input((10,))).shape
    (None, 10)
    """
    return layers.SSMax(name=name, init_s=init_s, **options)(inputs)


def build(embed_dim: int, **options: Any) -> keras.Model:
    """`keras_ssattn.build` with `normalizer="ssmax"`; takes its other options.

    Example:

    >>> from keras_ssattn import ssmax
    >>> ssmax.build(embed_dim=32, hidden_size=64, num_layers=1).output_shape
    (None, 64)
    """
    return models.build(embed_dim, normalizer="ssmax", **options)


def build_ssmax_attention(
    inputs: Any, hidden_size: int = 256, num_heads: int = 4, name: str = "ssmax_attn"
) -> Any:
    """Applies new causal multi-head self-attention with SSMax to `[B, T, E]`.

    Args:
        inputs: symbolic or eager tensor `[B, T, E]`.
        hidden_size: of queries, keys, values and the output; a multiple of `num_heads`.
        num_heads: number of heads, each with its own s.
        name: of the layer.

    Returns:
        `[B, T, hidden_size]`.

    Raises:
        ValueError: for sizes that do not fit.

    Example:

    >>> import keras
    >>> from keras_ssattn import ssmax
    >>> ssmax.build_ssmax_attention(keras.Input((60, 32))).shape
    (None, 60, 256)
    """
    return build_attention(inputs, "ssmax", hidden_size, num_heads, name)
