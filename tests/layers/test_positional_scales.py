"""Length scales beside SSMax's: by position, by Qwen's logarithm, and by the query."""

import math

import keras
import numpy as np
import pytest
from support import oracle
from support.helpers import gradients, to_numpy

from keras_ssattn import layers, ops

N = np.array([0, 1, 2, 7, 8, 9, 15, 16, 17, 8191, 8192, 8193, 131072, 10_000_000])


def temperature(n, beta, length, first):
    position = max(int(n), 1) - 1 + first
    return 1 + beta * np.log(1 + np.floor(position / length))


def qwen(n, length):
    return np.log(n) / np.log(length) if n > length else 1.0


# Position temperature and Qwen's logarithm


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("beta", "length"), [(0.1, 8192), (0.1, 8), (0.5, 3), (0.0, 1)])
def test_position_temperature(beta, length, first):
    actual = to_numpy(ops.position_temperature(N.astype("int32"), beta, length, first))
    expected = [temperature(n, beta, length, first) for n in N]
    assert actual.dtype == "float32"
    np.testing.assert_allclose(actual, expected, rtol=3e-7)
    for n in N[1:]:
        number = ops.position_temperature(int(n), beta, length, first)
        assert number == pytest.approx(temperature(n, beta, length, first), rel=1e-14)


def test_position_temperature_of_ministral():
    for position, expected in ((0, 1.0), (16383, 1.0), (16384, 1.0693), (32768, 1.1099)):
        scale = layers.PositionTemperature(0.1, 16384)
        actual = to_numpy(scale(np.array([position + 1], "int32")))
        assert actual[0] == pytest.approx(expected, abs=5e-5)


def test_position_temperature_of_llama():
    scale = layers.PositionTemperature(first_position=1)  # floor((p + 1) / 8192)
    actual = to_numpy(scale(np.array([8190, 8191]) + 1))
    np.testing.assert_allclose(actual, [1.0, 1.0 + 0.1 * np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("length", [2, 8, 2048])
def test_qwen_log_scale(length):
    actual = to_numpy(ops.qwen_log_scale(N.astype("int32"), length))
    assert actual.dtype == "float32"
    np.testing.assert_allclose(actual, [qwen(n, length) for n in N], rtol=5e-7)
    assert (actual[length >= N] == 1.0).all()
    assert (actual[length < N] > 1.0).all()
    for n in N[1:]:
        assert ops.qwen_log_scale(int(n), length) == pytest.approx(qwen(n, length), rel=1e-14)
    layer = layers.QwenLogScale(length)
    np.testing.assert_array_equal(to_numpy(layer(N.astype("int32"))), actual)


SCALES = {
    "temperature": (
        lambda: layers.PositionTemperature(0.5, 3),
        lambda n: temperature(n, 0.5, 3, 0),
    ),
    "qwen": (lambda: layers.QwenLogScale(3), lambda n: qwen(n, 3)),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("normalizer", ["softmax", "softpick", "rectified_softpick"])
def test_in_a_normalizer(name, normalizer, rng):
    make, formula = SCALES[name]
    logits = rng.normal(size=(2, 3, 5, 7)).astype("float32")
    mask = rng.random((2, 3, 5, 7)) < 0.7
    cls = {
        "softmax": layers.Softmax,
        "softpick": layers.Softpick,
        "rectified_softpick": layers.RectifiedSoftpick,
    }[normalizer]
    layer = cls(length_scale=make())
    factor = np.vectorize(formula)(mask.sum(-1, keepdims=True))
    expected = oracle.normalize(normalizer, logits * factor, mask)
    np.testing.assert_allclose(to_numpy(layer(logits, mask=mask)), expected, rtol=3e-6, atol=1e-7)
    assert layer.weights == []
    assert layer.uses_count


@pytest.mark.parametrize("name", SCALES)
def test_in_attention(name, rng):
    make, formula = SCALES[name]
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    layer = layers.MultiHeadAttention(2, 4, normalizer=layers.Softmax(length_scale=make()))
    plain = layers.MultiHeadAttention(2, 4, normalizer="softmax")
    plain.build(x.shape, x.shape)
    layer.build(x.shape, x.shape)
    plain.set_weights(layer.get_weights())  # as many: the scale has none
    _, weights = layer(x, x, use_causal_mask=True, return_attention_scores=True)
    _, without = plain(x, x, use_causal_mask=True, return_attention_scores=True)
    logs = np.log(np.maximum(to_numpy(without), 1e-30))
    factor = np.array([formula(n) for n in range(1, 10)])[:, None]
    expected = oracle.normalize("softmax", logs * factor, np.tril(np.ones((9, 9), bool)))
    np.testing.assert_allclose(to_numpy(weights), expected, rtol=1e-4, atol=1e-6)


ERRORS = [
    (lambda: ops.position_temperature(0), "`n` must be a number of keys, 1 or more.*0"),
    (lambda: ops.qwen_log_scale(0, 8), "`n` must be a number of keys, 1 or more.*0"),
    (lambda: layers.PositionTemperature("a"), "`beta` must be a finite number.*'a'"),
    (lambda: layers.PositionTemperature(float("inf")), "`beta` must be a finite number.*inf"),
    (
        lambda: layers.PositionTemperature(0.1, 0),
        "`original_length` must be a positive integer.*=0",
    ),
    (
        lambda: layers.PositionTemperature(0.1, 8.5),
        "`original_length` must be a positive integer.*8.5",
    ),
    (lambda: layers.PositionTemperature(first_position=2), "`first_position` must be 0 or 1.*=2"),
    (lambda: layers.QwenLogScale(1), "`train_length` must be an integer of 2 or more.*=1"),
    (lambda: layers.QwenLogScale(True), "`train_length` must be an integer of 2 or more.*=True"),
    (lambda: layers.QueryAwareScale(0), "`hidden_size` must be a positive integer.*=0"),
    (
        lambda: layers.Softmax(length_scale=layers.QueryAwareScale())(np.zeros((2, 3), "float32")),
        "`QueryAwareScale` needs the query.*attention layer",
    ),
    (lambda: layers.QueryAwareScale()(np.ones((3,), "int32")), "`QueryAwareScale` needs the query"),
    (
        lambda: layers.QueryAwareScale()(np.ones((3,), "int32"), np.zeros((2, 3, 4), "float32")),
        r"`query` must have shape \[B, T, H, D\].*\(2, 3, 4\)",
    ),
    (
        lambda: layers.QueryAwareScale(num_heads=2)(
            np.ones((3,), "int32"), np.zeros((2, 3, 4, 5), "float32")
        ),
        r"`query` must have shape \[B, T, H, D\].*num_heads=2.*\(2, 3, 4, 5\)",
    ),
]


@pytest.mark.parametrize(("call", "match"), ERRORS, ids=[e[1] for e in ERRORS])
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("function", [ops.position_temperature, lambda n: ops.qwen_log_scale(n, 8)])
def test_mask_for_n_is_refused(function):
    with pytest.raises(TypeError, match="`n` must be a number of keys, not a mask"):
        function(np.array([True]))


# The query-aware scale


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def query_aware(layer, n, query):
    """The formula in float64, one head at a time; n is `[B, H, T]`."""
    w = {v.name: np.asarray(to_numpy(v), "float64") for v in layer.weights}
    out = np.zeros(query.shape)
    for h in range(query.shape[2]):
        log_n = np.log(np.maximum(n[:, h], 1.0))[..., None]  # [B, T, 1]
        own = h if layer.num_heads else 0
        factor = gelu(log_n @ w["count_kernel"] + w["count_bias"]) @ w["factor_kernel"][own]
        gate = gelu(query[:, :, h] @ w["query_kernel"] + w["query_bias"]) @ w["gate_kernel"]
        gate = 1 + np.tanh(gate + w["gate_bias"])
        out[:, :, h] = (factor + w["factor_bias"][own]) * gate
    return out


def randomized(layer, rng):
    for weight in layer.weights:
        weight.assign(rng.normal(0, 0.5, weight.shape).astype("float32"))
    return layer


COUNTS = [(2, 3, 5), (2, 1, 5), (1, 1, 5), (1, 1, 1), (5,), ()]


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("shape", COUNTS, ids=str)
def test_query_aware_values(shape, heads, rng):
    n = rng.integers(0, 3000, shape).astype("int32")
    query = rng.normal(size=(2, 5, 3, 4)).astype("float32")
    layer = layers.QueryAwareScale(hidden_size=6, num_heads=heads)
    layer.build(shape, query.shape)
    randomized(layer, rng)
    actual = to_numpy(layer(n, query))
    expected = query_aware(layer, np.broadcast_to(n, (2, 3, 5)), query)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_query_aware_values_of_many_rows_without_heads(rng):
    """A product that TensorFlow gets wrong, and that may end the process: see the layer."""
    n = rng.integers(1, 3000, (16, 1, 32)).astype("int32")
    query = rng.normal(size=(16, 32, 2, 8)).astype("float32")
    layer = layers.QueryAwareScale()
    layer.build(n.shape, query.shape)
    randomized(layer, rng)
    expected = query_aware(layer, np.broadcast_to(n, (16, 2, 32)), query)
    for _ in range(5):
        np.testing.assert_allclose(to_numpy(layer(n, query)), expected, rtol=1e-4, atol=1e-4)


def test_query_aware_starts_as_softmax(rng):
    n = np.arange(1, 6, dtype="int32")
    query = rng.normal(size=(2, 5, 3, 4)).astype("float32")
    layer = layers.QueryAwareScale(num_heads=3)
    np.testing.assert_array_equal(to_numpy(layer(n, query)), np.ones(query.shape))
    assert len(layer.trainable_weights) == 8
    for name in ("gate_kernel", "gate_bias", "factor_kernel"):
        assert not to_numpy(getattr(layer, name)).any()
    for name in ("count_kernel", "query_kernel"):
        assert to_numpy(getattr(layer, name)).all()


def test_query_aware_gate_starts_closed_whatever_the_function_of_n(rng):
    n = np.arange(1, 6, dtype="int32")
    layer = layers.QueryAwareScale(num_heads=3)
    query = rng.normal(size=(2, 5, 3, 4)).astype("float32")
    layer.build(n.shape, query.shape)
    layer.factor_kernel.assign(rng.normal(size=layer.factor_kernel.shape))
    actual = to_numpy(layer(n, query))
    np.testing.assert_array_equal(actual, to_numpy(layer(n, -3 * query)))
    assert np.ptp(actual[0, :, 0, 0]) > 0.01


def test_query_aware_gradients_reach_the_query(rng):
    n = np.arange(1, 6, dtype="int32")
    query = rng.normal(size=(1, 5, 2, 4)).astype("float32")
    layer = layers.QueryAwareScale(hidden_size=6)
    layer.build(n.shape, query.shape)
    randomized(layer, rng)
    actual = gradients(lambda q: layer(n, q), [query], np.ones_like(query))[0]
    counts = np.broadcast_to(n, (1, 2, 5))
    step, expected = 1e-5, np.zeros(query.shape)
    for index in np.ndindex(query.shape):
        moved = np.zeros(query.shape)
        moved[index] = step
        ends = [query_aware(layer, counts, query + s * moved).sum() for s in (1, -1)]
        expected[index] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_query_aware_is_built_with_the_shape_of_the_queries():
    scale = layers.QueryAwareScale()
    normalizer = layers.Softmax(length_scale=scale, num_heads=3)
    assert normalizer.length_scale.uses_query
    normalizer.build_for_attention((None, None, 3, 4))
    assert normalizer.length_scale.factor_kernel.shape == (3, 64, 4)
    assert len(normalizer.trainable_weights) == 8


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_query_aware_computes_in_float32(policy, rng):
    n = np.arange(1, 6, dtype="int32") * 1000
    layer = layers.QueryAwareScale(num_heads=3, dtype=policy)
    query = rng.normal(size=(2, 5, 3, 4)).astype("float32")
    query = keras.ops.cast(query, policy.removeprefix("mixed_"))
    layer.build(n.shape, query.shape)
    randomized(layer, rng)
    actual = layer(n, query)
    assert keras.utils.standardize_dtype(actual.dtype) == "float32"
    wide = to_numpy(keras.ops.cast(query, "float32"))
    expected = query_aware(layer, np.broadcast_to(n, (2, 3, 5)), wide)
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=1e-5, atol=1e-5)
