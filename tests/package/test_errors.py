"""Bad arguments of functions and of rotary layers are refused by name."""

import math

import keras
import numpy as np
import pytest

from keras_ssattn import layers, ops, ssmax


def zeros(*shape):
    return np.zeros(shape, "float32")


X = zeros(2, 5, 4, 8)  # heads
EIGHT = ops.rotary_frequencies(8)
YARN = {"type": "yarn", "factor": 8.0, "original_length": 2048}

# Functions on logits

LOGITS = [
    (lambda: ops.softmax([1, 2]), TypeError, "`logits` must have a floating-point dtype.*int"),
    (lambda: ops.softpick([[1.0]], axis=2), ValueError, r"`axis` must lie in \[-2, 2\).*axis=2"),
    (lambda: ops.softpick([[1.0]], axis=1.5), TypeError, "`axis` must be an integer.*1.5"),
    (lambda: ops.softpick([[1.0]], axis=()), ValueError, "`axis` must name one or more"),
    (lambda: ops.softpick([[1.0]], axis=(0, -2)), ValueError, "`axis` must name.*distinct"),
    (
        lambda: ops.softmax([1.0, 2.0], mask=[0.0, 1.0]),
        TypeError,
        "`mask` must be a boolean mask.*float32",
    ),
    (
        lambda: ops.softmax([1.0, 2.0], mask=[True] * 3),
        ValueError,
        r"`mask` must be broadcastable.*\(2,\).*\(3,\)",
    ),
    (lambda: ops.ssmax([1.0], n=0), ValueError, "`n` must be a number of keys, 1 or more.*n=0"),
    (lambda: ops.ssmax([1.0], n=True), ValueError, "`n` must be a number of keys"),
    (lambda: ops.ssmax([1.0], n=math.inf), ValueError, "`n` must be a number of keys.*inf"),
    (lambda: ops.ssmax([1.0], n=[True]), TypeError, "`n` must be a number of keys, not a mask"),
    (
        lambda: ops.ssmax(np.zeros((3, 4), "float32"), n=[1, 2, 3, 4]),
        ValueError,
        r"`n` must be broadcastable.*axis=\(-1,\).*\(4,\)",
    ),
    (
        lambda: ops.ssmax(np.zeros((3, 4), "float32"), s=np.ones(4, "float32")),
        ValueError,
        "`s` must be broadcastable",
    ),
    (lambda: ops.ssmax([1.0], s=math.nan), ValueError, "`s` must be a finite number.*nan"),
    (lambda: ops.ssmax([1.0], s=[1]), TypeError, "`s` must have a floating-point dtype"),
    (lambda: ops.ssmax([1.0], b=math.inf), ValueError, "`b` must be a finite number.*inf"),
    (lambda: ssmax.compute([1.0], 1.0, 1, formula="log"), ValueError, "`formula` must be.*'log'"),
    (lambda: ops.rectified_softpick([1.0], epsilon=0), ValueError, "`epsilon` must be a positive"),
    (
        lambda: ops.rectified_softpick([1.0], epsilon=math.nan),
        ValueError,
        "`epsilon` must be a positive number.*nan",
    ),
]

# Attention: arguments and options of `ops.attention`

ATTENTION = [
    (
        (X, X, X, "sparsemax"),
        {},
        ValueError,
        "`normalizer` must be one of.*'sparsemax'",
    ),
    (
        (X, X, X),
        {"implementation": "flash"},
        ValueError,
        "`implementation` must be one of.*flash",
    ),
    ((X[0], X, X), {}, ValueError, r"`query` must have rank 4.*\(5, 4, 8\)"),
    ((X, X[0], X), {}, ValueError, r"`key` must have rank 4.*\(5, 4, 8\)"),
    ((X, X, X[0]), {}, ValueError, r"`value` must have rank 4.*\(5, 4, 8\)"),
    (
        (X.astype("int32"), X, X),
        {},
        TypeError,
        "`query` must have a floating-point.*int32",
    ),
    (
        (X, zeros(2, 5, 4, 7), X),
        {},
        ValueError,
        "`query` and `key` must have the same last",
    ),
    (
        (X, zeros(2, 5, 3, 8), zeros(2, 5, 3, 8)),
        {},
        ValueError,
        "number of heads of `query` must",
    ),
    (
        (X, X, zeros(2, 6, 4, 8)),
        {},
        ValueError,
        "`key` and `value` must have the same length",
    ),
    (
        (X, X, zeros(2, 5, 2, 8)),
        {},
        ValueError,
        "`key` and `value` must have the same length",
    ),
    ((X, X, X), {"causal": 1}, ValueError, "`causal` must be True or False.*causal=1"),
    ((X, X, X), {"window": -1}, ValueError, "`window` must be a positive integer"),
    ((X, X, X), {"mask": zeros(5, 5)}, TypeError, "`mask` must be a boolean mask"),
    (
        (X, X, X),
        {"length_scale": zeros(3, 5)},
        ValueError,
        "`length_scale` must be broadcast",
    ),
    (
        (X, X, X),
        {"scale": float("nan")},
        ValueError,
        "`scale` must be a finite number.*nan",
    ),
    (
        (X, X, X, "rectified_softpick"),
        {"epsilon": -1.0},
        ValueError,
        "`epsilon` must be a positive number.*-1.0",
    ),
    (
        (X, X[:1], X[:1]),
        {},
        ValueError,
        "`query`, `key` and `value` must have the same batch",
    ),
    (
        (X, X, X),
        {"mask": np.ones((3, 1, 5, 5), bool)},
        ValueError,
        r"`mask` must be broadcastable to \[B, H, T, S\]",
    ),
    (
        (X, X, X),
        {"key_mask": np.ones((3, 5), bool)},
        ValueError,
        r"`key_mask` must be broadcastable to \[B, S\]",
    ),
    (
        (X, X, X),
        {"query_offset": np.array([0, 1, 2])},
        ValueError,
        r"`query_offset` must be broadcastable to \[B\]",
    ),
]

# Rotary positions

ROTARY = [
    (lambda: ops.rotary_frequencies(7), ValueError, "`size` must be an even positive.*7"),
    (lambda: ops.rotary_frequencies(0), ValueError, "`size` must be an even positive.*0"),
    (lambda: ops.rotary_frequencies(8, 1), ValueError, "`theta` must be a finite number above 1"),
    (lambda: ops.rotary_frequencies(8, "x"), ValueError, "`theta` must be.*'x'"),
    (
        lambda: ops.rotary_frequencies(8, scaling={"type": "ntk"}),
        ValueError,
        "`scaling` must be None or a dict whose \"type\" is one of.*'ntk'",
    ),
    (
        lambda: ops.rotary_frequencies(8, scaling={"type": "yarn", "factor": 2}),
        ValueError,
        "type 'yarn' must have the keys \\['factor', 'original_length'\\].*Received",
    ),
    (
        lambda: ops.rotary_frequencies(8, scaling={"type": "linear", "factor": 2, "x": 1}),
        ValueError,
        "type 'linear' must have the keys \\['factor'\\]. Received",
    ),
    (
        lambda: ops.rotary_frequencies(8, scaling={"type": "linear", "factor": 0.5}),
        ValueError,
        "`scaling\\['factor'\\]` must be a number of 1 or more. Received: .*=0.5",
    ),
    (
        lambda: ops.rotary_attention_factor({**YARN, "beta_fast": -1}),
        ValueError,
        "`scaling\\['beta_fast'\\]` must be a positive number. Received: .*=-1",
    ),
    (
        lambda: ops.rotary_embedding(X, 0.5, EIGHT),
        TypeError,
        "`positions` must be integ",
    ),
    (
        lambda: ops.rotary_embedding(X, True, EIGHT),
        TypeError,
        "`positions` must be integ",
    ),
    (
        lambda: ops.rotary_embedding(X.astype("int32"), 0, EIGHT),
        TypeError,
        "`x` must have a floating-point dtype",
    ),
    (
        lambda: ops.rotary_embedding(X[0], 0, EIGHT),
        ValueError,
        "`x` must have rank 4",
    ),
    (
        lambda: ops.rotary_embedding(X, np.arange(4), EIGHT),
        ValueError,
        r"`positions` must have shape \[T\] or \[B, T\].*\(1, 4\)",
    ),
    (
        lambda: ops.rotary_embedding(X, np.zeros((3, 5), "int32"), EIGHT),
        ValueError,
        r"`positions` must have shape \[T\] or \[B, T\].*\(3, 5\)",
    ),
    (
        lambda: ops.rotary_embedding(X, np.zeros((2, 5, 1), "int32"), ops.rotary_frequencies(8)),
        ValueError,
        "`positions` must have rank 0 or 1 or 2",
    ),
    (
        lambda: ops.rotary_embedding(X, 0, ops.rotary_frequencies(10)),
        ValueError,
        r"`frequencies` must have shape \[R/2\].*\(5,\)",
    ),
    (
        lambda: ops.rotary_embedding(X, 0, EIGHT, attention_factor=0),
        ValueError,
        "`attention_factor` must be a positive number",
    ),
    (lambda: layers.RotaryEmbedding(theta=-2), ValueError, "`theta` must be.*-2"),
    (lambda: layers.RotaryEmbedding(fraction=0), ValueError, r"`fraction` must .* in \(0, 1\].*0"),
    (lambda: layers.RotaryEmbedding(fraction=1.5), ValueError, "`fraction` must be.*1.5"),
    (lambda: layers.RotaryEmbedding(scaling="yarn"), ValueError, "`scaling` must be.*'yarn'"),
    (lambda: layers.RotaryEmbedding(fraction=0.1)(X), ValueError, "`fraction` of the feat"),
    (lambda: layers.RotaryEmbedding()(X[0]), ValueError, r"`x` must have shape.*\(5, 4, 8\)"),
    (
        lambda: layers.RotaryEmbedding()(keras.Input((5, 8))),
        ValueError,
        r"`x` must have shape.*\(None, 5, 8\)",
    ),
    (lambda: layers.RotaryEmbedding()(X, offset=0.5), TypeError, "`offset` must be an integ"),
    (
        lambda: layers.RotaryEmbedding()(X, offset=np.zeros((2, 1), "int32")),
        ValueError,
        r"`offset` must be an integer or have shape \[B\].*\(2, 1\)",
    ),
]

CALLS = {"logits": LOGITS, "rotary": ROTARY}


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        pytest.param(*case, id=f"{name}-{case[2]}")
        for name, table in CALLS.items()
        for case in table
    ],
)
def test_calls(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"), ATTENTION, ids=[e[3] for e in ATTENTION]
)
def test_attention(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        ops.attention(*args, **kwargs)
