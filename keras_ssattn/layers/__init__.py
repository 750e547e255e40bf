"""Keras layers: weights and configuration around the functions of `keras_ssattn.ops`."""

from keras_ssattn.layers.attention import MultiHeadAttention
from keras_ssattn.layers.feed_forward import FeedForward
from keras_ssattn.layers.length_scale import LengthScale, LogLengthScale
from keras_ssattn.layers.normalizer import Normalizer
from keras_ssattn.layers.pooling import LastTimestep, MeanPool
from keras_ssattn.layers.position_scale import PositionTemperature, QwenLogScale
from keras_ssattn.layers.query_aware_scale import QueryAwareScale
from keras_ssattn.layers.rotary import RotaryEmbedding
from keras_ssattn.layers.softmax import Softmax, SSMax
from keras_ssattn.layers.softpick import RectifiedSoftpick, Softpick
from keras_ssattn.layers.transformer import TransformerBlock

__all__ = [
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
    "Softmax",
    "Softpick",
    "TransformerBlock",
]
