"""Every public layer: its constructor, config, shapes, masks, and a file of it."""

import inspect
import json

import keras
import numpy as np
import pytest
from support.cases import FEATURES, TIME, randomize, sequences
from support.helpers import FORMATS, assert_survives, to_numpy

from keras_ssattn import layers
from keras_ssattn.layers import (
    AdaptiveLogScale,
    FeedForward,
    LastTimestep,
    LengthScale,
    LogLengthScale,
    MeanPool,
    MultiHeadAttention,
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

X = sequences(3)
CONTEXT = sequences(3, 5, 11)
N = np.arange(21, dtype="int32").reshape(3, 1, TIME)
HEADS = sequences(3, TIME, 2 * 6).reshape(3, TIME, 2, 6)

# class: (required arguments, other arguments, inputs)
LAYERS = {
    FeedForward: (
        dict(inner_size=5),
        dict(gated=True, activation="relu", use_bias=False),
        (X,),
    ),
    LastTimestep: ({}, {}, (X,)),
    LengthScale: ({}, dict(num_heads=2), (N,)),
    LogLengthScale: (
        {},
        dict(init_s="auto", use_bias=True, train_length=11, num_heads=2),
        (N,),
    ),
    MeanPool: ({}, {}, (X,)),
    MultiHeadAttention: (
        dict(num_heads=4, key_dim=3),
        dict(
            value_dim=5,
            num_kv_heads=2,
            normalizer=SSMax(init_s=0.4, use_bias=True),
            dropout=0.2,
            use_bias=["key", "query"],
            output_shape=(2, 3),
            sliding_window=4,
            attention_axes=(1,),
            flash_attention=False,
            use_gate=True,
            rotary=RotaryEmbedding(fraction=0.7),
            qk_norm=True,
            norm_epsilon=1e-3,
            implementation="dense",
            kernel_initializer="he_normal",
            bias_initializer="ones",
            kernel_regularizer="l2",
            bias_regularizer="l1",
            activity_regularizer="l2",
            kernel_constraint="max_norm",
            bias_constraint="non_neg",
            seed=5,
        ),
        (X, CONTEXT),
    ),
    PositionTemperature: (
        {},
        dict(beta=0.2, original_length=4, first_position=1, num_heads=2),
        (N,),
    ),
    AdaptiveLogScale: ({}, dict(delta=0.5, num_heads=2), (N, HEADS)),
    QueryAwareScale: ({}, dict(hidden_size=5, num_heads=2), (N, HEADS)),
    QwenLogScale: (dict(train_length=4), dict(num_heads=2), (N,)),
    RectifiedSoftpick: (
        {},
        dict(axis=(1, 2), epsilon=1e-3, length_scale=LogLengthScale(init_s=0.3), num_heads=None),
        (X,),
    ),
    RotaryEmbedding: (
        {},
        dict(
            theta=500.0,
            fraction=0.7,
            scaling=dict(type="yarn", factor=4, original_length=16),
        ),
        (HEADS,),
    ),
    SinkSoftmax: (
        {},
        dict(axis=-1, init_sink=0.5, length_scale=LogLengthScale(init_s=0.3), num_heads=3),
        (X,),
    ),
    Softmax: (
        {},
        dict(axis=1, length_scale=LogLengthScale(use_bias=True), num_heads=None),
        (X,),
    ),
    Softpick: (
        {},
        dict(axis=-2, length_scale=LogLengthScale(init_s=0.3), num_heads=None),
        (X,),
    ),
    SSMax: (
        {},
        dict(init_s="auto", use_bias=True, train_length=11, num_heads=3, axis=-1),
        (X,),
    ),
    TransformerBlock: (
        dict(num_heads=2),
        dict(
            key_dim=5,
            num_kv_heads=1,
            normalizer=Softpick(length_scale=LogLengthScale()),
            causal=True,
            cross_attention=True,
            sliding_window=4,
            rotary=RotaryEmbedding(theta=500.0),
            qk_norm=True,
            use_gate=True,
            implementation="dense",
            ffn_type="gated",
            ffn_expansion=1.5,
            activation="gelu_tanh",
            norm="offset_rms_norm",
            norm_epsilon=1e-3,
            norm_position="post",
            dropout=0.2,
            use_bias=["value", "feed_forward"],
        ),
        (X, CONTEXT),
    ),
}

CASES = [
    pytest.param(cls, {**required, **more}, inputs, id=f"{cls.__name__}-{label}")
    for cls, (required, other, inputs) in LAYERS.items()
    for label, more in (("defaults", {}), ("options", other))[: 2 if other else 1]
]


def call(layer, inputs):
    """Calls a layer with as many inputs as it takes."""
    takes_two = isinstance(layer, (MultiHeadAttention, AdaptiveLogScale, QueryAwareScale)) or (
        isinstance(layer, TransformerBlock) and layer.cross_attention
    )
    return layer(*inputs[: 2 if takes_two else 1])


def test_every_public_layer_is_in_the_table():
    assert {cls.__name__ for cls in LAYERS} == set(layers.__all__) - {"Normalizer"}  # a base class


@pytest.mark.parametrize("cls", LAYERS)
def test_table_names_every_constructor_argument(cls):
    required, other, _ = LAYERS[cls]
    names = set(inspect.signature(cls).parameters) - {"args", "kwargs"}
    assert {*required, *other} == names


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_config_round_trip(cls, arguments, inputs):
    layer = cls(**arguments, name="some_name", trainable=False)
    config = layer.get_config()
    assert set(inspect.signature(cls).parameters) - {"args", "kwargs"} <= set(config)
    json.dumps(config)
    again = cls.from_config(config)
    assert again.get_config() == config
    assert (again.name, again.trainable) == ("some_name", False)
    assert dir(again) == dir(layer)


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_config_holds_the_arguments(cls, arguments, inputs):
    config = cls(**arguments).get_config()
    plain = {k: v for k, v in arguments.items() if isinstance(v, (int, float))}
    assert {k: config[k] for k in plain} == plain
    for name, value in arguments.items():
        if isinstance(value, keras.Layer):
            options = {k: v for k, v in value.get_config().items() if k not in ("name", "dtype")}
            kept = config[name]["config"]
            assert config[name]["class_name"] == type(value).__name__
            heads = {"num_heads": arguments.get("num_heads")} if "num_heads" in kept else {}
            # the layer in an attention layer has one parameter per head
            assert {**{k: kept[k] for k in options}, **heads} == {**options, **heads}


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_serialization_through_keras_saving(cls, arguments, inputs):
    layer = cls(**arguments)
    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert serialized["registered_name"] == f"keras_ssattn>{cls.__name__}"
    again = keras.saving.deserialize_keras_object(serialized)
    assert type(again) is cls
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_build_from_config_makes_the_same_layer(cls, arguments, inputs):
    layer = cls(**arguments)
    call(layer, inputs)
    again = cls.from_config(layer.get_config())
    again.build_from_config(layer.get_build_config())
    assert again.built
    assert [w.path for w in again.weights] == [w.path for w in layer.weights]
    assert [w.shape for w in again.weights] == [w.shape for w in layer.weights]
    randomize(again)
    layer.set_weights(again.get_weights())
    np.testing.assert_array_equal(to_numpy(call(again, inputs)), to_numpy(call(layer, inputs)))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_symbolic_output_is_the_eager_one(cls, arguments, inputs, policy):
    layer = cls(**arguments, dtype=policy)
    symbolic = [
        keras.Input((None, *x.shape[2:]), dtype=str(x.dtype)) if x.ndim > 2 else x for x in inputs
    ]
    if isinstance(layer, LengthScale):
        symbolic[0] = keras.Input((1, None), dtype="int32")
    spec = call(layer, symbolic)
    y = call(layer, inputs)
    assert spec.dtype == keras.utils.standardize_dtype(y.dtype)
    assert len(spec.shape) == len(y.shape)
    assert all(a in (None, b) for a, b in zip(spec.shape, y.shape, strict=True))
    assert spec.shape[-1] in (y.shape[-1], None)


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_compute_output_shape(cls, arguments, inputs):
    layer = cls(**arguments)
    y = call(layer, inputs)
    takes_two = isinstance(layer, (MultiHeadAttention, AdaptiveLogScale, QueryAwareScale))
    shapes = [x.shape for x in inputs][: 2 if takes_two else 1]
    assert tuple(layer.compute_output_shape(*shapes)) == tuple(y.shape)


@pytest.mark.parametrize(("cls", "arguments", "inputs"), CASES)
def test_supports_masking_and_keeps_or_drops_the_mask(cls, arguments, inputs):
    layer = cls(**arguments)
    if isinstance(layer, LengthScale):
        assert not layer.supports_masking
        return
    assert layer.supports_masking
    mask = np.ones((3, TIME), bool)
    kept = layer.compute_mask(inputs[0], mask)
    assert kept is (None if cls in (LastTimestep, MeanPool) else mask)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    "cls",
    [c for c in LAYERS if not issubclass(c, (LengthScale, RotaryEmbedding))],
    ids=lambda c: c.__name__,
)
def test_layer_with_every_option_survives_saving(cls, ending, tmp_path):
    required, other, _ = LAYERS[cls]
    x = np.concatenate([X, sequences(3, TIME, 11, seed=9)], axis=-1)

    def make():
        inputs = keras.Input((TIME, FEATURES + 11))
        parts = inputs[..., :FEATURES], inputs[..., FEATURES:]
        return keras.Model(inputs, call(cls(**required, **other, name="part"), parts))

    assert_survives(make, tmp_path / f"model{ending}", x)
