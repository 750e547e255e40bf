"""Pure functions of `keras.ops`: the arithmetic of the package, without weights.

`attention`, the normalizers and the counts check their arguments. `Visibility` and the objects of
`kernels` are arguments that have been checked, which `attend` and `attend_weights` take.
"""

from keras_ssattn._keras.exporting import exporting
from keras_ssattn.ops import kernels
from keras_ssattn.ops._attention.api import attention, attention_weights
from keras_ssattn.ops._attention.arguments import factor_of_query
from keras_ssattn.ops._attention.choice import attend, attend_weights
from keras_ssattn.ops._attention.dense import combine
from keras_ssattn.ops.cache import Cache, make_cache, update_cache
from keras_ssattn.ops.length_scales import (
    adaptive_log_scale,
    log_length_scale,
    position_temperature,
    qwen_log_scale,
)
from keras_ssattn.ops.normalizers import rectified_softpick, sink_softmax, softmax, softpick, ssmax
from keras_ssattn.ops.rotary import rotary_attention_factor, rotary_embedding, rotary_frequencies
from keras_ssattn.ops.visibility import Visibility, key_count, visible_keys

__all__ = [
    "adaptive_log_scale",
    "Cache",
    "Visibility",
    "attend",
    "attend_weights",
    "attention",
    "attention_weights",
    "combine",
    "exporting",
    "factor_of_query",
    "kernels",
    "key_count",
    "log_length_scale",
    "make_cache",
    "position_temperature",
    "qwen_log_scale",
    "rectified_softpick",
    "rotary_attention_factor",
    "rotary_embedding",
    "rotary_frequencies",
    "sink_softmax",
    "softmax",
    "softpick",
    "ssmax",
    "update_cache",
    "visible_keys",
]
