"""Length scales that take the query: TabICLv2's and ASEntmax's."""

import math

import keras
import numpy as np
import pytest
from support.helpers import gradients, to_numpy

from keras_ssattn import layers, ops


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


def adaptive(layer, n, query):
    """The formula in float64, one number at a time; n is `[B, H, T]`."""
    w = {v.name: np.asarray(to_numpy(v), "float64") for v in layer.weights}
    out = np.zeros((*query.shape[:3], 1))
    for b, t, h in np.ndindex(*query.shape[:3]):
        own = h if layer.num_heads else 0
        q = np.asarray(query[b, t, h], "float64")
        beta = np.log1p(np.exp(q @ w["beta_kernel"][own] + w["beta_bias"][own]))
        gamma = 2 * np.tanh(q @ w["gamma_kernel"][own] + w["gamma_bias"][own])
        out[b, t, h] = layer.delta + beta * np.log(max(n[b, h, t], 1) + 1) ** gamma
    return out


SCALES = {
    "query_aware": (
        lambda **options: layers.QueryAwareScale(hidden_size=6, **options),
        query_aware,
    ),
    "adaptive": (lambda **options: layers.AdaptiveLogScale(delta=0.7, **options), adaptive),
}
by_scale = pytest.mark.parametrize("scale", SCALES)


def randomized(layer, rng):
    for weight in layer.weights:
        weight.assign(rng.normal(0, 0.5, weight.shape).astype("float32"))
    return layer


COUNTS = [(2, 3, 5), (2, 1, 5), (1, 1, 5), (1, 1, 1), (5,), ()]


@by_scale
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("shape", COUNTS, ids=str)
def test_values(shape, heads, scale, rng):
    make, formula = SCALES[scale]
    n = rng.integers(0, 3000, shape).astype("int32")
    query = rng.normal(size=(2, 5, 3, 4)).astype("float32")
    layer = make(num_heads=heads)
    layer.build(shape, query.shape)
    randomized(layer, rng)
    actual = to_numpy(layer(n, query))
    assert actual.shape == layer.compute_output_shape(shape, query.shape)
    expected = formula(layer, np.broadcast_to(n, (2, 3, 5)), query)
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


@by_scale
def test_gradients_reach_the_query(scale, rng):
    make, formula = SCALES[scale]
    n = np.arange(1, 6, dtype="int32")
    query = rng.normal(size=(1, 5, 2, 4)).astype("float32")
    layer = make()
    layer.build(n.shape, query.shape)
    randomized(layer, rng)
    ones = np.ones(layer.compute_output_shape(n.shape, query.shape), "float32")
    actual = gradients(lambda q: layer(n, q), [query], ones)[0]
    counts = np.broadcast_to(n, (1, 2, 5))
    step, expected = 1e-5, np.zeros(query.shape)
    for index in np.ndindex(query.shape):
        moved = np.zeros(query.shape)
        moved[index] = step
        ends = [formula(layer, counts, query + s * moved).sum() for s in (1, -1)]
        expected[index] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_query_aware_is_built_with_the_shape_of_the_queries():
    scale = layers.QueryAwareScale()
    normalizer = layers.Softmax(length_scale=scale, num_heads=3)
    assert normalizer.length_scale.uses_query
    normalizer.build_for_attention((None, None, 3, 4))
    assert normalizer.length_scale.factor_kernel.shape == (3, 64, 4)
    assert len(normalizer.trainable_weights) == 8


@by_scale
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_computes_in_float32(policy, scale, rng):
    make, formula = SCALES[scale]
    n = np.arange(1, 6, dtype="int32") * 1000
    layer = make(num_heads=3, dtype=policy)
    query = rng.normal(size=(2, 5, 3, 4)).astype("float32")
    query = keras.ops.cast(query, policy.removeprefix("mixed_"))
    layer.build(n.shape, query.shape)
    randomized(layer, rng)
    actual = layer(n, query)
    assert keras.utils.standardize_dtype(actual.dtype) == "float32"
    wide = to_numpy(keras.ops.cast(query, "float32"))
    expected = formula(layer, np.broadcast_to(n, (2, 3, 5)), wide)
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=1e-5, atol=1e-5)


def test_adaptive_starts_at_a_constant(rng):
    n = np.array([1, 2, 1000], "int32")
    query = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    layer = layers.AdaptiveLogScale()
    np.testing.assert_allclose(to_numpy(layer(n, query)), 1 + np.log(2), rtol=1e-6)
    assert len(layer.trainable_weights) == 4


@pytest.mark.parametrize("gamma", [-2.0, -0.5, 0.0, 1.0, 2.0])
def test_adaptive_log_scale(gamma):
    n = np.array([0, 1, 2, 7, 8191, 131072, 10_000_000], "int32")
    expected = 0.3 + 1.7 * np.log(np.maximum(n, 1) + 1.0) ** gamma
    actual = to_numpy(ops.adaptive_log_scale(n, 1.7, gamma, delta=0.3))
    assert actual.dtype == "float32"
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for one, value in zip(n[1:], expected[1:], strict=True):
        number = ops.adaptive_log_scale(int(one), 1.7, gamma, delta=0.3)
        assert number == pytest.approx(value, rel=1e-14)


def test_adaptive_scale_learns_in_attention(rng):
    """It tells one length from another only after training, and from then on by each query."""
    normalizer = layers.Softmax(length_scale=layers.AdaptiveLogScale())
    layer = layers.MultiHeadAttention(2, 4, normalizer=normalizer)
    x = rng.normal(size=(64, 6, 8)).astype("float32")
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, layer(inputs, inputs))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(x, x, epochs=2, verbose=0)
    scale = layer.normalizer.length_scale
    for weight in scale.weights:
        assert to_numpy(weight).all(), weight.name
    query = rng.normal(size=(1, 2, 2, 4)).astype("float32")
    short, long = (to_numpy(scale(np.array([n, n], "int32"), query)) for n in (4, 4000))
    assert (short != long).all()
    assert len(np.unique(short)) == short.size
