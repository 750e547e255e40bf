"""From the last block of a language model to logits."""

import keras
from keras import ops

from keras_ssattn._checks import check_choice
from keras_ssattn._keras.initializing import unless_read
from keras_ssattn._keras.loading import NoWeights, freeze_sublayers
from keras_ssattn._keras.serialization import policy_for
from keras_ssattn._keras.splitting import check_split
from keras_ssattn._tensors import cast, dtype_of, matmul, widen
from keras_ssattn._typing import Config, Layer, NormName, Shape, Tensor
from keras_ssattn.layers.norms import make_norm


@keras.saving.register_keras_serializable(package="keras_ssattn")
class TokenHead(keras.layers.Layer):
    """A normalization, then the product with an embedding `[V, E]` that it is given, or its own.

    A layer rather than a part of the model: of a model's own sublayers Keras looks for weights
    under two names, and a file with the other kind of head would load.
    """

    def __init__(
        self,
        vocabulary_size: int,
        norm: NormName,
        tied: bool,
        norm_epsilon: float | None = None,
        **kwargs: object,
    ) -> None:
        check_choice("norm", norm, NormName)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.vocabulary_size = vocabulary_size
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.tied = tied

    def build(self, x_shape: Shape, embeddings_shape: Shape | None = None) -> None:
        policy = policy_for(self, "final_norm")
        self.final_norm = make_norm(
            self.norm, x_shape, self.norm_epsilon, name="final_norm", dtype=policy
        )
        policy = policy_for(self, "projection")
        if self.tied:
            self.projection = NoWeights(name="projection", dtype=policy)
        else:
            shape = (x_shape[-1], self.vocabulary_size)
            check_split(self, "projection/kernel", shape, "`vocabulary_size`")
            self.projection = keras.layers.Dense(
                self.vocabulary_size,
                use_bias=False,
                kernel_initializer=unless_read("glorot_uniform", self, "projection"),
                name="projection",
                dtype=policy,
            )
        self.projection.build(x_shape)
        freeze_sublayers(self)

    def projections(self) -> list[Layer]:
        """The layers on which `quantize` and `enable_lora` work."""
        return [] if self.tied else [self.projection]

    def call(
        self, x: Tensor, embeddings: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        # Keras attaches the mask to the logits, for the loss
        x = self.final_norm(x)
        if not self.tied:
            return widen(self._project(x))
        return widen(matmul(x, cast(ops.transpose(embeddings), dtype_of(x))))

    def _project(self, x: Tensor) -> Tensor:
        """The projection; Keras's own computes float64 in float32 on PyTorch."""
        if dtype_of(x) == "float64" and self.projection.quantization_mode is None:
            return matmul(x, ops.convert_to_tensor(self.projection.kernel))
        return self.projection(x)

    def compute_output_shape(self, x_shape: Shape, embeddings_shape: Shape | None = None) -> Shape:
        return (*x_shape[:-1], self.vocabulary_size)

    def get_config(self) -> Config:
        config = {
            "vocabulary_size": self.vocabulary_size,
            "norm": self.norm,
            "tied": self.tied,
            "norm_epsilon": self.norm_epsilon,
        }
        return {**super().get_config(), **config}
