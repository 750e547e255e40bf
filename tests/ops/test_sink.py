"""Sinks other than 0, which the tables over `NAMES` have: their value and their gradient."""

import functools

import keras
import numpy as np
import pytest
from support import oracle
from support.cases import implementations
from support.helpers import compiled, gradients, relative_error, to_numpy

from keras_ssattn import ops

SINKS = np.array([-1.5, 0.7], "float32")  # one for each head
attend = functools.partial(ops.attention, normalizer="sink_softmax")
reference = functools.partial(oracle.attention, name="sink_softmax")
IMPLEMENTATIONS = implementations("sink_softmax")

CASES = {
    "all": {},
    "some see no key": {
        "causal": True,
        "window": 3,
        "query_offset": 1,
        "key_mask": np.array([[0, 0, 1, 1, 0], [1, 1, 1, 0, 1]], bool),
    },
    "mask": {"mask": np.arange(40).reshape(2, 1, 4, 5) % 3 > 0},
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """So that a few positions make several tiles."""
    monkeypatch.setattr("keras_ssattn.ops._attention.tiled.band.QUERY_TILE", 2)
    monkeypatch.setattr("keras_ssattn.ops._attention.tiled.band.KEY_TILE", 3)


def inputs(rng, kv_heads=1, size=2, scale=1.0):
    shapes = (2, 4, 2, size), (2, 5, kv_heads, size), (2, 5, kv_heads, 1)
    return [(scale * rng.normal(size=shape)).astype("float32") for shape in shapes]


def with_sink(query, key, value, sink, **options):
    return attend(query, key, value, sink=sink, **options)


# Attention


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_equal_the_oracle(case, rng):
    arrays = [*inputs(rng), SINKS]
    expected = reference(*arrays[:3], sink=SINKS, **case)
    cotangent = rng.normal(size=expected.shape).astype("float32")
    slopes = oracle.finite_difference(
        lambda q, k, v, s: reference(q, k, v, sink=s, **case), arrays, cotangent
    )
    assert np.abs(slopes[3]).min() > 1e-2  # of the sink
    for implementation in IMPLEMENTATIONS:
        function = compiled(functools.partial(with_sink, implementation=implementation, **case))
        assert relative_error(to_numpy(function(*arrays)), expected) < 2e-6
        for gradient, slope in zip(gradients(function, arrays, cotangent), slopes, strict=True):
            assert relative_error(gradient, slope) < 2e-5


def test_a_length_scale_scales_the_logits_and_not_the_sink(rng):
    arrays, s = inputs(rng), np.array([[0.4], [1.3]], "float32")
    n = ops.key_count(4, 5, causal=True)
    expected = reference(*arrays, sink=SINKS, length_scaled=True, s=s[:, 0], causal=True)
    for implementation in IMPLEMENTATIONS:
        found = attend(
            *arrays, sink=SINKS, length_scale=ops.log_length_scale(n, s), causal=True,
            implementation=implementation,
        )  # fmt: skip
        assert relative_error(to_numpy(found), expected) < 2e-6


def test_queries_without_a_key_are_zero_in_value_and_gradient(rng):
    arrays = [*inputs(rng), SINKS]
    for implementation in IMPLEMENTATIONS:
        options = {"key_mask": np.zeros((2, 5), bool), "implementation": implementation}
        function = compiled(functools.partial(with_sink, **options))
        assert (to_numpy(function(*arrays)) == 0).all()
        for gradient in gradients(function, arrays, np.ones((2, 4, 2, 1), "float32")):
            assert (gradient == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("sink", [0.0, 1e31, -1e30])
def test_huge_logits_and_sinks_are_finite(sink, sign, rng):
    """Of 1e30, all of one sign but for one key."""
    query, key = np.full((1, 4, 2, 2), 1e15, "float32"), np.full((1, 5, 1, 2), 1e15, "float32")
    key *= sign
    key[0, 2] *= -0.5
    value = rng.normal(size=(1, 5, 1, 1)).astype("float32")
    sink = np.full(2, sink, "float32")
    expected = reference(query, key, value, sink=sink)
    for implementation in IMPLEMENTATIONS:
        function = compiled(functools.partial(with_sink, implementation=implementation))
        found = to_numpy(function(query, key, value, sink))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        cotangent = np.ones((1, 4, 2, 1), "float32")
        for gradient in gradients(function, [query, key, value, sink], cotangent):
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, rng):
    halves = [keras.ops.cast(x, dtype) for x in inputs(rng, scale=2.0)]
    case = CASES["some see no key"]
    expected = reference(*map(to_numpy, halves), sink=SINKS, **case)
    cotangent = rng.normal(size=expected.shape).astype("float32")
    exact = [*map(to_numpy, halves), SINKS]
    slopes = oracle.finite_difference(
        lambda q, k, v, s: reference(q, k, v, sink=s, **case), exact, cotangent
    )
    tolerance = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for implementation in IMPLEMENTATIONS:
        function = compiled(functools.partial(with_sink, implementation=implementation, **case))
        found = function(*halves, SINKS)
        assert keras.utils.standardize_dtype(found.dtype) == dtype
        factor = 1 if implementation == "dense" else 3
        assert relative_error(to_numpy(found), expected) < factor * tolerance
        found = gradients(function, [*halves, SINKS], cotangent)
        for gradient, slope in zip(found, slopes, strict=True):
            assert relative_error(gradient, slope) < 8 * tolerance


def test_a_sink_far_below_is_softmax_and_one_far_above_takes_all(rng):
    arrays = inputs(rng)
    expected = oracle.attention(*arrays)
    for implementation in IMPLEMENTATIONS:
        function = compiled(functools.partial(with_sink, implementation=implementation))
        for sink in (-1e30, -3e38, -120.0):
            found = to_numpy(function(*arrays, np.full(2, sink, "float32")))
            assert relative_error(found, expected) < 2e-6
        for sink in (3e38, 1e30, 200.0):
            found = to_numpy(function(*arrays, np.full(2, sink, "float32")))
            np.testing.assert_array_equal(found, np.zeros_like(found))


@pytest.mark.parametrize("sink", [np.ones(3), np.ones((2, 1)), np.ones((1, 4, 2))])
def test_a_sink_that_is_not_one_per_head_is_refused(sink, rng):
    with pytest.raises(ValueError, match=r"`sink` must be broadcastable to \[H\], \(2,\)"):
        attend(*inputs(rng), sink=sink.astype("float32"))


# The function on logits


def test_the_sink_of_a_row_of_logits(rng):
    logits = (2 * rng.normal(size=(2, 3, 5))).astype("float32")
    sink = rng.normal(size=(3, 1)).astype("float32")
    mask = rng.random((2, 3, 5)) < 0.6
    mask[0, 0] = False
    expected = oracle.normalize("sink_softmax", logits, mask, sink=sink)
    run = compiled(functools.partial(ops.sink_softmax, mask=mask))
    np.testing.assert_allclose(to_numpy(run(logits, sink)), expected, rtol=1e-6, atol=1e-7)
    cotangent = rng.normal(size=logits.shape).astype("float32")
    slopes = oracle.finite_difference(
        lambda x, s: oracle.normalize("sink_softmax", x, mask, sink=s), [logits, sink], cotangent
    )
    for a, e in zip(gradients(run, [logits, sink], cotangent), slopes, strict=True):
        assert relative_error(a, e) < 1e-5


def test_a_sink_is_one_entry_more_of_softmax(rng):
    """That of logit 0 is "softmax off by one"."""
    logits = (3 * rng.normal(size=(4, 6))).astype("float32")
    for sink in (0.0, -2.5, 4.0):
        wide = np.concatenate([logits, np.full((4, 1), sink, "float32")], axis=1)
        expected = to_numpy(ops.softmax(wide))[:, :-1]
        found = to_numpy(ops.sink_softmax(logits, sink))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    e = np.exp(logits.astype("float64"))
    found = to_numpy(ops.sink_softmax(logits))
    np.testing.assert_allclose(found, e / (1 + e.sum(1, keepdims=True)), rtol=1e-6)


@pytest.mark.parametrize("sink", [0.5, 1e29, -1e29])
@pytest.mark.parametrize("peak", [1e30, -1e30, 3e38])
def test_huge_logits_of_the_function(peak, sink):
    logits = np.array([[peak, peak / 2, -peak]], "float32")
    expected = oracle.normalize("sink_softmax", logits, sink=sink)
    found = to_numpy(ops.sink_softmax(logits, sink))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    run = compiled(ops.sink_softmax)
    arrays = [logits, np.full((1, 1), sink, "float32")]
    for gradient in gradients(run, arrays, np.array([[1.0, -2.0, 0.5]], "float32")):
        assert np.isfinite(gradient).all()


def test_a_sink_that_is_not_one_per_row_is_refused():
    with pytest.raises(ValueError, match="`sink` must be broadcastable.*size 1 along axis"):
        ops.sink_softmax(np.zeros((3, 4), "float32"), np.zeros(4, "float32"))
