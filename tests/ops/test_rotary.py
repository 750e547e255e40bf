"""Rotary position embedding: angles, shapes, and the scalings for longer contexts."""

import keras
import numpy as np
import pytest
from support.helpers import gradients, to_numpy

from keras_ssattn import layers, ops

FAR = 131071
YARN = {"type": "yarn", "factor": 8.0, "original_length": 2048}


def rotate(x, positions, frequencies):
    """`[B, T, H, D]` as complex numbers, turned: float64, positions `[T]` or `[B, T]`."""
    x = np.asarray(x, "float64")
    half = len(frequencies)
    angles = np.asarray(positions, "float64")[..., None, None] * frequencies
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


def plain(size, theta=10000.0):
    return np.array([theta ** (-2 * i / size) for i in range(size // 2)])


def yarn(size, theta, factor, length, fast=32, slow=1):
    """NTK by parts, pair by pair."""

    def pair(turns):  # at which a wave turns so many times within the length
        return size / 2 * np.log(length / (2 * np.pi * turns)) / np.log(theta)

    low, high = max(np.floor(pair(fast)), 0), min(np.ceil(pair(slow)), size - 1)
    out = []
    for i, f in enumerate(plain(size, theta)):
        ramp = min(max((i - low) / (high - low), 0), 1)
        out.append(ramp * f / factor + (1 - ramp) * f)
    return np.array(out)


def normal(rng, *shape):
    return rng.normal(size=shape).astype("float32")


# Frequencies


@pytest.mark.parametrize("theta", [2.0, 10000.0, 5e5])
def test_frequencies(theta):
    found = ops.rotary_frequencies(10, theta)
    assert found.dtype == "float64"
    np.testing.assert_allclose(found, plain(10, theta), rtol=1e-14)


def test_linear_scaling_divides_the_positions(rng):
    frequencies = ops.rotary_frequencies(8, scaling={"type": "linear", "factor": 4})
    x = normal(rng, 1, 5, 2, 8)
    actual = to_numpy(ops.rotary_embedding(x, 4 * np.arange(5), frequencies))
    np.testing.assert_allclose(actual, rotate(x, np.arange(5), plain(8)), atol=1e-6)


@pytest.mark.parametrize(("size", "theta"), [(64, 10000.0), (128, 1e6), (16, 500.0)])
def test_yarn_frequencies(size, theta):
    actual = ops.rotary_frequencies(size, theta, YARN)
    np.testing.assert_allclose(actual, yarn(size, theta, 8.0, 2048), rtol=1e-13)
    fast, slow = plain(size, theta)[[0, -1]]
    assert actual[0] == fast  # turns 326 times within the length
    if theta * 2 * np.pi > 2048 * theta ** (2 / size):
        assert actual[-1] == pytest.approx(slow / 8, rel=1e-13)  # not once


def test_yarn_with_other_ends():
    scaling = {**YARN, "beta_fast": 16, "beta_slow": 2}
    actual = ops.rotary_frequencies(64, scaling=scaling)
    np.testing.assert_allclose(actual, yarn(64, 1e4, 8.0, 2048, 16, 2), rtol=1e-13)


def test_yarn_whose_ends_are_not_rounded():
    actual = ops.rotary_frequencies(64, scaling={**YARN, "truncate": False})
    rounded = ops.rotary_frequencies(64, scaling=YARN)
    low, high = (32 * np.log(2048 / (2 * np.pi * n)) / np.log(1e4) for n in (32, 1))
    assert low % 1 > 0.01
    ramp = np.clip((np.arange(32) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(actual, plain(64) * (1 - ramp + ramp / 8), rtol=1e-13)
    assert np.abs(actual / rounded - 1).max() > 0.01


@pytest.mark.parametrize("ends", [{}, {"low_freq_factor": 2, "high_freq_factor": 7.5}])
@pytest.mark.parametrize(("size", "theta"), [(64, 10000.0), (128, 5e5), (16, 500.0)])
def test_llama3_frequencies(size, theta, ends):
    """By wavelength, as its authors write it."""
    scaling = {"type": "llama3", "factor": 8, "original_length": 2048, **ends}
    low, high = ends.get("low_freq_factor", 1), ends.get("high_freq_factor", 4)
    expected = []
    for f in plain(size, theta):
        wavelength = 2 * np.pi / f
        if wavelength < 2048 / high:
            expected.append(f)
        elif wavelength > 2048 / low:
            expected.append(f / 8)
        else:
            smooth = (2048 / wavelength - low) / (high - low)
            expected.append((1 - smooth) * f / 8 + smooth * f)
    actual = ops.rotary_frequencies(size, theta, scaling)
    np.testing.assert_allclose(actual, expected, rtol=1e-13)
    assert 0 < np.isclose(actual, plain(size, theta)).sum() < size // 2
    assert ops.rotary_attention_factor(scaling) == 1.0


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [
        ({"mscale": 1, "mscale_all_dim": 1}, 1.0),
        ({"mscale": 0.7, "mscale_all_dim": 2}, (0.07 * np.log(8) + 1) / (0.2 * np.log(8) + 1)),
        ({"mscale": 0.7, "mscale_all_dim": 0}, 0.1 * np.log(8) + 1),
        ({"mscale_all_dim": 2}, 0.1 * np.log(8) + 1),
        ({"mscale": 1, "mscale_all_dim": 1, "attention_factor": 1.5}, 1.5),
    ],
)
def test_attention_factor_of_yarn_with_slopes(slopes, expected):
    assert ops.rotary_attention_factor({**YARN, **slopes}) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({**YARN, "truncate": 1}, r"`scaling\['truncate'\]` must be True or False.*1"),
        ({**YARN, "mscale": -1}, r"`scaling\['mscale'\]` must be a number of 0 or more.*-1"),
        ({**YARN, "type": "llama3", "low_freq_factor": 4}, "a 'high_freq_factor' above its"),
        ({**YARN, "type": "llama3", "beta_fast": 4}, "type 'llama3' must have the keys"),
        ({**YARN, "type": "llama3", "factor": 0.5}, r"`scaling\['factor'\]` must be a number of 1"),
    ],
)
def test_errors_of_scalings(entries, message):
    with pytest.raises(ValueError, match=message):
        ops.rotary_frequencies(8, scaling=entries)


def test_yarn_of_a_factor_of_one_changes_nothing():
    scaling = {**YARN, "factor": 1}
    np.testing.assert_allclose(ops.rotary_frequencies(64, scaling=scaling), plain(64), rtol=1e-14)
    assert ops.rotary_attention_factor(scaling) == 1.0


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 1.0),
        ({"type": "linear", "factor": 8}, 1.0),
        (YARN, 0.1 * np.log(8) + 1),
        ({**YARN, "attention_factor": 1.5}, 1.5),
    ],
)
def test_attention_factor(scaling, expected):
    assert ops.rotary_attention_factor(scaling) == pytest.approx(expected, rel=1e-14)


# The function


def test_values_equal_oracle(rng):
    x = normal(rng, 2, 9, 3, 8)
    actual = to_numpy(ops.rotary_embedding(x, 0, ops.rotary_frequencies(8)))
    np.testing.assert_allclose(actual, rotate(x, np.arange(9), plain(8)), atol=1e-6)


def test_positions_of_each_row(rng):
    x = normal(rng, 2, 5, 3, 8)
    positions = rng.integers(0, 5000, (2, 5)).astype("int32")
    actual = to_numpy(ops.rotary_embedding(x, positions, plain(8)))
    np.testing.assert_allclose(actual, rotate(x, positions, plain(8)), atol=2e-6)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("start", [0, 4090, FAR - 6, 10_000_000])
def test_far_positions_are_exact(start, theta, rng):
    x = normal(rng, 1, 7, 2, 64)
    actual = to_numpy(ops.rotary_embedding(x, start, ops.rotary_frequencies(64, theta)))
    expected = rotate(x, start + np.arange(7), plain(64, theta))
    np.testing.assert_allclose(actual, expected, atol=5e-6, rtol=0)


def test_negative_positions(rng):
    x = normal(rng, 1, 5, 2, 8)
    positions = np.array([-5000, -4097, -4096, -1, 0])
    actual = to_numpy(ops.rotary_embedding(x, positions, plain(8)))
    np.testing.assert_allclose(actual, rotate(x, positions, plain(8)), atol=2e-6)


@pytest.mark.parametrize("shift", [1, 1000, FAR - 20])
def test_dot_product_depends_on_the_difference_only(shift, rng):
    query, key = normal(rng, 1, 1, 1, 64), normal(rng, 1, 1, 1, 64)
    query, key = np.repeat(query, 6, 1), np.repeat(key, 6, 1)

    def logits(start):
        q, k = (
            to_numpy(ops.rotary_embedding(x, start, ops.rotary_frequencies(64)))[0, :, 0]
            for x in (query, key)
        )
        return q @ k.T

    near, far = logits(0), logits(shift)
    np.testing.assert_allclose(near, far, atol=5e-5)
    for diagonal in range(-5, 6):
        assert np.ptp(np.diag(near, diagonal)) < 5e-5
    assert np.ptp(near[0]) > 0.1


def test_norm_is_kept_and_multiplied_by_the_attention_factor(rng):
    x = normal(rng, 1, 5, 2, 8)
    actual = to_numpy(ops.rotary_embedding(x, 7, plain(8), attention_factor=1.25))
    norms = np.linalg.norm(actual, axis=-1) / np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(norms, 1.25, rtol=1e-6)


def test_other_features_pass_through(rng):
    x = normal(rng, 2, 5, 3, 10)
    actual = to_numpy(ops.rotary_embedding(x, 3, plain(6), attention_factor=2.0))
    np.testing.assert_array_equal(actual[..., 6:], x[..., 6:])
    expected = 2 * rotate(x[..., :6], 3 + np.arange(5), plain(6))
    np.testing.assert_allclose(actual[..., :6], expected, atol=2e-6)


@pytest.mark.parametrize("rotated", [2, 6, 10])
def test_gradient_turns_back(rotated, rng):
    """The transpose of a rotation is its inverse."""
    x, cotangent = normal(rng, 1, 4, 2, 10), normal(rng, 1, 4, 2, 10)
    [found] = gradients(lambda x: ops.rotary_embedding(x, 3, plain(rotated)), [x], cotangent)
    back = rotate(cotangent[..., :rotated], -(3 + np.arange(4)), plain(rotated))
    expected = np.concatenate([back, cotangent[..., rotated:]], axis=-1)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.backend("tensorflow", reason="its gradient of a slice fills zeros, on one thread")
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_training_takes_no_gradient_of_a_slice(fraction):
    import tensorflow as tf

    block = layers.TransformerBlock(
        2, num_kv_heads=1, causal=True, rotary=layers.RotaryEmbedding(fraction=fraction)
    )
    block.build((2, 5, 16))

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(block(x, training=True) ** 2)
        return tape.gradient(loss, block.trainable_variables)

    graph = gradient.get_concrete_function(tf.TensorSpec((2, 5, 16))).graph
    kinds = {operation.type for operation in graph.get_operations()}
    assert "SplitV" in kinds
    assert "StridedSliceGrad" not in kinds


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_once(dtype, rng):
    x = keras.ops.cast(normal(rng, 1, 4, 2, 64), dtype)
    actual = ops.rotary_embedding(x, FAR - 3, plain(64))
    assert keras.utils.standardize_dtype(actual.dtype) == dtype
    exact = rotate(to_numpy(keras.ops.cast(x, "float32")), FAR - 3 + np.arange(4), plain(64))
    rounded = keras.ops.cast(keras.ops.cast(exact, "float32"), dtype)
    error = np.abs(to_numpy(keras.ops.cast(actual, "float32")) - exact)
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert (error <= unit * np.abs(exact) + 1e-5).all()
    equal = to_numpy(keras.ops.equal(actual, rounded))
    assert equal.mean() > 0.98


# The layer


def test_layer_has_no_weights_and_equals_the_function(rng):
    x = normal(rng, 2, 5, 3, 8)
    layer = layers.RotaryEmbedding(theta=300.0)
    np.testing.assert_allclose(
        to_numpy(layer(x)), rotate(x, np.arange(5), plain(8, 300.0)), atol=1e-6
    )
    assert layer.weights == []


@pytest.mark.parametrize(
    ("fraction", "size"), [(0.5, 4), (0.25, 2), (0.7, 4), (1 / 3, 2), (1.0, 8), (0.99, 6)]
)
def test_fraction(fraction, size, rng):
    x = normal(rng, 2, 5, 3, 8)
    actual = to_numpy(layers.RotaryEmbedding(fraction=fraction)(x))
    np.testing.assert_allclose(actual, rotate(x, np.arange(5), plain(size)), atol=1e-6)


@pytest.mark.parametrize("kind", ["integer", "scalar", "rows"])
def test_offset_continues_a_sequence(kind, rng):
    x = normal(rng, 2, 9, 3, 8)
    layer = layers.RotaryEmbedding()
    whole = to_numpy(layer(x))
    offset = {"integer": 4, "scalar": np.array(4), "rows": np.array([4, 4])}[kind]
    np.testing.assert_allclose(to_numpy(layer(x[:, 4:], offset=offset)), whole[:, 4:], atol=1e-6)


def test_offset_of_each_row_and_positions_that_override_it(rng):
    x = normal(rng, 2, 3, 2, 8)
    layer = layers.RotaryEmbedding()
    expected = rotate(x, [[5, 6, 7], [90, 91, 92]], plain(8))
    actual = to_numpy(layer(x, offset=np.array([5, 90])))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    actual = to_numpy(layer(x, np.array([[5, 6, 7], [90, 91, 92]]), offset=1000))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    actual = to_numpy(layer(x, np.array([3, 1, 2])))
    np.testing.assert_allclose(actual, rotate(x, [3, 1, 2], plain(8)), atol=1e-6)


def test_yarn_layer(rng):
    x = normal(rng, 1, 5, 2, 64)
    layer = layers.RotaryEmbedding(scaling=YARN, fraction=0.5)
    factor = 0.1 * np.log(8) + 1
    expected = factor * rotate(x[..., :32], np.arange(5), yarn(32, 1e4, 8.0, 2048))
    actual = to_numpy(layer(x))
    np.testing.assert_allclose(actual[..., :32], expected, atol=2e-6)
    np.testing.assert_array_equal(actual[..., 32:], x[..., 32:])


def test_theta_changes_after_building(rng, tmp_path):
    x = normal(rng, 2, 5, 3, 8)
    inputs = keras.Input((None, 3, 8))
    model = keras.Model(inputs, layers.RotaryEmbedding(name="rotary")(inputs))
    model.compile()
    expected = {theta: rotate(x, np.arange(5), plain(8, theta)) for theta in (1e4, 5e5)}
    np.testing.assert_allclose(model.predict(x, verbose=0), expected[1e4], atol=1e-6)
    model.get_layer("rotary").theta = 5e5
    np.testing.assert_allclose(to_numpy(model(x)), expected[5e5], atol=1e-6)
    model.compile()
    np.testing.assert_allclose(model.predict(x, verbose=0), expected[5e5], atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("rotary").theta == 5e5
    with pytest.raises(ValueError, match="`theta` must be"):
        model.get_layer("rotary").theta = 0


def test_symbolic_offset_and_dynamic_length(rng):
    x, offset = keras.Input((None, 3, 8)), keras.Input((), dtype="int32")
    rotated = layers.RotaryEmbedding()(x, offset=offset)
    assert rotated.shape == (None, None, 3, 8)
    model = keras.Model([x, offset], rotated)
    values = normal(rng, 2, 5, 3, 8)
    actual = model.predict([values, np.array([3, 700], "int32")], verbose=0)
    positions = np.array([[3], [700]]) + np.arange(5)
    np.testing.assert_allclose(actual, rotate(values, positions, plain(8)), atol=1e-6)


def test_saved_with_every_option(rng, tmp_path):
    inputs = keras.Input((None, 3, 8))
    layer = layers.RotaryEmbedding(500.0, 0.5, {**YARN, "beta_fast": 16.0})
    model = keras.Model(inputs, layer(inputs))
    x = normal(rng, 2, 5, 3, 8)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


def test_mask_is_kept():
    x = keras.layers.TimeDistributed(keras.layers.Reshape((3, 2)))(
        keras.layers.Masking()(keras.Input((5, 6)))
    )
    mask = keras.KerasTensor((None, 5), "bool")
    x._keras_mask = mask
    assert layers.RotaryEmbedding()(x)._keras_mask is mask


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, rng):
    x = normal(rng, 1, 4, 2, 64)
    layer = layers.RotaryEmbedding(dtype=policy)
    actual = layer(x, offset=FAR - 3)
    assert keras.utils.standardize_dtype(actual.dtype) == policy.removeprefix("mixed_")
    expected = rotate(x, FAR - 3 + np.arange(4), plain(64))
    error = np.abs(to_numpy(keras.ops.cast(actual, "float32")) - expected).max()
    assert error < (2.0**-7 if "bfloat" in policy else 2.0**-10) * np.abs(x).max() * 1.5
