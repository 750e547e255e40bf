"""Attention that stays sharp as the context grows, for Keras 3 on any backend.

SSMax (scalable softmax) and softpick as functions (`ops`), layers (`layers`), and a
transformer (`build`); `ssmax` and `softpick` mirror the modules of Edifice.
"""

from keras_ssattn import analysis, distribution, layers, models, ops, softpick, ssmax
from keras_ssattn.layers import (
    AdaptiveLogScale,
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
    SinkSoftmax,
    Softmax,
    Softpick,
    SSMax,
    TransformerBlock,
)
from keras_ssattn.layers.normalizers import layer
from keras_ssattn.models import CausalLM, build, convert_attention, generate, output_size
from keras_ssattn.ssmax import compute

__version__ = "0.2.0"

__all__ = [
    "AdaptiveLogScale",
    "CausalLM",
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
    "analysis",
    "build",
    "compute",
    "convert_attention",
    "distribution",
    "generate",
    "layer",
    "layers",
    "models",
    "ops",
    "output_size",
    "softpick",
    "ssmax",
]
