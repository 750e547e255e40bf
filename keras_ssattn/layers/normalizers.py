"""The normalizers by name: what `normalizer=` accepts everywhere."""

from typing import Any

import keras

from keras_ssattn.layers.normalizer import Normalizer
from keras_ssattn.layers.softmax import Softmax, SSMax
from keras_ssattn.layers.softpick import RectifiedSoftpick, Softpick

NORMALIZERS: dict[str, type[Normalizer]] = {
    "softmax": Softmax,
    "ssmax": SSMax,
    "softpick": Softpick,
    "rectified_softpick": RectifiedSoftpick,
}


def get(identifier: Any) -> Normalizer:
    """Returns the normalizer layer for a name, a layer, or the config of one.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str) and identifier in NORMALIZERS:
        return NORMALIZERS[identifier]()
    if not isinstance(identifier, Normalizer):
        raise ValueError(
            f"`normalizer` must be one of {tuple(NORMALIZERS)}, an instance of one of "
            f"{tuple(c.__name__ for c in NORMALIZERS.values())}, or its config. Received: "
            f"normalizer={identifier!r}"
        )
    return identifier


def get_for_attention(identifier: Any) -> Normalizer:
    """Returns `get(identifier)`, or raises if it does not normalize over the keys."""
    normalizer = get(identifier)
    if normalizer.axis != -1:
        raise ValueError(
            "`normalizer` must have axis=-1 in an attention layer. Received: "
            f"a {type(normalizer).__name__} with axis={normalizer.axis}"
        )
    return normalizer


def name_of(normalizer: Normalizer) -> str:
    """The name under which `get` knows the class of a normalizer."""
    for name, cls in NORMALIZERS.items():
        if type(normalizer) is cls:
            return name
    return normalizer.kernel


def layer(inputs: Any, normalizer: str = "ssmax", **options: Any) -> Any:
    """Normalizes a tensor of logits with a new layer.

    Args:
        inputs: logits, a symbolic tensor or an eager one.
        normalizer: `"ssmax"`, `"softpick"`, `"rectified_softpick"` or `"softmax"`.
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
