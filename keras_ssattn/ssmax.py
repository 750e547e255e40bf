"""SSMax under the names of Edifice's `Blocks.SSMax`."""

from typing import Literal

import keras

from keras_ssattn import _checks, _tensors, layers, models, ops
from keras_ssattn._typing import ArrayLike, Option, Shape, Tensor
from keras_ssattn.layers import masks
from keras_ssattn.layers.length_scales.log import INIT_S
from keras_ssattn.models import output_size
from keras_ssattn.models.sequence import build_attention

__all__ = ["EdificeSSMax", "build", "build_ssmax_attention", "compute", "layer", "output_size"]


Formula = Literal["scale", "shift"]


def compute(
    logits: ArrayLike, s: ArrayLike, seq_len: ArrayLike, formula: Formula = "scale"
) -> Tensor:
    """Scalable softmax of `logits` over the last axis, with n = `seq_len`.

    Args:
        logits: floating-point `[..., n]`.
        s: the scale, a number or a tensor with size 1 along the last axis.
        seq_len: n, a positive integer or integer tensor.
        formula: `"scale"` for the paper's `softmax(s log(n) x)`; `"shift"` for
            `softmax(x - s log n)`, as Edifice documents it. Softmax ignores a shift, so that
            equals softmax for every s and n, and s receives no gradient. It is here for parity.

    Returns:
        Weights of the shape and dtype of `logits`.

    Raises:
        ValueError: for an unknown formula, and as `keras_ssattn.ops.ssmax`.

    Example:

    >>> from keras_ssattn import ssmax
    >>> ssmax.compute([[1.0, 1.0, 1.0, 1.0]], s=1.0, seq_len=4)  # [[0.25, 0.25, 0.25, 0.25]]
    """
    _checks.check_choice("formula", formula, Formula)
    if formula == "scale":
        return ops.ssmax(logits, s, seq_len)
    logits = _tensors.to_tensor(logits)
    x = _tensors.widen(logits)
    shift = ops.log_length_scale(seq_len, s)
    shifted = x - (_tensors.cast(shift, _tensors.dtype_of(x)) if hasattr(shift, "dtype") else shift)
    return _tensors.cast(ops.softmax(shifted), _tensors.dtype_of(logits))


def layer(
    inputs: ArrayLike,
    name: str = "ssmax",
    init_s: float | str = INIT_S,
    formula: Formula = "scale",
    **options: Option,
) -> Tensor:
    """Applies a new `SSMax` layer, with learned scalar s, to a tensor of logits.

    Args:
        inputs: logits, a symbolic tensor `[..., n]`, or an eager one.
        name: of the layer.
        init_s: initial s; see `keras_ssattn.layers.LogLengthScale`.
        formula: `"scale"`, or `"shift"` for an `EdificeSSMax`; see `compute`.
        **options: of `keras_ssattn.layers.SSMax`.

    Returns:
        A tensor of the shape of `inputs`.

    Raises:
        ValueError: for an unknown formula.

    Example:

    >>> import keras
    >>> from keras_ssattn import ssmax
    >>> ssmax.layer(keras.Input((10,))).shape
    (None, 10)
    """
    _checks.check_choice("formula", formula, Formula)
    cls = layers.SSMax if formula == "scale" else EdificeSSMax
    return cls(name=name, init_s=init_s, **options)(inputs)


class _Shift(layers.LogLengthScale):
    """s, which shifts the logits and so has no effect and no gradient."""

    uses_count = False

    def build(self, n_shape: Shape) -> None:
        self.s = self._add_parameter("s", self.start_of_s(), trainable=False)


@keras.saving.register_keras_serializable(package="keras_ssattn")
class EdificeSSMax(layers.SSMax):
    """SSMax by the formula that Edifice documents, `softmax(x - s log n)`, which equals softmax.

    s is kept and is not trainable: it has no gradient. It takes the arguments of
    `keras_ssattn.layers.SSMax` but for `use_bias`. In version 0.1.0 this was
    `SSMax(formula="shift")`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn import ssmax
    >>> ssmax.EdificeSSMax()(np.array([[1.0, 1.0]]))  # [[0.5, 0.5]]
    """

    scale_class = _Shift

    def __init__(self, *args: Option, use_bias: bool = False, **kwargs: Option) -> None:
        if use_bias:
            raise ValueError("`use_bias` must be False in `EdificeSSMax`. Received: use_bias=True")
        super().__init__(*args, **kwargs)

    def call(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        return ops.softmax(logits, self.axis, masks.align_left(mask, logits))


EdificeSSMax.__name__ = "SSMax"  # Keras names the weights in a file by the class, as 0.1.0 did


def build(embed_dim: int, **options: Option) -> keras.Model:
    """`keras_ssattn.build` with `normalizer="ssmax"`; takes its other options.

    Example:

    >>> from keras_ssattn import ssmax
    >>> ssmax.build(embed_dim=32, hidden_size=64, num_layers=1).output_shape
    (None, 64)
    """
    return models.build(embed_dim, normalizer="ssmax", **options)


def build_ssmax_attention(
    inputs: ArrayLike, hidden_size: int = 256, num_heads: int = 4, name: str = "ssmax_attn"
) -> Tensor:
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
