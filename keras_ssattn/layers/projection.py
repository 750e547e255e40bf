"""The projections of an attention layer."""

import math
from collections.abc import Collection

import keras
from keras import ops

from keras_ssattn._checks import check_choice, check_integer
from keras_ssattn._frameworks import linear
from keras_ssattn._keras.calling import adds_nothing, call_inside
from keras_ssattn._keras.initializing import unless_read
from keras_ssattn._keras.serialization import policy_for
from keras_ssattn._keras.splitting import check_split
from keras_ssattn._typing import Layer, Shape, Tensor

PROJECTIONS = ("query", "key", "value", "gate", "attention_output")


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
    heads = "`num_kv_heads`" if name in ("key", "value") else "`num_heads`"
    check_split(attention, f"{name}/kernel", (*input_shape[2:], *output_shape), heads)
    inner, outer = "cd"[: len(input_shape) - 2], "efgh"[: len(output_shape)]
    equation = f"ab{inner},{inner}{outer}->ab{outer}"

    def fresh(initializer: keras.Initializer) -> keras.Initializer:
        # one instance gives every kernel the same values
        new = type(initializer).from_config(initializer.get_config())
        return keras.initializers.get(unless_read(new, attention, name))

    layer = keras.layers.EinsumDense(
        equation,
        output_shape=(None, *output_shape),
        activation=activation,
        bias_axes=equation.split("->")[1][2:] if has_bias(attention.use_bias, name) else None,
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


def project(
    owner: Layer, layer: keras.layers.EinsumDense | keras.layers.Dense, x: Tensor
) -> Tensor:
    """`layer(x)` in the call of its owner: on PyTorch as one product of matrices, with the bias.

    Its einsum takes ten operations on tensors, which at one token take longer than the product. Its
    sum with the bias is a second large tensor, and new memory costs more than the sum.
    """
    plain = type(layer) in (keras.layers.EinsumDense, keras.layers.Dense)
    if not plain or "call" in vars(layer) or not adds_nothing(owner, layer, x):
        return call_inside(owner, layer, x)
    kernel = ops.convert_to_tensor(layer.kernel)  # with that of LoRA
    bias = None if layer.bias is None else ops.convert_to_tensor(layer.bias)
    inner = 1 if isinstance(layer, keras.layers.Dense) else len(x.shape) - 2
    rows, columns = math.prod(kernel.shape[:inner]), math.prod(kernel.shape[inner:])
    y = linear(
        ops.reshape(x, (math.prod(x.shape[:-inner]), rows)),
        ops.reshape(kernel, (rows, columns)),
        None if bias is None else ops.reshape(bias, (columns,)),
    )
    y = ops.reshape(y, (*x.shape[:-inner], *kernel.shape[inner:]))
    return y if layer.activation is None else layer.activation(y)


def check_biases(
    value: bool | Collection[str], names: Collection[str] = PROJECTIONS
) -> bool | tuple[str, ...]:
    """Returns `use_bias`, for all alike or the names of those with a bias, or raises."""
    if not isinstance(value, Collection):
        return bool(value)
    value = (value,) if isinstance(value, str) else value
    for name in value:
        check_choice("use_bias", name, names)
    return tuple(name for name in names if name in value)


def has_bias(use_bias: bool | Collection[str], name: str) -> bool:
    """Whether the part `name` of a layer has biases."""
    return name in use_bias if isinstance(use_bias, Collection) else use_bias


def check_output_shape(value: int | Shape | None) -> tuple[int, ...] | None:
    """Returns `output_shape` as a tuple of 1 to 4 sizes, or raises."""
    if value is None:
        return None
    shape = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    shape = tuple(check_integer("output_shape", size) for size in shape)
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"`output_shape` must have 1 to 4 sizes. Received: output_shape={value}")
    return shape
