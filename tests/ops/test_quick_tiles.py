"""Rectified softpick in fewer passes: where each way is taken, and that results are as exact.

Exact beside the greatest entry: `quick.py` says what an entry may be off by that is small.
"""

import keras
import numpy as np
import pytest
from support import oracle
from support.helpers import gradients, relative_error, to_numpy

from keras_ssattn import ops
from keras_ssattn.ops._attention.tiled import band, quick
from keras_ssattn.ops._attention.tiled.quick import Quick, Unshifted
from keras_ssattn.ops.kernels import RectifiedSoftpick

pytestmark = pytest.mark.backend("torch", reason="the others have compilers of their own")
CASE = {"normalizer": "rectified_softpick", "causal": True, "scale": 0.5}


@pytest.fixture
def ways(monkeypatch):
    """The tiles of each pass that each way computed; in the backward pass only the one taken."""
    monkeypatch.setattr(band, "QUERY_TILE", 16)
    monkeypatch.setattr(band, "KEY_TILE", 8)
    taken = {cls: {"sums": 0, "gradient": 0} for cls in (Quick, Unshifted, RectifiedSoftpick)}
    for owner in (Unshifted, RectifiedSoftpick):
        for name in taken[owner]:
            original = getattr(owner, name)

            def spy(self, *args, name=name, original=original):
                taken[type(self)][name] += 1
                return original(self, *args)

            monkeypatch.setattr(owner, name, spy)
    return taken


@pytest.fixture
def tiles(ways):
    """The tiles of each pass that were computed by e^x less 1."""
    return ways[Quick]


def inputs(rng, length=70, heads=2, kv_heads=2, size=4):
    shapes = ((2, length, n, size) for n in (heads, kv_heads, kv_heads, heads))
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def attend(*arrays, **case):
    return ops.attention(*arrays, implementation="tiled", **{**CASE, **case})


def check(arrays, cotangent, bound=3e-6, **case):
    """Value and gradients are those of the float64 oracle, relative to their greatest."""
    case = {**CASE, **case}
    expected = oracle.attention(*arrays, case["normalizer"], **without_name(case))
    assert relative_error(to_numpy(attend(*arrays, **case)), expected) < bound
    references = oracle.attention_gradients(*arrays, cotangent, case["normalizer"],
                                            **without_name(case))  # fmt: skip
    found = gradients(lambda *xs: attend(*xs, **case), arrays, cotangent)
    for actual, reference in zip(found, references, strict=True):
        assert relative_error(actual, reference) < bound


def without_name(case):
    return {key: value for key, value in case.items() if key != "normalizer"}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"causal": False},
        {"window": 40},
        {"query_offset": 9},
        {"key_mask": np.arange(70) < np.array([[70], [61]])},
    ],
)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_usual_logits_take_it_and_are_right(tiles, heads, case, rng):
    *arrays, cotangent = inputs(rng, 70, *heads)
    check(arrays, cotangent, **case)
    assert min(tiles.values()) >= 10


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-2, 15.0])
def test_small_and_huge_logits_are_computed_exactly(tiles, ways, scale, rng):
    *arrays, cotangent = inputs(rng)
    if scale == 15.0:  # none near to 0, where the gradient jumps
        arrays[:2] = (np.round(x) for x in arrays[:2])
    check(arrays, cotangent, bound=1e-5, scale=scale)
    assert tiles["gradient"] == 0
    assert tiles["sums"] <= 2 * (4 + 6)  # the first two tiles of rows, of two passes
    other = RectifiedSoftpick if scale == 15.0 else Unshifted
    assert ways[other]["gradient"] >= 10
    if scale != 15.0:
        assert ways[RectifiedSoftpick]["sums"] == 0


PADDED = {  # of 160 keys
    "right": {"key_mask": np.arange(160) < np.array([[160], [18]])},
    "left": {"key_mask": np.arange(160) >= np.array([[0], [130]])},
    "segments": {"segment_ids": (np.tile(np.arange(160) // 80, (2, 1)),) * 2},
    "rows": {"query_offset": np.array([0, 40])},
}


@pytest.mark.parametrize("case", PADDED)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_make_it_slow(ways, case, causal, rng):
    """Z is compared with the keys that a row sees, not with all that there are."""
    *arrays, cotangent = inputs(rng, length=160)
    check(arrays, cotangent, bound=1e-5, **PADDED[case], causal=causal)
    quick, other = (ways[cls]["gradient"] for cls in (Quick, Unshifted))
    assert quick > (other if causal else 4 * other), (quick, other)
    assert ways[RectifiedSoftpick]["sums"] == 0


@pytest.mark.parametrize("logit", [29.5, 29.9, 31.0])
def test_logits_that_may_have_passed_the_headroom_need_a_maximum(ways, logit, rng):
    """One of them, in the last tile of rows, for that tile alone; a sum of 2^43 is e^29.8."""
    *arrays, cotangent = inputs(rng, heads=1, kv_heads=1)
    arrays[1] = np.clip(arrays[1], -0.8, 0.8)
    arrays[0][:, 69, 0], arrays[1][:, 3, 0] = np.eye(4)[0] * 2 * logit, np.eye(4)[0]
    check(arrays, cotangent, bound=1e-5)
    assert (ways[RectifiedSoftpick]["gradient"] > 0) == (logit > 29.8)
    assert ways[Quick]["gradient"] > 0


def test_rows_of_few_keys_are_not_tried_in_vain(ways, rng):
    """In a window of less than 16 keys their logits may all be near 0."""
    *arrays, cotangent = inputs(rng)
    check(arrays, cotangent, bound=1e-5, window=9)
    assert ways[Quick]["sums"] == 0
    assert ways[Unshifted]["gradient"] > 10


@pytest.mark.parametrize("epsilon", [1.0, 100.0, 1e6, 1e12])
def test_a_large_epsilon_does_not_make_the_gradient_quick(tiles, epsilon, rng):
    *arrays, cotangent = inputs(rng)
    case = {"scale": 1e-5, "epsilon": epsilon}
    found = gradients(lambda *xs: attend(*xs, **case), arrays, cotangent)
    assert tiles["gradient"] == 0
    dense = {**case, "normalizer": "rectified_softpick", "causal": True, "implementation": "dense"}
    expected = gradients(lambda *xs: ops.attention(*xs, **dense), arrays, cotangent)
    for actual, reference in zip(found, expected, strict=True):
        assert relative_error(actual, reference) < 1e-5


def test_it_would_be_wrong_for_small_logits(tiles, monkeypatch, rng):
    monkeypatch.setattr(quick, "LEAST", 0.0)
    arrays = inputs(rng)[:3]
    expected = oracle.attention(*arrays, CASE["normalizer"], causal=True, scale=1e-6)
    assert relative_error(to_numpy(attend(*arrays, scale=1e-6)), expected) > 1e-2
    assert tiles["sums"]


def test_one_head_of_small_logits_is_right_among_others(rng, tiles):
    *arrays, cotangent = inputs(rng)
    arrays[0][:, 40:, 1] *= 1e-5
    expected = oracle.attention(*arrays, CASE["normalizer"], causal=True, scale=0.5)
    found = to_numpy(attend(*arrays))
    for head in range(2):
        assert relative_error(found[:, 40:, head], expected[:, 40:, head]) < 1e-5
    check(arrays, cotangent, bound=1e-5)
    assert tiles["sums"] > tiles["gradient"] > 0  # the first tiles, and not the last


def test_what_is_passed_by_is_exactly_zero(rng, tiles):
    """Values of keys with logits up to 0 do not show, however great."""
    query, key, value, _ = (abs(x) for x in inputs(rng))
    key[:, 20:30] *= -1
    key[:, 30:40] = 0
    value[:, 20:40] = 1e30
    found = to_numpy(attend(query, key, value, causal=False))
    value[:, 20:40] = 0
    np.testing.assert_allclose(found, to_numpy(attend(query, key, value, causal=False)), rtol=1e-6)
    assert tiles["sums"]


def test_at_right_angles_the_gradient_is_zero(tiles, rng):
    """Where a logit is exactly 0 the derivative is 0 by convention, as in the other ways."""
    query = np.tile(np.eye(4, dtype="float32") * 3, (1, 20, 1)).reshape(1, 80, 1, 4)
    key = query * np.round(rng.uniform(1, 3, (1, 80, 1, 1))).astype("float32")
    value, cotangent = (rng.normal(size=query.shape).astype("float32") for _ in range(2))
    check([query, key, value], cotangent, bound=1e-5)
    assert tiles["gradient"]


def test_what_is_not_a_number_stays_so(rng, tiles):
    query, key, value, _ = inputs(rng)
    query[:, 50, 0, 0] = np.nan
    found = to_numpy(attend(query, key, value))
    assert np.isnan(found[:, 50, 0]).all()
    assert np.isfinite(found[:, :50]).all()
    assert np.isfinite(found[:, 51:]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_precisions(dtype, rng, tiles):
    arrays = [keras.ops.convert_to_tensor(x, dtype) for x in inputs(rng)[:3]]
    exact = [to_numpy(keras.ops.cast(x, "float64")) for x in arrays]
    expected = oracle.attention(*exact, CASE["normalizer"], causal=True, scale=0.5)
    found = to_numpy(keras.ops.cast(attend(*arrays), "float64"))
    bound = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float64": 1e-14}[dtype]
    assert relative_error(found, expected) < bound
    assert tiles["sums"]


def test_memory_of_one_pass_is_not_that_of_another(rng):
    """Two passes at once, as threads or a model with two layers have them."""
    *arrays, _ = inputs(rng)
    first = attend(*arrays)
    kept = np.array(to_numpy(first))
    attend(*(2 * x for x in arrays))
    np.testing.assert_array_equal(to_numpy(first), kept)


@pytest.mark.parametrize("scale", [0.5, 1e-6])
def test_the_backward_pass_may_run_where_numbers_cannot_be_read(ways, scale, rng):
    """As under modes that count or trace what is differentiated: it takes the kept maxima."""
    from torch.utils.flop_counter import FlopCounterMode

    *arrays, cotangent = inputs(rng)
    expected = gradients(lambda *xs: attend(*xs, scale=scale), arrays, cotangent)
    tensors = [keras.ops.convert_to_tensor(x).requires_grad_(True) for x in arrays]
    out = attend(*tensors, scale=scale)
    before = ways[RectifiedSoftpick]["gradient"]
    with FlopCounterMode(display=False):
        out.backward(keras.ops.convert_to_tensor(cotangent))
    assert ways[RectifiedSoftpick]["gradient"] > before
    for x, reference in zip(tensors, expected, strict=True):
        assert relative_error(to_numpy(x.grad), reference) < 1e-5


def test_one_tile_that_does_not_hold_now_and_then_gives_nothing_up(ways, rng):
    """Only failures in a row do: here two tiles of rows fail, with others between them."""
    *arrays, cotangent = inputs(rng, length=130)
    for position in (40, 100):
        arrays[0][:, position] *= 1e-5
    check(arrays, cotangent, bound=1e-5)
    assert ways[Quick]["gradient"] > 2 * ways[Unshifted]["gradient"]
