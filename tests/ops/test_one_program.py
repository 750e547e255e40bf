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
    for run in (ops.softpick, in_one_program(ops.softpick)):
        [found] = gradients(run, [x], cotangent)
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
