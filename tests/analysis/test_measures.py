"""Measures of attention against NumPy in float64, and against closed forms."""

import keras
import numpy as np
import pytest
from support.helpers import relative_error, to_numpy

from keras_ssattn.analysis import (
    attention_entropy,
    kurtosis,
    max_activation,
    sink_rate,
    sparsity,
    weight_on,
)

B, H, T, S, E = 2, 3, 5, 7, 11


def measure(function, *args, **kwargs):
    return to_numpy(function(*args, **kwargs))


def tensor(x, dtype):
    return keras.ops.cast(keras.ops.convert_to_tensor(np.asarray(x, "float32")), dtype)


def rounded(x, dtype):
    """The values of `x` in that dtype, in float64."""
    return np.asarray(to_numpy(tensor(x, dtype)), "float64")


# -- Slow and obvious formulas. A query's keys are dropped from its row before anything is done.


def rows(weights, mask):
    """For each head, the rows of weights on the keys that are seen, without empty ones."""
    mask = np.broadcast_to(True if mask is None else mask, weights.shape)
    by_head = [[] for _ in range(weights.shape[1])]
    for b, h, i in np.ndindex(*weights.shape[:3]):
        if mask[b, h, i].any():
            by_head[h].append(weights[b, h, i][mask[b, h, i]])
    return by_head


def entropy_oracle(weights, mask):
    def entropy(row):
        p = np.abs(row[row != 0]) / np.abs(row).sum()
        return -(p * np.log(p)).sum()

    return np.array([np.mean([entropy(r) for r in rs if r.any()]) for rs in rows(weights, mask)])


def sparsity_oracle(weights, mask, threshold=0.0):
    return np.array([np.mean(np.abs(np.concatenate(r)) <= threshold) for r in rows(weights, mask)])


def sink_oracle(weights, mask, threshold=0.3):
    mask = np.broadcast_to(True if mask is None else mask, weights.shape)
    sinks = []
    for b, h in np.ndindex(*weights.shape[:2]):
        columns = np.flatnonzero(mask[b, h].any(axis=0))
        if columns.size:
            seen = mask[b, h, :, columns[0]]
            sinks.append(np.abs(weights[b, h, seen, columns[0]]).mean() > threshold)
    return np.mean(sinks)


def weight_oracle(weights, mask, keys, queries=None):
    mask = np.broadcast_to(True if mask is None else mask, weights.shape)
    out = np.full(weights.shape[:2], np.nan)
    for b, h in np.ndindex(*out.shape):
        those = range(weights.shape[2]) if queries is None else [queries[b]]
        found = [weights[b, h, i, keys[b]] for i in those if mask[b, h, i, keys[b]]]
        if found:
            out[b, h] = np.mean(found)
    return out


def kurtosis_oracle(values, mask):
    x = values[np.ones(values.shape[:-1], bool) if mask is None else mask].ravel()
    x = x - x.mean()
    return (x**4).mean() / (x**2).mean() ** 2


# -- Cases


def softmax_weights(rng):
    e = np.exp(2 * rng.normal(size=(B, H, T, S)))
    return e / e.sum(-1, keepdims=True)


def signed_weights(rng):
    x = rng.normal(size=(B, H, T, S))
    return x / (1 + np.abs(x).sum(-1, keepdims=True))


def sparse_weights(rng):
    x = np.maximum(rng.normal(size=(B, H, T, S)) - 0.5, 0.0)
    x[0, 1, 2] = 0.0  # attends to nothing
    return x / (1e-6 + np.abs(x).sum(-1, keepdims=True))


def some_rows_empty(rng):
    mask = rng.random((B, H, T, S)) > 0.4
    mask[1, :, 3] = False
    return mask


WEIGHTS = {"softmax": softmax_weights, "signed": signed_weights, "sparse": sparse_weights}
MASKS = {
    "none": lambda rng: None,
    "causal": lambda rng: np.tril(np.ones((T, S), bool)),
    "padding": lambda rng: np.arange(S) >= np.array([0, 3])[:, None, None, None],
    "each": some_rows_empty,
}
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_measures_of_weights_are_those_of_numpy(kind, mask, dtype, rng):
    weights, mask = WEIGHTS[kind](rng), MASKS[mask](rng)
    x, exact = tensor(weights, dtype), rounded(weights, dtype)
    keys, queries = np.array([2, -3]), np.array([4, 0])
    found = {
        "entropy": measure(attention_entropy, x, mask),
        "sparsity": measure(sparsity, x, mask),
        "near zero": measure(sparsity, x, mask, threshold=0.05),
        "sinks": measure(sink_rate, x, mask),
        "sinks at 0.15": measure(sink_rate, x, mask, threshold=0.15),
        "on key": measure(weight_on, x, keys, mask=mask),
        "of query": measure(weight_on, x, keys, queries, mask=mask),
    }
    expected = {
        "entropy": entropy_oracle(exact, mask),
        "sparsity": sparsity_oracle(exact, mask),
        "near zero": sparsity_oracle(exact, mask, 0.05),
        "sinks": sink_oracle(exact, mask),
        "sinks at 0.15": sink_oracle(exact, mask, 0.15),
        "on key": weight_oracle(exact, mask, keys),
        "of query": weight_oracle(exact, mask, keys, queries),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=1e-7, err_msg=name)
        assert value.dtype == "float32", name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_measures_of_activations_are_those_of_numpy(masked, dtype, rng):
    values = rng.normal(3.0, 2.0, (B, T, E))
    values[1, 2, 3] = -300.0  # massive
    values[0, 0, 0] = 1000.0  # padding, where masked
    mask = rng.random((B, T)) > 0.3 if masked else None
    if masked:
        mask[1, 2], mask[0, 0] = True, False
    x, exact = tensor(values, dtype), rounded(values, dtype)
    found = measure(kurtosis, x, mask)
    assert found.dtype == "float32"
    assert relative_error(found, kurtosis_oracle(exact, mask)) < 1e-5
    assert measure(max_activation, x, mask) == (300.0 if masked else 1000.0)


@pytest.mark.parametrize("n", [1, 2, S])
def test_entropy_of_equal_weights_is_log_n(n):
    weights = np.zeros((B, H, T, S))
    weights[..., :n] = np.array([-0.25, 1.0, 1e-4])[:, None, None]  # of any sign and sum
    np.testing.assert_allclose(measure(attention_entropy, weights), np.log(n), rtol=1e-6, atol=1e-6)


def test_entropy_without_any_weight_is_nan_and_does_not_spread():
    weights = np.zeros((1, 2, 3, 4))
    weights[0, 1, 2] = 0.1
    found = measure(attention_entropy, weights)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(np.log(4))


@pytest.mark.parametrize(("length", "expected"), [(9, 1.0), (10, 0.0)])
def test_uniform_causal_attention_is_a_sink_up_to_nine_keys(length, expected):
    """As the docstring says: (1 + 1/2 + ... + 1/T) / T passes 0.3 between them."""
    mask = np.tril(np.ones((length, length), bool))
    weights = (mask / mask.sum(-1, keepdims=True))[None, None]
    assert measure(sink_rate, weights, mask) == expected


def test_sink_is_the_first_key_after_padding():
    weights = np.zeros((2, 1, 4, 4))
    weights[0, 0, :, 0] = weights[1, 0, :, 2] = 0.9
    real = np.arange(4) >= np.array([0, 2])[:, None]
    mask = real[:, None, :, None] & real[:, None, None, :] & np.tril(np.ones((4, 4), bool))
    assert measure(sink_rate, weights, mask) == 1.0
    assert measure(sink_rate, weights) == 0.5  # key 0 of the second sequence has no weight


def test_sink_rate_is_over_the_queries_that_see_the_first_key():
    """A window hides it from most; a sequence without keys has no first key."""
    distance = np.arange(8)[:, None] - np.arange(8)
    window = (distance >= 0) & (distance < 2)
    weights = np.zeros((2, 1, 8, 8))
    weights[..., 0] = 0.35
    mask = window & np.array([True, False])[:, None, None, None]
    assert measure(sink_rate, weights, mask) == 1.0
    assert np.isnan(measure(sink_rate, weights, np.zeros((8, 8), bool)))


def test_a_negative_sink_is_one():
    assert measure(sink_rate, np.full((1, 1, 2, 2), -0.4)) == 1.0


def test_sparsity_counts_seen_keys_only():
    mask = np.tril(np.ones((4, 4), bool))
    weights = np.where(np.eye(4, dtype=bool), 1.0, 0.0)[None, None]
    assert measure(sparsity, weights, mask)[0] == pytest.approx(6 / 10)
    assert measure(sparsity, weights)[0] == pytest.approx(12 / 16)
    assert np.isnan(measure(sparsity, weights, np.zeros((4, 4), bool))[0])


def test_weight_on_a_key_keeps_its_sign_and_is_nan_where_the_key_is_not_seen():
    weights = np.full((1, 1, 3, 3), -0.25)
    mask = np.tril(np.ones((3, 3), bool))
    assert measure(weight_on, weights, 1, mask=mask) == -0.25
    assert measure(weight_on, weights, -2, 2, mask=mask) == -0.25
    assert np.isnan(measure(weight_on, weights, 1, 0, mask=mask))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.tile([-1.0, 1.0], 50), 1.0),
        (np.eye(100).ravel(), (1 - 3 * 0.01 * 0.99) / (0.01 * 0.99)),
        (np.linspace(-1, 1, 100), 1.8 - 2.4 / (100**2 - 1)),
    ],
    ids=["two", "one in a hundred", "uniform"],
)
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-20, 0.0), (-1e30, 1e29), (1, 100)])
def test_kurtosis_of_known_distributions_at_any_scale(values, expected, scale, shift):
    x = (values * scale + shift).reshape(1, -1, 10)
    assert measure(kurtosis, x.astype("float32")) == pytest.approx(expected, rel=2e-4)


def test_kurtosis_of_a_normal_sample_is_three(rng):
    assert measure(kurtosis, rng.normal(size=(4, 250, 100))) == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize("function", [kurtosis, max_activation])
@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_activations_of_an_empty_batch_are_nan(function, shape, masked):
    mask = np.ones(shape[:-1], bool) if masked else None
    assert np.isnan(measure(function, np.zeros(shape, "float32"), mask))


@pytest.mark.parametrize("scale", [1e-30, 8e37, 1e38])
def test_kurtosis_at_the_ends_of_float32(scale, rng):
    x = rng.uniform(-3, 3, size=(1, 100, 10))
    found = measure(kurtosis, (x * scale).astype("float32"))
    assert found == pytest.approx(kurtosis_oracle(x, None), rel=1e-5)


WEIGHTS_MEASURES = {
    "entropy": attention_entropy,
    "sinks": sink_rate,
    "sparsity": sparsity,
    "on key": lambda weights, mask: weight_on(weights, 0, mask=mask)[0],
}


@pytest.mark.parametrize("name", WEIGHTS_MEASURES)
def test_of_weights_that_are_nan_nothing_is_measured(name):
    weights = np.full((1, 2, 5, 5), 0.2)
    weights[:, 1, 3] = np.nan  # one query of the second head
    found = measure(WEIGHTS_MEASURES[name], weights, None)
    assert np.isnan(found).tolist() == (True if name == "sinks" else [False, True])
    mask = np.arange(5)[:, None] != 3  # but not where it sees no key
    healthy = measure(WEIGHTS_MEASURES[name], weights, mask)
    expected = measure(WEIGHTS_MEASURES[name], np.full((1, 2, 5, 5), 0.2), mask)
    np.testing.assert_array_equal(healthy, expected)
    assert np.isfinite(healthy).all()


@pytest.mark.parametrize("function", [kurtosis, max_activation])
def test_of_activations_with_nan_nothing_is_measured(function):
    assert np.isnan(measure(function, np.array([[[1.0, np.nan, 3.0]]])))


@pytest.mark.parametrize("function", [kurtosis, max_activation])
def test_activations_that_cannot_be_measured_are_nan(function):
    assert np.isnan(measure(function, np.ones((1, 2, 3)), np.zeros((1, 2), bool)))
    assert np.isnan(measure(kurtosis, np.full((2, 3, 4), 0.1, "float32")))


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (attention_entropy, [np.ones((2, 3, 4))], ValueError, "`weights` must have rank 4"),
        (sparsity, [np.ones((1, 1, 2, 2), "int32")], TypeError, "`weights` must have a floating"),
        (attention_entropy, [np.ones((1, 1, 2, 2)), np.ones((2, 2))], TypeError, "`mask` must be"),
        (sink_rate, [np.ones((1, 1, 2, 2)), np.ones((3, 2), bool)], ValueError, "broadcastable"),
        (sink_rate, [np.ones((1, 1, 2, 2)), None, -1], ValueError, "`threshold` must be a number"),
        (sparsity, [np.ones((1, 1, 2, 2)), None, "x"], ValueError, "Received: threshold='x'"),
        (weight_on, [np.ones((1, 1, 2, 2)), 2], ValueError, r"`key_index` must lie in \[-2, 2\)"),
        (weight_on, [np.ones((1, 1, 2, 2)), 0, -3], ValueError, "`query_index` must lie in"),
        (weight_on, [np.ones((1, 1, 2, 2)), 0.5], TypeError, "`key_index` must be integers"),
        (weight_on, [np.ones((1, 1, 2, 2)), [[0]]], ValueError, r"shape \[\] or \[B\]"),
        (weight_on, [np.ones((2, 1, 2, 2)), [0, 1, 0]], ValueError, "`key_index` must be broad"),
        (kurtosis, [np.ones((2, 3, 4)), np.ones((2, 4), bool)], ValueError, "`mask` must be broad"),
        (max_activation, [np.ones((2, 3, 4), "int32")], TypeError, "`values` must have a floating"),
    ],
)
def test_bad_arguments_are_refused(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)
