"""The projections of an attention layer."""

import keras

from keras_ssattn._checks import check_integer
from keras_ssattn._keras.serialization import policy_for
from keras_ssattn._typing import Layer, Shape


def projection(
    attention: Layer,
    name: str,
    input_shape: Shape,
    output_shape: Shape,
    activation: str | None = None,
) -> keras.layers.EinsumDense:
    """A built `EinsumDense` with the initializers, regularizers and constraints of a layer.

    From features to heads, or from heads, `[B, T, H, D]`, to features. Quantization and LoRA are
    at home in `EinsumDense`, and go on working.
    """
    inner, outer = "cd"[: len(input_shape) - 2], "efgh"[: len(output_shape)]
    equation = f"ab{inner},{inner}{outer}->ab{outer}"

    def fresh(initializer: keras.Initializer) -> keras.Initializer:
        # one instance gives every kernel the same values
        return type(initializer).from_config(initializer.get_config())

    layer = keras.layers.EinsumDense(
        equation,
        output_shape=(None, *output_shape),
        activation=activation,
        bias_axes=equation.split("->")[1][2:] if attention.use_bias else None,
        kernel_initializer=fresh(attention.kernel_initializer),
        bias_initializer=fresh(attention.bias_initializer),
        kernel_regularizer=attention.kernel_regularizer,
        bias_regularizer=attention.bias_regularizer,
        activity_regularizer=attention.projection_regularizer,
        kernel_constraint=attention.kernel_constraint,
        bias_constraint=attention.bias_constraint,
        dtype=policy_for(attention, name),
        name=name,
    )
    layer.supports_masking = True
    layer.build(input_shape)
    return layer


def check_output_shape(value: int | Shape | None) -> tuple[int, ...] | None:
    """Returns `output_shape` as a tuple of 1 to 4 sizes, or raises."""
    if value is None:
        return None
    shape = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    shape = tuple(check_integer("output_shape", size) for size in shape)
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"`output_shape` must have 1 to 4 sizes. Received: output_shape={value}")
    return shape
