"""`layers.MultiHeadAttention` against the oracle and against Keras's own layer."""

import inspect
import itertools

import keras
import numpy as np
import pytest
from support import oracle
from support.cases import NAMES, oracle_name
from support.helpers import relative_error, to_numpy

from keras_ssattn import layers
from keras_ssattn.layers import FeedForward, MultiHeadAttention, projection
from keras_ssattn.ssmax import EdificeSSMax

BATCH, LENGTH, KEY_LENGTH = 2, 5, 7


@pytest.fixture
def data(rng):
    return {
        "query": rng.normal(size=(BATCH, LENGTH, 11)).astype("float32"),
        "value": rng.normal(size=(BATCH, KEY_LENGTH, 13)).astype("float32"),
        "key": rng.normal(size=(BATCH, KEY_LENGTH, 17)).astype("float32"),
        "query_mask": np.arange(LENGTH) < np.array([[4], [5]]),
        "value_mask": np.arange(KEY_LENGTH) >= np.array([[2], [0]]),
        "key_mask": np.arange(KEY_LENGTH) < np.array([[6], [7]]),
        "attention_mask": rng.random((BATCH, LENGTH, KEY_LENGTH)) < 0.7,
    }


def randomize(layer, rng):
    """Weights away from their initial zeros and ones."""
    layer.set_weights([w + 0.3 * rng.normal(size=w.shape) for w in layer.get_weights()])


def project(layer, name, x):
    dense = {d.name: d for d in layer.projections()}[name]
    kernel = to_numpy(dense.kernel).astype("float64")
    y = np.tensordot(x, kernel, axes=kernel.ndim - 1 if name == "attention_output" else 1)
    return y + to_numpy(dense.bias)


def reference(layer, query, value, key=None, query_mask=None, value_mask=None, key_mask=None,
              attention_mask=None, causal=False):  # fmt: skip
    """The layer's output and weights, from its own variables, by the oracle."""
    key = value if key is None else key
    keys = [m for m in (value_mask, key_mask) if m is not None]
    visibility = {"causal": causal, "window": layer.sliding_window}
    if keys:
        visibility["key_mask"] = np.logical_and.reduce(keys)
    if attention_mask is not None:
        mask = np.asarray(attention_mask)
        visibility["mask"] = mask[:, None] if mask.ndim == 3 else mask
    s = b = 0.0
    scaled = layer.normalizer.uses_count
    if scaled:
        s = to_numpy(layer.normalizer.length_scale.s)
        bias = layer.normalizer.length_scale.b
        b = 0.0 if bias is None else to_numpy(bias)
    out, weights = oracle.attention(
        project(layer, "query", query),
        project(layer, "key", key),
        project(layer, "value", value),
        oracle_name(layer.normalizer),
        s=s,
        b=b,
        sink=to_numpy(getattr(layer.normalizer, "sink", 0.0)),
        length_scaled=scaled,
        return_weights=True,
        **visibility,
    )
    if query_mask is not None:
        weights = weights * query_mask[:, None, :, None]
        out = out * query_mask[:, :, None, None]
    return project(layer, "attention_output", out), weights


MASKS = ("query_mask", "value_mask", "key_mask", "attention_mask")
COMBINATIONS = [
    dict(zip((*MASKS, "causal"), chosen, strict=True))
    for chosen in itertools.product([False, True], repeat=5)
]


@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda c: "+".join(k for k in c if c[k]))
@pytest.mark.parametrize("normalizer", NAMES)
def test_every_mask_combination(normalizer, chosen, data, rng):
    layer = MultiHeadAttention(3, 4, value_dim=5, normalizer=normalizer)
    arguments = {k: data[k] for k in ("query", "value", "key")}
    masks = {k: data[k] for k in MASKS if chosen[k]}
    layer.build(*(arguments[k].shape for k in ("query", "value", "key")))
    randomize(layer, rng)
    expected, weights = reference(layer, **arguments, **masks, causal=chosen["causal"])
    actual = layer(**arguments, **masks, use_causal_mask=chosen["causal"])
    assert relative_error(to_numpy(actual), expected) < 2e-6
    actual, scores = layer(
        **arguments, **masks, use_causal_mask=chosen["causal"], return_attention_scores=True
    )
    assert relative_error(to_numpy(actual), expected) < 2e-6
    np.testing.assert_allclose(to_numpy(scores), weights, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda c: "+".join(k for k in c if c[k]))
def test_softmax_equals_keras(chosen, window, data, rng):
    options = {} if window is None else {"sliding_window": window}
    if not set(options) <= set(inspect.signature(keras.layers.MultiHeadAttention).parameters):
        pytest.skip("this Keras has no sliding windows")
    theirs = keras.layers.MultiHeadAttention(3, 4, **options)
    ours = MultiHeadAttention(3, 4, normalizer="softmax", sliding_window=window)
    arguments = {k: data[k] for k in ("query", "value", "key")}
    masks = {k: data[k] for k in MASKS if chosen[k]}
    for layer in (theirs, ours):
        layer.build(*(arguments[k].shape for k in ("query", "value", "key")))
    randomize(theirs, rng)
    ours.set_weights(theirs.get_weights())
    # Keras overrules an explicit query mask by the one attached to the query: check the rows
    # that it leaves.
    expected, scores = theirs(
        **arguments, **masks, use_causal_mask=chosen["causal"], return_attention_scores=True
    )
    actual, our_scores = ours(
        **arguments, **masks, use_causal_mask=chosen["causal"], return_attention_scores=True
    )
    seen = to_numpy(our_scores).sum((1, 3)) > 0  # [B, T]; rows that see no key are zero here
    np.testing.assert_allclose(
        to_numpy(actual)[seen], to_numpy(expected)[seen], rtol=1e-5, atol=2e-6
    )
    rows = np.broadcast_to(seen[:, None], (BATCH, 3, LENGTH))
    np.testing.assert_allclose(
        to_numpy(our_scores)[rows], to_numpy(scores)[rows], rtol=1e-5, atol=1e-6
    )
    assert (to_numpy(our_scores)[~rows] == 0).all()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("normalizer", NAMES)
def test_grouped_heads(normalizer, num_kv_heads, data, rng):
    layer = MultiHeadAttention(4, 3, num_kv_heads=num_kv_heads, normalizer=normalizer)
    layer.build(data["query"].shape, data["value"].shape)
    randomize(layer, rng)
    arguments = {k: data[k] for k in ("query", "value", "value_mask")}
    assert layer.key_dense.kernel.shape == (13, num_kv_heads, 3)
    expected, weights = reference(layer, **arguments)
    actual, scores = layer(**arguments, return_attention_scores=True)
    assert relative_error(to_numpy(actual), expected) < 2e-6
    assert relative_error(to_numpy(scores), weights) < 2e-6
    assert relative_error(to_numpy(layer(**arguments)), expected) < 2e-6


def test_grouped_heads_equal_keras_grouped_query_attention(data, rng):
    theirs = keras.layers.GroupQueryAttention(3, 4, 2)
    ours = MultiHeadAttention(4, 3, num_kv_heads=2, normalizer="softmax")
    x = data["query"]
    theirs.build(x.shape, x.shape)
    ours.build(x.shape, x.shape)
    randomize(theirs, rng)
    ours.set_weights(theirs.get_weights())
    np.testing.assert_allclose(
        to_numpy(ours(x, x, use_causal_mask=True)),
        to_numpy(theirs(x, x, use_causal_mask=True)),
        rtol=1e-5,
        atol=2e-6,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalizer", NAMES)
def test_sliding_window(normalizer, causal, data, rng):
    layer = MultiHeadAttention(2, 3, normalizer=normalizer, sliding_window=2)
    layer.build(data["query"].shape, data["value"].shape)
    randomize(layer, rng)
    expected, _ = reference(layer, data["query"], data["value"], causal=causal)
    actual = layer(data["query"], data["value"], use_causal_mask=causal)
    assert relative_error(to_numpy(actual), expected) < 2e-6


def test_s_is_per_query_head_and_used_with_the_visible_count(data, rng):
    normalizer = layers.SSMax(use_bias=True, init_s=0.4)
    layer = MultiHeadAttention(4, 3, num_kv_heads=2, normalizer=normalizer)
    layer.build(data["query"].shape, data["value"].shape)
    assert layer.normalizer.s.shape == layer.normalizer.b.shape == (4,)
    np.testing.assert_allclose(to_numpy(layer.normalizer.s), [0.4] * 4, rtol=1e-6)
    randomize(layer, rng)
    arguments = {k: data[k] for k in ("query", "value", "value_mask", "attention_mask")}
    expected, _ = reference(layer, **arguments, causal=True)
    actual = layer(**arguments, use_causal_mask=True)
    assert relative_error(to_numpy(actual), expected) < 2e-6


@pytest.mark.parametrize("kind", [layers.Softpick, layers.RectifiedSoftpick])
def test_scalable_softpick(kind, data, rng):
    layer = MultiHeadAttention(
        2, 3, normalizer=kind(length_scale=layers.LogLengthScale(init_s=0.3))
    )
    layer.build(data["query"].shape, data["value"].shape)
    assert layer.normalizer.length_scale.s.shape == (2,)
    randomize(layer, rng)
    expected, _ = reference(layer, data["query"], data["value"], causal=True)
    actual = layer(data["query"], data["value"], use_causal_mask=True)
    assert relative_error(to_numpy(actual), expected) < 2e-6


def test_shift_formula_is_softmax(data, rng):
    shift = MultiHeadAttention(2, 3, normalizer=EdificeSSMax(init_s=2.0))
    soft = MultiHeadAttention(2, 3, normalizer="softmax")
    for layer in (shift, soft):
        layer.build(data["query"].shape, data["value"].shape)
    for ours, theirs in zip(soft.projections(), shift.projections(), strict=True):
        ours.set_weights(theirs.get_weights())
    np.testing.assert_array_equal(
        to_numpy(shift(data["query"], data["value"])), to_numpy(soft(data["query"], data["value"]))
    )
    assert len(shift.trainable_variables) == len(soft.trainable_variables)


@pytest.mark.parametrize("normalizer", ["softmax", "ssmax"])
def test_qk_norm_comes_before_the_length_scale(normalizer, data, rng):
    """Scaling the projections leaves the output; s does not cancel."""
    layer = MultiHeadAttention(2, 3, normalizer=normalizer, qk_norm=True, use_bias=False)
    before = to_numpy(layer(data["query"], data["value"], use_causal_mask=True))
    layer.query_dense.kernel.assign(layer.query_dense.kernel * 100)
    after = to_numpy(layer(data["query"], data["value"], use_causal_mask=True))
    assert relative_error(after, before) < 1e-3  # the norm's epsilon is felt before
    if normalizer == "ssmax":
        layer.normalizer.s.assign([0.0, 0.0])
        uniform = to_numpy(layer(data["query"], data["value"], use_causal_mask=True))
        assert relative_error(uniform, before) > 1e-2


@pytest.mark.parametrize("output_shape", [6, (6,), (2, 3)])
def test_output_shape(output_shape, data):
    layer = MultiHeadAttention(2, 3, output_shape=output_shape)
    sizes = (output_shape,) if isinstance(output_shape, int) else output_shape
    assert layer(data["query"], data["value"]).shape == (BATCH, LENGTH, *sizes)
    assert layer.compute_output_shape((None, 5, 11), (None, 7, 13)) == (None, 5, *sizes)


@pytest.mark.parametrize("normalizer", NAMES)
def test_dropout_on_weights(normalizer, data):
    layer = MultiHeadAttention(2, 3, normalizer=normalizer, dropout=0.5, seed=3)
    inference, scores = layer(data["query"], data["value"], return_attention_scores=True)
    again, _ = layer(data["query"], data["value"], return_attention_scores=True, training=False)
    np.testing.assert_allclose(to_numpy(inference), to_numpy(again), rtol=1e-6)
    without = layer(data["query"], data["value"], training=False)
    assert relative_error(to_numpy(without), to_numpy(inference)) < 2e-6
    _, trained = layer(data["query"], data["value"], return_attention_scores=True, training=True)
    np.testing.assert_allclose(to_numpy(trained), to_numpy(scores), rtol=1e-6)
    many = [np.repeat(data[name][:1], 500, axis=0) for name in ("query", "value")]
    outputs = to_numpy(layer(*many, training=True))
    assert relative_error(outputs[0], outputs[1]) > 1e-3
    assert relative_error(outputs.mean(0), to_numpy(inference)[0]) < 0.15


def test_symbolic_shapes_in_cross_attention(data):
    query, value = keras.Input((5, 11)), keras.Input((7, 13))
    layer = MultiHeadAttention(2, 3, num_kv_heads=1)
    output, scores = layer(query, value, return_attention_scores=True)
    assert output.shape == (None, 5, 11)
    assert scores.shape == (None, 2, 5, 7)
    model = keras.Model([query, value], [output, scores])
    found = model([data["query"], data["value"]])
    assert found[0].shape == (2, 5, 11)
    assert found[1].shape == (2, 2, 5, 7)


def test_masks_attached_to_tensors_are_honored_and_the_querys_passed_on(data, rng):
    query, value = data["query"].copy(), data["value"].copy()
    query[~data["query_mask"]] = 0
    value[~data["value_mask"]] = 0
    masked = [keras.layers.Masking()(keras.ops.convert_to_tensor(x)) for x in (query, value)]
    layer = MultiHeadAttention(2, 3)
    actual = layer(*masked)
    np.testing.assert_array_equal(to_numpy(actual._keras_mask), data["query_mask"])
    expected, _ = reference(
        layer, query, value, query_mask=data["query_mask"], value_mask=data["value_mask"]
    )
    assert relative_error(to_numpy(actual), expected) < 2e-6


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("normalizer", NAMES)
def test_mixed_precision(normalizer, policy, data):
    keras.config.set_dtype_policy(policy)
    layer = MultiHeadAttention(2, 3, normalizer=normalizer)
    actual, scores = layer(
        data["query"], data["value"], use_causal_mask=True, return_attention_scores=True
    )
    half = policy.removeprefix("mixed_")
    assert keras.utils.standardize_dtype(actual.dtype) == half
    assert keras.utils.standardize_dtype(scores.dtype) == half
    assert {keras.utils.standardize_dtype(w.dtype) for w in layer.weights} <= {"float32", "uint32"}
    # From the layer's own projections on: rounding those may carry a logit across 0, where
    # rectified softpick of a single key jumps.
    _, expected = oracle.attention(
        to_numpy(layer.query_dense(data["query"])),
        to_numpy(layer.key_dense(data["value"])),
        to_numpy(layer.value_dense(data["value"])),
        normalizer,
        s=0.2,
        causal=True,
        return_weights=True,
    )
    tolerance = {"bfloat16": 2**-8, "float16": 2**-11}[half]
    assert relative_error(to_numpy(scores), expected) < tolerance
    plain = layer(data["query"], data["value"], use_causal_mask=True)
    assert relative_error(to_numpy(plain), to_numpy(actual)) < 8 * tolerance


def test_a_normalizer_instance_is_a_specification(data):
    spec = layers.SSMax(init_s=0.7)
    first, second = (MultiHeadAttention(2, 3, normalizer=spec) for _ in range(2))
    for layer in (first, second):
        layer.build(data["query"].shape, data["value"].shape)
    assert first.normalizer is not second.normalizer
    assert not spec.built
    first.normalizer.s.assign([5.0, 5.0])
    np.testing.assert_allclose(to_numpy(second.normalizer.s), [0.7, 0.7], rtol=1e-6)


class RootLengthScale(layers.LengthScale):
    """Not registered with Keras, so it cannot be saved; it can be used."""

    uses_count = True

    def call(self, n):
        return keras.ops.sqrt(keras.ops.cast(n, "float32"))


@pytest.mark.parametrize("cls", [MultiHeadAttention, layers.TransformerBlock])
def test_a_length_scale_of_the_user_needs_no_registration_to_be_used(cls, data):
    normalizer = layers.Softpick(length_scale=RootLengthScale())
    x = data["query"]
    if cls is MultiHeadAttention:
        layer = MultiHeadAttention(2, 3, normalizer=normalizer)
        plain = MultiHeadAttention(2, 3, normalizer="softpick")
        _, weights = layer(x, x, return_attention_scores=True)
        plain.build(x.shape, x.shape)
        plain.set_weights(layer.get_weights())
        plain.query_dense.kernel.assign(plain.query_dense.kernel * np.sqrt(x.shape[1]))
        _, expected = plain(x, x, return_attention_scores=True)
        assert relative_error(to_numpy(weights), to_numpy(expected)) < 1e-5
    else:
        layer = layers.TransformerBlock(1, normalizer=normalizer)
        layer(x)
        assert type(layer.attention.normalizer.length_scale) is RootLengthScale


def test_sizes_may_be_numpy_integers():
    config = MultiHeadAttention(np.int64(2), np.int32(4), sliding_window=np.int64(3)).get_config()
    assert all(type(config[name]) is int for name in ("num_heads", "key_dim", "sliding_window"))


@pytest.mark.parametrize("normalizer", NAMES)
def test_packed_segments_do_not_see_each_other(normalizer, rng):
    x = rng.normal(size=(1, 9, 8)).astype("float32")
    layer = MultiHeadAttention(2, 4, normalizer=normalizer)
    ids = np.array([[1, 1, 1, 1, 2, 2, 7, 7, 7]])
    packed = to_numpy(layer(x, x, use_causal_mask=True, segment_ids=ids))
    parts = [to_numpy(layer(p, p, use_causal_mask=True)) for p in np.split(x, [4, 6], axis=1)]
    np.testing.assert_allclose(packed, np.concatenate(parts, 1), rtol=1e-5, atol=1e-6)


def test_without_training_dropout_needs_no_weights(monkeypatch, data):
    layer = MultiHeadAttention(2, 3, dropout=0.5)
    layer.build((BATCH, LENGTH, 11), (BATCH, 7, 13))
    monkeypatch.setattr("keras_ssattn.layers.attention.attend_weights", None)
    layer(data["query"], data["value"], training=False)
    with pytest.raises(TypeError, match="NoneType"):
        layer(data["query"], data["value"], training=True)


@pytest.mark.backend("torch", reason="its autocast")
def test_autocast_rounds_products_but_not_their_sum_with_the_bias(rng):
    import torch

    owner = FeedForward(8)
    x = torch.tensor(rng.normal(size=(2, 3, 4)).astype("float32"))
    owner(x)
    owner.up.bias.assign(np.full(8, 100.0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = projection.project(owner, owner.up, x), owner.up(x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.backend("torch", reason="hooks are PyTorch's")
@pytest.mark.parametrize("names", ["query_dense value_dense key_dense", "up down gate"])
def test_hooks_of_projections_are_called(names, rng):
    layer = FeedForward(5, gated=True) if "up" in names else MultiHeadAttention(2, 4)
    x = keras.ops.convert_to_tensor(rng.normal(size=(2, 3, 8)).astype("float32"))
    inputs = (x.requires_grad_(),) if "up" in names else (x.requires_grad_(), x)
    expected, seen = to_numpy(layer(*inputs)), []
    first, second, third = (getattr(layer, name) for name in names.split())
    first.register_forward_hook(lambda *_: seen.append("forward"))
    second.register_full_backward_hook(lambda *_: seen.append("backward"))
    call = third.call
    third.call = lambda x: seen.append("call") or call(x)
    found = layer(*inputs)
    found.sum().backward()
    assert sorted(seen) == ["backward", "call", "forward"]
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-5, atol=1e-6)
