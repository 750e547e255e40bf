"""A length scale whose power of log n each query chooses."""

import keras
from keras import ops

from keras_ssattn._checks import check_number
from keras_ssattn._tensors import cast
from keras_ssattn._typing import Config, Shape, Tensor
from keras_ssattn.layers.length_scales.of_query import QueryScale
from keras_ssattn.ops.length_scales import adaptive_log_scale

LARGEST_FLOAT32 = 3.4e38


@keras.saving.register_keras_serializable(package="keras_ssattn")
class AdaptiveLogScale(QueryScale):
    r"""ASEntmax's length scale, :math:`\delta + \beta\,(\log(n + 1))^\gamma`.

    Each query chooses its own :math:`\beta > 0` and :math:`-2 < \gamma < 2`: with kernels and
    biases of each head, :math:`\beta = \mathrm{softplus}(q \cdot w_\beta + b_\beta)` and
    :math:`\gamma = 2 \tanh(q \cdot w_\gamma + b_\gamma)`. A positive :math:`\gamma` makes
    attention sharper as n grows, a negative one flatter. All four start at zero, so that training
    starts at the constant :math:`\delta + \log 2`.

    The paper has :math:`\log n`, and its implementation counts from 2, as here: log 1 = 0 has no
    negative power. It computes :math:`\beta` and :math:`\gamma` from the input of the attention
    layer, of which the query is a linear function. It puts the scale before entmax; here any
    normalizer takes it: `MultiHeadAttention(8, 64,
    normalizer=Softmax(length_scale=AdaptiveLogScale()))`. A normalizer by itself has no query.

    Args:
        delta: :math:`\delta`, a finite number. Defaults to 1, as in the paper's implementation.
        num_heads: H for kernels and biases of each head; `None` for one set in all. Attention
            layers give theirs.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        n: int32 tensor, the number of keys that each query sees, broadcastable to `[B, H, T]`.
        query: floating-point `[B, T, H, D]`.

    Returns:
        A float32 (float64 for float64 queries) tensor `[B, T, H, 1]`.

    Raises:
        ValueError: for a `delta` that is not a finite number, or a query that is missing or of
            another shape.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import AdaptiveLogScale
    >>> query = np.random.normal(size=(2, 3, 4, 16)).astype("float32")
    >>> AdaptiveLogScale(num_heads=4)(np.array([1, 2, 3]), query).shape
    (2, 3, 4, 1)

    Reference: Vasylenko et al., "Long-Context Generalization with Sparse Attention", arXiv
    2506.16640.
    """

    def __init__(self, delta: float = 1.0, num_heads: int | None = None, **kwargs: object) -> None:
        delta = check_number(
            "delta", delta, "a finite number of float32", lambda x: abs(x) <= LARGEST_FLOAT32
        )
        super().__init__(num_heads=num_heads, **kwargs)
        self.delta = delta

    def add_parameters(self, num_heads: int, size: int) -> None:
        self.beta_kernel = self.add_parameter("beta_kernel", (num_heads, size), "zeros")
        self.beta_bias = self.add_parameter("beta_bias", (num_heads,), "zeros")
        self.gamma_kernel = self.add_parameter("gamma_kernel", (num_heads, size), "zeros")
        self.gamma_bias = self.add_parameter("gamma_bias", (num_heads,), "zeros")

    def factor(self, n: Tensor, query: Tensor) -> Tensor:
        def of_query(kernel: Tensor, bias: Tensor) -> Tensor:  # [B, T, H]
            kernel, bias = (cast(ops.convert_to_tensor(w), query.dtype) for w in (kernel, bias))
            return ops.sum(query * kernel, -1) + bias

        beta = ops.softplus(of_query(self.beta_kernel, self.beta_bias))
        gamma = 2.0 * ops.tanh(of_query(self.gamma_kernel, self.gamma_bias))
        n = ops.transpose(n, (0, 2, 1))  # [B|1, T|1, H|1]
        return ops.expand_dims(adaptive_log_scale(n, beta, gamma, self.delta), -1)

    def compute_output_shape(self, n_shape: Shape, query_shape: Shape | None = None) -> Shape:
        return (*super().compute_output_shape(n_shape, query_shape)[:-1], 1)

    def get_config(self) -> Config:
        return {**super().get_config(), "delta": self.delta}
