"""Length scales beside SSMax's: by position and by Qwen's logarithm; errors of all."""

import numpy as np
import pytest
from support import oracle
from support.helpers import to_numpy

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
    (lambda: layers.AdaptiveLogScale("a"), "`delta` must be a finite number of float32.*'a'"),
    (lambda: layers.AdaptiveLogScale(1e39), r"`delta` must be a finite number of float32.*1e\+39"),
    (lambda: ops.adaptive_log_scale(5, 1, 1e6), r"`gamma` must leave.*gamma=1000000.0 with n=5"),
    (lambda: ops.adaptive_log_scale(1, 1, -1e6), r"`gamma` must leave.*gamma=-1000000.0 with n=1"),
    (
        lambda: layers.AdaptiveLogScale()(np.ones((3,), "int32")),
        "`AdaptiveLogScale` needs the query",
    ),
    (
        lambda: layers.AdaptiveLogScale()(np.ones((3,), "int32"), np.zeros((2, 3, 4), "float32")),
        r"`query` must have shape \[B, T, H, D\].*\(2, 3, 4\)",
    ),
    (lambda: ops.adaptive_log_scale(0, 1, 1), "`n` must be a number of keys, 1 or more.*0"),
    (lambda: ops.adaptive_log_scale(3, np.inf, 1), "`beta` must be a finite number.*inf"),
    (lambda: layers.LogLengthScale(use_bias="no"), "`use_bias` must be True or False.*'no'"),
    (
        lambda: layers.AdaptiveLogScale()(
            np.ones((1, 1, 1, 3), "int32"), np.zeros((1, 3, 2, 4), "float32")
        ),
        r"`n` must be broadcastable to \[B, H, T\].*\(1, 1, 1, 3\)",
    ),
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


@pytest.mark.parametrize(
    "function",
    [
        ops.position_temperature,
        lambda n: ops.qwen_log_scale(n, 8),
        lambda n: ops.adaptive_log_scale(n, 1, 1),
    ],
)
def test_what_is_no_number_is_refused(function):
    for bad in (None, "a"):
        with pytest.raises(TypeError, match=f"`n` must be a number or a tensor.*n={bad!r}"):
            function(bad)


@pytest.mark.parametrize("given", [(1, None, 1), (1, 1, "a")], ids=str)
def test_parameter_that_is_no_number_is_refused(given):
    with pytest.raises(TypeError, match="`(beta|gamma)` must be a number or a tensor"):
        ops.adaptive_log_scale(*given)


@pytest.mark.parametrize("function", [ops.position_temperature, lambda n: ops.qwen_log_scale(n, 8)])
def test_mask_for_n_is_refused(function):
    with pytest.raises(TypeError, match="`n` must be a number of keys, not a mask"):
        function(np.array([True]))
