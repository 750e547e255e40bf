"""`layers.TransformerBlock`, the feed-forward network and the pooling layers."""

import keras
import numpy as np
import pytest
from support.helpers import relative_error, to_numpy

from keras_ssattn import layers
from keras_ssattn.layers import FeedForward, TransformerBlock


@pytest.fixture
def x(rng):
    return rng.normal(size=(2, 5, 12)).astype("float32")


@pytest.fixture
def context(rng):
    return rng.normal(size=(2, 7, 9)).astype("float32")


def gelu(x):
    from math import erf

    return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2


def silu(x):
    return x / (1 + np.exp(-x))


def dense(layer, x):
    return x @ to_numpy(layer.kernel).astype("float64") + to_numpy(layer.bias)


def layer_norm(layer, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * to_numpy(layer.gamma) + to_numpy(layer.beta)


def rms_norm(layer, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * to_numpy(layer.scale)


def feed_forward(layer, x, gated):
    if gated:
        return dense(layer.down, silu(dense(layer.gate, x)) * dense(layer.up, x))
    return dense(layer.down, gelu(dense(layer.up, x)))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("ffn_type", ["standard", "gated"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_structure(position, norm, ffn_type, cross, x, context, rng):
    """The block, recomputed in NumPy around its own attention layers."""
    block = TransformerBlock(
        3,
        causal=True,
        norm=norm,
        norm_position=position,
        ffn_type=ffn_type,
        cross_attention=cross,
        dropout=0.3,
    )
    arguments = (x, context) if cross else (x,)
    block.build(*(a.shape for a in arguments))
    for variable in block.trainable_variables:
        variable.assign(variable + 0.1 * rng.normal(size=variable.shape))
    normalize = {"layer_norm": layer_norm, "rms_norm": rms_norm}[norm]

    def residual(y, norm_layer, part):
        if position == "pre":
            return y + part(normalize(norm_layer, y))
        return normalize(norm_layer, y + part(y))

    def attend(y):
        y = y.astype("float32")
        return to_numpy(block.attention(y, y, use_causal_mask=True))

    expected = residual(x.astype("float64"), block.attention_norm, attend)
    if cross:
        expected = residual(
            expected,
            block.context_attention_norm,
            lambda y: to_numpy(block.context_attention(y.astype("float32"), context)),
        )
    expected = residual(
        expected,
        block.feed_forward_norm,
        lambda y: feed_forward(block.feed_forward, y, ffn_type == "gated"),
    )
    assert relative_error(to_numpy(block(*arguments)), expected) < 5e-6


@pytest.mark.parametrize(
    ("ffn_type", "expansion", "size"),
    [("standard", None, 48), ("gated", None, 32), ("standard", 1.5, 18), ("gated", 4, 48)],
)
def test_inner_size(ffn_type, expansion, size, x):
    block = TransformerBlock(3, ffn_type=ffn_type, ffn_expansion=expansion)
    block.build(x.shape)
    assert block.feed_forward.inner_size == size


def test_attention_options_reach_attention(x):
    block = TransformerBlock(
        4, key_dim=5, num_kv_heads=2, normalizer="softpick", sliding_window=3, qk_norm=True,
        use_bias=False, cross_attention=True,
    )  # fmt: skip
    block.build(x.shape, x.shape)
    for attention, window in ((block.attention, 3), (block.context_attention, None)):
        assert (attention.num_heads, attention.key_dim, attention.num_kv_heads) == (4, 5, 2)
        assert type(attention.normalizer) is layers.Softpick
        assert attention.qk_norm
        assert not attention.use_bias
        assert attention.sliding_window == window
    assert not block.feed_forward.use_bias


def test_dropout_is_on_the_output_of_each_part(x):
    """With both parts' outputs dropped whole, only the residual is left."""
    block = TransformerBlock(3, dropout=0.999999)
    np.testing.assert_array_equal(to_numpy(block(x, training=True)), x)
    assert relative_error(to_numpy(block(x, training=False)), x) > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_causal(causal, x):
    block = TransformerBlock(3, causal=causal)
    before = to_numpy(block(x))
    changed = x.copy()
    changed[:, 3:] += 1.0
    after = to_numpy(block(changed))
    assert np.array_equal(before[:, :3], after[:, :3]) == causal


@pytest.mark.parametrize("how", ["attached", "mask", "inputs_mask"])
@pytest.mark.parametrize("cross", [False, True])
def test_padding_is_invisible(cross, how, x, context):
    mask = np.arange(5) < np.array([[3], [5]])
    context_mask = np.arange(7) >= np.array([[4], [1]])
    x[~mask], context[~context_mask] = 0, 0
    block = TransformerBlock(3, cross_attention=cross)
    extra = {"context": context, "context_mask": context_mask} if cross else {}
    if how == "attached":
        out = block(keras.layers.Masking()(keras.ops.convert_to_tensor(x)), **extra)
        np.testing.assert_array_equal(to_numpy(out._keras_mask), mask)
    else:
        out = block(x, **{how: mask}, **extra)
    short = {"context": context[:1, 4:]} if cross else {}
    expected = to_numpy(block(x[:1, :3], **short))
    np.testing.assert_allclose(to_numpy(out)[:1, :3], expected, rtol=1e-5, atol=1e-6)


def test_attention_mask(x, rng):
    mask = np.tril(np.ones((5, 5), bool))
    block = TransformerBlock(3)
    causal = TransformerBlock.from_config({**block.get_config(), "causal": True})
    first = to_numpy(block(x, attention_mask=mask[None]))
    causal.build(x.shape)
    causal.set_weights(block.get_weights())
    np.testing.assert_allclose(first, to_numpy(causal(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [layers.LastTimestep, layers.MeanPool])
def test_pooling(layer, x):
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    kept = x[0][mask[0]].astype("float64")
    expected = kept[-1] if layer is layers.LastTimestep else kept.mean(0)
    actual = to_numpy(layer()(x, mask=mask))
    np.testing.assert_allclose(actual[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(actual[1], np.zeros(12))
    unmasked = x[:, -1] if layer is layers.LastTimestep else x.mean(1)
    np.testing.assert_allclose(to_numpy(layer()(x)), unmasked, rtol=1e-5, atol=1e-6)


ERRORS = [
    (lambda x: TransformerBlock(5)(x), "`num_heads` must divide the last dimension.*5.*12"),
    (lambda x: TransformerBlock(0), "`num_heads` must be a positive integer.*0"),
    (lambda x: TransformerBlock(3, norm="batch_norm"), "`norm` must be one of.*'batch_norm'"),
    (lambda x: TransformerBlock(3, norm_position="mid"), "`norm_position` must be.*'mid'"),
    (lambda x: TransformerBlock(3, ffn_type="moe"), "`ffn_type` must be one of.*'moe'"),
    (lambda x: TransformerBlock(3, ffn_expansion=0), "`ffn_expansion` must be a positive.*0"),
    (lambda x: TransformerBlock(3, dropout=-0.1), r"`dropout` must be a number in \[0, 1\).*-0.1"),
    (lambda x: TransformerBlock(3, normalizer="max"), "`normalizer` must be one of.*'max'"),
    (lambda x: TransformerBlock(3)(x, x), "`context` goes with `cross_attention=True`.*False"),
    (lambda x: TransformerBlock(3, cross_attention=True)(x), "`context` goes with.*True.*None"),
    (lambda x: TransformerBlock(3, num_kv_heads=2), "`num_kv_heads` must divide `num_heads`"),
    (lambda x: TransformerBlock(3, sliding_window=0), "`sliding_window` must be a positive.*0"),
    (lambda x: TransformerBlock(3, ffn_expansion="big"), "`ffn_expansion` must be.*'big'"),
    (lambda x: TransformerBlock(3, ffn_expansion=float("inf")), "`ffn_expansion` must be.*inf"),
    (lambda x: TransformerBlock(3, ffn_expansion=1e-3)(x), "`ffn_expansion` times the last.*0.001"),
    (lambda x: TransformerBlock(3, activation="gleu"), "activation function identifier: gleu"),
    (
        lambda x: TransformerBlock(3, normalizer=layers.SSMax(axis=1)),
        "`normalizer` must have axis=-1.*axis=1",
    ),
    (lambda x: FeedForward(4, gated="no"), "`gated` must be True or False.*'no'"),
    (lambda x: FeedForward(4, use_bias=None), "`use_bias` must be True or False.*None"),
    (
        lambda x: TransformerBlock(3, cross_attention=2),
        "`cross_attention` must be True or False.*2",
    ),
    (lambda x: FeedForward(0), "`inner_size` must be a positive integer.*0"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS, ids=[e[1] for e in ERRORS])
def test_errors(call, match, x):
    with pytest.raises(ValueError, match=match):
        call(x)


# Options of published models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offset_rms_norm(x, dtype):
    block = TransformerBlock(3, norm="offset_rms_norm", norm_epsilon=0.3, dtype=dtype)
    block.build(x.shape)
    norm = block.attention_norm
    scale = np.linspace(-0.5, 0.5, 12).astype("float32")
    norm.scale.assign(scale)
    x = to_numpy(keras.ops.cast(x, dtype)).astype("float64")
    scale = to_numpy(norm.scale).astype("float64")
    expected = (1 + scale) * x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.3)
    tolerance = 1e-6 if dtype == "float32" else 2.0**-8
    assert relative_error(to_numpy(norm(x)), expected) < tolerance


def test_gelu_by_a_tanh(x):
    layer = FeedForward(20, gated=True, activation="gelu_tanh")
    layer.build(x.shape)
    gate = dense(layer.gate, x)
    gate = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
    expected = dense(layer.down, gate * dense(layer.up, x))
    assert relative_error(to_numpy(layer(x)), expected) < 1e-5
    assert FeedForward.from_config(layer.get_config()).activation is layer.activation


@pytest.mark.parametrize("names", [("query", "key", "value"), "gate", ["feed_forward"], ()])
def test_biases_by_name(names, x):
    block = TransformerBlock(3, use_bias=names, use_gate=True, ffn_type="gated")
    block.build(x.shape)
    names = (names,) if isinstance(names, str) else names
    found = {w.path.split("/")[-2:][0] for w in block.weights if w.name == "bias"}
    feed_forward = {"gate", "up", "down"} if "feed_forward" in names else set()
    assert found == {*names} - {"feed_forward"} | feed_forward


@pytest.mark.parametrize("epsilon", [None, 0.25])
def test_epsilon_of_every_norm(epsilon, x):
    block = TransformerBlock(3, norm="rms_norm", qk_norm=True, norm_epsilon=epsilon)
    block.build(x.shape)
    inner = block.attention
    norms = (block.attention_norm, block.feed_forward_norm, inner.query_norm, inner.key_norm)
    expected = [1e-5, 1e-5, 1e-6, 1e-6] if epsilon is None else [0.25] * 4
    assert [norm.epsilon for norm in norms] == expected
