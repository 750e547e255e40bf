"""The base class of length scales that take the query as well as n."""

import keras
from keras import ops

from keras_ssattn._tensors import dtype_of
from keras_ssattn._typing import DType, Shape, Tensor
from keras_ssattn.layers.length_scales.base import LengthScale


class QueryScale(LengthScale):
    """A length scale of which `factor(n, query)` is that of each query or of its features.

    A subclass has `add_parameters` and `factor`. Its n is `[B or 1, H or 1, T or 1]`, and its query
    `[B, T, H, D]` in the dtype of the result.
    """

    uses_count = True
    uses_query = True

    def build(self, n_shape: Shape, query_shape: Shape | None = None) -> None:
        if query_shape is None:
            raise ValueError(self.no_query())
        if len(query_shape) != 4 or self.num_heads not in (None, query_shape[2]):
            raise ValueError(
                "`query` must have shape [B, T, H, D]. Received: "
                f"num_heads={self.num_heads}, query with shape {tuple(query_shape)}"
            )
        self.add_parameters(self.num_heads or 1, query_shape[3])

    def call(self, n: Tensor, query: Tensor | None = None) -> Tensor:
        if query is None:
            raise ValueError(self.no_query())
        if len(n.shape) > 3:
            raise ValueError(
                f"`n` must be broadcastable to [B, H, T]. Received: n with shape {tuple(n.shape)}"
            )
        while len(n.shape) < 3:
            n = ops.expand_dims(n, 0)
        return self.factor(n, ops.cast(query, self.result_dtype(query)))

    def factor(self, n: Tensor, query: Tensor) -> Tensor:
        """The factor, broadcastable to the query."""
        raise NotImplementedError

    def add_parameters(self, num_heads: int, size: int) -> None:
        """Adds the weights, for so many heads (1 for all of them) of a size."""
        raise NotImplementedError

    def add_parameter(self, name: str, shape: Shape, initializer: str) -> keras.Variable:
        return self.add_weight(name=name, shape=shape, initializer=initializer, autocast=False)

    def no_query(self) -> str:
        return (
            f"the length scale `{type(self).__name__}` needs the query, which a normalizer alone "
            "does not have. Use it in an attention layer. Received: query=None"
        )

    def compute_output_shape(self, n_shape: Shape, query_shape: Shape | None = None) -> Shape:
        return tuple(query_shape or ())

    def compute_output_spec(self, n: Tensor, query: Tensor | None = None) -> keras.KerasTensor:
        shape = self.compute_output_shape(n.shape, getattr(query, "shape", None))
        return keras.KerasTensor(shape, dtype=self.result_dtype(query))

    def result_dtype(self, query: Tensor) -> DType:
        return "float64" if "float64" in (self.compute_dtype, dtype_of(query)) else "float32"
