"""From the last block of a language model to logits."""

from typing import Any

import keras
from keras import ops

from keras_ssattn.layers._config import NoWeights, check_choice, freeze_sublayers
from keras_ssattn.layers._norms import NORMS, make_norm
from keras_ssattn.ops._arguments import widen


@keras.saving.register_keras_serializable(package="keras_ssattn")
class TokenHead(keras.layers.Layer):
    """A normalization, then the product with an embedding `[V, E]` that it is given, or its own.

    A layer rather than a part of the model: of a model's own sublayers Keras looks for weights
    under two names, and a file with the other kind of head would load.
    """

    def __init__(self, vocabulary_size: int, norm: str, tied: bool, **kwargs: Any) -> None:
        check_choice("norm", norm, tuple(NORMS))
        super().__init__(**kwargs)
        self.supports_masking = True
        self.vocabulary_size = vocabulary_size
        self.norm = norm
        self.tied = tied

    def build(self, x_shape: Any, embeddings_shape: Any = None) -> None:
        options = {"dtype": self.dtype_policy}
        self.final_norm = make_norm(self.norm, x_shape, name="final_norm", **options)
        if self.tied:
            self.projection = NoWeights(name="projection", dtype=self.dtype_policy)
        else:
            self.projection = keras.layers.Dense(
                self.vocabulary_size, use_bias=False, name="projection", **options
            )
        self.projection.build(x_shape)
        freeze_sublayers(self)

    def projections(self) -> list[Any]:
        """The layers on which `quantize` and `enable_lora` work."""
        return [] if self.tied else [self.projection]

    def call(self, x: Any, embeddings: Any = None) -> Any:
        x = self.final_norm(x)
        if not self.tied:
            return widen(self.projection(x))
        return widen(x @ ops.cast(ops.transpose(embeddings), x.dtype))

    def compute_output_shape(self, x_shape: Any, embeddings_shape: Any = None) -> tuple:
        return (*x_shape[:-1], self.vocabulary_size)

    def get_config(self) -> dict[str, Any]:
        config = {
            "vocabulary_size": self.vocabulary_size,
            "norm": self.norm,
            "tied": self.tied,
        }
        return {**super().get_config(), **config}
