"""Rotary position embedding, with the scalings that stretch it to longer contexts."""

import dataclasses
import math
import numbers

import numpy as np
from keras import ops

from keras_ssattn._checks import check_flag, check_floating, check_number, check_rank, to_int32
from keras_ssattn._frameworks import constant_like
from keras_ssattn._tensors import cast, dtype_of, may_be_equal, split, to_tensor, widen
from keras_ssattn._typing import ArrayLike, Config, DType, Tensor
from keras_ssattn.ops.sizes import steps

# Keys that each type of scaling needs, and those it may have.
SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "yarn": (
        {"factor", "original_length"},
        {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", "original_length"}, {"low_freq_factor", "high_freq_factor"}),
}


def rotary_frequencies(
    size: int, theta: float = 10000.0, scaling: Config | None = None
) -> np.ndarray:
    r"""Radians per position by which each pair of features turns.

    Pair i turns by :math:`\theta^{-2i/size}`. The scalings slow the pairs down:

    - `{"type": "linear", "factor": f}` divides every frequency by f, as if positions were.
    - `{"type": "yarn", "factor": f, "original_length": L}` divides by f the pairs that turn less
      than `beta_slow` (1) times within L positions, leaves those that turn more than `beta_fast`
      (32) times, and between them goes from one to the other linearly in i, the two ends rounded
      outwards to whole pairs, as in the code of YaRN's authors and the models that use it (in
      their paper it is linear in the number of turns). With `"truncate": False` the ends are not
      rounded.
    - `{"type": "llama3", "factor": f, "original_length": L}` divides by f the pairs that turn less
      than `low_freq_factor` (1) times within L positions, leaves those that turn more than
      `high_freq_factor` (4) times, and between them goes from one to the other linearly in the
      number of turns.

    Args:
        size: number of features that are rotated, even.
        theta: the base, a number above 1.
        scaling: `None` or one of the above; what has a default is optional, and so are the
            entries that `rotary_attention_factor` reads.

    Returns:
        A NumPy array `[size / 2]`. It is float64: at position 131071 a frequency rounded to
        float32 would be 0.004 radians off.

    Raises:
        ValueError: for a size that is not even and positive, a theta that is not a finite number
            above 1, or a scaling of unknown type, keys or values.

    Example:

    >>> from keras_ssattn import ops
    >>> ops.rotary_frequencies(4).tolist()
    [1.0, 0.01]
    >>> ops.rotary_frequencies(4, scaling={"type": "linear", "factor": 4}).tolist()
    [0.25, 0.0025]

    References: arXiv 2104.09864 (rotary embedding), arXiv 2306.15595 (linear scaling), arXiv
    2309.00071 (YaRN), arXiv 2407.21783 and the published implementation of Llama 3.1 (llama3).
    """
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 2 or size % 2:
        raise ValueError(f"`size` must be an even positive integer. Received: size={size!r}")
    theta = check_theta(theta)
    scaling = check_scaling(scaling)
    pairs = np.arange(size // 2)
    frequencies = theta ** (-2.0 * pairs / size)
    if scaling is None:
        return frequencies
    slow = frequencies / scaling["factor"]
    if scaling["type"] == "linear":
        return slow
    if scaling["type"] == "llama3":
        low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
        turns = scaling["original_length"] * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return kept * frequencies + (1 - kept) * slow

    def pair_that_turns(times: float) -> float:
        return (
            size
            * math.log(scaling["original_length"] / (2 * math.pi * times))
            / (2 * math.log(theta))
        )

    first = pair_that_turns(scaling.get("beta_fast", 32))
    last = pair_that_turns(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    share = np.clip((pairs - first) / (last - first or 1e-3), 0.0, 1.0)
    return share * slow + (1 - share) * frequencies


def rotary_attention_factor(scaling: Config | None) -> float:
    """What a scaling multiplies cos and sin by, and so the logits by the square of.

    Args:
        scaling: as in `rotary_frequencies`.

    Returns:
        For YaRN its `"attention_factor"`; by default `m(mscale) / m(mscale_all_dim)` if it has
        both and neither is 0, else `m(1)`, where `m(s) = 0.1 s ln(factor) + 1`. Without YaRN, 1.

    Raises:
        ValueError: for an invalid scaling.

    Example:

    >>> from keras_ssattn import ops
    >>> yarn = {"type": "yarn", "factor": 16, "original_length": 4096}
    >>> round(ops.rotary_attention_factor(yarn), 4)
    1.2773

    Reference: arXiv 2309.00071.
    """
    scaling = check_scaling(scaling)
    if scaling is None or scaling["type"] != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def magnitude(slope: float) -> float:
        return 0.1 * slope * math.log(scaling["factor"]) + 1.0

    slopes = scaling.get("mscale", 0.0), scaling.get("mscale_all_dim", 0.0)
    return magnitude(slopes[0]) / magnitude(slopes[1]) if all(slopes) else magnitude(1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """Turns features of some positions; one serves all layers that read the same positions.

    Attributes:
        cos: `[B|1, T, 1, D]`, 1 where a feature is not rotated.
        sin: the same; minus the sine in the first half of the rotated features, 0 where a feature
            is not rotated.
        half: R/2, the number of pairs.
    """

    cos: Tensor
    sin: Tensor
    half: int

    @classmethod
    def of(
        cls,
        positions: Tensor,
        frequencies: np.ndarray,
        size: int,
        attention_factor: float = 1.0,
        dtype: DType = "float32",
    ) -> "Rotation":
        """The rotation at positions `[B|1, T]`, int32, of heads with D = `size` features."""
        angles = ops.expand_dims(_angles(positions, frequencies, dtype), -2)  # [B|1, T, 1, R/2]
        cos, sin = ops.cos(angles), ops.sin(angles)
        if attention_factor != 1.0:
            cos, sin = cos * attention_factor, sin * attention_factor
        cos, sin = [cos, cos], [-sin, sin]
        rest = size - 2 * frequencies.size
        if rest:
            ones = ops.ones_like(cos[0][..., :1])
            cos.append(ops.repeat(ones, rest, axis=-1))
            sin.append(ops.repeat(ops.zeros_like(ones), rest, axis=-1))
        cos, sin = ops.concatenate(cos, axis=-1), ops.concatenate(sin, axis=-1)
        return cls(cos, sin, frequencies.size)

    def turn(self, x: Tensor) -> Tensor:
        """`x`, `[B, T, H, D]`, with its first R features turned."""
        dtype, x = dtype_of(x), widen(x)
        sizes, rest = [self.half, self.half], x.shape[-1] - 2 * self.half
        first, second, *others = split(x, [*sizes, rest] if rest else sizes)
        swapped = ops.concatenate([second, first, *others], axis=-1)
        return cast(x * self.cos + swapped * self.sin, dtype)


def rotary_embedding(
    x: ArrayLike, positions: int | ArrayLike, frequencies: ArrayLike, attention_factor: float = 1.0
) -> Tensor:
    """Turns pairs of features by an angle proportional to the position.

    The dot product of a query and a key, both turned, depends on their positions by the
    difference only. Of R rotated features the pairs are i and i + R/2 (half-split, "NeoX"). The
    angles are true to 1e-6 radians up to position 16 million, though computed in float32
    (float64 for float64 inputs).

    Args:
        x: floating-point `[B, T, H, D]`.
        positions: integer tensor `[T]` or `[B, T]`; or an integer, the position of the first
            step, the others following.
        frequencies: radians per position, R/2 numbers, such as `rotary_frequencies(R)`. Where
            R < D, the first R features are rotated and the others left as they are.
        attention_factor: multiplies the rotated features.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        TypeError: if `x` is not floating-point or `positions` are not integers.
        ValueError: for shapes that do not fit, or an `attention_factor` that is not a positive
            number.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> x = keras.random.normal((2, 7, 4, 16))
    >>> ops.rotary_embedding(x, 0, ops.rotary_frequencies(16)).shape
    (2, 7, 4, 16)

    Reference: Su et al., arXiv 2104.09864.
    """
    x = to_tensor(x)
    check_floating("x", x)
    check_rank("x", x, 4)
    frequencies = np.asarray(frequencies, "float64")
    half = frequencies.size
    if frequencies.ndim != 1 or not 0 < 2 * half <= x.shape[-1]:
        raise ValueError(
            "`frequencies` must have shape [R/2] with 0 < R <= D, the last dimension of `x`. "
            f"Received: frequencies with shape {frequencies.shape}, x with shape {tuple(x.shape)}"
        )
    attention_factor = _check_at_least("attention_factor", attention_factor)
    positions = _check_positions(positions, x)
    dtype = dtype_of(widen(x))
    rotation = Rotation.of(positions, frequencies, x.shape[-1], attention_factor, dtype)
    return rotation.turn(x)


def _angles(positions: Tensor, frequencies: np.ndarray, dtype: DType) -> Tensor:
    """Positions times frequencies, less whole turns: `[..., T]` and `[R/2]` to `[..., T, R/2]`."""
    # The float32 product is 0.01 radians off at position 131071. So count turns, not radians, and
    # split the position into 4096 high + low. How far a step of either goes, modulo 1, is known
    # in float64; its leading 12 bits times high or low are exact in float32 and lose their whole
    # turns without error; the rest of it gives a product of less than half a turn.
    positions = ops.expand_dims(positions, -1)
    high = ops.floor_divide(positions, 4096)
    turns: Tensor = 0.0
    for count, stride in ((high, 4096), (positions - 4096 * high, 1)):
        count = ops.cast(count, dtype)
        rate = frequencies * (stride / (2 * math.pi))
        rate -= np.round(rate)
        leading = np.round(rate * 4096) / 4096
        product = count * constant_like(leading, count)
        rest = count * constant_like(rate - leading, count)
        turns = turns + (product - ops.round(product)) + rest
    return turns * (2 * math.pi)


def _check_positions(positions: int | ArrayLike, x: Tensor) -> Tensor:
    """Positions as int32 `[1, T]` or `[B, T]`, or raises if they do not fit `x`."""
    positions = to_int32("positions", positions)
    check_rank("positions", positions, (0, 1, 2))
    if len(positions.shape) == 0:
        positions = positions + steps(ops.shape(x)[1])
    if len(positions.shape) == 1:
        positions = ops.expand_dims(positions, 0)
    (rows, length), (batch, time) = ops.shape(positions), ops.shape(x)[:2]
    one_row = isinstance(rows, int) and rows == 1
    if not (one_row or may_be_equal(rows, batch)) or not may_be_equal(length, time):
        raise ValueError(
            "`positions` must have shape [T] or [B, T]. Received: positions with shape "
            f"{tuple(positions.shape)}, x with shape {tuple(x.shape)}"
        )
    return positions


def check_theta(theta: object) -> float:
    """Returns `theta`, a finite number above 1, as a float, or raises."""
    return check_number("theta", theta, "a finite number above 1", lambda x: 1 < x < math.inf)


def check_scaling(scaling: Config | None) -> Config | None:
    """Returns a copy of `scaling`, a valid one or `None`, or raises."""
    if scaling is None:
        return None
    if not isinstance(scaling, dict) or scaling.get("type") not in SCALINGS:
        raise ValueError(
            f'`scaling` must be None or a dict whose "type" is one of {tuple(SCALINGS)}. '
            f"Received: scaling={scaling!r}"
        )
    needed, optional = SCALINGS[scaling["type"]]
    names = set(scaling) - {"type"}
    if not needed <= names <= needed | optional:
        raise ValueError(
            f"`scaling` of type {scaling['type']!r} must have the keys {sorted(needed)}"
            f"{f' and may have {sorted(optional)}' if optional else ''}. Received: "
            f"scaling={scaling!r}"
        )
    for name in names:
        _check_entry(name, scaling[name])
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    if low >= high:
        raise ValueError(
            "`scaling` must have a 'high_freq_factor' above its 'low_freq_factor'. Received: "
            f"scaling={scaling!r}"
        )
    return dict(scaling)


def _check_entry(name: str, value: object) -> None:
    """Raises if this entry of a scaling does not fit."""
    name = f"scaling[{name!r}]"
    if "truncate" in name:
        check_flag(name, value)
    elif "mscale" in name:
        check_number(name, value, "a number of 0 or more", lambda x: 0 <= x < math.inf)
    else:
        _check_at_least(name, value, 1.0 if "['factor']" in name or "length" in name else 0.0)


def _check_at_least(name: str, value: object, least: float = 0.0) -> float:
    """Returns a finite number above 0, and not below `least`, as a float, or raises."""
    expected = f"a number of {least:g} or more" if least else "a positive number"
    return check_number(name, value, expected, lambda x: 0 < x < math.inf and x >= least)
