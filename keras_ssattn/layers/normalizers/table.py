"""The normalizers by name: what `normalizer=` accepts everywhere."""

import inspect

import keras

from keras_ssattn._checks import did_you_mean
from keras_ssattn._keras.serialization import Specification
from keras_ssattn._typing import ArrayLike, Identifier, Option, Tensor
from keras_ssattn.layers.normalizers.base import Normalizer
from keras_ssattn.layers.normalizers.softmax import SinkSoftmax, Softmax, SSMax
from keras_ssattn.layers.normalizers.softpick import RectifiedSoftpick, Softpick

NORMALIZERS: dict[str, type[Normalizer]] = {
    "softmax": Softmax,
    "ssmax": SSMax,
    "softpick": Softpick,
    "rectified_softpick": RectifiedSoftpick,
    "sink_softmax": SinkSoftmax,
}


def get(identifier: Identifier) -> Normalizer:
    """Returns the normalizer layer for a name, a layer, or the config of one.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str) and identifier in NORMALIZERS:
        return NORMALIZERS[identifier]()
    if not isinstance(identifier, Normalizer):
        hint = did_you_mean(identifier, NORMALIZERS)
        if inspect.isclass(identifier) and issubclass(identifier, Normalizer):
            hint = f". Did you mean an instance, {identifier.__name__}()?"
        raise ValueError(
            f"`normalizer` must be one of {tuple(NORMALIZERS)}, an instance of one of "
            f"{tuple(c.__name__ for c in NORMALIZERS.values())}, or its config. Received: "
            f"normalizer={identifier!r}{hint}"
        )
    return identifier


def get_for_attention(identifier: Identifier) -> Specification:
    """The specification of `get(identifier)`, or raises if it does not normalize over the keys."""
    if isinstance(identifier, Specification):
        return identifier
    normalizer = get(identifier)
    if normalizer.axis != -1:
        raise ValueError(
            "`normalizer` must have axis=-1 in an attention layer. Received: "
            f"a {type(normalizer).__name__} with axis={normalizer.axis}"
        )
    return normalizer.specification()


def name_of(normalizer: Specification) -> str:
    """The name under which `get` knows the nearest class of a normalizer."""
    for cls in normalizer.cls.__mro__:
        for name, known in NORMALIZERS.items():
            if cls is known:
                return name
    return normalizer.cls.__name__.lower()


def layer(inputs: ArrayLike, normalizer: str = "ssmax", **options: Option) -> Tensor:
    """Normalizes a tensor of logits with a new layer.

    Args:
        inputs: logits, a symbolic tensor or an eager one.
        normalizer: `"ssmax"`, `"softpick"`, `"rectified_softpick"`,
            `"sink_softmax"` or `"softmax"`.
        **options: of that normalizer's layer: `name`, `axis`, `init_s` and so on.

    Returns:
        A tensor of the shape of `inputs`.

    Raises:
        ValueError: for an unknown normalizer, or an option that is invalid or unknown.

    Example:

    >>> import keras
    >>> import keras_ssattn
    >>> keras_ssattn.layer(keras.Input((10,)), normalizer="softpick", axis=-1).shape
    (None, 10)
    """
    if not isinstance(normalizer, str) or normalizer not in NORMALIZERS:
        raise ValueError(
            f"`normalizer` must be one of {tuple(NORMALIZERS)}. Received: normalizer={normalizer!r}"
        )
    return NORMALIZERS[normalizer](**options)(inputs)
