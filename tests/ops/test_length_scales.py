"""SSMax's length scale, as a function: every kind of n, s and b, and symbolic ones."""

import keras
import numpy as np
import pytest
from support.helpers import to_numpy

from keras_ssattn import ops


def test_bias_is_by_head_where_there_are_as_many_queries(rng):
    n, s, b = np.array([[[1, 2, 3, 4]]]), rng.normal(size=(4, 1)), rng.normal(size=(4, 1))
    s, b = s.astype("float32"), b.astype("float32")
    found = to_numpy(ops.log_length_scale(n, s, b))
    np.testing.assert_allclose(found, s * np.log(n) + b, rtol=1e-5)


@pytest.mark.backend("tensorflow", "torch", reason="JAX has float64 only where it is enabled")
@pytest.mark.parametrize("wide", ["s", "b", "n"])
def test_float64_of_any_argument_is_exact(wide, rng):
    arguments = {"n": np.array([[1, 2, 1000, 131072]]), "s": 0.5, "b": 0.25}
    exact = {
        "n": arguments["n"].astype("float64"),
        "s": rng.normal(size=(3, 1)),
        "b": rng.normal(size=(3, 1)),
    }
    arguments[wide] = exact[wide]
    found = ops.log_length_scale(**arguments)
    assert keras.utils.standardize_dtype(found.dtype) == "float64"
    n, s, b = arguments["n"], arguments["s"], arguments["b"]
    np.testing.assert_allclose(to_numpy(found), s * np.log(n) + b, rtol=1e-14)


@pytest.mark.parametrize("b", [0.0, 0.5, np.array([[0.1], [-0.2], [0.3]], "float32")])
@pytest.mark.parametrize("s", [1.0, 0.4, np.array([[0.1], [0.2], [0.3]], "float32")])
def test_symbolic_count(s, b, rng):
    """As many heads as queries: where a bias of one head might become that of one query."""
    n = keras.Input((3, 3), dtype="int32")
    query = keras.Input((3, 3, 8))
    scale = ops.log_length_scale(n, s, b)
    assert not scale.sparse
    model = keras.Model([n, query], ops.attention(query, query, query, length_scale=scale))
    counts = rng.integers(1, 9, (2, 3, 3)).astype("int32")
    x = rng.normal(size=(2, 3, 3, 8)).astype("float32")
    expected = ops.attention(x, x, x, length_scale=ops.log_length_scale(counts, s, b))
    found = to_numpy(model([counts, x]))
    np.testing.assert_allclose(found, to_numpy(expected), rtol=1e-5, atol=1e-6)
