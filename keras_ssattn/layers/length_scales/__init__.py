"""Length scales: how the logits grow with the number of keys that a query sees."""

from keras_ssattn.layers.length_scales.adaptive import AdaptiveLogScale
from keras_ssattn.layers.length_scales.base import LengthScale, get
from keras_ssattn.layers.length_scales.log import LogLengthScale
from keras_ssattn.layers.length_scales.positional import PositionTemperature, QwenLogScale
from keras_ssattn.layers.length_scales.query_aware import QueryAwareScale

__all__ = [
    "AdaptiveLogScale",
    "LengthScale",
    "LogLengthScale",
    "PositionTemperature",
    "QueryAwareScale",
    "QwenLogScale",
    "get",
]
