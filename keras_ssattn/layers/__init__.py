"""Keras layers: weights and configuration around the functions of `keras_ssattn.ops`."""

from keras_ssattn.layers.attention import MultiHeadAttention
from keras_ssattn.layers.feed_forward import FeedForward
from keras_ssattn.layers.length_scales import (
    AdaptiveLogScale,
    LengthScale,
    LogLengthScale,
    PositionTemperature,
    QueryAwareScale,
    QwenLogScale,
)
from keras_ssattn.layers.normalizers import (
    Normalizer,
    RectifiedSoftpick,
    SinkSoftmax,
    Softmax,
    Softpick,
    SSMax,
)
from keras_ssattn.layers.pooling import LastTimestep, MeanPool
from keras_ssattn.layers.rotary import RotaryEmbedding
from keras_ssattn.layers.transformer import TransformerBlock

__all__ = [
    "AdaptiveLogScale",
    "FeedForward",
    "LastTimestep",
    "LengthScale",
    "LogLengthScale",
    "MeanPool",
    "MultiHeadAttention",
    "Normalizer",
    "PositionTemperature",
    "QueryAwareScale",
    "QwenLogScale",
    "RectifiedSoftpick",
    "RotaryEmbedding",
    "SSMax",
    "SinkSoftmax",
    "Softmax",
    "Softpick",
    "TransformerBlock",
]
