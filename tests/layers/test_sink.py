"""`SinkSoftmax` in attention: with a length scale, a cache, recorded, and in files."""

import functools

import keras
import numpy as np
import pytest
from support import oracle
from support.cases import attention_model, randomize
from support.helpers import compiled, relative_error, to_numpy

from keras_ssattn import analysis
from keras_ssattn.layers import LogLengthScale, MultiHeadAttention, SinkSoftmax, TransformerBlock


@pytest.fixture
def x(rng):
    return rng.normal(size=(2, 6, 8)).astype("float32")


def attention(x, **options):
    """A layer of four heads, with other sinks and scales for each."""
    normalizer = SinkSoftmax(init_sink=0.3, length_scale=LogLengthScale(init_s=0.6))
    layer = MultiHeadAttention(4, 3, num_kv_heads=2, normalizer=normalizer, **options)
    layer.build(x.shape, x.shape)
    return randomize(layer)


def test_grouped_heads_and_a_length_scale_equal_the_oracle(x):
    layer = attention(x, use_bias=False)
    kernels = [to_numpy(p.kernel).astype("float64") for p in layer.projections()]
    assert layer.normalizer.sink.shape == layer.normalizer.length_scale.s.shape == (4,)
    query, key, value = (np.einsum("bte,ehd->bthd", x, kernel) for kernel in kernels[:3])
    padding = np.arange(6) < np.array([[4], [6]])
    heads, weights = oracle.attention(
        query, key, value, "sink_softmax", length_scaled=True, causal=True, key_mask=padding,
        s=to_numpy(layer.normalizer.length_scale.s), sink=to_numpy(layer.normalizer.sink),
        return_weights=True,
    )  # fmt: skip
    expected = np.einsum("bthd,hde->bte", heads, kernels[3])
    options = {"use_causal_mask": True, "value_mask": padding}
    found, scores = layer(x, x, return_attention_scores=True, **options)
    assert relative_error(to_numpy(scores), weights) < 2e-6
    for output in (found, layer(x, x, **options)):
        assert relative_error(to_numpy(output), expected) < 2e-6


def test_a_cache_gives_what_the_whole_pass_does(x):
    layer = attention(x)
    attend = functools.partial(layer, use_causal_mask=True)
    expected = to_numpy(compiled(attend)(x, x))
    cache, found = layer.make_cache(2, 8), []
    for part in (slice(0, 4), slice(4, 6)):
        step = compiled(functools.partial(attend, cache_index=part.start))
        y, cache = step(x[:, part], x[:, part], cache=cache)
        found.append(to_numpy(y))
    assert relative_error(np.concatenate(found, 1), expected) < 2e-6


def test_recorded_weights_and_the_share_of_the_sink_sum_to_one(x):
    block = TransformerBlock(2, normalizer=SinkSoftmax(init_sink=0.5), causal=True, name="block")
    block.build(x.shape)
    randomize(block)
    inputs = keras.Input(x.shape[1:])
    weights, mask = analysis.record(keras.Model(inputs, block(inputs)), x).attention["block"]
    normalized = block.attention_norm(x)
    query, key = (
        to_numpy(dense(normalized))
        for dense in (block.attention.query_dense, block.attention.key_dense)
    )
    logits = np.einsum("bthd,bshd->bhts", query, key, dtype="float64") / np.sqrt(4)
    sink = to_numpy(block.attention.normalizer.sink)[:, None]
    total = np.exp(sink) + np.where(mask, np.exp(logits), 0).sum(-1)
    share = np.exp(sink) / total
    np.testing.assert_allclose(weights.sum(-1) + share, np.ones_like(share), rtol=1e-5)
    assert share.min() > 0.01


def test_a_sink_that_is_frozen_stays():
    model = attention_model("sink_softmax")
    layer = model.get_layer("attention").normalizer
    assert [w.name for w in layer.trainable_weights] == ["sink"]
    frozen = SinkSoftmax(init_sink=0.5, trainable=False)
    frozen.build((2, 3))
    assert frozen.trainable_weights == []
    np.testing.assert_allclose(to_numpy(frozen.sink), 0.5)


@pytest.mark.parametrize("init_sink", [float("nan"), float("inf"), "0", None, True])
def test_an_initial_sink_that_is_no_number_is_refused(init_sink):
    with pytest.raises(ValueError, match="`init_sink` must be a finite number.*Received"):
        SinkSoftmax(init_sink=init_sink)


def test_tiles_take_the_sink_of_an_eager_layer(x):
    """TensorFlow's gradient of their own wants no variable that it is not given."""
    layer = attention(x, implementation="tiled")
    expected, _ = layer(x, x, use_causal_mask=True, return_attention_scores=True)
    found = layer(x, x, use_causal_mask=True)
    assert relative_error(to_numpy(found), to_numpy(expected)) < 2e-6
