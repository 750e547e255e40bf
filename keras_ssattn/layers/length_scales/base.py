"""The base class of length scales, which is no length scale itself."""

import keras
from keras import ops

from keras_ssattn._checks import check_integer
from keras_ssattn._keras.loading import StrictLoading
from keras_ssattn._keras.serialization import Specification
from keras_ssattn._typing import Config, Identifier, Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_ssattn")
class LengthScale(StrictLoading):
    """No length scale: the logits are left as they are, whatever the number of keys.

    The base class of length scales. A subclass sets `uses_count = True` and returns from
    `call(n)` the factor that multiplies the logits of a query that sees n keys. One with
    `uses_query = True` too returns from `call(n, query)` the factor of the query, `[B, T, H, D]`
    or broadcastable to it, and is built with the shapes of both; it has a use in attention layers
    only.

    Args:
        num_heads: number of attention heads, for one set of parameters per head; `None` for
            one set in all. Attention layers give theirs.

    Call arguments:
        n: int32 tensor, the number of keys that each query sees; `[..., H or 1, T]` where
            there is a set of parameters per head.

    Returns:
        A float32 tensor broadcastable to that shape, here of ones.

    Raises:
        ValueError: for a `num_heads` that is not a positive integer or `None`.

    Example:

    >>> import keras
    >>> from keras_ssattn.layers import LengthScale
    >>> class RootLengthScale(LengthScale):
    ...     uses_count = True
    ...     def call(self, n):
    ...         return keras.ops.sqrt(keras.ops.cast(n, "float32"))
    >>> float(RootLengthScale()(keras.ops.array([9]))[0])
    3.0
    """

    uses_count = False
    uses_query = False  # whether `call` takes the query as well

    def __init__(self, num_heads: int | None = None, **kwargs: object) -> None:
        num_heads = check_integer("num_heads", num_heads, optional=True)
        super().__init__(**kwargs)
        self.num_heads = num_heads

    def call(self, n: Tensor) -> Tensor:
        return ops.ones_like(n, dtype="float32")

    def compute_output_shape(self, n_shape: Shape) -> Shape:
        return tuple(n_shape)

    def compute_output_spec(self, n: Tensor) -> keras.KerasTensor:
        return keras.KerasTensor(self.compute_output_shape(n.shape), dtype="float32")

    def explain(self) -> str:
        own = f"the length scale `{type(self).__name__}`" if self.uses_count else "no length scale"
        return (
            f"The normalizer {self.path.rpartition('/')[0]!r} has {own}, that of the file another: "
            'normalizer="ssmax" has an s (and with `use_bias` a b), "softmax" has none. Make the '
            "model with the `normalizer=` that it was saved with."
        )

    def get_config(self) -> Config:
        return {**super().get_config(), "num_heads": self.num_heads}


def get(identifier: Identifier) -> Specification:
    """The specification of a length scale, given itself or its config; `None` for none.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if identifier is None:
        return Specification(LengthScale, {})
    if isinstance(identifier, Specification):
        return identifier
    if not isinstance(identifier, LengthScale):
        raise ValueError(
            "`length_scale` must be a `LengthScale` layer, its config, or None. Received: "
            f"length_scale={identifier!r}"
        )
    return Specification.of(identifier)
