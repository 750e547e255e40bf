"""`ops.in_place` and the formulas on it: what PyTorch writes over equals what it does not."""

import functools
import types

import keras
import numpy as np
import pytest
from support.cases import NAMES
from support.helpers import gradients, relative_error, to_numpy

from keras_ssattn import ops
from keras_ssattn._frameworks import keep_where_positive
from keras_ssattn._tensors import widen
from keras_ssattn.ops import in_place, kernels, stacks
from keras_ssattn.ops._attention.tiled import band

# of every size, sign, and both zeros
LOGITS = np.concatenate([np.linspace(-20, 30, 1001), np.logspace(-37, 1.4, 500), [0.0, 1e30]])
LOGITS = np.concatenate([LOGITS, -LOGITS]).astype("float32")[None, None, None]
ONE = {
    "exp": np.exp, "expm1": np.expm1, "absolute": np.abs, "sign": np.sign,
    "relu": lambda x: np.maximum(x, 0.0),
}  # fmt: skip


def tensor(x):
    return keras.ops.convert_to_tensor(np.array(x))


@pytest.mark.parametrize("name", ONE)
def test_a_function_of_one_tile(name, backend):
    logits = np.minimum(LOGITS, 30)
    x = tensor(logits)
    y = getattr(in_place, name)(x)
    assert (y is x) == (backend == "torch")
    expected = ONE[name](logits.astype("float64"))
    normal = (np.abs(expected) > 1e-36) | (expected == 0)  # some backends flush the others to 0
    np.testing.assert_allclose(to_numpy(y)[normal], expected[normal], rtol=5e-7, atol=1e-36)


@pytest.mark.backend("torch", reason="the others have functions of their own")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 4.0), ("float64", 4.0)])
def test_expm1_is_exact_near_0_and_far(dtype, bound):
    x = np.minimum(LOGITS, 30).astype(dtype)
    x = np.append(x, [-np.inf, np.nan]).astype(dtype)
    expected = np.expm1(x.astype("longdouble"))
    d, e = (to_numpy(y) for y in in_place.expm1_and_exp(tensor(x)))
    np.testing.assert_allclose(d, expected, rtol=bound * np.finfo(dtype).eps, atol=1e-37)
    np.testing.assert_allclose(e, np.exp(x.astype("longdouble")), rtol=1e-6, atol=1e-37)


def test_functions_of_two_tiles(backend, rng):
    x, y = (rng.normal(size=(2, 3, 4, n)).astype("float32") for n in (5, 1))
    np.testing.assert_array_equal(to_numpy(in_place.subtract(tensor(x), tensor(y))), x - y)
    np.testing.assert_array_equal(to_numpy(in_place.maximum(tensor(y), tensor(-y))), np.abs(y))
    nan = in_place.maximum(tensor(np.float32([np.nan])), tensor(np.float32([1])))
    assert to_numpy(nan) == 1
    np.testing.assert_allclose(to_numpy(in_place.row_sum(tensor(x))), x.sum(-1, keepdims=True),
                               rtol=1e-6, atol=1e-6)  # fmt: skip
    peak = to_numpy(in_place.row_maximum(tensor(x)))
    np.testing.assert_array_equal(peak, x.max(-1, keepdims=True))
    np.testing.assert_array_equal(to_numpy(in_place.transpose(tensor(x))), x.swapaxes(-1, -2))


def test_products_are_added(backend, rng):
    x, y, z = (rng.normal(size=(2, 3, *s)).astype("float32") for s in ((4, 5), (6, 5), (4, 6)))
    total = tensor(z)
    y = keras.ops.swapaxes(tensor(y), -1, -2)  # a view, as the tiles' transposes are
    expected = z + x @ to_numpy(y)
    found = in_place.add_product(total, tensor(x), y)
    assert (found is total) == (backend == "torch")
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-5, atol=1e-5)
    tiles = keras.ops.zeros((2, *z.shape))
    for _ in range(2):
        tiles = in_place.add_product_to(tiles, 1, tensor(x), y)
    first, second = to_numpy(tiles)
    np.testing.assert_array_equal(first, np.zeros_like(z))
    np.testing.assert_allclose(second, 2 * (expected - z), rtol=1e-5, atol=1e-5)


def test_a_product_is_written_where_there_is_room(backend, rng):
    x, y, nan = (rng.normal(size=(2, 3, *s)).astype("float32") for s in ((4, 5), (5, 6), (4, 6)))
    room = in_place.room(tensor(x), 6)
    if backend == "torch":
        room.copy_(tensor(nan * np.nan))
    found = in_place.product(tensor(x), tensor(y), room)
    assert (found is room) == (backend == "torch")
    np.testing.assert_allclose(to_numpy(found), x @ y, rtol=1e-5, atol=1e-5)


def test_what_is_not_visible_is_hidden(backend, rng):
    x, visible = rng.normal(size=(2, 3, 4, 5)).astype("float32"), rng.random((4, 5)) < 0.5
    x[0, 0, 0, 0] = np.nan
    for absent in (0.0, -np.inf):
        given = tensor(x)
        found = in_place.hide(given, tensor(visible), absent)
        assert (found is given) == (backend == "torch")
        np.testing.assert_array_equal(to_numpy(found), np.where(visible, x, absent))


@pytest.mark.backend("torch", reason="the others fold nothing")
@pytest.mark.parametrize("shape", [(4, 5), (1, 1, 4, 5), (2, 1, 4, 5), (1, 3, 1, 5), (2, 3, 4, 1)])
def test_folded_matrices_are_hidden_and_unfolded(shape, rng):
    x, visible = rng.normal(size=(2, 3, 4, 5)).astype("float32"), rng.random(shape) < 0.5
    folded = in_place.fold(tensor(x))
    assert folded.shape == (6, 4, 5)
    assert in_place.fold(folded) is folded
    found = in_place.hide(folded, tensor(visible), 0.5)
    assert found is folded
    found = to_numpy(in_place.unfold(found, tensor(x)))
    np.testing.assert_array_equal(found, np.where(visible, x, np.float32(0.5)))


@pytest.mark.backend("torch", reason="the others have no such function")
def test_what_is_kept_where_another_is_positive():
    x = tensor(np.float32([1.0, -2.0, np.nan, 4.0, 5.0, np.nan]))
    keep_where_positive(x, tensor(np.float32([2.0, -1.0, 0.0, -0.0, np.nan, 1.0])))
    np.testing.assert_array_equal(to_numpy(x), np.float32([1.0, 0.0, 0.0, 0.0, 5.0, np.nan]))


@pytest.mark.backend("torch", reason="the others write over nothing")
def test_what_cannot_be_written_over_is_refused():
    """A product in memory that does not fold would be lost."""
    x = keras.ops.ones((2, 3, 4, 5))
    into = keras.ops.swapaxes(keras.ops.zeros((3, 2, 4, 4)), 0, 1)
    with pytest.raises(RuntimeError, match="view"):
        in_place.product(x, in_place.transpose(x), into)
    with pytest.raises(RuntimeError, match="view"):
        in_place.add_product(into, x, in_place.transpose(x))


def test_a_product_of_entries_is_subtracted(backend, rng):
    x, y = (rng.normal(size=(2, 3, 4, 5)).astype("float32") for _ in range(2))
    z = rng.normal(size=(2, 3, 4, 1)).astype("float32")
    given = tensor(x)
    found = in_place.subtract_product(given, tensor(y), tensor(z))
    assert (found is given) == (backend == "torch")
    np.testing.assert_allclose(to_numpy(found), x - y * z, rtol=1e-6, atol=1e-6)


def test_sums_over_a_stretch_of_tiles(rng):
    x, y = rng.normal(size=(5, 2, 3)).astype("float32"), np.float32([[1, 2, 3], [4, 5, 6]])
    for start, stop in ((0, 5), (1, 3), (2, 2)):
        found = to_numpy(stacks.sum_between(tensor(x), start, stop))
        np.testing.assert_allclose(found, x[start:stop].sum(0), rtol=1e-6, atol=1e-6)
        expected = x.copy()
        expected[start:stop] += y
        found = to_numpy(stacks.add_between(tensor(x), start, stop, tensor(y)))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("m", [0.0, 5.0, 90.0])
@pytest.mark.parametrize("normalizer", NAMES)
def test_tiles_have_the_values_of_rows(normalizer, m, rng):
    """And the gradient has the f of the values, and is 0 where a logit is that of a masked key."""
    kernel = kernels.get(normalizer)
    logits = np.minimum(LOGITS, m + kernel.headroom) if kernel.headroom is not None else LOGITS
    m = np.full((1, 1, 1, 1), m, "float32")
    rows = [to_numpy(y) for y in kernel.values(tensor(logits), tensor(m), kernels.ROWS)]
    tiles = [to_numpy(y) for y in kernel.values(tensor(logits), tensor(m), kernels.TILES)]
    upstream = rng.normal(size=logits.shape).astype("float32")
    delta = np.full((1, 1, 1, 1), 0.7, "float32")
    f, dx = (to_numpy(y) for y in kernel.gradient(*map(tensor, (logits, m, upstream, delta))))
    for actual, expected in zip((*tiles, f), (*rows, rows[0]), strict=True):
        # with m, f is a difference of numbers up to 1
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1.2e-7 if m else 1e-37)
    assert np.isfinite(dx).all()
    if normalizer == "rectified_softpick":
        x = logits.astype("float64")
        slope = np.exp(x - m) * ((x > 0) * upstream - np.sign(x) * 0.7)
        unit = np.exp(x - m) * (np.abs(upstream) + 0.7)
        assert (np.abs(dx - slope) <= 1e-6 * unit + 2e-7).all()
        assert not dx[x == 0].any()


@pytest.mark.backend("torch", reason="the others have one way only")
@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("normalizer", NAMES)
def test_attention_that_writes_over_nothing_is_the_same(normalizer, dtype, scale, monkeypatch, rng):
    monkeypatch.setattr(band, "QUERY_TILE", 16)
    monkeypatch.setattr(band, "KEY_TILE", 8)
    arrays = [rng.normal(size=(2, 37, 4, 5)).astype("float32") for _ in range(3)]
    arrays[0] *= scale
    key_mask = np.arange(37) >= np.array([[3], [37]])  # some queries see no key

    def attend(*xs):
        xs = [keras.ops.cast(x, dtype) for x in xs]
        options = {"causal": True, "key_mask": key_mask, "implementation": "tiled"}
        return keras.ops.cast(ops.attention(*xs, normalizer, **options), "float32")

    cotangent = rng.normal(size=(2, 37, 4, 5)).astype("float32")
    results = [(to_numpy(attend(*arrays)), *gradients(attend, arrays, cotangent))]
    monkeypatch.setattr(stacks, "matrices", lambda x: stacks.unstack(widen(x)))  # not folded
    out_of_place = types.SimpleNamespace(
        add=stacks.add, runs_eagerly=lambda: False, runs_on_cpu_eagerly=lambda x: False
    )
    monkeypatch.setattr(in_place, "stacks", out_of_place)
    results.append((to_numpy(attend(*arrays)), *gradients(attend, arrays, cotangent)))
    bound = {"float32": 2e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < bound
    assert not results[0][0][1].any()


@pytest.mark.backend("torch", reason="the other backends never write over a tensor")
@pytest.mark.parametrize("normalizer", NAMES)
def test_arguments_are_not_written_over(normalizer, rng):
    """Tiles of one whole head may be views of what the caller gave."""
    arrays = [rng.normal(size=(1, 16, 1, 8)).astype("float32") for _ in range(3)]
    tensors = [tensor(x) for x in arrays]
    attend = functools.partial(ops.attention, normalizer=normalizer, implementation="tiled")
    cotangent = tensor(arrays[0])
    for x in tensors:
        x.requires_grad_(True)
    attend(*tensors).backward(cotangent)
    for x, expected in zip((*tensors, cotangent), (*arrays, arrays[0]), strict=True):
        np.testing.assert_array_equal(to_numpy(x), expected)


def test_the_derivative_of_a_magnitude_is_0_at_0(rng):
    x = np.float32([-2.0, -0.0, 0.0, 3.0])
    cotangent = rng.normal(size=4).astype("float32")
    [found] = gradients(kernels.magnitude, [x], cotangent)
    np.testing.assert_array_equal(found, np.sign(x) * cotangent)
    np.testing.assert_array_equal(to_numpy(kernels.magnitude(tensor(x))), np.abs(x))
