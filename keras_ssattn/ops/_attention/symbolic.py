"""`attention` as one step of a functional model."""

from collections.abc import Sequence

import keras

from keras_ssattn._typing import ArrayLike, Config, Implementation, Tensor
from keras_ssattn.ops._attention.arguments import prepare
from keras_ssattn.ops._attention.choice import attend
from keras_ssattn.ops.kernels import Kernel


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Attention(keras.Operation):
    """Runs `attention` whole; without it a model would be made of the dense operations."""

    def __init__(
        self,
        normalizer: str | Kernel,
        scale: float | None,
        causal: bool,
        window: int | None,
        epsilon: float,
        implementation: Implementation,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.options: Config = {
            "normalizer": normalizer,
            "scale": scale,
            "causal": causal,
            "window": window,
            "epsilon": epsilon,
            "implementation": implementation,
        }

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: ArrayLike | None = None,
        key_mask: ArrayLike | None = None,
        query_offset: int | ArrayLike = 0,
        segment_ids: Sequence[ArrayLike] | None = None,
        length_scale: ArrayLike | None = None,
        sink: ArrayLike = 0.0,
    ) -> Tensor:
        options = self.options
        if segment_ids is not None:
            segment_ids = tuple(segment_ids)  # a pair, which is a list once it is loaded
        prepared = prepare(
            query, key, value, options["normalizer"], options["scale"], mask, key_mask,
            options["causal"], options["window"], query_offset, segment_ids, length_scale,
            options["epsilon"], sink,
        )  # fmt: skip
        return attend(**vars(prepared), implementation=options["implementation"])

    def get_config(self) -> Config:
        return {**self.options, "name": self.name}
