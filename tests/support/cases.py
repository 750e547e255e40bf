"""Models and data that the tests share with the scripts they launch."""

import inspect

import keras
import numpy as np

import keras_ssattn
from keras_ssattn.layers import (
    LogLengthScale,
    MultiHeadAttention,
    RectifiedSoftpick,
    SinkSoftmax,
    Softpick,
    SSMax,
)
from keras_ssattn.models import CausalLM
from keras_ssattn.ops import kernels
from keras_ssattn.ssmax import EdificeSSMax

TIME, FEATURES = 7, 6

# The names of the normalizers, each with the row of the oracle and the kernel that it has.
NAMES = ("softmax", "ssmax", "softpick", "rectified_softpick", "sink_softmax")
COMPARED = tuple(name for name in NAMES if name != "sink_softmax")  # by the examples

# Every `normalizer=` that users are promised, as factories: a layer belongs to one model.
NORMALIZERS = {
    "softmax": lambda: "softmax",
    "ssmax": lambda: "ssmax",
    "softpick": lambda: "softpick",
    "rectified_softpick": lambda: "rectified_softpick",
    "ssmax_bias": lambda: SSMax(use_bias=True),
    "ssmax_fixed": lambda: SSMax(trainable=False),
    "ssmax_shift": lambda: EdificeSSMax(),
    "ssmax_auto": lambda: SSMax(init_s="auto", train_length=TIME),
    "softpick_scaled": lambda: Softpick(length_scale=LogLengthScale(init_s=0.3)),
    "rectified_softpick_epsilon": lambda: RectifiedSoftpick(epsilon=1e-4),
    "sink_softmax": lambda: "sink_softmax",
    "sink_softmax_scaled": lambda: SinkSoftmax(init_sink=0.5, length_scale=LogLengthScale()),
}

# Those that move between backends: one of each formula, with every kind of parameter.
TRAVELERS = (
    "softmax", "ssmax_bias", "softpick_scaled", "rectified_softpick", "sink_softmax_scaled",
)  # fmt: skip
MODELS = (*TRAVELERS, "language_model")
VOCABULARY = 13

# What the Keras of the floor lacks.
HAS_GATE = "use_gate" in inspect.signature(keras.layers.MultiHeadAttention).parameters


def implementations(normalizer):
    """Those that serve any mask on this backend and this Keras."""
    fused = normalizer in ("softmax", "ssmax", "sink_softmax")
    fused = fused and keras.backend.backend() == "torch"
    return ("dense", "tiled", "fused") if fused else ("dense", "tiled")


def oracle_name(normalizer):
    """The row of the oracle that a normalizer layer has, but for its length scale."""
    kernel = type(normalizer.kernel())
    return next(name for name in NAMES if kernels.KERNELS[name] is kernel)


def attention_model(normalizer, **options):
    """One layer of causal self-attention, `[B, 7, 6]` to the same."""
    options = {"num_heads": 2, "key_dim": 3, "name": "attention", **options}
    attention = MultiHeadAttention(normalizer=NORMALIZERS[normalizer](), **options)
    inputs = keras.Input((TIME, FEATURES), name="inputs")
    return keras.Model(inputs, attention(inputs, inputs, use_causal_mask=True))


def sequence_model(normalizer="ssmax", **options):
    """A small `keras_ssattn.build`, `[B, 7, 6]` to `[B, 10]`."""
    sizes = {"hidden_size": 10, "num_heads": 2, "num_layers": 1, "window_size": TIME}
    return keras_ssattn.build(
        FEATURES, normalizer=NORMALIZERS[normalizer](), dropout=0.0, **{**sizes, **options}
    )


def language_model(**options):
    sizes = {"hidden_size": 12, "num_layers": 2, "num_heads": 2}
    return CausalLM(VOCABULARY, **{**sizes, **options})


def randomize(model, seed=7):
    """Moves every weight off its initial value, as training would."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        noise = rng.normal(0.0, 0.2, weight.shape)
        weight.assign(keras.ops.convert_to_numpy(weight) + noise.astype("float32"))
    return model


def sequences(batch=8, time=TIME, features=FEATURES, seed=3):
    return np.random.default_rng(seed).normal(size=(batch, time, features)).astype("float32")


def tokens(batch=4, time=9, seed=3):
    return np.random.default_rng(seed).integers(1, VOCABULARY, (batch, time))
