"""`attention` as one step of a functional model."""

from collections.abc import Sequence

import keras

from keras_ssattn._checks import check_choice
from keras_ssattn._typing import ArrayLike, Config, Implementation, Tensor
from keras_ssattn.ops import kernels
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
        check_choice("normalizer", normalizer, kernels.KERNELS)  # by name, to be saved
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
        segment_ids: Sequence[ArrayLike] | None = None,
        **tensors: ArrayLike,
    ) -> Tensor:
        options = dict(self.options)
        implementation = options.pop("implementation")
        if segment_ids is not None:
            segment_ids = tuple(segment_ids)  # a pair, which is a list once it is loaded
        prepared = prepare(query, key, value, segment_ids=segment_ids, **tensors, **options)
        return attend(**vars(prepared), implementation=implementation)

    def get_config(self) -> Config:
        return {**self.options, "name": self.name}
