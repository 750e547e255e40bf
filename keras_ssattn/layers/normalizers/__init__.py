"""Normalizers as layers on logits, and the table of their names."""

from keras_ssattn.layers.normalizers.base import Normalizer
from keras_ssattn.layers.normalizers.softmax import SinkSoftmax, Softmax, SSMax
from keras_ssattn.layers.normalizers.softpick import RectifiedSoftpick, Softpick
from keras_ssattn.layers.normalizers.table import (
    NORMALIZERS,
    get,
    get_for_attention,
    layer,
    name_of,
)

__all__ = [
    "NORMALIZERS",
    "Normalizer",
    "RectifiedSoftpick",
    "SSMax",
    "SinkSoftmax",
    "Softmax",
    "Softpick",
    "get",
    "get_for_attention",
    "layer",
    "name_of",
]
