"""Decoding with a cache gives what a pass over everything gives."""

import keras
import numpy as np
import pytest
from support.helpers import relative_error, to_numpy

from keras_ssattn import ops
from keras_ssattn.layers import (
    LogLengthScale,
    MultiHeadAttention,
    QueryAwareScale,
    RotaryEmbedding,
    Softmax,
    Softpick,
    SSMax,
    TransformerBlock,
)
from keras_ssattn.ops.cache import Carried, write_cache

NORMALIZERS = {
    "softmax": "softmax",
    "ssmax": SSMax(init_s=0.6, use_bias=True),
    "softpick": "softpick",
    "rectified_softpick": "rectified_softpick",
    "scalable softpick": Softpick(length_scale=LogLengthScale(init_s=0.5)),
}
BATCH, LENGTH, FEATURES, SIZE = 2, 9, 8, 12


@pytest.fixture
def x(rng):
    return rng.normal(size=(BATCH, LENGTH, FEATURES)).astype("float32")


@pytest.fixture(params=NORMALIZERS)
def block(request):
    return TransformerBlock(
        4,
        num_kv_heads=2,
        normalizer=NORMALIZERS[request.param],
        causal=True,
        rotary=RotaryEmbedding(),
        qk_norm=True,
    )


def decode(block, x, steps, mask=None, index=0):
    """The outputs of consecutive stretches of x, each through the cache of those before."""
    cache, outputs = block.make_cache(BATCH, SIZE), []
    start = 0
    for step in steps:
        part = slice(start, start + step)
        out, cache = block(
            x[:, part],
            mask=None if mask is None else mask[:, part],
            cache=cache,
            cache_index=index + start,
        )
        outputs.append(to_numpy(out))
        start += step
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("steps", [(9,), (1,) * 9, (5, 1, 1, 1, 1), (3, 4, 2)], ids=str)
def test_every_way_to_cut_it(steps, block, x):
    full = to_numpy(block(x))
    assert relative_error(decode(block, x, steps), full) < 2e-6


def test_left_padding(block, x):
    mask = np.arange(LENGTH) >= np.array([[3], [0]])
    full = to_numpy(block(x, mask=mask))
    cached = decode(block, x, (5, 1, 1, 2), mask)
    np.testing.assert_allclose(cached[mask], full[mask], rtol=1e-5, atol=1e-6)


def test_right_padded_prompts_go_on_at_their_own_positions(block, x):
    """Row 0 has a prompt of 3, row 1 of 5; each then decodes 3 steps from where it ended."""
    full = to_numpy(block(x))
    lengths, prompt = np.array([3, 5], "int32"), 5
    out, cache = block(
        x[:, :prompt],
        mask=np.arange(prompt) < lengths[:, None],
        cache=block.make_cache(BATCH, SIZE),
        cache_index=0,
    )
    out = to_numpy(out)
    np.testing.assert_allclose(out[0, :3], full[0, :3], rtol=1e-5, atol=1e-6)
    for _ in range(3):
        step = x[np.arange(BATCH), lengths][:, None]
        out, cache = block(step, cache=cache, cache_index=lengths)
        expected = full[np.arange(BATCH), lengths][:, None]
        np.testing.assert_allclose(to_numpy(out), expected, rtol=1e-5, atol=2e-6)
        lengths = lengths + 1


def test_sliding_window(x):
    block = TransformerBlock(2, normalizer="ssmax", causal=True, sliding_window=3)
    full = to_numpy(block(x))
    assert relative_error(decode(block, x, (4, 1, 1, 1, 1, 1)), full) < 2e-6


def test_weights_are_over_the_cache(x):
    layer = MultiHeadAttention(2, 3, value_dim=5)
    layer.build(x.shape, x.shape)
    _, scores, cache = layer(
        x, x, use_causal_mask=True, return_attention_scores=True,
        cache=layer.make_cache(BATCH, SIZE), cache_index=2,
    )  # fmt: skip
    assert tuple(scores.shape) == (BATCH, 2, LENGTH, SIZE)
    assert tuple(cache.value.shape) == (BATCH, SIZE, 2, 5)
    seen = np.arange(SIZE) <= np.arange(LENGTH)[:, None] + 2
    assert ((to_numpy(scores) > 0) == seen).all()


def test_compiled_step_serves_every_index(x):
    layer = MultiHeadAttention(2, 4, normalizer="ssmax")
    full = to_numpy(layer(x, x, use_causal_mask=True))

    def step(token, key, value, mask, index):
        out, cache = layer(
            token, token, use_causal_mask=True, cache=(key, value, mask), cache_index=index
        )
        return out, *cache

    if keras.backend.backend() == "jax":
        import jax

        step = jax.jit(step)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        step = tf.function(step, jit_compile=True)
    cache = layer.make_cache(BATCH, SIZE)
    for i in range(LENGTH):
        index = keras.ops.convert_to_tensor(i, "int32")
        out, *cache = step(keras.ops.convert_to_tensor(x[:, i : i + 1]), *cache, index)
        np.testing.assert_allclose(to_numpy(out)[:, 0], full[:, i], rtol=1e-5, atol=2e-6)
    if keras.backend.backend() == "tensorflow":
        assert step.experimental_get_tracing_count() == 1


def test_symbolic_shapes():
    layer = MultiHeadAttention(2, 4)
    cache = [keras.Input((SIZE, 2, 4)), keras.Input((SIZE, 2, 4)), keras.Input((SIZE,), dtype=bool)]
    token = keras.Input((1, FEATURES))
    out, new = layer(token, token, use_causal_mask=True, cache=cache)
    assert out.shape == (None, 1, FEATURES)
    assert [x.shape for x in new] == [x.shape for x in cache]


def test_symbolic_block():
    block = TransformerBlock(2, causal=True, rotary=RotaryEmbedding())
    token = keras.Input((1, FEATURES))
    cache = [keras.Input((SIZE, 2, 4)), keras.Input((SIZE, 2, 4)), keras.Input((SIZE,), dtype=bool)]
    out, new = block(token, cache=cache)
    assert out.shape == (None, 1, FEATURES)
    assert len(new) == 3


def test_attention_mask_is_over_the_cache(x):
    layer = MultiHeadAttention(2, 4)
    layer.build(x.shape, x.shape)
    mask = np.arange(SIZE) != 3
    _, scores, _ = layer(
        x, x, use_causal_mask=True, cache=layer.make_cache(BATCH, SIZE),
        attention_mask=np.broadcast_to(mask, (BATCH, LENGTH, SIZE)), return_attention_scores=True,
    )  # fmt: skip
    assert (to_numpy(scores)[..., 3] == 0).all()


@pytest.mark.parametrize("cls", [MultiHeadAttention, TransformerBlock])
def test_rotary_layer_has_the_dtype_of_attention_and_quantizes(cls):
    options = {"rotary": RotaryEmbedding(), "dtype": "mixed_bfloat16"}
    layer = cls(2, 4, **options)
    inputs = keras.Input((LENGTH, FEATURES))
    model = keras.Model(
        inputs, layer(inputs, inputs) if cls is MultiHeadAttention else layer(inputs)
    )
    attention = layer if cls is MultiHeadAttention else layer.attention
    assert attention.rotary.compute_dtype == "bfloat16"
    model.quantize("int8")
    assert attention.query_dense.quantization_mode == "int8"


def test_half_precision_cache(x):
    layer = MultiHeadAttention(2, 4, dtype="mixed_bfloat16")
    layer.build(x.shape, x.shape)
    cache = layer.make_cache(BATCH, SIZE)
    assert keras.utils.standardize_dtype(cache.key.dtype) == "bfloat16"
    out, _ = layer(x, x, use_causal_mask=True, cache=cache)
    full = to_numpy(layer(x, x, use_causal_mask=True))
    assert relative_error(to_numpy(out), full) < 2e-2


def test_errors(x):
    layer = MultiHeadAttention(2, 4)
    layer.build(x.shape, x.shape)
    with pytest.raises(ValueError, match="`cache` goes with `use_causal_mask=True`"):
        layer(x, x, cache=layer.make_cache(BATCH, SIZE))
    with pytest.raises(ValueError, match="`index` must leave room for 9 positions in a cache of 4"):
        layer(x, x, use_causal_mask=True, cache=layer.make_cache(BATCH, 4))
    with pytest.raises(ValueError, match="`key` must be broadcastable to the cache's shape"):
        layer(x, x, use_causal_mask=True, cache=ops.make_cache(BATCH, SIZE, 3, 4))
    cache = ops.make_cache(BATCH, SIZE, 2, 4)
    with pytest.raises(ValueError, match="`index` must have rank 0 or 1"):
        ops.update_cache(cache, np.zeros((2, 1), "int32"), cache.key, cache.value)
    with pytest.raises(ValueError, match="`index` must leave room for 9.*index=4"):
        layer(x, x, use_causal_mask=True, cache=layer.make_cache(BATCH, SIZE), cache_index=4)
    with pytest.raises(TypeError, match="`index` must be an integer.*float32"):
        ops.update_cache(cache, 1.5, cache.key, cache.value)
    with pytest.raises(TypeError, match="`mask` must be a boolean mask.*float32"):
        ops.update_cache(cache, 0, cache.key, cache.value, np.ones((BATCH, SIZE), "float32"))
    with pytest.raises(ValueError, match="`cache_index` goes with `cache`"):
        layer(x, x, use_causal_mask=True, cache_index=5)
    with pytest.raises(ValueError, match="`rotary` must be a `RotaryEmbedding` layer.*'rope'"):
        MultiHeadAttention(2, 4, rotary="rope")


def test_query_aware_scale_starts_as_softmax_and_learns(x, rng):
    layer = MultiHeadAttention(2, 4, normalizer=Softmax(length_scale=QueryAwareScale(5)))
    plain = MultiHeadAttention(2, 4, normalizer="softmax")
    for one in (layer, plain):
        one.build(x.shape, x.shape)
    for name in ("query_dense", "key_dense", "value_dense", "output_dense"):
        getattr(plain, name).set_weights(getattr(layer, name).get_weights())
    out, expected = (to_numpy(one(x, x, use_causal_mask=True)) for one in (layer, plain))
    assert relative_error(out, expected) < 2e-6
    inputs = keras.Input((LENGTH, FEATURES))
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True))
    model.compile("adam", "mse")
    before = layer.normalizer.length_scale.get_weights()
    model.fit(x, rng.normal(size=x.shape), epochs=3, verbose=0)
    after = layer.normalizer.length_scale.get_weights()
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, after, strict=True))


def test_one_row_of_padding_serves_all_rows(x):
    layer = MultiHeadAttention(2, 4, normalizer="ssmax")
    mask = np.array([[False, True, True, True]])
    layer.build(x.shape, x.shape)
    outputs = []
    for rows in (mask, np.repeat(mask, BATCH, axis=0)):
        cache = layer.make_cache(BATCH, SIZE)
        options = {"use_causal_mask": True, "cache": cache, "cache_index": 0}
        y, cache = layer(x[:, :4], x[:, :4], value_mask=rows, **options)
        outputs.append((to_numpy(y), to_numpy(cache.mask)))
    assert outputs[0][1][:, 0].tolist() == [False] * BATCH
    np.testing.assert_array_equal(outputs[0][1], outputs[1][1])
    np.testing.assert_allclose(outputs[0][0], outputs[1][0], rtol=1e-6)


@pytest.mark.parametrize(("batch", "num_kv_heads"), [(2, 3), (1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("index", [0, 3, np.array(2), "per row"])
def test_a_carried_cache_is_the_same_cache(index, batch, num_kv_heads, rng):
    index = np.arange(batch) if isinstance(index, str) else index
    shapes = [(batch, 6, num_kv_heads, 4), (batch, 6, num_kv_heads, 5)]
    new = [rng.normal(size=(batch, 2, *shape[2:])).astype("float32") for shape in shapes]
    cache = ops.Cache(
        *(keras.ops.convert_to_tensor(rng.normal(size=x).astype("float32")) for x in shapes),
        keras.ops.ones((batch, 6), "bool"),
    )
    expected = ops.update_cache(cache, index, *new)
    carried = Carried.of(cache)
    count = batch * num_kv_heads
    assert tuple(carried.key.shape) == ((6, 4) if count == 1 else (count, 6, 4))
    for actual, tensor in zip(carried.cache(), cache, strict=True):
        np.testing.assert_array_equal(to_numpy(actual), to_numpy(tensor))
    if not isinstance(index, int):
        index = keras.ops.convert_to_tensor(index, "int32")
    written = write_cache(carried.cache(), index, *map(keras.ops.convert_to_tensor, new))
    for actual, tensor in zip(written, expected[:2], strict=True):
        np.testing.assert_array_equal(to_numpy(actual), to_numpy(tensor))


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_weights_and_sums_of_one_symbolic_query(num_kv_heads):
    query, key = keras.Input((1, 4, 16)), keras.Input((7, num_kv_heads, 16))
    assert ops.attention_weights(query, key, "softmax").shape == (None, 4, 1, 7)
    assert ops.combine(keras.Input((4, 1, 7)), key).shape == (None, 1, 4, 16)
