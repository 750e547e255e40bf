"""Rotary position embedding as a layer."""

import math
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_ssattn._checks import check_fits_int32, check_number, to_int32
from keras_ssattn._keras.serialization import Specification
from keras_ssattn._tensors import dtype_of, is_known
from keras_ssattn._typing import ArrayLike, Config, DType, Identifier, Layer, Option, Shape, Tensor
from keras_ssattn.ops import rotary_attention_factor, rotary_embedding, rotary_frequencies
from keras_ssattn.ops.rotary import Rotation, check_scaling, check_theta
from keras_ssattn.ops.sizes import steps


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
            `{"type": "yarn", "factor": 4, "original_length": 4096}`, or "llama3" with the same.
            See `keras_ssattn.ops.rotary_frequencies`.
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
        scaling: Config | None = None,
        **kwargs: object,
    ) -> None:
        fraction = check_number("fraction", fraction, "a number in (0, 1]", lambda x: 0 < x <= 1)
        theta, scaling = check_theta(theta), check_scaling(scaling)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.theta = theta
        self.fraction = fraction
        self.scaling = scaling

    @property
    def theta(self) -> float:
        """The base; read at each call."""
        return self._theta

    @theta.setter
    def theta(self, value: float) -> None:
        self._theta = check_theta(value)

    def __call__(self, x: Tensor, *args: Option, **kwargs: Option) -> Tensor:
        given = {**dict(zip(("positions", "offset"), args, strict=False)), **kwargs}
        for name in ("positions", "offset"):
            if given.get(name) is not None:  # before Keras makes tensors of 32 bits of them on JAX
                check_fits_int32(name, given[name])
        return super().__call__(x, *args, **kwargs)

    def call(
        self, x: Tensor, positions: ArrayLike | None = None, offset: int | ArrayLike = 0
    ) -> Tensor:
        frequencies = self._frequencies(x.shape)
        factor = rotary_attention_factor(self.scaling)
        if positions is None:
            positions = _positions(offset, x)
        return rotary_embedding(x, positions, frequencies, factor)

    def rotation(self, positions: Tensor, size: int, dtype: DType = "float32") -> Rotation:
        """What turns queries and keys at some positions, for several layers.

        Args:
            positions: int32 `[B|1, T]`.
            size: D, features of a head.
            dtype: `"float32"`, or `"float64"` for heads of that dtype.
        """
        factor = rotary_attention_factor(self.scaling)
        frequencies = self._frequencies((None, None, None, size))
        return Rotation.of(positions, frequencies, size, factor, dtype)

    def _frequencies(self, shape: Shape) -> np.ndarray:
        return rotary_frequencies(self._rotary_size(shape), self.theta, self.scaling)

    def _rotary_size(self, shape: Shape) -> int:
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
        self,
        x_shape: Shape,
        positions_shape: Shape | None = None,
        offset_shape: Shape | None = None,
    ) -> Shape:
        self._rotary_size(x_shape)
        return tuple(x_shape)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "theta": self.theta,
            "fraction": self.fraction,
            "scaling": check_scaling(self.scaling),  # a plain dict
        }


def _positions(offset: int | ArrayLike, x: Tensor) -> Tensor:
    """Positions `[1 or B, T]` from that of the first step, `[]` or `[B]`."""
    offset = to_int32("offset", offset, "an integer")
    if len(offset.shape) > 1:
        raise ValueError(
            "`offset` must be an integer or have shape [B]. Received: offset with shape "
            f"{tuple(offset.shape)}"
        )
    return ops.reshape(offset, (-1, 1)) + steps(ops.shape(x)[1])


def turn(rotation: Rotation, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys `[B, T, heads, D]` of the same positions, turned.

    One position in one call, which on PyTorch costs as much as for one of them; but not where
    heads are split over devices, which would send each other a half of them.
    """
    length = query.shape[1]
    together = is_known(length) and length == 1 and dtype_of(query) == dtype_of(key)
    if not together or keras.distribution.distribution() is not None:
        return rotation.turn(query), rotation.turn(key)
    heads = query.shape[2]
    both = rotation.turn(ops.concatenate([query, key], axis=2))
    return both[:, :, :heads], both[:, :, heads:]


def specify(rotary: Identifier) -> Specification | None:
    """The specification of a `RotaryEmbedding`, given itself or its config; `None` for none."""
    if isinstance(rotary, dict):
        rotary = keras.saving.deserialize_keras_object(rotary)
    if rotary is None or isinstance(rotary, Specification):
        return rotary
    if not isinstance(rotary, RotaryEmbedding):
        raise ValueError(
            "`rotary` must be a `RotaryEmbedding` layer, its serialized config, or None. Received: "
            f"rotary={rotary!r}"
        )
    specification = Specification.of(rotary)
    specification.options["name"] = "rotary"
    return specification


def serialize_rotary(specification: Specification | None, layers: Sequence[Layer]) -> Config | None:
    """The config of the rotary layer given, with what was set since on those made of it."""
    if specification is None:
        return None
    settings = [(x.theta, x.scaling) for x in layers]
    if any(x != settings[0] for x in settings):
        raise ValueError(
            "`theta` and `scaling` must be the same in every block, to be saved in one config. "
            f"Received: {settings}"
        )
    config = specification.serialize()
    if settings:
        theta, scaling = settings[0]
        config["config"] |= {"theta": theta, "scaling": check_scaling(scaling)}
    return config
