"""The functions on logits: values, gradients, masks, extremes, errors."""

import functools
import itertools
import warnings

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from support import oracle
from support.cases import NAMES
from support.helpers import compiled, gradients, relative_error, to_numpy

from keras_ssattn import ops, ssmax
from keras_ssattn.ops import kernels, normalizers

FUNCTIONS = {name: getattr(ops, name) for name in NAMES}


def function(name, **options):
    """A function of logits."""
    return compiled(functools.partial(FUNCTIONS[name], **options))


HALVES = ("bfloat16", "float16")
LARGEST = {"float32": 1e4, "bfloat16": 3.3895314e38, "float16": 65504.0}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_equal_oracle(name, masked, rng):
    logits = rng.normal(size=(3, 5, 23)).astype("float32") * 3
    mask = rng.random((3, 5, 23)) < 0.6 if masked else None
    actual = to_numpy(function(name, mask=mask)(logits))
    np.testing.assert_allclose(actual, oracle.normalize(name, logits, mask), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name, scale, rng):
    logits = rng.normal(size=(2, 7)).astype("float32") * scale
    mask = np.array([[1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]], bool)
    cotangent = rng.normal(size=(2, 7)).astype("float32")
    normalize = functools.partial(FUNCTIONS[name], mask=mask)
    (actual,) = gradients(normalize, [logits], cotangent)
    expected = oracle.finite_difference(
        lambda x: oracle.normalize(name, x, mask), [logits], cotangent
    )
    assert relative_error(actual, expected[0]) < 1e-5


@pytest.mark.parametrize("n", [None, 1, 23])
@pytest.mark.parametrize("s", [-0.7, 0.0, 0.43])
def test_ssmax_gradients_of_s_and_b(s, n, rng):
    logits = rng.normal(size=(3, 2, 5)).astype("float32")
    cotangent = rng.normal(size=(3, 2, 5)).astype("float32")
    mask = rng.random((3, 2, 5)) < 0.8
    s = np.full((3, 1, 1), s, "float32") + np.array([[[0.0]], [[0.1]], [[0.2]]], "float32")
    b = rng.normal(size=(3, 1, 1)).astype("float32")
    actual = gradients(lambda x, s, b: ops.ssmax(x, s, n, b, mask=mask), [logits, s, b], cotangent)

    def reference(x, s, b):
        count = np.maximum(mask.sum(-1, keepdims=True), 1) if n is None else n
        return oracle.normalize("ssmax", x, mask, s=s, n=count, b=b)

    expected = oracle.finite_difference(reference, [logits, s, b], cotangent)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5


@pytest.mark.parametrize("formula", ["scale", "shift"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_s_of_any_dtype(dtype, formula, rng):
    logits = rng.normal(size=(3, 5)).astype("float32")
    s = keras.ops.cast(np.array([[0.5], [-0.25], [2.0]]), dtype)
    n = np.array([[2], [5], [9]])
    if formula == "scale":
        expected = oracle.normalize("ssmax", logits, s=to_numpy(s), n=n)
    else:
        expected = oracle.normalize("softmax", logits)
    actual = to_numpy(ssmax.compute(logits, s, n, formula=formula))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.backend("tensorflow", "torch", reason="JAX has float64 only where it is enabled")
def test_float64_stays_float64(rng):
    logits = rng.normal(size=(3, 5))
    mask = np.arange(5) < np.array([[5], [3], [2]])
    for name in NAMES:
        for seen in (None, mask):
            x = keras.ops.convert_to_tensor(logits, "float64")
            actual = FUNCTIONS[name](x, mask=seen)
            assert keras.utils.standardize_dtype(actual.dtype) == "float64"
            expected = oracle.normalize(name, logits, seen)
            np.testing.assert_allclose(to_numpy(actual), expected, rtol=1e-13)


def test_gradient_of_s_at_zero_is_not_lost(rng):
    logits = rng.normal(size=(11,)).astype("float32")
    cotangent = rng.normal(size=(11,)).astype("float32")
    (actual,) = gradients(lambda s: ops.ssmax(logits, s), [np.zeros((1,), "float32")], cotangent)
    expected = oracle.finite_difference(
        lambda s: oracle.normalize("ssmax", logits, s=s), [np.zeros((1,))], cotangent
    )
    assert abs(expected[0][0]) > 0.1
    assert relative_error(actual, expected[0]) < 1e-5


@pytest.mark.parametrize(("n", "expected"), [(10, 0.940), (100, 0.995), (1000, 0.9996)])
def test_ssmax_published_vector(n, expected):
    logits = np.full((n,), -2.0, "float32")
    logits[n // 3] = 3.0
    actual = float(to_numpy(ops.ssmax(logits, s=0.43))[n // 3])
    assert actual == pytest.approx(1 / (1 + (n - 1) * n ** (-5 * 0.43)), rel=1e-6)
    assert actual == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("n", "expected"), [(10, 0.943), (100, 0.600), (1000, 0.129)])
def test_softmax_published_vector(n, expected):
    logits = np.full((n,), -2.0, "float32")
    logits[0] = 3.0
    assert float(to_numpy(ops.softmax(logits))[0]) == pytest.approx(expected, abs=5e-4)


def test_ssmax_is_the_power_form(rng):
    x = rng.normal(size=(17,))
    power = 17 ** (0.43 * x)
    actual = to_numpy(ops.ssmax(x.astype("float32"), s=0.43))
    np.testing.assert_allclose(actual, power / power.sum(), rtol=1e-6)


def test_ssmax_with_n_per_row_equals_truncated_rows(rng):
    logits = rng.normal(size=(2, 9, 9)).astype("float32")
    causal = np.tril(np.ones((9, 9), bool))
    n = np.arange(1, 10, dtype="int32")[:, None]
    actual = to_numpy(ops.ssmax(logits, s=0.43, n=n, mask=causal))
    np.testing.assert_array_equal(actual, to_numpy(ops.ssmax(logits, s=0.43, mask=causal)))
    for b, i in itertools.product(range(2), range(9)):
        row = oracle.ssmax_row(logits[b, i, : i + 1].astype("float64"), 0.43)
        np.testing.assert_allclose(actual[b, i, : i + 1], row, rtol=1e-6)


@pytest.mark.backend("torch", reason="the package scalable-softmax is for PyTorch")
def test_ssmax_agrees_with_scalable_softmax_package(rng):
    import torch
    from scalable_softmax import ScalableSoftmax

    other = ScalableSoftmax(s=0.43, bias=True)
    torch.nn.init.constant_(other.b, 0.21)
    logits = torch.tensor(rng.normal(size=(9, 9)), dtype=torch.float32)
    causal = np.tril(np.ones((9, 9), bool))
    n = np.arange(1, 10)[:, None]
    ours = ops.ssmax(logits, s=0.43, n=n, b=0.21, mask=causal)
    for i in range(9):
        torch.testing.assert_close(ours[i, : i + 1], other(logits[i, : i + 1]), rtol=1e-6, atol=0)


def test_shift_formula_is_softmax_without_gradient_of_s(rng):
    logits = rng.normal(size=(2, 13)).astype("float32")
    shifted = to_numpy(ssmax.compute(logits, 1.7, 13, formula="shift"))
    np.testing.assert_allclose(shifted, oracle.normalize("softmax", logits), rtol=1e-6)
    cotangent = rng.normal(size=(2, 13)).astype("float32")
    (gradient,) = gradients(
        lambda s: ssmax.compute(logits, s, 13, formula="shift"),
        [np.ones((1,), "float32")],
        cotangent,
    )
    assert abs(gradient[0]) < 1e-5


def test_bias_form_is_softmax(rng):
    logits = rng.normal(size=(2, 13)).astype("float32")
    actual = to_numpy(ops.ssmax(logits, s=0.0, b=1.0))
    np.testing.assert_allclose(actual, oracle.normalize("softmax", logits), rtol=1e-6)


def test_softpick_keeps_sign_and_stays_below_one(rng):
    x = rng.normal(size=(5, 31)).astype("float32") * 100
    y = to_numpy(ops.softpick(x))
    np.testing.assert_array_equal(np.sign(y), np.sign(x))
    assert (np.abs(y).sum(-1) < 1).all()


@pytest.mark.parametrize("values", [[1e-8, 3e-8], [-2e-7, 5e-7, 1e-9], [1e-4, -1e-4, 3e-4]])
def test_rectified_softpick_does_not_cancel_near_zero(values):
    x = np.array(values, "float32")
    f = np.expm1(x.astype("float64"))
    expected = np.maximum(f, 0) / (np.abs(f).sum() + 1e-6)
    np.testing.assert_allclose(to_numpy(ops.rectified_softpick(x)), expected, rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 20.0, 87.0, 100.0, 5000.0])
def test_rectified_softpick_epsilon_is_in_the_units_of_the_definition(shift):
    x = np.array([0.5, -1.0], "float32") + np.float32(shift)
    actual = to_numpy(ops.rectified_softpick(x, epsilon=0.1))
    expected = oracle.normalize("rectified_softpick", x, epsilon=0.1)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_rectified_softpick_gradient_reaches_negative_logits():
    x = np.array([1.0, -1.0, 0.0], "float32")
    (gradient,) = gradients(ops.rectified_softpick, [x], np.array([1, 0, 0], "float32"))
    e = np.exp(x.astype("float64"))
    total = np.abs(e - 1).sum() + 1e-6
    w = (e[0] - 1) / total
    np.testing.assert_allclose(gradient, [e[0] / total * (1 - w), e[1] / total * w, 0], rtol=1e-5)


@pytest.mark.parametrize("start", [29.9, 30.1, 95.0])
def test_rows_of_rectified_softpick_do_not_depend_on_each_other(start, rng):
    """Where no logit is large PyTorch leaves a step out; then it changes nothing."""
    x = rng.normal(size=(3, 7)).astype("float32")
    large = np.concatenate([x, x[:1] * 0 + np.float32(start)])
    cotangent = rng.normal(size=(4, 7)).astype("float32")
    apart = to_numpy(ops.rectified_softpick(x))
    np.testing.assert_array_equal(to_numpy(ops.rectified_softpick(large))[:3], apart)
    [found] = gradients(ops.rectified_softpick, [large], cotangent)
    [expected] = gradients(ops.rectified_softpick, [x], cotangent[:3])
    np.testing.assert_allclose(found[:3], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.backend("torch", reason="its ways to follow what runs")
@pytest.mark.parametrize(
    "way", ["jit.trace", "export", "make_fx", "before dispatch", "vmap", "compile"]
)
def test_what_follows_small_logits_holds_for_large_ones(way):
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    small, large = (torch.tensor([[1.0, -2.0, 0.5]]) * factor for factor in (1, 100))

    class Module(torch.nn.Module):
        def forward(self, x):
            return ops.rectified_softpick(x)

    if way == "jit.trace":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = torch.jit.trace(Module(), small, check_trace=False)
    elif way == "export":
        run = torch.export.export(Module(), (small,), strict=False).module()
    elif way == "make_fx":
        run = make_fx(lambda x: ops.rectified_softpick(x))(small)
    elif way == "before dispatch":
        run = make_fx(lambda x: ops.rectified_softpick(x), pre_dispatch=True)(small)
    elif way == "vmap":
        run = torch.func.vmap(ops.rectified_softpick)
    else:
        run = torch.compile(ops.rectified_softpick, backend="eager")
    for x in (small, large):
        expected = oracle.normalize("rectified_softpick", x.numpy())
        np.testing.assert_allclose(run(x).numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.backend("torch", reason="its tensors that stand for others")
def test_tensors_without_numbers():
    import torch

    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    x = mode.from_tensor(torch.ones(2, 3))
    assert ops.rectified_softpick(x).shape == (2, 3)


class Relu(kernels.Kernel):
    """ReLU attention without a constant, by a kernel of one's own."""

    def values(self, x, m, on):
        return keras.ops.relu(x), keras.ops.relu(x)

    def constant(self, m):
        return 0


class LateSoftmax(kernels.Softmax):
    """Softmax whose maximum is kept 30 away."""

    headroom = 30.0

    def values(self, x, m, on):
        assert len(m.shape) == len(x.shape)
        return super().values(x, m, on)


@pytest.mark.parametrize("mask", [None, [[True, True, True], [False, False, False]]])
def test_kernels_of_ones_own(mask):
    x = np.array([[1, 2, -1], [-1, -2, -3]], "float32")
    seen = np.ones_like(x) if mask is None else np.array(mask)
    weights = to_numpy(normalizers.apply(Relu(), x, -1, mask))
    np.testing.assert_allclose(weights, [[1 / 3, 2 / 3, 0], [0, 0, 0]], rtol=1e-6)
    expected = np.exp(x.astype("float64")) * seen
    expected /= np.maximum(expected.sum(-1, keepdims=True), 1e-30)
    weights = to_numpy(normalizers.apply(LateSoftmax(), x, -1, mask))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


EXTREMES = [[1, -1, 0], [-1, -1, -1], [1, 1, -1], [0, 0, 0], [1, 0.5, 0.25], [-1, 0, -0.5]]


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("pattern", EXTREMES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name, pattern, dtype):
    logits = keras.ops.cast(np.array(pattern, "float64") * LARGEST[dtype], dtype)
    expected = oracle.normalize(name, to_numpy(logits))
    weights = function(name)(logits)
    assert keras.utils.standardize_dtype(weights.dtype) == dtype
    tolerance = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[dtype]
    np.testing.assert_allclose(to_numpy(weights), expected, rtol=tolerance, atol=1e-12)
    (gradient,) = gradients(FUNCTIONS[name], [logits], np.array([1, -2, 0.5], "float32"))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("s", [-2.0, 0.0, 1e-3, 3.0])
@pytest.mark.parametrize("dtype", LARGEST)
def test_ssmax_scales_extreme_logits_without_overflow(dtype, s):
    logits = keras.ops.cast(np.array([1.0, 0.99, -1.0, 0.5] * 300) * LARGEST[dtype], dtype)
    expected = oracle.normalize("ssmax", to_numpy(logits), s=s)
    tolerance = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 1e-3}[dtype]
    actual = to_numpy(ops.ssmax(logits, s=s))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=1e-7)
    s = np.full((1,), s, "float32")
    found = gradients(ops.ssmax, [logits, s], np.linspace(-1, 1, 1200).astype("float32"))
    assert all(np.isfinite(g).all() for g in found)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_half_logits_are_normalized_in_float32(name, dtype, rng):
    logits = keras.ops.cast(rng.normal(size=(3, 4096)), dtype)
    expected = keras.ops.cast(oracle.normalize(name, to_numpy(logits)).astype("float32"), dtype)
    # Equal to the rounded oracle, except where float32 falls on the other side of a tie.
    one_step = {"bfloat16": 2**-7, "float16": 2**-10}[dtype]
    weights = function(name)(logits)
    np.testing.assert_allclose(to_numpy(weights), to_numpy(expected), rtol=one_step, atol=6e-8)
    assert (to_numpy(weights) == to_numpy(expected)).mean() > 0.99


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_key_are_zero(name, dtype, rng):
    logits = keras.ops.cast(rng.normal(size=(3, 5)) * 50, dtype)
    mask = np.array([[True] * 5, [False] * 5, [False, True, False, False, False]])
    normalize = functools.partial(FUNCTIONS[name], mask=mask)
    weights = to_numpy(compiled(normalize)(logits))
    assert (weights[~mask] == 0).all()
    assert np.isfinite(weights).all()
    (gradient,) = gradients(normalize, [logits], rng.normal(size=(3, 5)).astype("float32"))
    assert (gradient[~mask] == 0).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_key(name):
    expected = {"softmax": 1.0, "ssmax": 1.0, "softpick": 2.0 / 3.0}
    expected["rectified_softpick"] = np.expm1(2) / (np.expm1(2) + 1e-6)
    expected["sink_softmax"] = np.exp(2) / (np.exp(2) + 1)
    actual = to_numpy(FUNCTIONS[name](np.array([[2.0]], "float32")))
    np.testing.assert_allclose(actual, [[expected[name]]], rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3, (0, 2), (-1, 1), (0, 1, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_axes(name, axis, rng):
    x = rng.normal(size=(3, 5, 7)).astype("float32")
    mask = rng.random((3, 5, 7)) < 0.7
    axes = [a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))]
    kept = [a for a in range(3) if a not in axes]
    order = kept + axes

    def to_rows(a):
        a = np.transpose(a, order)
        return a.reshape((*a.shape[: len(kept)], -1))

    expected = oracle.normalize(name, to_rows(x), to_rows(mask))
    actual = to_rows(to_numpy(function(name, axis=axis, mask=mask)(x)))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (5, 1), (3, 1, 1), (1, 5, 7), (1,), ()])
@pytest.mark.parametrize("name", NAMES)
def test_masks_broadcast(name, shape, rng):
    x = rng.normal(size=(3, 5, 7)).astype("float32")
    mask = rng.random(shape) < 0.5
    expected = oracle.normalize(name, x, mask)
    actual = to_numpy(function(name, mask=mask)(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_axis_of_size_zero(name):
    assert FUNCTIONS[name](np.zeros((3, 0), "float32")).shape == (3, 0)


def test_integer_masks_are_accepted():
    weights = to_numpy(ops.softmax(np.zeros(4, "float32"), mask=np.array([1, 0, 1, 0])))
    np.testing.assert_array_equal(weights, [0.5, 0, 0.5, 0])


def test_symbolic_inputs():
    x = keras.Input((5, 7))
    mask = keras.Input((5, 7), dtype="bool")
    model = keras.Model([x, mask], [f(x, mask=mask) for f in FUNCTIONS.values()])
    assert "NaN" not in model.to_json()
    value = np.linspace(-2, 2, 70).reshape(2, 5, 7).astype("float32")
    seen = value > -1
    for name, y in zip(NAMES, model([value, seen]), strict=True):
        expected = oracle.normalize(name, value, seen)
        np.testing.assert_allclose(to_numpy(y), expected, rtol=1e-6, atol=1e-7)


@st.composite
def logits_and_mask(draw):
    shape = draw(st.sampled_from([(1,), (7,), (1, 5), (5, 1), (3, 5), (2, 3, 5), (2, 1, 4)]))
    bound = draw(st.sampled_from([2.0**-20, 1.0, 30.0, 1e4]))
    finite = st.floats(-bound, bound, width=32, allow_subnormal=False)
    logits = draw(hnp.arrays("float32", shape, elements=finite))
    mask_shape = tuple(draw(st.sampled_from([1, size])) for size in shape)
    mask = draw(st.none() | hnp.arrays(bool, mask_shape))
    return logits, mask, draw(st.integers(-len(shape), len(shape) - 1))


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(case=logits_and_mask(), dtype=st.sampled_from(["float32", *HALVES]))
def test_any_input(name, case, dtype):
    logits, mask, axis = case
    logits = keras.ops.cast(logits, dtype)
    exact = np.moveaxis(to_numpy(logits), axis, -1)
    seen = None if mask is None else np.moveaxis(np.broadcast_to(mask, logits.shape), axis, -1)
    expected = np.moveaxis(oracle.normalize(name, exact, seen), -1, axis)
    actual = to_numpy(function(name, axis=axis, mask=mask)(logits))
    # exp of a difference d is exact to about |d| float32 roundings, relative to the largest.
    tolerance = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[dtype]
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
    normalize = functools.partial(FUNCTIONS[name], axis=axis, mask=mask)
    # rectified softpick's is up to 1 / epsilon, 1e6, near 0: too much for float16
    cotangent = np.full(logits.shape, 0.01 if dtype == "float16" else 1.0, "float32")
    (gradient,) = gradients(normalize, [logits], cotangent)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("epsilon", [1e-6, 1e-20, 2.0**-126])
def test_a_row_of_zeros_has_gradients_of_zero_for_any_epsilon(epsilon, rng):
    normalize = functools.partial(ops.rectified_softpick, epsilon=epsilon)
    [found] = gradients(normalize, [np.zeros((2, 5), "float32")], rng.normal(size=(2, 5)))
    np.testing.assert_array_equal(found, np.zeros((2, 5)))
