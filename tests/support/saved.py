"""Models that were saved by earlier versions, with what they are given.

`scripts/write_files.py` writes them, `models/test_older_files.py` loads what earlier versions
wrote. A model that is in files of an earlier version keeps its name and its architecture here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_ssattn import ops
from keras_ssattn.layers import (
    AdaptiveLogScale,
    FeedForward,
    LastTimestep,
    LogLengthScale,
    MeanPool,
    MultiHeadAttention,
    PositionTemperature,
    QueryAwareScale,
    QwenLogScale,
    RectifiedSoftpick,
    RotaryEmbedding,
    Softmax,
    Softpick,
    SSMax,
    TransformerBlock,
    normalizers,
)
from keras_ssattn.models import convert_attention
from support import custom_layers
from support.cases import (
    FEATURES,
    NORMALIZERS,
    TIME,
    attention_model,
    language_model,
    randomize,
    sequence_model,
    sequences,
    tokens,
)

STEPS = 5  # of queries, where keys have TIME
YARN = {"type": "yarn", "factor": 4.0, "original_length": 8}
LINEAR = {"type": "linear", "factor": 2.0}
MIXED = "mixed_bfloat16"


@dataclasses.dataclass(frozen=True)
class Saved:
    """How to make a model, what it is given, and what is done to it before it is saved."""

    make: Callable[[], Any]
    inputs: Callable[[], tuple]
    prepare: Callable[[Any, int], Any] = randomize  # of the new model and a seed


# Inputs


def padded():
    """Sequences that end in zeros, which `Masking` takes for padding."""
    x = sequences(3)
    x[1, 4:] = 0.0
    return (x,)


def plain():
    return (sequences(3),)


def with_context():
    return sequences(3, time=STEPS), sequences(3, seed=5)


def logits():
    """`[B, H, T, S]` and a mask of them, with a row of nothing and a row of all."""
    rng = np.random.default_rng(5)
    mask = rng.random((2, 2, STEPS, TIME)) < 0.6
    mask[0, 0, 1], mask[1, 1, 2] = False, True
    return (2.0 * rng.normal(size=mask.shape)).astype("float32"), mask


def heads():
    return (np.random.default_rng(5).normal(size=(2, TIME, 3, 8)).astype("float32"),)


def text():
    return (tokens().astype("int32"),)


def padded_text():
    x = tokens().astype("int32")
    x[1, 5:], x[2, :2] = 0, 0
    return (x,)


def grouped(length=STEPS):
    """Queries of four heads, keys and values of two."""
    rng = np.random.default_rng(5)
    shapes = [(2, length, 4, 3), (2, TIME, 2, 3), (2, TIME, 2, 5)]
    return tuple(rng.normal(size=shape).astype("float32") for shape in shapes)


def grouped_with_masks():
    rng = np.random.default_rng(6)
    mask, key_mask = rng.random((2, 1, STEPS, TIME)) < 0.7, rng.random((2, TIME)) < 0.8
    return *grouped(), mask, key_mask


def segments(length):
    return np.sort(np.random.default_rng(length).integers(0, 3, (2, length))).astype("int32")


def packed():
    return *grouped(TIME), segments(TIME)


def packed_pair():
    length_scale = np.random.default_rng(7).uniform(0.5, 2.0, (2, 4, STEPS)).astype("float32")
    return *grouped(), segments(STEPS), segments(TIME), length_scale


# Models


def model_of(function, inputs):
    """The functional model of a function, for inputs of these shapes and dtypes."""
    symbolic = [keras.Input(x.shape[1:], dtype=str(x.dtype)) for x in inputs()]
    return keras.Model(symbolic[0] if len(symbolic) == 1 else symbolic, function(*symbolic))


def functional(function, inputs=plain, **options):
    return Saved(lambda: model_of(function, inputs), inputs, **options)


def masked(layer):
    return functional(lambda x: layer()(keras.layers.Masking()(x)), padded)


def on_logits(layer):
    return functional(lambda x, mask: layer()(x, mask=mask), logits)


def attention_of_all_options():
    return MultiHeadAttention(
        4,
        6,
        value_dim=5,
        num_kv_heads=2,
        normalizer=SSMax(init_s=0.5, use_bias=True),
        dropout=0.1,
        use_bias=False,
        output_shape=(3, 2),
        sliding_window=4,
        rotary=RotaryEmbedding(theta=500.0, fraction=0.7, scaling=LINEAR),
        qk_norm=True,
        kernel_initializer=keras.initializers.HeNormal(seed=1),
        bias_initializer="ones",
        kernel_regularizer=keras.regularizers.L2(1e-3),
        kernel_constraint=keras.constraints.MaxNorm(5.0),
        seed=3,
        name="attention",
    )


def block_of_all_options():
    return TransformerBlock(
        4,
        key_dim=4,
        num_kv_heads=2,
        normalizer=Softmax(length_scale=LogLengthScale(init_s="auto", train_length=TIME)),
        causal=True,
        cross_attention=True,
        sliding_window=3,
        rotary=RotaryEmbedding(theta=1000.0, scaling=YARN),
        qk_norm=True,
        ffn_type="gated",
        ffn_expansion=2,
        activation="relu",
        norm="rms_norm",
        norm_position="post",
        dropout=0.2,
        use_bias=False,
    )


def grouped_block():
    return TransformerBlock(2, num_kv_heads=1, rotary=RotaryEmbedding(fraction=0.7))


def packed_attention(x, segment_ids):
    layer = MultiHeadAttention(2, 3, normalizer="rectified_softpick")
    return layer(x, x, use_causal_mask=True, segment_ids=segment_ids)


def cross_attention(x, context):
    return MultiHeadAttention(2, 3, normalizer="softpick")(x, context)


def converted(*layers):
    model = keras.Sequential([keras.Input((TIME, FEATURES)), *layers])
    return convert_attention(model, "ssmax", train_length=TIME)


def of_keras():
    x = keras.Input((TIME, FEATURES))
    y = keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x, use_causal_mask=True)
    return convert_attention(keras.Model(x, y), "ssmax", train_length=TIME)


def operation(inputs, **options):
    """`ops.attention` on symbolic tensors, after the first three named as in `options`."""
    *names, fixed = options.pop("tensors"), options

    def function(query, key, value, *others):
        tensors = dict(zip(names[0], others, strict=True))
        if "key_segments" in tensors:
            tensors["segment_ids"] = tensors["segment_ids"], tensors.pop("key_segments")
        return ops.attention(query, key, value, **tensors, **fixed)

    return functional(function, inputs)


def enlarged(model, seed=7):
    """Embeddings as large as training makes them: a norm of small ones enlarges rounding errors."""
    embeddings = randomize(model, seed).token_embedding.embeddings
    embeddings.assign(4.0 * embeddings)
    return model


def language(inputs=text, prepare=enlarged, **options):
    def make():
        arguments = {k: v() if callable(v) else v for k, v in options.items()}
        return language_model(num_layers=1, **arguments)

    return Saved(make, inputs, prepare)


def query_aware():
    return Softmax(length_scale=QueryAwareScale(hidden_size=2))


def adaptive_log_scale():
    return Softmax(length_scale=AdaptiveLogScale(delta=0.7))


def position_temperature():
    return Softmax(length_scale=PositionTemperature(beta=0.3, original_length=2, first_position=1))


def qwen_log_scale():
    return Softmax(length_scale=QwenLogScale(train_length=3))


# What is done to them


def quantized(model, seed=7):
    randomize(model, seed).quantize("int8")
    return model


def other_theta(model, seed=7):
    """As one does for longer texts than those trained on."""
    for block in enlarged(model, seed).blocks:
        block.attention.rotary.theta = 777.0
    return model


def frozen(model, seed=7):
    randomize(model, seed).get_layer("attention").trainable = False
    return model


def targets():
    return sequences(3, seed=4)


def trained(model, seed=7):
    model = randomize(model, seed)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(*plain(), targets(), epochs=2, shuffle=False, verbose=0)
    return model


def go_on(model):
    """The losses of a trained model that goes on; the second depends on the optimizer's state."""
    history = model.fit(*plain(), targets(), epochs=2, shuffle=False, verbose=0).history
    return history["loss"]


MODELS = {
    **{
        f"attention_{name}": Saved(lambda name=name: attention_model(name), plain)
        for name in NORMALIZERS
    },
    **{
        f"sequence_{name}": Saved(lambda name=name: sequence_model(name), plain)
        for name in NORMALIZERS
    },
    **{
        f"normalizer_{name}": on_logits(
            lambda make=make: normalizers.get(make()),
        )
        for name, make in NORMALIZERS.items()
    },
    "normalizer_ssmax_per_head": on_logits(lambda: SSMax(use_bias=True, num_heads=2)),
    "normalizer_softmax_scaled": on_logits(lambda: Softmax(length_scale=LogLengthScale(0.4))),
    "normalizer_softmax_temperature": on_logits(position_temperature),
    "normalizer_softmax_qwen": on_logits(qwen_log_scale),
    "normalizer_softpick_axes": on_logits(lambda: Softpick(axis=(1, -1))),
    "normalizer_rectified_softpick_axis": on_logits(lambda: RectifiedSoftpick(axis=2)),
    "attention_options": functional(
        lambda x: attention_of_all_options()(x, x, use_causal_mask=True)
    ),
    "attention_packed": functional(packed_attention, lambda: (*plain(), segments(TIME)[[0, 1, 0]])),
    "attention_cross": functional(cross_attention, with_context),
    "attention_frozen": Saved(lambda: attention_model("ssmax_bias"), plain, frozen),
    "attention_trained": Saved(lambda: attention_model("ssmax_bias"), plain, trained),
    "attention_int8": Saved(lambda: attention_model("ssmax_bias"), plain, quantized),
    "attention_bfloat16": Saved(lambda: attention_model("ssmax_bias", dtype=MIXED), plain),
    "attention_adaptive": functional(
        lambda x: MultiHeadAttention(2, 3, normalizer=adaptive_log_scale())(x, x)
    ),
    "attention_query_aware": functional(
        lambda x: MultiHeadAttention(2, 3, normalizer=query_aware())(x, x)
    ),
    "sequence_all": Saved(lambda: sequence_model(output_mode="all", final_norm=False), plain),
    "sequence_mean_pool": Saved(lambda: sequence_model(output_mode="mean_pool"), plain),
    "sequence_two_layers": Saved(lambda: sequence_model(num_layers=2, window_size=None), plain),
    "sequence_options": Saved(
        lambda: sequence_model(
            window_size=None,
            output_mode="mean_pool",
            causal=False,
            rotary="default",
            num_kv_heads=1,
            sliding_window=4,
            qk_norm=True,
            use_gate=True,
            ffn_type="gated",
            norm="rms_norm",
        ),
        plain,
    ),
    "sequence_nested": masked(lambda: sequence_model("softpick")),
    "block": masked(lambda: TransformerBlock(2)),
    "block_options": functional(lambda x, y: block_of_all_options()(x, y), with_context),
    "block_grouped": masked(grouped_block),
    "block_int8": functional(lambda x: TransformerBlock(2, qk_norm=True)(x), prepare=quantized),
    "block_bfloat16": functional(lambda x: TransformerBlock(2, norm="rms_norm", dtype=MIXED)(x)),
    "language_tied": language(),
    "language_untied": language(tie_embeddings=False),
    "language_padding": language(padded_text, padding_id=0),
    "language_query_aware": language(normalizer=query_aware),
    "language_adaptive": language(normalizer=adaptive_log_scale),
    "language_temperature": language(normalizer=position_temperature),
    "language_qwen": language(normalizer=qwen_log_scale),
    "language_theta": language(prepare=other_theta),
    "language_options": language(
        num_heads=4,
        num_kv_heads=2,
        normalizer="rectified_softpick",
        rotary=lambda: RotaryEmbedding(theta=500.0, fraction=0.7, scaling=YARN),
        sliding_window=3,
        qk_norm=True,
        ffn_type="standard",
        ffn_expansion=1.5,
        norm="layer_norm",
        use_bias=True,
        dropout=0.1,
    ),
    "language_remat": language(remat=True, rotary=None),
    "language_int8": language(prepare=quantized),
    "last_timestep": masked(LastTimestep),
    "mean_pool": masked(MeanPool),
    "rotary": functional(lambda x: RotaryEmbedding(theta=100.0, scaling=YARN)(x, offset=3), heads),
    "rotary_partial": functional(lambda x: RotaryEmbedding(fraction=0.5)(x), heads),
    "feed_forward": functional(lambda x: FeedForward(5, activation="tanh")(x)),
    "feed_forward_gelu_tanh": functional(lambda x: FeedForward(5, activation="gelu_tanh")(x)),
    "feed_forward_gated": functional(lambda x: FeedForward(5, gated=True, use_bias=False)(x)),
    "operation_masks": operation(
        grouped_with_masks,
        tensors=("mask", "key_mask"),
        normalizer="rectified_softpick",
        epsilon=1e-3,
        scale=0.7,
    ),
    "operation_segments": operation(
        packed, tensors=("segment_ids",), normalizer="ssmax", causal=True, window=4
    ),
    "operation_segment_pair": operation(
        packed_pair,
        tensors=("segment_ids", "key_segments", "length_scale"),
        normalizer="softpick",
        query_offset=1,
        implementation="tiled",
    ),
    "converted": Saved(of_keras, plain),
    "converted_layers": Saved(
        lambda: converted(custom_layers.InConstructor(FEATURES), custom_layers.InBuild(FEATURES)),
        plain,
    ),
}  # fmt: skip
