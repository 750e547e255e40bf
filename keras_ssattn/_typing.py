"""The words that annotations use: what a tensor, a shape, a size, a dtype and a choice are."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

# A tensor of the backend, or a symbolic `keras.KerasTensor`. Keras has no common class for them.
Tensor: TypeAlias = Any
# A tensor, or what `keras.ops.convert_to_tensor` takes: arrays, lists, numbers.
ArrayLike: TypeAlias = Any
# An `int` where a size is known; `None`, or a tensor of the backend, where it is not.
Size: TypeAlias = Any
Shape: TypeAlias = Sequence[Size]
DType: TypeAlias = str
Number: TypeAlias = float | int
Config: TypeAlias = dict[str, Any]
# A name, an object of Keras, or its config, as `keras.initializers.get` takes them.
Identifier: TypeAlias = Any
Layer: TypeAlias = Any  # a `keras.Layer`, with the attributes of its own class
Option: TypeAlias = Any  # a keyword handed on to a function that checks it

Axis: TypeAlias = int | Sequence[int]
Implementation: TypeAlias = Literal["auto", "dense", "tiled", "fused"]
NormName: TypeAlias = Literal["layer_norm", "rms_norm", "offset_rms_norm"]
FeedForwardType: TypeAlias = Literal["standard", "gated"]
NormPosition: TypeAlias = Literal["pre", "post"]
PatternName: TypeAlias = Literal["swan", "smollm3", "ministral"]
OutputMode: TypeAlias = Literal["last_timestep", "all", "mean_pool"]
