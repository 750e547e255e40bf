"""Pure functions of `keras.ops`: the arithmetic of the package, without weights."""

from keras_ssattn.ops.attention import attention, attention_weights
from keras_ssattn.ops.cache import Cache, make_cache, update_cache
from keras_ssattn.ops.length_scale import log_length_scale
from keras_ssattn.ops.normalizers import rectified_softpick, softmax, softpick, ssmax
from keras_ssattn.ops.position_scale import position_temperature, qwen_log_scale
from keras_ssattn.ops.rotary import rotary_attention_factor, rotary_embedding, rotary_frequencies
from keras_ssattn.ops.visibility import key_count, visible_keys

__all__ = [
    "Cache",
    "attention",
    "attention_weights",
    "key_count",
    "log_length_scale",
    "make_cache",
    "position_temperature",
    "qwen_log_scale",
    "rectified_softpick",
    "rotary_attention_factor",
    "rotary_embedding",
    "rotary_frequencies",
    "softmax",
    "softpick",
    "ssmax",
    "update_cache",
    "visible_keys",
]
