"""Layers on logits: the weights they own, and the functions they apply."""

import keras
import numpy as np
import pytest
from support import oracle
from support.helpers import relative_error, to_numpy

from keras_ssattn import layers
from keras_ssattn.ssmax import EdificeSSMax

LAYERS = {
    "softmax": layers.Softmax,
    "ssmax": layers.SSMax,
    "softpick": layers.Softpick,
    "rectified_softpick": layers.RectifiedSoftpick,
    "sink_softmax": layers.SinkSoftmax,
}
DEFAULTS = {"ssmax": {"s": 0.2}}  # where they are not those of the oracle


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_values_equal_oracle(name, masked, rng):
    logits = rng.normal(size=(3, 5, 7)).astype("float32")
    mask = rng.random((3, 5, 7)) < 0.6 if masked else None
    actual = to_numpy(LAYERS[name]()(logits, mask=mask))
    expected = oracle.normalize(name, logits, mask, **DEFAULTS.get(name, {}))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


SCALES = {
    "log": layers.LogLengthScale,
    "qwen": lambda: layers.QwenLogScale(3),
    "position": lambda: layers.PositionTemperature(original_length=2),
    "query": layers.QueryAwareScale,
    "adaptive": layers.AdaptiveLogScale,
}


@pytest.mark.parametrize("scale", SCALES)
def test_length_scale_of_float32_in_a_layer_of_float64(scale, rng):
    x = rng.normal(size=(2, 7, 8))
    normalizer = layers.Softmax(length_scale=SCALES[scale](), dtype="float64")
    if scale not in ("query", "adaptive"):
        wide = to_numpy(normalizer(x))
        narrow = to_numpy(layers.Softmax(length_scale=SCALES[scale]())(x.astype("float32")))
        np.testing.assert_allclose(wide, narrow, atol=1e-6)
    attention = layers.MultiHeadAttention(2, 4, normalizer=normalizer, dtype="float64")
    wide = to_numpy(attention(x, x, use_causal_mask=True))
    narrow = layers.MultiHeadAttention(
        2, 4, normalizer=layers.Softmax(length_scale=SCALES[scale]())
    )
    narrow.build(x.shape, x.shape)
    narrow.set_weights([to_numpy(w) for w in attention.weights])
    x = x.astype("float32")
    np.testing.assert_allclose(wide, to_numpy(narrow(x, x, use_causal_mask=True)), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_axis(name, rng):
    logits = rng.normal(size=(3, 5)).astype("float32")
    actual = to_numpy(LAYERS[name](axis=0)(logits))
    expected = oracle.normalize(name, logits.T, **DEFAULTS.get(name, {})).T
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_ssmax_parameters(rng):
    logits = rng.normal(size=(3, 7)).astype("float32")
    layer = layers.SSMax(init_s=0.4, use_bias=True)
    layer.build(logits.shape)
    assert [v.name for v in layer.trainable_variables] == ["s", "b"]
    assert layer.s.shape == layer.b.shape == ()
    layer.b.assign(0.3)
    expected = oracle.normalize("ssmax", logits, s=0.4, b=0.3)
    np.testing.assert_allclose(to_numpy(layer(logits)), expected, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_ssmax_per_head(masked, rng):
    logits = rng.normal(size=(2, 3, 5, 7)).astype("float32")
    mask = rng.random((2, 1, 5, 7)) < 0.6 if masked else None
    layer = layers.SSMax(num_heads=3, use_bias=True)
    layer.build(logits.shape)
    s, b = np.array([0.1, -0.5, 1.5]), np.array([0.0, 1.0, 0.2])
    layer.s.assign(s)
    layer.b.assign(b)
    seen = np.ones(logits.shape, bool) if mask is None else np.broadcast_to(mask, logits.shape)
    n = np.maximum(seen.sum(-1, keepdims=True), 1)
    expected = oracle.normalize("ssmax", logits, seen, s=s[:, None, None], n=n, b=b[:, None, None])
    np.testing.assert_allclose(to_numpy(layer(logits, mask=mask)), expected, rtol=2e-6, atol=1e-7)


def test_ssmax_shift_is_softmax_and_its_s_is_fixed(rng):
    logits = rng.normal(size=(3, 7)).astype("float32")
    layer = EdificeSSMax(init_s=2.0)
    actual = to_numpy(layer(logits))
    np.testing.assert_allclose(actual, oracle.normalize("softmax", logits), rtol=1e-6)
    assert layer.trainable_variables == []
    assert len(layer.non_trainable_variables) == 1


def test_fixed_s():
    layer = layers.SSMax(trainable=False)
    layer.build((3, 7))
    assert layer.trainable_variables == []
    assert [v.name for v in layer.non_trainable_variables] == ["s"]


@pytest.mark.parametrize(("length", "expected"), [(1024, 0.168), (60, 0.318)])
def test_auto_init_s(length, expected):
    layer = layers.SSMax(init_s="auto", train_length=length)
    layer.build((3, 7))
    assert float(layer.s) == pytest.approx(expected, abs=5e-4)
    mean = np.log(np.arange(1, length + 1)).mean()
    assert float(layer.s) * mean == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("name", ["softmax", "softpick", "rectified_softpick"])
def test_length_scale_in_any_normalizer(name, heads, masked, rng):
    logits = rng.normal(size=(2, 3, 5, 7)).astype("float32")
    mask = rng.random((2, 3, 5, 7)) < 0.6 if masked else None
    scale = layers.LogLengthScale(init_s=0.3, num_heads=heads)
    actual = to_numpy(LAYERS[name](length_scale=scale)(logits, mask=mask))
    seen = np.ones(logits.shape, bool) if mask is None else mask
    factor = 0.3 * np.log(np.maximum(seen.sum(-1, keepdims=True), 1))
    expected = oracle.normalize(name, logits * factor, seen)
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_s_is_float32_under_mixed_precision(policy, rng):
    keras.config.set_dtype_policy(policy)
    logits = keras.ops.cast(rng.normal(size=(3, 4096)) * 4, policy.removeprefix("mixed_"))
    layer = layers.SSMax(init_s=0.4321)
    actual = layer(logits)
    assert keras.utils.standardize_dtype(layer.s.dtype) == "float32"
    assert keras.utils.standardize_dtype(actual.dtype) == policy.removeprefix("mixed_")
    expected = oracle.normalize("ssmax", to_numpy(logits), s=float(np.float32(0.4321)))
    # An s rounded to a half would shift the logits by a factor, and these weights by 10 %.
    assert relative_error(to_numpy(actual), expected) < 4e-3


def test_keras_mask_of_batch_and_time_is_passed_on(rng):
    x = rng.normal(size=(2, 5, 7)).astype("float32")
    x[0, 3:] = 0
    inputs = keras.Input((5, 7))
    outputs = layers.Softpick()(keras.layers.Masking()(inputs))
    assert tuple(outputs._keras_mask.shape) == (None, 5)
    seen = np.any(x != 0, -1)[:, :, None]
    actual = to_numpy(keras.Model(inputs, outputs)(x))
    np.testing.assert_allclose(actual, oracle.normalize("softpick", x, seen), rtol=1e-6)


def test_entrywise_mask_is_not_passed_on():
    layer = layers.Softmax()
    logits, mask = keras.Input((5, 7)), keras.Input((5, 7), dtype="bool")
    assert getattr(layer(logits, mask=mask), "_keras_mask", None) is None


ERRORS = [
    (lambda: layers.SSMax(init_s=float("nan")), "`init_s` must be a finite number.*nan"),
    (lambda: layers.SSMax(init_s="big"), "`init_s` must be a finite number or \"auto\".*'big'"),
    (lambda: layers.SSMax(init_s="auto"), "`train_length` must be an integer of 2 or more.*None"),
    (lambda: layers.SSMax(init_s="auto", train_length=1), "`train_length` must be.*=1"),
    (lambda: layers.SSMax(train_length=60), '`train_length` goes with `init_s="auto"`.*60'),
    (lambda: EdificeSSMax(use_bias=True), "`use_bias` must be False in"),
    (lambda: layers.SSMax(num_heads=0), "`num_heads` must be a positive integer or None.*0"),
    (lambda: layers.Softpick(length_scale=3.0), "`length_scale` must be a `LengthScale`.*3.0"),
    (lambda: layers.RectifiedSoftpick(epsilon=-1), "`epsilon` must be a positive number.*-1"),
    (lambda: layers.RectifiedSoftpick(epsilon=1e-50), "`epsilon` must be a positive.*1e-50"),
    (lambda: layers.SSMax(num_heads=2)(np.ones((4, 3), "float32")), "for each head.*\\(4, 3\\)"),
    (lambda: layers.SSMax(num_heads=2)(np.ones((4, 3, 3, 3), "float32")), "for each head.*=2"),
    (lambda: layers.SSMax(axis=1, num_heads=2)(np.ones((2, 3, 3), "float32")), "head.*axis=1"),
    (lambda: layers.Softpick(axis=5)(np.ones((2, 3), "float32")), r"`axis` must lie in \[-2, 2\)"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS, ids=[e[1] for e in ERRORS])
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_axis_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="`axis` must be an integer.*'last'"):
        layers.Softpick(axis="last")


def test_float_mask_is_refused():
    with pytest.raises(TypeError, match="`mask` must be a boolean mask"):
        layers.SSMax()(np.ones((2, 3), "float32"), mask=np.ones((2, 3), "float32"))


def test_mask_of_another_rank_is_refused():
    mask = np.array([True, True, False])
    with pytest.raises(ValueError, match=r"`mask` must have the rank of the logits.*\(3,\)"):
        layers.SSMax()(np.zeros((3, 3), "float32"), mask=mask)
