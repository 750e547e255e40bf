"""The base class of layers on logits."""

from typing import Any

import keras
from keras import ops

from keras_ssattn.layers._config import freeze_sublayers, serialize_options
from keras_ssattn.layers._masks import align_left
from keras_ssattn.layers.length_scale import LengthScale
from keras_ssattn.ops import normalizers
from keras_ssattn.ops._arguments import check_axis, dtype_of, scaled


class Normalizer(keras.layers.Layer):
    """Base class: a normalizing function and a length scale for its logits.

    A subclass names the function of `keras_ssattn.ops` in `kernel`, and the function's own
    options in `kernel_options()`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        length_scale: a `LengthScale` layer, or its config; `None` for none. A layer is a
            specification: its options are copied, its parameters are not shared.

    Call arguments:
        logits: floating-point tensor of any shape.
        mask: boolean, True = attend, broadcastable to `logits` and of its rank; or Keras's own
            `[batch, time]`, for logits of rank 3 or more.

    Returns:
        Weights of the shape and dtype of `logits`; masked entries and rows are 0.

    Example:

    >>> from keras_ssattn.layers import Normalizer, Softpick
    >>> issubclass(Softpick, Normalizer)
    True
    """

    kernel = ""

    def __init__(self, axis: Any = -1, length_scale: Any = None, **kwargs: Any) -> None:
        check_axis(axis)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.axis = tuple(axis) if isinstance(axis, list) else axis
        self.length_scale = _length_scale(length_scale)

    def kernel_options(self) -> dict[str, Any]:
        """Options that the function of `keras_ssattn.ops` takes beside axis and mask."""
        return {}

    @property
    def uses_count(self) -> bool:
        """Whether the weights depend on the number of keys beyond the sum over them."""
        return self.length_scale.uses_count

    def build(self, input_shape: Any) -> None:
        num_heads = self.length_scale.num_heads
        if num_heads is not None and (
            self.axis not in (-1, len(input_shape) - 1)
            or len(input_shape) < 3
            or input_shape[-3] not in (None, num_heads)
        ):
            raise ValueError(
                "with a length scale for each head, `logits` must have shape [..., H, T, S] and "
                f"`axis` be -1. Received: num_heads={num_heads}, axis={self.axis}, logits with "
                f"shape {tuple(input_shape)}"
            )
        if not self.length_scale.built:
            self.length_scale.build((None,))
        freeze_sublayers(self)

    def call(self, logits: Any, mask: Any = None) -> Any:
        if self.length_scale.uses_query:
            raise ValueError(
                f"the length scale `{type(self.length_scale).__name__}` needs the query, which a "
                "normalizer by itself has not. Use it in an attention layer."
            )
        mask = align_left(mask, logits)
        function = getattr(normalizers, self.kernel)
        options = self.kernel_options()
        if not self.uses_count:
            return function(logits, axis=self.axis, mask=mask, **options)
        n = ops.convert_to_tensor(normalizers.entry_count(logits, self.axis, mask), "int32")
        if self.length_scale.num_heads is None:
            factor = self.length_scale(n)
        else:  # heads are the third axis from the end, the normalized axis is the last
            n = ops.reshape(n, (1, 1)) if mask is None else ops.squeeze(n, -1)  # [..., H|1, T|1]
            factor = ops.expand_dims(self.length_scale(n), -1)
        weights = function(scaled(logits, factor), axis=self.axis, mask=mask, **options)
        return ops.cast(weights, dtype_of(logits))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        # An entrywise mask has done its work; a mask of batch and time concerns later layers.
        if previous_mask is None or len(previous_mask.shape) == len(inputs.shape):
            return None
        return previous_mask

    def copy_for(self, num_heads: int, **kwargs: Any) -> "Normalizer":
        """An unbuilt copy, of the same options, with parameters for `num_heads` heads."""
        config = self.get_config()
        if "length_scale" in config:  # by itself, lest its class have to be registered
            config["length_scale"] = self.length_scale
        copy = type(self).from_config({**config, **kwargs})
        copy.length_scale.num_heads = num_heads
        return copy

    def get_config(self) -> dict[str, Any]:
        scale = serialize_options(self.length_scale)
        return {**super().get_config(), "axis": self.axis, "length_scale": scale}


def _length_scale(value: Any) -> LengthScale:
    if isinstance(value, dict):
        value = keras.saving.deserialize_keras_object(value)
    if value is None:
        return LengthScale(name="length_scale")
    if not isinstance(value, LengthScale):
        raise ValueError(
            "`length_scale` must be a `LengthScale` layer, its config, or None. Received: "
            f"length_scale={value!r}"
        )
    # A copy, under a name that does not depend on how many others there are.
    return type(value).from_config({**value.get_config(), "name": "length_scale"})
