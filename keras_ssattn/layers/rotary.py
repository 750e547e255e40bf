"""Rotary position embedding as a layer."""

import math
import numbers
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ssattn.layers._config import serialize_options
from keras_ssattn.ops import rotary_attention_factor, rotary_embedding, rotary_frequencies
from keras_ssattn.ops._arguments import dtype_of, to_tensor
from keras_ssattn.ops.rotary import check_scaling, check_theta


@keras.saving.register_keras_serializable(package="keras_ssattn")
class RotaryEmbedding(keras.layers.Layer):
    """Turns the features of queries and keys by angles proportional to their positions.

    It has no weights, and one layer serves queries and keys. `theta` may be set at any time: a
    trained model can be evaluated at another without training it again. A compiled function
    keeps the theta that it was traced with, so call `model.compile` again after setting it.

    Args:
        theta: the base, a number above 1. Pair i of R features turns by `theta^(-2i/R)` radians
            per position. Defaults to 10000.
        fraction: share of the features that is rotated, in (0, 1]; rounded down to an even
            number of them, the first ones. The others are left as they are.
        scaling: for contexts longer than those trained on: `None`;
            `{"type": "linear", "factor": 4}`, which divides the frequencies; or
            `{"type": "yarn", "factor": 4, "original_length": 4096}`. See
            `keras_ssattn.ops.rotary_frequencies`.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        x: `[B, T, H, D]`, queries or keys divided into heads.
        positions: integers `[T]` or `[B, T]`. Defaults to `offset`, `offset + 1`, ...
        offset: position of the first step, an integer or an integer tensor, scalar or `[B]`.
            Not used where `positions` are given.

    Returns:
        A tensor of the shape and dtype of `x`, computed in float32 or wider. A mask attached to
        `x` is kept.

    Raises:
        TypeError: if `positions` or `offset` are not integers.
        ValueError: for arguments or shapes that do not fit.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import RotaryEmbedding
    >>> rotary = RotaryEmbedding(theta=10000.0)
    >>> query = np.random.normal(size=(2, 10, 4, 16)).astype("float32")
    >>> rotary(query).shape
    (2, 10, 4, 16)
    >>> rotary(query[:, :1], offset=9).shape  # a step of decoding
    (2, 1, 4, 16)
    >>> rotary.theta = 500000.0  # for a context longer than those trained on
    >>> rotary.get_config()["theta"]
    500000.0

    References: arXiv 2104.09864 (rotary embedding), arXiv 2309.00071 (YaRN).
    """

    def __init__(
        self,
        theta: float = 10000.0,
        fraction: float = 1.0,
        scaling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if (
            isinstance(fraction, bool)
            or not isinstance(fraction, numbers.Real)
            or not 0 < float(fraction) <= 1
        ):
            raise ValueError(
                f"`fraction` must be a number in (0, 1]. Received: fraction={fraction!r}"
            )
        theta, scaling = check_theta(theta), check_scaling(scaling)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.theta = theta
        self.fraction: float = float(fraction)
        self.scaling: dict[str, Any] | None = scaling

    @property
    def theta(self) -> float:
        """The base; read at each call."""
        return self._theta

    @theta.setter
    def theta(self, value: float) -> None:
        self._theta = check_theta(value)

    def call(self, x: Any, positions: Any = None, offset: Any = 0) -> Any:
        frequencies = rotary_frequencies(self._rotary_size(x.shape), self.theta, self.scaling)
        factor = rotary_attention_factor(self.scaling)
        if positions is None:
            positions = _positions(offset, x)
        return rotary_embedding(x, positions, frequencies, factor)

    def _rotary_size(self, shape: Any) -> int:
        if len(shape) != 4:
            raise ValueError(
                "`x` must have shape [batch, time, heads, features]. Received: x with shape "
                f"{tuple(shape)}"
            )
        size = 2 * math.floor(self.fraction * shape[-1] / 2 + 1e-6)  # 1/3 of 6 is 2
        if size == 0:
            raise ValueError(
                "`fraction` of the features of `x` must be 2 or more. Received: "
                f"fraction={self.fraction}, x with shape {tuple(shape)}"
            )
        return size

    def compute_output_shape(
        self, x_shape: Any, positions_shape: Any = None, offset_shape: Any = None
    ) -> tuple:
        self._rotary_size(x_shape)
        return tuple(x_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "theta": self.theta,
            "fraction": self.fraction,
            "scaling": check_scaling(self.scaling),  # a plain dict
        }


def _positions(offset: Any, x: Any) -> Any:
    """Positions `[1 or B, T]` from that of the first step, `[]` or `[B]`."""
    offset = to_tensor(offset)
    if "int" not in dtype_of(offset):
        raise TypeError(f"`offset` must be an integer. Received: offset with dtype {offset.dtype}")
    if len(offset.shape) > 1:
        raise ValueError(
            "`offset` must be an integer or have shape [B]. Received: offset with shape "
            f"{tuple(offset.shape)}"
        )
    steps = ops.arange(ops.shape(x)[1], dtype="int32")
    return ops.reshape(ops.cast(offset, "int32"), (-1, 1)) + steps


def rotate(rotary: Any, offset: Any, *inputs: Any) -> Any:
    """Each of the inputs, `[B, T, heads, D]`, turned; as they are where there is no rotary layer.

    Those of one length are turned in one call, which on PyTorch costs as much as for one of them,
    and without what Keras does around the call of a layer: this one has no weights.
    """
    if rotary is None:
        return inputs
    turn = rotary.call
    lengths = {x.shape[1] for x in inputs}
    if len(inputs) == 1 or len(lengths) > 1 or None in lengths:
        return tuple(turn(x, offset=offset) for x in inputs)
    ends = np.cumsum([x.shape[2] for x in inputs])[:-1].tolist()
    return tuple(ops.split(turn(ops.concatenate(inputs, axis=2), offset=offset), ends, axis=2))


def serialize_rotary(specification: Any, layers: list[Any]) -> dict[str, Any] | None:
    """The config of the rotary layer given, with what was set since on those made of it."""
    if specification is None:
        return None
    settings = [(x.theta, x.scaling) for x in layers]
    if any(x != settings[0] for x in settings):
        raise ValueError(
            "`theta` and `scaling` must be the same in every block, to be saved in one config. "
            f"Received: {settings}"
        )
    config = serialize_options(specification)
    if settings:
        theta, scaling = settings[0]
        config["config"] |= {"theta": theta, "scaling": check_scaling(scaling)}
    return config


def get_rotary(rotary: Any, dtype: Any = None) -> RotaryEmbedding | None:
    """An unshared copy of a `RotaryEmbedding`, given itself or its config; `None` for none."""
    if isinstance(rotary, dict):
        rotary = keras.saving.deserialize_keras_object(rotary)
    if rotary is None:
        return None
    if not isinstance(rotary, RotaryEmbedding):
        raise ValueError(
            "`rotary` must be a `RotaryEmbedding` layer, its config, or None. Received: "
            f"rotary={rotary!r}"
        )
    config = {**rotary.get_config(), "name": "rotary"}
    return type(rotary).from_config(config if dtype is None else {**config, "dtype": dtype})
