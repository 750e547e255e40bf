"""A length scale that each query adjusts for itself."""

import keras
from keras import ops

from keras_ssattn._checks import check_integer
from keras_ssattn._tensors import cast, dtype_of
from keras_ssattn._typing import Config, Tensor
from keras_ssattn.layers.length_scales.of_query import QueryScale
from keras_ssattn.ops import log_length_scale


@keras.saving.register_keras_serializable(package="keras_ssattn")
class QueryAwareScale(QueryScale):
    r"""TabICLv2's length scale, :math:`\mathrm{MLP}(\log n)\,(1 + \tanh \mathrm{MLP}(q))`.

    The factor differs from feature to feature, and multiplies the query. Both networks have one
    hidden layer with GELU; the first ends in values for every head and feature, the second is
    the same for all heads. The second's last layer starts at zero, so that the scale starts as a
    function of n alone; the first's starts at zero with biases of one, so that this function is
    1 and training starts at ordinary softmax.

    Give it to the normalizer of an attention layer: `MultiHeadAttention(8, 64,
    normalizer=Softmax(length_scale=QueryAwareScale()))`. A normalizer by itself has no query.

    Args:
        hidden_size: size of the hidden layers. Defaults to 64.
        num_heads: H for one function of n per head; `None` for one in all. Attention layers give
            theirs.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        n: int32 tensor, the number of keys that each query sees, broadcastable to `[B, H, T]`.
        query: floating-point `[B, T, H, D]`.

    Returns:
        A float32 (float64 for float64 queries) tensor `[B, T, H, D]`.

    Raises:
        ValueError: for a `hidden_size` that is not a positive integer, or a query that is
            missing or of another shape.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import QueryAwareScale
    >>> query = np.random.normal(size=(2, 3, 4, 16)).astype("float32")
    >>> QueryAwareScale(num_heads=4)(np.array([1, 2, 3]), query).shape
    (2, 3, 4, 16)

    Reference: Qu et al., "TabICLv2", arXiv 2602.11139.
    """

    def __init__(
        self, hidden_size: int = 64, num_heads: int | None = None, **kwargs: object
    ) -> None:
        hidden_size = check_integer("hidden_size", hidden_size)
        super().__init__(num_heads=num_heads, **kwargs)
        self.hidden_size = hidden_size

    def add_parameters(self, num_heads: int, size: int) -> None:
        hidden, random = self.hidden_size, "glorot_uniform"
        # [1, hidden] and [H|1, hidden, D], with biases; then those of the gate.
        self.count_kernel = self.add_parameter("count_kernel", (1, hidden), random)
        self.count_bias = self.add_parameter("count_bias", (hidden,), "zeros")
        self.factor_kernel = self.add_parameter("factor_kernel", (num_heads, hidden, size), "zeros")
        self.factor_bias = self.add_parameter("factor_bias", (num_heads, 1, size), "ones")
        self.query_kernel = self.add_parameter("query_kernel", (size, hidden), random)
        self.query_bias = self.add_parameter("query_bias", (hidden,), "zeros")
        self.gate_kernel = self.add_parameter("gate_kernel", (hidden, size), "zeros")
        self.gate_bias = self.add_parameter("gate_bias", (size,), "zeros")

    def factor(self, n: Tensor, query: Tensor) -> Tensor:
        log_n: Tensor = log_length_scale(ops.cast(n, dtype_of(query)))
        hidden = _layer(ops.expand_dims(log_n, -1), self.count_kernel, self.count_bias)
        factor = _layer(_gelu(hidden), self.factor_kernel, self.factor_bias)  # [B|1, H|1, T|1, D]
        hidden = _layer(query, self.query_kernel, self.query_bias)
        gate = ops.tanh(_layer(_gelu(hidden), self.gate_kernel, self.gate_bias))  # [B, T, H, D]
        return ops.transpose(factor, (0, 2, 1, 3)) * (1.0 + gate)

    def get_config(self) -> Config:
        return {**super().get_config(), "hidden_size": self.hidden_size}


def _gelu(x: Tensor) -> Tensor:
    return ops.gelu(x, approximate=False)


def _layer(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    kernel, bias = (cast(ops.convert_to_tensor(w), dtype_of(x)) for w in (kernel, bias))
    if len(kernel.shape) == 3 and kernel.shape[0] > 1:
        return ops.matmul(x, kernel) + bias
    # On processors, TensorFlow 2.21 writes outside of its memory in [B, 1, T, K] @ [K, N]; this
    # product is of two matrices.
    return ops.tensordot(x, ops.reshape(kernel, kernel.shape[-2:]), axes=1) + bias
