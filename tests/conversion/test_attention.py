"""`convert_attention`: the same outputs with softmax, and s where it should start."""

import inspect

import keras
import numpy as np
import pytest
from support.cases import randomize
from support.helpers import predict, reload, values

from keras_ssattn.layers import (
    LogLengthScale,
    MultiHeadAttention,
    PositionTemperature,
    Softmax,
    Softpick,
    SSMax,
)
from keras_ssattn.models import convert_attention

TIME, KEYS, FEATURES = 5, 7, 6
HAS_WINDOW = "sliding_window" in inspect.signature(keras.layers.MultiHeadAttention).parameters
window = pytest.mark.skipif(not HAS_WINDOW, reason="this Keras has no sliding_window")

CAUSAL, CROSS = {"use_causal_mask": True}, {"cross": True}
MULTI_HEAD = {
    "plain": (CAUSAL, {}),
    "cross": (CROSS, {}),
    "no_bias": (CAUSAL, {"use_bias": False}),
    # Keras's attention with values of another size fails on JAX unless it makes the weights
    "value_dim": (CROSS, {"value_dim": 5, "dropout": 0.2}),
    "output_shape": (CAUSAL, {"output_shape": (3, 2)}),
    "window": (CROSS, {"sliding_window": 2}),
}
GROUPED = {
    "groups": (CAUSAL, {"num_query_heads": 6, "num_key_value_heads": 2}),
    "cross_groups": (CROSS, {"num_query_heads": 6, "num_key_value_heads": 3}),
    "one_group": (CAUSAL, {"num_query_heads": 3, "num_key_value_heads": 1}),
}
TABLE = {
    **{
        name: (call, keras.layers.MultiHeadAttention, {"num_heads": 3, "key_dim": 4, **options})
        for name, (call, options) in MULTI_HEAD.items()
        if name != "window" or HAS_WINDOW
    },
    **{
        name: (call, keras.layers.GroupQueryAttention, {"head_dim": 5, **options})
        for name, (call, options) in GROUPED.items()
    },
}


def attend(attention, cross=False, **call):
    """A model of one attention layer, over the inputs or another sequence, with random weights."""
    inputs = keras.Input((TIME, FEATURES), name="inputs")
    memory = keras.Input((KEYS, FEATURES), name="memory") if cross else inputs
    outputs = attention(inputs, memory, **call)
    return randomize(keras.Model([inputs, memory] if cross else inputs, outputs, name="model"))


def arrays(cross=False, seed=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4, TIME, FEATURES)).astype("float32")
    return [x, rng.normal(size=(4, KEYS, FEATURES)).astype("float32")] if cross else x


def multi_head(**options):
    options = {"num_heads": 2, "key_dim": 3, "name": "attention", **options}
    return keras.layers.MultiHeadAttention(**options)


def layer_of(model):
    return model.get_layer("attention")


@pytest.mark.parametrize("name", TABLE)
def test_softmax_gives_the_outputs_of_before(name):
    call, cls, options = TABLE[name]
    model = attend(cls(**options, name="attention"), **call)
    converted = convert_attention(model, normalizer="softmax")
    assert isinstance(layer_of(converted), MultiHeadAttention)
    x = arrays("cross" in call)
    np.testing.assert_allclose(predict(converted, x), predict(model, x), atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "groups"])
@pytest.mark.parametrize("cross", [False, True])
def test_ssmax_at_s_log_n_of_1_gives_the_outputs_of_before(name, cross):
    _, cls, options = TABLE[name]
    model = attend(cls(**options, name="attention"), cross)
    n = KEYS if cross else TIME
    converted = convert_attention(model, train_length=n, causal=False)
    s = keras.ops.convert_to_numpy(layer_of(converted).normalizer.s)
    np.testing.assert_allclose(s * np.log(n), 1.0, rtol=1e-6)
    x = arrays(cross)
    np.testing.assert_allclose(predict(converted, x), predict(model, x), atol=1e-5)
    layer_of(converted).normalizer.s.assign(2 * s)
    assert np.abs(predict(converted, x) - predict(model, x)).max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "reach", [None, pytest.param(3, marks=window), pytest.param(1, marks=window)]
)
def test_s_starts_at_1_over_the_mean_of_log_n(causal, reach):
    options = {} if reach is None else {"sliding_window": reach}
    model = attend(multi_head(**options), use_causal_mask=causal)
    converted = convert_attention(model, train_length=11, causal=causal)
    counts = [
        sum(
            1 for j in range(11) if (j <= i or not causal) and (reach is None or abs(i - j) < reach)
        )
        for i in range(11)
    ]
    mean = np.mean([np.log(n) for n in counts])
    s = keras.ops.convert_to_numpy(layer_of(converted).normalizer.s)
    np.testing.assert_allclose(s, np.full(2, 1 / mean if reach != 1 else 0.2), rtol=1e-6)


@pytest.mark.parametrize(
    "normalizer",
    [
        "softpick",
        "rectified_softpick",
        SSMax(init_s=0.4, use_bias=True),
        Softpick(length_scale=LogLengthScale(init_s=0.3)),
        Softmax(length_scale=PositionTemperature()),
        keras.saving.serialize_keras_object(SSMax(init_s=0.7)),
    ],
    ids=["softpick", "rectified", "ssmax", "scaled", "temperature", "config"],
)
def test_every_normalizer(normalizer, tmp_path):
    model = attend(multi_head(), use_causal_mask=True)
    converted = convert_attention(model, normalizer)
    layer = MultiHeadAttention(2, 3, normalizer=normalizer, name="attention")
    expected = attend(layer, use_causal_mask=True)
    for name in ("query", "key", "value", "output"):
        old, new = (getattr(layer_of(m), f"{name}_dense") for m in (model, expected))
        new.set_weights(old.get_weights())
    fresh = MultiHeadAttention(2, 3, normalizer=normalizer)
    fresh.build((1, TIME, FEATURES), (1, TIME, FEATURES))
    layer.normalizer.set_weights(fresh.normalizer.get_weights())
    np.testing.assert_allclose(predict(converted, arrays()), predict(expected, arrays()), atol=1e-6)
    randomize(converted)
    loaded = reload(converted, tmp_path / "model.keras", None)
    np.testing.assert_allclose(predict(loaded, arrays()), predict(converted, arrays()), atol=1e-6)


def test_the_model_given_is_left_alone():
    model = attend(multi_head(), use_causal_mask=True)
    model.compile("sgd", "mse")
    before, outputs = values(model.weights), predict(model, arrays())
    converted = convert_attention(model, train_length=TIME)
    assert not converted.compiled
    converted.compile(keras.optimizers.SGD(1.0), "mse")
    converted.fit(arrays(), np.ones((4, TIME, FEATURES)), verbose=0)
    after = values(converted.weights)
    assert np.abs(after["attention/query/kernel"] - before["attention/query/kernel"]).max() > 1e-4
    for path, value in values(model.weights).items():
        np.testing.assert_array_equal(value, before[path])
    np.testing.assert_array_equal(predict(model, arrays()), outputs)
    assert type(layer_of(model)) is keras.layers.MultiHeadAttention
    assert layer_of(model).output is not None  # which a second use of the layer would forbid


def test_options_survive():
    model = attend(
        multi_head(
            dropout=0.25,
            seed=11,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.5),
            bias_initializer="ones",
            kernel_regularizer=keras.regularizers.L2(0.125),
            bias_regularizer="l1",
            kernel_constraint=keras.constraints.MaxNorm(2.5),
            bias_constraint="non_neg",
        )
    )
    converted = layer_of(convert_attention(model, "softmax"))
    same = {name: value for name, value in layer_of(model).get_config().items()
            if name in converted.get_config() and name != "dtype"}  # fmt: skip
    assert len(same) >= 14
    assert {name: converted.get_config()[name] for name in same} == same
    assert converted.attention_dropout.rate == 0.25
    losses, expected = [
        sum(keras.ops.convert_to_numpy(x) for x in m.losses)
        for m in (convert_attention(model, "softmax"), model)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
def test_dtype_policies_survive(policy):
    model = attend(multi_head(dtype=policy))
    converted = convert_attention(model, train_length=TIME, causal=False)
    assert layer_of(converted).dtype_policy.name == policy
    assert layer_of(converted).query_dense.dtype_policy.name == policy
    # what Keras makes of float16 on JAX cannot be compiled for a CPU
    expected = predict(model, arrays(), eager=True)
    np.testing.assert_allclose(predict(converted, arrays()), expected, atol=3e-2)


FROZEN = {
    "model": lambda model: [model],
    "attention": lambda model: [layer_of(model)],
    "projection": lambda model: [layer_of(model).query_dense, layer_of(model).output_dense],
    "variable": lambda model: [layer_of(model).key_dense.kernel],
}


@pytest.mark.parametrize("which", FROZEN)
def test_trainable_flags_survive(which):
    model = attend(multi_head())
    for part in FROZEN[which](model):
        part.trainable = False
    converted = convert_attention(model, train_length=TIME)
    s = layer_of(converted).normalizer.s
    expected = {w.path for w in model.trainable_variables}
    if which in ("projection", "variable"):
        expected.add(s.path)
    assert {w.path for w in converted.trainable_variables} == expected
    assert s.trainable == (s.path in expected)


def test_padding_is_left_out_of_n():
    tokens = keras.Input((TIME,), dtype="int32")
    x = keras.layers.Embedding(11, FEATURES, mask_zero=True)(tokens)
    model = randomize(keras.Model(tokens, multi_head()(x, x)))
    ids = np.array([[3, 1, 0, 0, 0], [2, 7, 1, 8, 0]])
    seen = ids != 0
    same = convert_attention(model, "softmax")
    np.testing.assert_allclose(predict(same, ids)[seen], predict(model, ids)[seen], atol=1e-5)
    # With s = 1 / log 2, the row that sees 2 keys is as before, and the row of 4 is sharper
    converted = convert_attention(model, SSMax(init_s=1 / np.log(2)))
    difference = np.abs(predict(converted, ids) - predict(model, ids))
    assert difference[0][seen[0]].max() < 1e-5
    assert difference[1][seen[1]].max() > 1e-3
    # Rows without a key: zeros before the output projection, where Keras's are means of values
    bias = keras.ops.convert_to_numpy(layer_of(same).output_dense.bias)
    np.testing.assert_allclose(predict(same, ids)[~seen], np.tile(bias, (4, 1)), atol=1e-6)


def test_attention_scores_are_returned():
    inputs = keras.Input((TIME, FEATURES))
    model = randomize(
        keras.Model(inputs, multi_head()(inputs, inputs, return_attention_scores=True))
    )
    converted = convert_attention(model, "softmax")
    for actual, expected in zip(converted(arrays()), model(arrays()), strict=True):
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(actual), keras.ops.convert_to_numpy(expected), atol=1e-5
        )
