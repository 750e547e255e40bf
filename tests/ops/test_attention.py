"""`ops.attention` on every path against the oracle."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from support import oracle
from support.cases import NAMES, implementations
from support.helpers import gradients, relative_error, to_numpy

from keras_ssattn import ops
from keras_ssattn.ops._attention import choice

HALVES = ("bfloat16", "float16")

CASES = {
    "all": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": 2},
    "window": {"window": 2},
    "offset": {"causal": True, "query_offset": 3},
    "offset per row": {"causal": True, "query_offset": np.array([0, 4])},
    "left padding": {"causal": True, "key_mask": np.arange(7) >= np.array([[3], [0]])},
    "right padding": {"key_mask": np.arange(7) < np.array([[4], [7]])},
    "all padding": {"causal": True, "key_mask": np.arange(7) < np.array([[0], [7]])},
    "mask [T, S]": {"mask": np.arange(35).reshape(5, 7) % 3 == 0},
    "mask [B, H, T, 1]": {"mask": (np.arange(40) % 3 > 0).reshape(2, 4, 5, 1), "causal": True},
    "mask [B, 1, 1, S]": {"mask": (np.arange(14) % 3 > 0).reshape(2, 1, 1, 7)},
    "mask [B, 1, T, S]": {"mask": np.arange(70).reshape(2, 1, 5, 7) % 4 == 0},
    "mask [1, H, T, S]": {"mask": np.arange(140).reshape(1, 4, 5, 7) % 4 < 2, "causal": True},
    "everything": {
        "mask": np.arange(280).reshape(2, 4, 5, 7) % 7 < 5,
        "key_mask": np.arange(7) >= np.array([[2], [0]]),
        "causal": True,
        "window": 4,
        "query_offset": np.array([2, 0]),
    },
}


def inputs(rng, heads=4, kv_heads=4, length=5, key_length=7, size=8, value_size=3, batch=2):
    return [
        rng.normal(size=shape).astype("float32")
        for shape in (
            (batch, length, heads, size),
            (batch, key_length, kv_heads, size),
            (batch, key_length, kv_heads, value_size),
        )
    ]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """So that a few positions make several tiles."""
    monkeypatch.setattr("keras_ssattn.ops._attention.tiled.band.QUERY_TILE", 4)
    monkeypatch.setattr("keras_ssattn.ops._attention.tiled.band.KEY_TILE", 3)


def test_auto_is_fused_on_torch_only(backend, rng):
    q, k, v = inputs(rng)
    if "fused" in implementations("ssmax"):
        fused = ops.attention(q, k, v, "ssmax", implementation="fused")
        auto = ops.attention(q, k, v, "ssmax")
        np.testing.assert_array_equal(to_numpy(auto), to_numpy(fused))
    else:
        with pytest.raises(ValueError, match='implementation="fused" serves softmax.*torch'):
            ops.attention(q, k, v, "ssmax", window=2, implementation="fused")
    exact = [keras.ops.cast(x, "float64") for x in (q, k, v)]
    if keras.utils.standardize_dtype(exact[0].dtype) == "float64":
        with pytest.raises(ValueError, match='implementation="fused" serves.*float64'):
            ops.attention(*exact, "ssmax", implementation="fused")
    with pytest.raises(ValueError, match='implementation="fused" serves softmax.*softpick'):
        ops.attention(q, k, v, "softpick", implementation="fused")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("normalizer", NAMES)
def test_values_equal_oracle(normalizer, case, rng):
    q, k, v = inputs(rng)
    expected, weights = oracle.attention(q, k, v, normalizer, return_weights=True, **case)
    for implementation in implementations(normalizer):
        actual = ops.attention(q, k, v, normalizer, implementation=implementation, **case)
        assert relative_error(to_numpy(actual), expected) < 1e-6
    actual = to_numpy(ops.attention_weights(q, k, normalizer, **case))
    np.testing.assert_allclose(actual, weights, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["all", "causal", "all padding", "everything"])
@pytest.mark.parametrize("normalizer", NAMES)
def test_gradients_equal_finite_differences(normalizer, case, rng):
    case = {k: v[:, :2] if k == "mask" else v for k, v in CASES[case].items()}
    arrays = inputs(rng, heads=2, kv_heads=1, size=3, value_size=2)
    cotangent = rng.normal(size=(2, 5, 2, 2)).astype("float32")
    reference = functools.partial(oracle.attention, name=normalizer, **case)
    expected = oracle.finite_difference(reference, arrays, cotangent)
    for implementation in implementations(normalizer):
        function = functools.partial(
            ops.attention, normalizer=normalizer, implementation=implementation, **case
        )
        for a, e in zip(gradients(function, arrays, cotangent), expected, strict=True):
            assert relative_error(a, e) < 2e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("normalizer", NAMES)
def test_grouped_heads(normalizer, kv_heads, rng):
    q, k, v = inputs(rng, kv_heads=kv_heads)
    mask = rng.random((2, 4, 5, 7)) < 0.7
    expected = oracle.attention(q, k, v, normalizer, mask=mask)
    for implementation in implementations(normalizer):
        actual = ops.attention(q, k, v, normalizer, mask=mask, implementation=implementation)
        assert relative_error(to_numpy(actual), expected) < 1e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("normalizer", NAMES)
def test_masking_a_key_is_dropping_it(normalizer, case, rng):
    """One query at a time: its visible keys alone, with no mask at all, give the same."""
    q, k, v = inputs(rng)
    out = to_numpy(ops.attention(q, k, v, normalizer, **case))
    seen = oracle.visible(5, 7, 2, 4, **case)
    for b, h, i in [(0, 0, 0), (0, 3, 4), (1, 1, 2), (1, 2, 4)]:
        kept = seen[b, h, i]
        if not kept.any():
            assert (out[b, i, h] == 0).all()
            continue
        one = ops.attention(
            q[b : b + 1, i : i + 1, h : h + 1],
            k[b : b + 1, kept, h : h + 1],
            v[b : b + 1, kept, h : h + 1],
            normalizer,
        )
        np.testing.assert_allclose(out[b, i, h], to_numpy(one)[0, 0, 0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("normalizer", NAMES)
def test_what_is_masked_does_not_matter(normalizer, rng):
    q, k, v = inputs(rng)
    mask = np.arange(7) < np.array([[4], [7]])
    other_k, other_v = k.copy(), v.copy()
    other_k[0, 4:], other_v[0, 4:] = 1e4, -1e4
    for implementation in implementations(normalizer):
        run = functools.partial(
            ops.attention, normalizer=normalizer, key_mask=mask, implementation=implementation
        )
        np.testing.assert_array_equal(to_numpy(run(q, k, v)), to_numpy(run(q, other_k, other_v)))


@pytest.mark.parametrize("normalizer", NAMES)
def test_queries_without_a_key_are_zero_in_value_and_gradient(normalizer, rng):
    arrays = inputs(rng)
    key_mask = np.array([[False] * 7, [True] * 7])
    cotangent = rng.normal(size=(2, 5, 4, 3)).astype("float32")
    for implementation in implementations(normalizer):
        function = functools.partial(
            ops.attention,
            normalizer=normalizer,
            key_mask=key_mask,
            causal=True,
            implementation=implementation,
        )
        assert (to_numpy(function(*arrays))[0] == 0).all()
        for gradient in gradients(function, arrays, cotangent):
            assert (gradient[0] == 0).all()
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize("normalizer", NAMES)
def test_no_keys_at_all(normalizer, rng):
    q, k, v = inputs(rng, key_length=0)
    out = to_numpy(ops.attention(q, k, v, normalizer))
    np.testing.assert_array_equal(out, np.zeros((2, 5, 4, 3)))


def test_length_scale_times_any_normalizer(rng):
    """Scalable softpick is a composition: s log n on the query, then softpick."""
    q, k, v = inputs(rng)
    n = ops.key_count(5, 7, causal=True)
    s = np.array([[0.3], [-0.5], [0.0], [1.0]], "float32")
    for normalizer in ("softpick", "rectified_softpick", "ssmax"):
        actual = ops.attention(
            q, k, v, normalizer, causal=True, length_scale=ops.log_length_scale(n, s, 0.2)
        )
        expected = oracle.attention(
            q, k, v, normalizer, causal=True, length_scaled=True, s=s[:, 0], b=0.2
        )
        assert relative_error(to_numpy(actual), expected) < 1e-6


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int32"])
def test_length_scale_of_any_dtype(dtype, rng):
    q, k, v = inputs(rng)
    length_scale = keras.ops.cast(np.array([[1.0], [2.0], [3.0], [0.0]]), dtype)
    actual = ops.attention(q, k, v, "softpick", length_scale=length_scale)
    scaled = q * np.array([1.0, 2.0, 3.0, 0.0])[:, None]
    assert relative_error(to_numpy(actual), oracle.attention(scaled, k, v, "softpick")) < 1e-6


def test_scale_and_epsilon(rng):
    q, k, v = inputs(rng)
    actual = ops.attention(q, k, v, "rectified_softpick", scale=0.7, epsilon=0.5)
    expected = oracle.attention(q, k, v, "rectified_softpick", scale=0.7, epsilon=0.5)
    assert relative_error(to_numpy(actual), expected) < 1e-6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("normalizer", NAMES)
def test_half_precision(normalizer, dtype, rng):
    halves = [keras.ops.cast(x, dtype) for x in inputs(rng)]
    exact = [to_numpy(x) for x in halves]
    case = CASES["left padding"]
    expected = oracle.attention(*exact, normalizer, **case)
    for implementation in implementations(normalizer):
        actual = ops.attention(*halves, normalizer, implementation=implementation, **case)
        assert keras.utils.standardize_dtype(actual.dtype) == dtype
        # the dense path rounds only its result; the fused one its query and weights, too
        tolerance = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
        tolerance *= 1.0 if implementation == "dense" else 3.0
        assert relative_error(to_numpy(actual), expected) < tolerance


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("normalizer", NAMES)
def test_huge_logits_under_a_mask(normalizer, dtype, rng):
    """Logits far below any finite stand-in for -inf: the masked keys must still not win."""
    q, k, v = inputs(rng, heads=1, kv_heads=1, size=1)
    q, k = np.sign(q) * 200, -np.sign(q[:, :1]) * np.ones_like(k) * 200
    mask = np.arange(7) < np.array([[3], [5]])
    arrays = [keras.ops.cast(x, dtype) for x in (q, k, v)]
    expected = oracle.attention(*[to_numpy(x) for x in arrays], normalizer, key_mask=mask)
    for implementation in implementations(normalizer):
        function = functools.partial(
            ops.attention, normalizer=normalizer, key_mask=mask, implementation=implementation
        )
        tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
        assert relative_error(to_numpy(function(*arrays)), expected) < tolerance
        cotangent = np.ones((2, 5, 1, 3), "float32")
        assert all(np.isfinite(g).all() for g in gradients(function, arrays, cotangent))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("normalizer", NAMES)
def test_logits_of_1e30(normalizer, size, rng):
    """Even if a compiler does not round a product before it subtracts the maximum."""
    query = np.full((1, 5, 1, size), 1e15, "float32")
    key = query[:, :1] * np.array([1, 0.9, -0.5], "float32")[None, :, None, None]
    value = rng.normal(size=(1, 3, 1, 2)).astype("float32")
    expected = oracle.attention(query, key, value, normalizer)
    for implementation in implementations(normalizer):
        found = ops.attention(query, key, value, normalizer, implementation=implementation)
        assert relative_error(to_numpy(found), expected) < 2e-6


def test_symbolic_inputs(rng):
    arrays = inputs(rng)
    symbols = [keras.Input(x.shape[1:]) for x in arrays]
    model = keras.Model(symbols, ops.attention(*symbols, "ssmax", causal=True))
    expected = oracle.attention(*arrays, "ssmax", causal=True)
    assert relative_error(to_numpy(model(arrays)), expected) < 1e-6


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize("normalizer", NAMES)
@hypothesis.given(
    shape=st.sampled_from([(1, 1, 2, 1), (5, 7, 2, 2), (7, 5, 2, 1)]),
    key_mask=st.none() | hnp.arrays(bool, (2, 7)),
    mask=st.none() | hnp.arrays(bool, (2, 1, 7, 7)),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 8),
    offset=st.sampled_from([0, 2]),
    dtype=st.sampled_from(["float32", *HALVES]),
    seed=st.integers(0, 99),
)
def test_any_visibility(
    normalizer, shape, key_mask, mask, causal, window, offset, dtype, seed
):  # fmt: skip
    length, key_length, heads, kv_heads = shape
    rng = np.random.default_rng(seed)
    arrays = inputs(rng, heads, kv_heads, length, key_length, size=3, value_size=2)
    arrays = [keras.ops.cast(x, dtype) for x in arrays]
    case = {"causal": causal, "window": window, "query_offset": offset}
    if key_mask is not None:
        case["key_mask"] = key_mask[:, :key_length]
    if mask is not None:
        case["mask"] = mask[:, :, :length, :key_length]
    expected = oracle.attention(*[to_numpy(x) for x in arrays], normalizer, **case)
    actual = to_numpy(ops.attention(*arrays, normalizer, **case))
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("normalizer", NAMES)
def test_a_length_scale_does_not_overflow_a_half_query(normalizer, rng):
    """Large queries and small keys: the logits are moderate, the scaled query is not."""
    q, k, v = inputs(rng, length=7)
    arrays = [keras.ops.cast(x, "float16") for x in (q * 1e4, k * 1e-4, v)]
    scale = np.full((1, 1, 7), 8.0, "float32")
    expected = oracle.attention(
        *(to_numpy(x) for x in arrays), normalizer.replace("ssmax", "softmax"), scale=8.0 / 8**0.5
    )
    for implementation in implementations(normalizer):
        actual = ops.attention(
            *arrays, normalizer, length_scale=scale, implementation=implementation
        )
        assert relative_error(to_numpy(actual), expected) < 2e-3


def test_symbolic_inputs_of_unknown_length():
    x = keras.Input((None, 2, 4))
    assert ops.attention(x, x, x, causal=True).shape == (None, None, 2, 4)
    with pytest.raises(ValueError, match="symbolic `query` and `key` must have a known length"):
        ops.attention_weights(x, x, causal=True)


@pytest.mark.parametrize("implementation", ["tiled", "auto"])
def test_a_functional_model_computes_what_was_asked_for(implementation, monkeypatch, rng, tmp_path):
    """It is not made of the operations of the dense implementation, also once it is loaded."""
    q, k, v = inputs(rng)
    symbols = [keras.Input(x.shape[1:]) for x in (q, k, v)]
    symbols.append(keras.Input((7,), dtype="bool"))
    case = {"causal": True, "window": 4, "query_offset": 1}
    case["segment_ids"] = (np.array([[0, 0, 0, 1, 1]]), np.array([[0, 0, 1, 1, 1, 1, 1]]))
    options = {"implementation": implementation, **case}
    y = ops.attention(*symbols[:3], "softpick", key_mask=symbols[3], **options)
    keras.Model(symbols, y).save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    called = []
    monkeypatch.setattr(choice, "DENSE_UP_TO", 6)
    for name, compute in list(choice.IMPLEMENTATIONS.items()):

        def spy(*args, name=name, compute=compute):
            called.append(name)
            return compute(*args)

        monkeypatch.setitem(choice.IMPLEMENTATIONS, name, spy)
    key_mask = rng.random((2, 7)) < 0.7
    case["segment_ids"] = tuple(np.repeat(x, 2, axis=0) for x in case["segment_ids"])
    expected = oracle.attention(q, k, v, "softpick", key_mask=key_mask, **case)
    assert relative_error(to_numpy(model([q, k, v, key_mask])), expected) < 2e-6
    assert called == ["tiled"]


BAD_FOR_EVERY_IMPLEMENTATION = [
    ({"window": 0}, "`window` must be a positive integer"),
    ({"window": True}, "`window` must be a positive integer"),
    ({"query_offset": -1}, "`query_offset` must be 0 or a positive integer"),
    ({"query_offset": 1.5}, "`query_offset` must be an integer"),
    ({"epsilon": 0.0}, "`epsilon` must be a positive number"),
    ({"key_mask": np.ones((2, 1), bool)}, "`key_mask` must have shape"),
]


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
@pytest.mark.parametrize(("options", "message"), BAD_FOR_EVERY_IMPLEMENTATION)
def test_every_implementation_refuses_what_does_not_fit(implementation, options, message, rng):
    q, k, v = inputs(rng)
    with pytest.raises(ValueError, match=message):
        ops.attention(q, k, v, "rectified_softpick", implementation=implementation, **options)


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
def test_integers_of_numpy(implementation, rng):
    q, k, v = inputs(rng)
    case = {"causal": True, "window": np.int64(3), "query_offset": np.int64(2)}
    found = ops.attention(q, k, v, "softpick", implementation=implementation, **case)
    assert relative_error(to_numpy(found), oracle.attention(q, k, v, "softpick", **case)) < 2e-6


@pytest.mark.parametrize("normalizer", ["softpick", "rectified_softpick"])
def test_hidden_keys_may_be_infinite_in_tiles(normalizer, rng):
    q, k, v = inputs(rng)
    expected = oracle.attention(q, k, v, normalizer, causal=True)
    k[:, 6:] = np.inf  # in a tile that is seen in part
    found = ops.attention(q, k, v, normalizer, causal=True, implementation="tiled")
    assert relative_error(to_numpy(found), expected) < 2e-6


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty_inputs(shape, implementation):
    batch, length, key_length = shape
    q = np.ones((batch, length, 4, 3), "float32")
    kv = np.ones((batch, key_length, 2, 3), "float32")
    out = ops.attention(q, kv, kv, "ssmax", causal=True, implementation=implementation)
    np.testing.assert_array_equal(to_numpy(out), np.zeros((batch, length, 4, 3)))


@pytest.mark.backend("torch", reason="the others have no fused kernel on a CPU")
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(
    ("length", "size", "copied"), [(2048, 64, True), (2047, 64, False), (2048, 32, False)]
)
def test_what_many_queries_read_is_copied_by_head(length, size, copied, kv_heads, monkeypatch, rng):
    """There the fused kernel reads it faster than where it lies; elsewhere a copy costs more."""
    import torch

    kernel, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(*args, **options):
        seen.extend(x.is_contiguous() for x in args)
        return kernel(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    shapes = [(1, length, 8, size)] + 2 * [(1, length, kv_heads, size)]
    arrays = [rng.normal(size=shape).astype("float32") for shape in shapes]
    attend = functools.partial(ops.attention, normalizer="ssmax", causal=True)
    out = attend(*arrays, implementation="fused")
    assert seen == [False, copied, copied]
    assert out.is_contiguous()  # as the queries lie
    last = attend(arrays[0][:, -1:], *arrays[1:], query_offset=length - 1, implementation="dense")
    assert relative_error(to_numpy(out)[:, -1:], to_numpy(last)) < 1e-5
