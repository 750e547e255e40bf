"""The length scale of the SSMax paper's preliminary experiment: a number of its own for each n."""

from typing import Any

import keras
from keras import ops

from keras_ssattn.layers import LengthScale


@keras.saving.register_keras_serializable(package="papers")
class ScalePerCount(LengthScale):
    """Multiplies the logits of a query that sees n keys by a learned p[n], at first 1.

    Args:
        max_count: the largest n that has a number of its own; beyond it, p[max_count] serves.
        **kwargs: of `LengthScale`; the heads of a layer share the numbers.
    """

    uses_count = True

    def __init__(self, max_count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_count = max_count

    def build(self, n_shape: Any) -> None:
        self.p = self.add_weight(
            name="p", shape=(self.max_count + 1,), initializer="ones", autocast=False
        )

    def call(self, n: Any) -> Any:
        return ops.take(self.p, ops.minimum(n, self.max_count), axis=0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "max_count": self.max_count}
