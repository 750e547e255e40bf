"""Large windows, large ids, positions near 2^31 and the integers of NumPy."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from support import TESTS, oracle
from support.helpers import relative_error, to_numpy

import keras_ssattn
from keras_ssattn import layers, models, ops

BATCH, LENGTH, KEYS = 2, 6, 7
END = 2**31  # the first position that int32 cannot hold
WINDOWS = [sys.maxsize, 2**31, 2**31 - 1, 2**31 - 2, 2**30]


def arrays(rng, length=LENGTH, keys=KEYS):
    shapes = ((BATCH, length, 2, 4), (BATCH, keys, 2, 4), (BATCH, keys, 2, 3))
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


# Windows


OFFSETS = {
    "none": 0,
    "far": 2**30,
    "near the end": END - 2 * LENGTH,
    "per row": np.array([3, END - 2 * LENGTH]),
    "per row, far": np.array([2**30 - 1, 2**30 + 5]),
}


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_counts_and_masks_of_large_windows(window, causal, offset):
    case = {"window": window, "causal": causal, "query_offset": offset}
    expected = oracle.visible(LENGTH, KEYS, BATCH, **case)
    count = to_numpy(ops.key_count(LENGTH, KEYS, **case))
    np.testing.assert_array_equal(np.broadcast_to(count, (BATCH, 1, LENGTH)), expected.sum(-1))
    visible = ops.visible_keys(LENGTH, KEYS, **case)
    visible = True if visible is None else to_numpy(visible)
    np.testing.assert_array_equal(np.broadcast_to(visible, expected.shape), expected)


@pytest.mark.parametrize(
    ("window", "offset"),
    [(2**31 - 1, "near the end"), (2**31 - 2, "per row"), (2**30, "per row, far")],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["dense", "tiled"])
def test_attention_with_large_windows(
    window, implementation, causal, offset, rng, monkeypatch
):  # fmt: skip
    monkeypatch.setattr("keras_ssattn.ops._attention.tiled.band.QUERY_TILE", 4)
    monkeypatch.setattr("keras_ssattn.ops._attention.tiled.band.KEY_TILE", 3)
    inputs = arrays(rng)
    case = {"window": window, "causal": causal, "query_offset": OFFSETS[offset]}
    expected = oracle.attention(*inputs, "ssmax", **case)
    found = ops.attention(*inputs, "ssmax", implementation=implementation, **case)
    assert relative_error(to_numpy(found), expected) < 2e-6


def test_a_large_window_of_a_layer_hides_nothing(rng):
    x = rng.normal(size=(BATCH, LENGTH, 5)).astype("float32")
    layer = layers.MultiHeadAttention(2, 3, sliding_window=sys.maxsize)
    plain = layers.MultiHeadAttention(2, 3)
    for one in (layer, plain):
        one.build(x.shape, x.shape)
    plain.set_weights(layer.get_weights())
    found, expected = (to_numpy(one(x, x, use_causal_mask=True)) for one in (layer, plain))
    np.testing.assert_array_equal(found, expected)


def test_a_large_window_of_a_language_model_hides_nothing():
    model, plain = (models.CausalLM(9, 8, 1, 2, sliding_window=w) for w in (2**31, None))
    plain.set_weights(model.get_weights())
    prompts = [[1, 2, 3, 4], [5]]
    np.testing.assert_array_equal(model.generate(prompts, 3), plain.generate(prompts, 3))
    text = np.array([[1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(to_numpy(model(text)), to_numpy(plain(text)))


# Positions beyond int32


BEYOND = {
    "integer": END - 3,
    "NumPy integer": np.int64(END - 3),
    "far integer": 2**33,
    "array": np.array([0, END - 3]),
    "far array": np.array([0, 2**33]),
    "far negative array": np.array([0, -(2**33)]),
    "list": [0, END - 3],
}


@pytest.mark.parametrize("offset", BEYOND.values(), ids=BEYOND)
def test_positions_of_queries_beyond_int32_are_refused(offset, rng):
    with pytest.raises(ValueError, match=r"`query_offset` must.*2\^31"):
        ops.key_count(LENGTH, KEYS, causal=True, query_offset=offset)
    with pytest.raises(ValueError, match=r"`query_offset` must.*2\^31"):
        ops.attention(*arrays(rng), causal=True, query_offset=offset)


@pytest.mark.parametrize("offset", [END - 6, np.int64(END - 6), np.array([END - 6, 0])], ids=str)
def test_the_last_position_of_int32_is_one(offset):
    n = to_numpy(ops.key_count(LENGTH, KEYS, causal=True, query_offset=offset))
    expected = oracle.visible(LENGTH, KEYS, BATCH, causal=True, query_offset=offset).sum(-1)
    np.testing.assert_array_equal(np.broadcast_to(n, expected.shape), expected)


# Indices of caches


def step(length=3):
    return np.ones((BATCH, length, 1, 2), "float32")


FULL = [6, np.int64(6), np.int32(6), np.uint8(6), np.array(6)]


@pytest.mark.parametrize("index", FULL, ids=[type(x).__name__ for x in FULL])
def test_an_index_without_room_is_refused(index):
    cache = ops.make_cache(BATCH, 8, 1, 2)
    with pytest.raises(ValueError, match="`index` must leave room for 3 positions in a cache of 8"):
        ops.update_cache(cache, index, step(), step())


@pytest.mark.parametrize("index", [np.int64(5), np.int32(5), np.uint8(5), np.array(5)], ids=repr)
def test_an_index_with_room_is_where_it_is_written(index):
    cache = ops.update_cache(ops.make_cache(BATCH, 8, 1, 2), index, step(), step())
    for x in (cache.key, cache.value):
        np.testing.assert_array_equal(to_numpy(x)[0, :, 0, 0], [0] * 5 + [1] * 3)


@pytest.mark.parametrize("index", [np.int64(2**33), np.array([0, 2**33])], ids=repr)
def test_an_index_beyond_int32_is_refused(index):
    cache = ops.make_cache(BATCH, 8, 1, 2)
    with pytest.raises(ValueError, match="`index` must"):
        ops.update_cache(cache, index, step(), step())


@pytest.mark.parametrize("cls", [layers.MultiHeadAttention, layers.TransformerBlock])
@pytest.mark.parametrize("index", [4, np.int64(4), np.int32(4)], ids=repr)
def test_an_index_without_room_is_refused_by_layers(index, cls, rng):
    """Though Keras makes a tensor of an integer of NumPy, which cannot be compared in a trace."""
    x = rng.normal(size=(BATCH, 5, 4)).astype("float32")
    layer = cls(2, 3, **({"causal": True} if cls is layers.TransformerBlock else {}))
    layer.build(*[x.shape] * (2 if cls is layers.MultiHeadAttention else 1))
    inputs = (x, x) if cls is layers.MultiHeadAttention else (x,)
    options = {"use_causal_mask": True} if cls is layers.MultiHeadAttention else {}
    cache = layer.make_cache(BATCH, 8)
    fits = layer(*inputs, cache=cache, cache_index=type(index)(3), **options)[-1]
    assert (to_numpy(fits.key)[:, 3:] != 0).all()
    with pytest.raises(ValueError, match="`index` must leave room for 5 positions in a cache of 8"):
        layer(*inputs, cache=cache, cache_index=index, **options)


def test_a_numpy_index_of_zero_goes_without_a_cache(rng):
    x = rng.normal(size=(BATCH, 5, 4)).astype("float32")
    layer = layers.MultiHeadAttention(2, 3)
    expected = to_numpy(layer(x, x))
    np.testing.assert_array_equal(to_numpy(layer(x, x, cache_index=np.int64(0))), expected)


# Integers of NumPy as options


def test_lengths_and_sizes_may_be_numpy_integers():
    n = to_numpy(ops.key_count(np.int64(4), np.int32(5), causal=True, window=np.uint8(2)))
    np.testing.assert_array_equal(n, [[[1, 2, 2, 2]]])
    cache = ops.make_cache(np.int64(2), np.int64(8), np.int64(1), np.int64(3), np.int64(5))
    assert tuple(cache.value.shape) == (2, 8, 1, 5)


def test_models_of_numpy_integers(tmp_path):
    one, two, eight = np.int64(1), np.int32(2), np.int64(8)
    model = models.CausalLM(
        eight, eight, one, two, num_kv_heads=one, sliding_window=two, padding_id=np.int64(0)
    )
    integers = [v for v in model.get_config().values() if isinstance(v, np.generic)]
    assert not integers
    options = {"temperature": 1.0, "top_k": two, "seed": one, "stop_tokens": [np.int64(5)]}
    new = model.generate([[1, 2]], two, **options)
    np.testing.assert_array_equal(
        new, model.generate([[1, 2]], 2, temperature=1.0, top_k=2, seed=1, stop_tokens=[5])
    )
    model.save(tmp_path / "model.keras")
    keras.saving.load_model(tmp_path / "model.keras")


def test_build_of_numpy_integers(tmp_path):
    model = keras_ssattn.build(
        np.int64(4), np.int64(8), np.int64(2), np.int64(1), window_size=np.int64(5)
    )
    assert model.output_shape == (None, 8)
    assert type(keras_ssattn.output_size(np.int64(8))) is int
    model.save(tmp_path / "model.keras")
    keras.saving.load_model(tmp_path / "model.keras")


# Ids of segments


WIDE = np.array([[1, 1 + 2**32, 1, 1, 2], [0, 0, 0, 2**40, 2**40]])
NARROW = np.array([[0, 1, 0, 0, 2], [0, 0, 0, 1, 1]])


def test_ids_that_differ_above_32_bits_stay_apart(rng):
    expected = oracle.visible(5, 5, BATCH, segment_ids=(WIDE, WIDE))
    found = to_numpy(ops.visible_keys(5, 5, segment_ids=WIDE))
    np.testing.assert_array_equal(found, expected)
    n = to_numpy(ops.key_count(5, 5, segment_ids=WIDE, causal=True))
    expected = oracle.visible(5, 5, BATCH, segment_ids=(WIDE, WIDE), causal=True)
    np.testing.assert_array_equal(n, expected.sum(-1))
    inputs = arrays(rng, 5, 5)
    expected = oracle.attention(*inputs, "ssmax", segment_ids=(WIDE, WIDE))
    for implementation in ("dense", "tiled"):
        found = ops.attention(*inputs, "ssmax", segment_ids=WIDE, implementation=implementation)
        assert relative_error(to_numpy(found), expected) < 2e-6
    pair = (WIDE, WIDE[:, ::-1])
    expected = oracle.attention(*inputs, "ssmax", segment_ids=pair)
    found = ops.attention(*inputs, "ssmax", segment_ids=(pair[0], pair[1].copy()))
    assert relative_error(to_numpy(found), expected) < 2e-6


@pytest.mark.parametrize("kind", ["attention", "block", "language model"])
def test_such_ids_stay_apart_in_layers(kind, rng):
    x = rng.normal(size=(BATCH, 5, 4)).astype("float32")
    if kind == "attention":
        layer, inputs = layers.MultiHeadAttention(2, 3), (x, x)
    elif kind == "block":
        layer, inputs = layers.TransformerBlock(2), (x,)
    else:
        layer, inputs = models.CausalLM(9, 4, 1, 2), (rng.integers(0, 9, (BATCH, 5)),)
    found = to_numpy(layer(*inputs, segment_ids=WIDE))
    expected = to_numpy(layer(*inputs, segment_ids=NARROW))
    np.testing.assert_array_equal(found, expected)
    if kind == "language model":
        found = to_numpy(layer(*inputs, None, WIDE))  # by position
        np.testing.assert_array_equal(found, expected)
    merged = to_numpy(layer(*inputs, segment_ids=(WIDE % 2**32).astype("int32")))
    assert np.abs(found - merged).max() > 1e-6


def test_unsigned_and_signed_ids_are_compared_exactly():
    """NumPy joins uint64 and int64 as float64, in which these ids are one."""
    ids = np.array([[2**53, 2**53 + 1]])
    found = to_numpy(ops.visible_keys(2, 2, segment_ids=(ids.astype("uint64"), ids)))
    np.testing.assert_array_equal(found[0, 0], np.eye(2, dtype=bool))


def test_wide_ids_beside_a_tensor_are_kept_or_refused():
    """JAX has no 64 bits for them."""
    pair = (WIDE, keras.ops.convert_to_tensor(NARROW.astype("int32")))
    if keras.backend.backend() == "jax":
        with pytest.raises(ValueError, match="`segment_ids` must fit in 32 bits"):
            ops.visible_keys(5, 5, segment_ids=pair)
    else:
        found = to_numpy(ops.visible_keys(5, 5, segment_ids=pair))
        np.testing.assert_array_equal(found, oracle.visible(5, 5, 2, segment_ids=(WIDE, NARROW)))


@pytest.mark.parametrize("name", ["positions", "offset"])
def test_positions_of_a_rotary_layer_beyond_int32_are_refused(name):
    rotary, x = layers.RotaryEmbedding(), np.ones((1, 1, 1, 4), "float32")
    with pytest.raises(ValueError, match=f"`{name}` must leave all positions below 2"):
        rotary(x, **{name: np.array([2**31])})


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_numbers_beyond_all_floats_are_refused_like_infinity(value):
    with pytest.raises(ValueError, match="`init_s` must be a finite number"):
        layers.SSMax(init_s=value)


# 64 bits on JAX

X64 = """
import keras, numpy as np
from keras_ssattn import layers, models, ops
from support import oracle

keras.utils.set_random_seed(0)  # no stop token is drawn
model = models.CausalLM(20, 8, 1, 2, sliding_window=2, padding_id=0, normalizer="softpick")
prompts = [[1, 2, 3], [4]]
options = {"temperature": 0.8, "top_k": 3, "top_p": 0.9, "seed": 1, "stop_tokens": [7]}
assert [len(x) for x in model.generate(prompts, 2, **options)] == [2, 2]

cache, one = ops.make_cache(2, 8, 1, 2), np.ones((2, 1, 1, 2), "float32")
for index in (3, np.int64(3), np.array(3), keras.ops.convert_to_tensor(3), np.array([1, 2])):
    rows = np.broadcast_to(np.asarray(index), (2,))
    found = np.asarray(ops.update_cache(cache, index, one, one).key)[..., 0, 0]
    np.testing.assert_array_equal(found, np.arange(8) == rows[:, None])

rng = np.random.default_rng(0)
x = rng.normal(size=(2, 5, 8)).astype("float32")
layer = layers.MultiHeadAttention(2, 4)
expected = np.asarray(layer(x, x, use_causal_mask=True))
for kind in (int, lambda i: keras.ops.convert_to_tensor(i), lambda i: np.array([i, i])):
    held, found = layer.make_cache(2, 8), []
    for i in range(5):
        part = x[:, i : i + 1]
        y, held = layer(part, part, use_causal_mask=True, cache=held, cache_index=kind(i))
        found.append(np.asarray(y))
    np.testing.assert_allclose(np.concatenate(found, 1), expected, rtol=1e-5, atol=1e-6)

q = rng.normal(size=(1, 40, 2, 4))
found = ops.attention(q, q, q, "ssmax", causal=True, window=7, implementation="tiled")
assert found.dtype == "float64"
expected = oracle.attention(q, q, q, "ssmax", causal=True, window=7)
np.testing.assert_allclose(found, expected, rtol=1e-12)
ids = np.array([[1, 1 + 2**40, 1]])
np.testing.assert_array_equal(ops.key_count(3, 3, segment_ids=ids), [[[2, 1, 2]]])
assert ops.key_count(3, 3, segment_ids=ids).dtype == "int32"
print("done")
"""


@pytest.mark.backend("jax")
def test_generation_caches_and_tiles_in_64_bits_of_jax():
    env = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", X64]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
