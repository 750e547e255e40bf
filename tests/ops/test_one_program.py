"""A compiler reorders products: what it makes of the largest numbers is what eager calls give."""

import functools

import numpy as np
import pytest
from support import oracle
from support.cases import NAMES, implementations
from support.helpers import gradients, in_one_program, relative_error, to_numpy

from keras_ssattn import ops

LOGITS = np.array(
    [
        [3.3e38, -3.2e38, 3e38, 0.0],
        [1e30, -2e30, 5.0, 1e29],
        [1e19, 1e19, 1e19, -1e19],
        [2.0, -1.0, 0.5, 0.0],
        [1e-6, -3e-6, 0.0, 2e-6],
    ],
    "float32",
)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_of_large_logits(name, masked):
    mask = np.array([True, True, False, True]) if masked else None
    function = functools.partial(getattr(ops, name), mask=mask)
    expected = oracle.normalize(name, LOGITS, None if mask is None else np.tile(mask, (5, 1)))
    for run in (function, in_one_program(function)):
        np.testing.assert_allclose(to_numpy(run(LOGITS)), expected, rtol=2e-6, atol=1e-12)


def test_softpick_keeps_both_terms_of_its_derivative():
    """`dx_i = g_i / L - sign(x_i) sum(g x) / L^2`, with L = 1 + sum |x|; L^2 overflows."""
    x, g = LOGITS[1:], np.array([[1.0, -2.0, 0.5, 0.25]])
    exact = x.astype("float64")
    total = 1 + np.abs(exact).sum(-1, keepdims=True)
    expected = g / total - np.sign(exact) * (g * exact / total).sum(-1, keepdims=True) / total
    cotangent = np.tile(g, (4, 1)).astype("float32")
    for run, eager in ((ops.softpick, True), (in_one_program(ops.softpick), False)):
        [found] = gradients(run, [x], cotangent, eager)
        for row, reference in zip(found, expected, strict=True):
            assert relative_error(row, reference) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_attention_of_large_logits(name, rng):
    query = np.full((1, 5, 1, 2), 1e19, "float32")
    key = query * np.array([1, -1, 0.9, 0.5, 0], "float32")[None, :, None, None]
    value = rng.normal(size=(1, 5, 1, 2)).astype("float32")
    expected = oracle.attention(query, key, value, name, scale=1.0)
    for implementation in implementations(name):
        function = functools.partial(
            ops.attention, normalizer=name, scale=1.0, implementation=implementation
        )
        for run in (function, in_one_program(function)):
            assert relative_error(to_numpy(run(query, key, value)), expected) < 2e-6


@pytest.mark.parametrize("size", [1e9, 1e15])
def test_softpick_keeps_both_terms_in_attention(size, rng):
    q, k, v = (rng.normal(size=(1, 5, 2, 4)).astype("float32") for _ in range(3))
    arrays = [q * np.float32(size), k * np.float32(size), v]
    cotangent = rng.normal(size=(1, 5, 2, 4)).astype("float32")
    expected = oracle.attention_gradients(*arrays, cotangent, "softpick")
    for implementation in ("dense", "tiled"):
        function = functools.partial(
            ops.attention, normalizer="softpick", implementation=implementation
        )
        for run, eager in ((function, True), (in_one_program(function), False)):
            found = gradients(run, arrays, cotangent, eager)
            for gradient, reference in zip(found, expected, strict=True):
                assert relative_error(gradient, reference) < 4e-6


@pytest.mark.parametrize("name", NAMES)
def test_infinite_and_missing_logits(name):
    """What is not a number stays none, and so does its gradient."""
    x = np.array([[np.nan, 1.0, -2.0], [0.5, 1.0, -2.0]], "float32")
    function = getattr(ops, name)
    for run in (function, in_one_program(function)):
        found = to_numpy(run(x))
        assert np.isnan(found[0]).all()
        assert np.isfinite(found[1]).all()
        [gradient] = gradients(run, [x], np.ones_like(x))
        assert np.isnan(gradient[0, 0])
        assert np.isfinite(gradient[1]).all()
    for run in (ops.softpick, in_one_program(ops.softpick)):
        found = to_numpy(run(np.array([np.inf, 1.0, -2.0], "float32")))
        np.testing.assert_array_equal(found, [np.nan, 0.0, 0.0])


@pytest.mark.backend("torch")
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_same_where_nothing_is_recorded(name, rng):
    import torch

    x = torch.tensor([*LOGITS.tolist(), [np.inf, 1.0, -2.0, 0.0]], requires_grad=True)
    expected = getattr(ops, name)(x).detach()
    with torch.no_grad():
        found = getattr(ops, name)(x)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


@pytest.mark.backend("torch")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_attention_in_float32(name, dtype, rng):
    import torch

    arrays = [rng.normal(size=(2, 5, 2, 8)).astype("float32") for _ in range(3)]
    cotangent = rng.normal(size=(2, 5, 2, 8)).astype("float32")
    for implementation in ("dense", "tiled"):
        function = functools.partial(ops.attention, normalizer=name, implementation=implementation)
        run = torch.autocast("cpu", getattr(torch, dtype))(function)
        np.testing.assert_array_equal(to_numpy(run(*arrays)), to_numpy(function(*arrays)))
        pair = [gradients(f, arrays, cotangent) for f in (run, function)]
        for gradient, reference in zip(*pair, strict=True):
            np.testing.assert_array_equal(gradient, reference)
