"""Attention that stays sharp as the context grows, for Keras 3 on any backend.

SSMax (scalable softmax) and softpick as functions (`ops`), layers (`layers`), and a
transformer (`build`); `ssmax` and `softpick` mirror the modules of Edifice.
"""

from keras_ssattn import analysis, distribution, layers, models, ops, softpick, ssmax
from keras_ssattn.layers import (
    FeedForward,
    LastTimestep,
    LengthScale,
    LogLengthScale,
    MeanPool,
    MultiHeadAttention,
    Normalizer,
    PositionTemperature,
    QueryAwareScale,
    QwenLogScale,
    RectifiedSoftpick,
    RotaryEmbedding,
    Softmax,
    Softpick,
    SSMax,
    TransformerBlock,
)
from keras_ssattn.layers.normalizers import layer
from keras_ssattn.models import build, output_size
from keras_ssattn.ssmax import compute

__version__ = "0.1.0"

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
    "analysis",
    "build",
    "compute",
    "distribution",
    "layer",
    "layers",
    "models",
    "ops",
    "output_size",
    "softpick",
    "ssmax",
]
