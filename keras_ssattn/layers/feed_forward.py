"""The feed-forward half of a transformer block."""

import math
from collections.abc import Callable

import keras
from keras import ops

from keras_ssattn._checks import check_flag, check_integer
from keras_ssattn._keras.exporting import is_exporting
from keras_ssattn._keras.initializing import unless_read
from keras_ssattn._keras.loading import NoWeights, freeze_sublayers
from keras_ssattn._keras.serialization import check_options, policy_for, serialize_policy
from keras_ssattn._keras.splitting import check_split
from keras_ssattn._typing import Config, Identifier, Layer, Shape, Tensor
from keras_ssattn.layers.projection import project


@keras.saving.register_keras_serializable(package="keras_ssattn")
def gelu(x: Tensor) -> Tensor:
    """Keras's GELU, in export by erf: TensorFlow computes it by erfc, which ONNX does not have."""
    if not is_exporting():
        return keras.activations.gelu(x)
    return 0.5 * x * (1.0 + ops.erf(x * math.sqrt(0.5)))


@keras.saving.register_keras_serializable(package="keras_ssattn")
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by a tanh, `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`; arXiv 1606.08415."""
    return ops.gelu(x, approximate=True)


def get_activation(identifier: Identifier) -> Callable[[Tensor], Tensor]:
    """The activation of a name of Keras, `"gelu_tanh"`, or a function."""
    return gelu_tanh if identifier == "gelu_tanh" else keras.activations.get(identifier)


@keras.saving.register_keras_serializable(package="keras_ssattn")
class FeedForward(keras.layers.Layer):
    """Two dense layers, `down(activation(up(x)))`, or gated, `down(activation(gate(x)) up(x))`.

    Args:
        inner_size: size between the two layers.
        gated: whether to multiply by an activated gate (SwiGLU with the default activation).
        activation: a name of Keras, `"gelu_tanh"` (GELU by a tanh), or a function. Defaults to
            exact GELU, or to SiLU if gated.
        use_bias: whether the dense layers have biases.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        inputs: `[..., E]`.

    Returns:
        `[..., E]`.

    Raises:
        ValueError: for an `inner_size` that is not a positive integer.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import FeedForward
    >>> FeedForward(64, gated=True)(np.ones((2, 5, 16), "float32")).shape
    (2, 5, 16)

    References: arXiv 1706.03762; gated forms: arXiv 2002.05202.
    """

    def __init__(
        self,
        inner_size: int,
        gated: bool = False,
        activation: Identifier = None,
        use_bias: bool = True,
        **kwargs: object,
    ) -> None:
        inner_size = check_integer("inner_size", inner_size)
        check_options(self, kwargs, {})
        super().__init__(**kwargs)
        self.supports_masking = True
        self.inner_size = inner_size
        self.gated = check_flag("gated", gated)
        if activation is None:
            activation = "silu" if gated else "gelu"
        self.activation = get_activation(activation)
        self.use_bias = check_flag("use_bias", use_bias)

    def build(self, input_shape: Shape) -> None:
        def dense(
            name: str, size: int, shape: Shape, activation: Identifier = None
        ) -> keras.layers.Dense:
            inner = "`inner_size`, of a block `ffn_expansion` times its size"
            check_split(self, f"{name}/kernel", (shape[-1], size), inner)
            layer = keras.layers.Dense(
                size,
                activation=activation,
                use_bias=self.use_bias,
                kernel_initializer=unless_read("glorot_uniform", self, name),
                dtype=policy_for(self, name),
                name=name,
            )
            layer.build(shape)
            return layer

        inner_shape = (*input_shape[:-1], self.inner_size)
        activation = gelu if self.activation is keras.activations.gelu else self.activation
        if self.gated:
            self.gate = dense("gate", self.inner_size, input_shape, activation)
        else:
            self.gate = NoWeights(name="gate", dtype=policy_for(self, "gate"))
        activation = None if self.gated else activation
        self.up = dense("up", self.inner_size, input_shape, activation)
        self.down = dense("down", input_shape[-1], inner_shape)
        freeze_sublayers(self)

    def projections(self) -> list[Layer]:
        """The `Dense` layers, on which `quantize` and `enable_lora` work."""
        return [*([self.gate] if self.gated else []), self.up, self.down]

    def call(self, inputs: Tensor) -> Tensor:
        x = project(self, self.up, inputs)
        if self.gated:
            x = x * project(self, self.gate, inputs)
        return project(self, self.down, x)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        config = {
            "inner_size": self.inner_size,
            "gated": self.gated,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
        }
        return {**super().get_config(), **serialize_policy(self), **config}
