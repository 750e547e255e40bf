"""Pure functions of `keras.ops`: the arithmetic of the package, without weights."""

from keras_ssattn.ops.attention import attention, attention_weights
from keras_ssattn.ops.length_scale import log_length_scale
from keras_ssattn.ops.normalizers import rectified_softpick, softmax, softpick, ssmax
from keras_ssattn.ops.visibility import key_count, visible_keys

__all__ = [
    "attention",
    "attention_weights",
    "key_count",
    "log_length_scale",
    "rectified_softpick",
    "softmax",
    "softpick",
    "ssmax",
    "visible_keys",
]
