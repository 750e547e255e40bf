"""Which keys a query sees, and how many, against a count one pair at a time."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from support import oracle
from support.helpers import gradients, relative_error, to_numpy

from keras_ssattn import ops

CASES = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": 3},
    "window of one": {"window": 1, "causal": True},
    "causal window": {"causal": True, "window": 3},
    "offset": {"causal": True, "query_offset": 4},
    "offset per row": {"causal": True, "window": 2, "query_offset": np.array([0, 5])},
    "negative offset": {"causal": True, "query_offset": np.array([-2, 1])},
    "negative offset, window": {"causal": True, "window": 2, "query_offset": np.array([-2, 1])},
    "negative offset, padding": {
        "causal": True,
        "query_offset": np.array([-2, 1]),
        "key_mask": np.ones((2, 7), bool),
    },
    "left padding": {"causal": True, "key_mask": np.arange(7) >= np.array([[3], [0]])},
    "right padding": {"key_mask": np.arange(7) < np.array([[3], [0]])},
    "padded window": {
        "causal": True,
        "window": 3,
        "key_mask": np.arange(7) % 3 != np.array([[0], [1]]),
        "query_offset": np.array([1, 2]),
    },
    "mask [T, S]": {"mask": np.arange(35).reshape(5, 7) % 3 == 0},
    "mask [B, H, T, S]": {"mask": np.arange(210).reshape(2, 3, 5, 7) % 4 == 0, "causal": True},
    "segments": {
        "segment_ids": (
            np.array([[0, 0, 1, 1, 2], [5, 5, 5, 9, 9]]),
            np.array([[0, 1, 1, 2, 0, 0, 3], [9, 9, 5, 5, 5, 9, 1]]),
        ),
        "causal": True,
        "window": 4,
        "key_mask": np.arange(7) != np.array([[2], [1]]),
    },
    "segments and mask": {
        "segment_ids": (np.zeros((2, 5), int), np.arange(14).reshape(2, 7) % 2),
        "mask": np.arange(35).reshape(5, 7) % 3 == 0,
    },
    "mask [1, 1, T, 1]": {"mask": (np.arange(5) % 2 == 0).reshape(1, 1, 5, 1), "window": 2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_visible_keys_and_key_count(case):
    expected = oracle.visible(5, 7, batch=2, heads=3, **case)
    visible = ops.visible_keys(5, 7, **case)
    visible = np.ones((), bool) if visible is None else to_numpy(visible)
    np.testing.assert_array_equal(np.broadcast_to(visible, expected.shape), expected)
    count = to_numpy(ops.key_count(5, 7, **case))
    assert count.dtype == "int32"
    np.testing.assert_array_equal(np.broadcast_to(count, (2, 3, 5)), expected.sum(-1))


def test_nothing_hidden_is_none():
    assert ops.visible_keys(5, 7) is None


@hypothesis.given(
    lengths=st.sampled_from([(1, 1), (5, 7), (7, 5)]),
    key_mask=st.none() | hnp.arrays(bool, (2, 7)),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 8),
    offset=st.sampled_from([0, 1, 3]) | hnp.arrays("int32", (2,), elements=st.integers(0, 9)),
    segments=st.none() | hnp.arrays("int64", (2, 7), elements=st.integers(0, 2)),
)
def test_key_count_is_the_number_of_visible_keys(
    lengths, key_mask, causal, window, offset, segments
):
    case = {"causal": causal, "window": window, "query_offset": offset}
    if key_mask is not None:
        case["key_mask"] = key_mask[:, : lengths[1]]
    if segments is not None:
        case["segment_ids"] = (segments[:, : lengths[0]], segments[:, : lengths[1]])
    expected = oracle.visible(*lengths, batch=2, **case).sum(-1)
    actual = to_numpy(ops.key_count(*lengths, **case))
    np.testing.assert_array_equal(np.broadcast_to(actual, expected.shape), expected)


@pytest.mark.parametrize("other", ["key_mask", "query_offset", "keys"])
def test_one_row_of_segments_serves_all(other, rng):
    segments = np.array([[0, 0, 0, 1, 1]])
    case = {"causal": True, "segment_ids": (segments, segments)}
    if other == "key_mask":
        case["key_mask"] = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], bool)
    elif other == "query_offset":
        case["query_offset"] = np.array([0, 2])
    else:
        case["segment_ids"] = segments, np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    # the oracle reads a row for each
    whole = {**case, "segment_ids": tuple(np.broadcast_to(x, (2, 5)) for x in case["segment_ids"])}
    expected = oracle.visible(5, 5, batch=2, **whole).sum(-1)
    np.testing.assert_array_equal(to_numpy(ops.key_count(5, 5, **case)), expected)


@pytest.mark.backend("tensorflow", "torch", reason="JAX has 64 bits only where they are enabled")
def test_segments_with_long_ids():
    ids = keras.ops.convert_to_tensor(np.array([[0, 0, 2**32, 2**32]]), "int64")
    found = to_numpy(ops.key_count(4, 4, segment_ids=ids))
    np.testing.assert_array_equal(found, [[[2, 2, 2, 2]]])
    x = np.ones((1, 4, 1, 2), "float32")
    value = np.arange(8, dtype="float32").reshape(x.shape)
    expected = [[0.5, 1.0], [0.5, 1.0], [2.5, 3.0], [2.5, 3.0]]
    for implementation in ("dense", "tiled"):
        options = {"segment_ids": ids, "implementation": implementation}
        found = to_numpy(ops.attention(x, x, 0.5 * value, **options))[0, :, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.backend("jax")
def test_64_bits_on_jax(rng):
    """Where they are enabled, JAX refuses indices of two dtypes."""
    import jax

    x = rng.normal(size=(2, 70, 2, 4)).astype("float32")
    segments = np.sort(rng.integers(0, 3, (2, 70)))
    case = {"causal": True, "query_offset": np.array([0, 3])}
    with jax.enable_x64(True):
        n = ops.key_count(70, 70, segment_ids=segments, causal=True)
        run = lambda q: ops.attention(q, q, q, implementation="tiled", **case)  # noqa: E731
        [gradient] = gradients(run, [x], np.ones_like(x))
    np.testing.assert_array_equal(
        to_numpy(n), oracle.visible(70, 70, 2, causal=True, segment_ids=(segments,) * 2).sum(-1)
    )
    [expected] = gradients(run, [x], np.ones_like(x))
    assert relative_error(gradient, expected) < 1e-5


def test_segments_of_more_rows_than_are_counted_at_a_time():
    ids = np.sort(np.arange(300).reshape(2, 150) * 7 % 5)
    n = to_numpy(ops.key_count(150, 150, causal=True, segment_ids=ids))
    expected = oracle.visible(150, 150, 2, causal=True, segment_ids=(ids, ids)).sum(-1)
    np.testing.assert_array_equal(n, expected)


ERRORS = [
    ({"causal": "no"}, ValueError, "`causal` must be True or False.*'no'"),
    ({"causal": None}, ValueError, "`causal` must be True or False.*None"),
    ({"window": 0}, ValueError, "`window` must be a positive integer or None.*window=0"),
    ({"window": -3}, ValueError, "`window` must be a positive integer or None.*-3"),
    ({"window": 2.0}, ValueError, "`window` must be a positive integer or None.*2.0"),
    ({"query_offset": -1}, ValueError, "`query_offset` must be 0 or a positive integer.*-1"),
    ({"query_offset": 1.5}, ValueError, "`query_offset` must be an integer.*float32"),
    ({"query_offset": [[1]]}, ValueError, r"`query_offset` must be an integer.*\(1, 1\)"),
    ({"key_mask": [True]}, ValueError, r"`key_mask` must have rank 2.*\(1,\)"),
    ({"key_mask": [[1.0]]}, TypeError, "`key_mask` must be a boolean mask.*float32"),
    ({"mask": [[[True]]]}, ValueError, r"`mask` must have rank 2 or 4.*\(1, 1, 1\)"),
    ({"mask": [[True] * 5] * 7}, ValueError, r"`mask` must be broadcastable to \[T, S\], \(5, 7\)"),
    ({"key_mask": [[True] * 5]}, ValueError, r"`key_mask` must have shape.*S = 7.*\(1, 5\)"),
    ({"segment_ids": [[0] * 5]}, ValueError, r"`segment_ids` must have shape.*\(1, 5\)"),
    ({"segment_ids": ([[0] * 5], [0] * 7)}, ValueError, r"`segment_ids` must.*\(7,\)"),
    ({"segment_ids": ([[0.0] * 5], [[0] * 7])}, TypeError, "`segment_ids` must be integers"),
    ({"mask": [[-1e9]]}, TypeError, "`mask` must be a boolean mask.*float32"),
]


@pytest.mark.parametrize("function", [ops.key_count, ops.visible_keys])
@pytest.mark.parametrize(("arguments", "error", "match"), ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(function, arguments, error, match):
    with pytest.raises(error, match=match):
        function(5, 7, **arguments)


@pytest.mark.backend("torch", reason="it is PyTorch's vmap")
def test_counts_in_segments_under_vmap(rng):
    import torch

    ids = np.sort(rng.integers(0, 3, (3, 2, 12)).astype("int32"))
    tensors = keras.ops.convert_to_tensor(ids)
    found = torch.func.vmap(lambda x: ops.key_count(12, 12, segment_ids=x))(tensors)
    expected = (ids[..., None] == ids[..., None, :]).sum(-1)
    np.testing.assert_array_equal(to_numpy(found).reshape(expected.shape), expected)
