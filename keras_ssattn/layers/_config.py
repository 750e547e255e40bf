"""Checks of constructor arguments, and the configuration that layers share."""

import math
import numbers
import re
import weakref
from typing import Any

import keras


def check_positive(name: str, value: Any, optional: bool = False) -> Any:
    """Returns `value`, a positive integer, as an `int` (or `None`, if `optional`), or raises."""
    if optional and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        expected = "a positive integer or None" if optional else "a positive integer"
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}")
    return int(value)


def check_groups(num_heads: Any, num_kv_heads: Any) -> tuple[int, int]:
    """Returns the numbers of query heads and of key heads, by default as many, or raises."""
    num_heads = check_positive("num_heads", num_heads)
    num_kv_heads = check_positive("num_kv_heads", num_kv_heads, optional=True) or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            "`num_kv_heads` must divide `num_heads`. Received: "
            f"num_heads={num_heads}, num_kv_heads={num_kv_heads}"
        )
    return num_heads, num_kv_heads


def check_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ValueError(
            "`hidden_size` must be a multiple of `num_heads`. Received: "
            f"hidden_size={hidden_size}, num_heads={num_heads}"
        )


def check_rate(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1). Received: {name}={value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={value!r}")


def check_expansion(value: Any) -> float | None:
    """Returns `value`, a positive number, as a `float`, or `None`, or raises."""
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not 0 < float(value) < math.inf
    ):
        raise ValueError(
            f"`ffn_expansion` must be a positive number or None. Received: ffn_expansion={value!r}"
        )
    return float(value)


class StrictLoading(keras.layers.Layer):
    """A layer that, once a file has weights that are not its own, refuses that file for good.

    In a subclassed model Keras looks for a layer under more than one name, and forgets a refusal
    where it then finds nothing and the layer expects nothing.
    """

    _refused: Any = None  # a weak reference to the file, and the error

    def load_own_variables(self, store: Any) -> None:
        file = getattr(store, "h5_file", None)
        if file is not None and self._refused is not None and self._refused[0]() is file:
            raise ValueError(self._refused[1])
        try:
            super().load_own_variables(store)
        except ValueError as error:
            self._refused = None if file is None else (weakref.ref(file), str(error))
            raise


class NoWeights(StrictLoading, keras.layers.Identity):
    """Stands where an optional layer is left out, and does nothing.

    Keras passes over the weights of a file that belong to no layer of the model. With this
    layer in the place, which expects none, such a file is refused.
    """

    def __call__(self, x: Any) -> Any:
        return x  # without what Keras does around a call, which on PyTorch takes time


def freeze_sublayers(layer: Any) -> None:
    """Carries `trainable=False` on to the layers that `build` has just made."""
    if not layer.trainable:
        layer.trainable = True  # on TensorFlow, setting the value that it has does nothing
        layer.trainable = False


def serialize_options(layer: Any) -> dict[str, Any]:
    """The class and options of a layer held by another, the same before and after building."""
    config = keras.saving.serialize_keras_object(layer)
    config.pop("build_config", None)
    return config


def serialize_policy(layer: Any) -> dict[str, Any]:
    """The `dtype` entry of a layer's config, where quantization has changed its projections.

    A layer with projections of its own dtype policies, as `model.quantize("int8")` makes
    them, is restored only from a map of policies by path.
    """
    if not layer.built:
        return {}
    quantized = [p for p in layer.projections() if p.quantization_mode is not None]
    if not quantized:
        return {}
    default = layer.dtype_policy
    if isinstance(default, keras.dtype_policies.DTypePolicyMap):
        default = default.default_policy
    policies = keras.dtype_policies.DTypePolicyMap(default_policy=default)
    above = len(layer.path) - len(layer.name)
    for projection in quantized:
        # The path above this layer depends on who builds it, a loaded model or a new one.
        path = re.escape(projection.path[above:])
        policies[f"^(.*/)?{path}$"] = projection.dtype_policy
    return {"dtype": keras.dtype_policies.serialize(policies)}
