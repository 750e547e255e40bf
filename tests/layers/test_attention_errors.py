"""Bad arguments of `layers.MultiHeadAttention` are refused by name."""

import numpy as np
import pytest

from keras_ssattn import layers
from keras_ssattn.layers import MultiHeadAttention

F = np.zeros((2, 5, 8), "float32")  # features


def attend(**kwargs):
    return lambda: MultiHeadAttention(2, 4)(F, F, **kwargs)


ERRORS = [
    (lambda: MultiHeadAttention(0, 4), ValueError, "`num_heads` must be a positive integer.*0"),
    (lambda: MultiHeadAttention(2, 4.0), ValueError, "`key_dim` must be a positive integer.*4.0"),
    (lambda: MultiHeadAttention(2, 4, 0), ValueError, "`value_dim` must be a positive.*or None"),
    (lambda: MultiHeadAttention(4, 4, num_kv_heads=3), ValueError, "`num_kv_heads` must divide"),
    (lambda: MultiHeadAttention(2, 4, sliding_window=-1), ValueError, "`sliding_window` must be"),
    (
        lambda: MultiHeadAttention(2, 4, dropout=1.0),
        ValueError,
        r"`dropout` must be.*\[0, 1\).*1.0",
    ),
    (lambda: MultiHeadAttention(2, 4, output_shape=0), ValueError, "`output_shape` must be"),
    (lambda: MultiHeadAttention(2, 4, output_shape=()), ValueError, "`output_shape` must have 1"),
    (
        lambda: MultiHeadAttention(2, 4, normalizer="sparsemax"),
        ValueError,
        "`normalizer` must be.*'sparsemax'",
    ),
    (lambda: MultiHeadAttention(2, 4, normalizer=layers.SSMax), ValueError, "`normalizer` must be"),
    (lambda: MultiHeadAttention(2, 4, normalizer=None), ValueError, "`normalizer` must be.*None"),
    (
        lambda: MultiHeadAttention(2, 4, normalizer=layers.Softpick(axis=1)),
        ValueError,
        "`normalizer` must have axis=-1.*axis=1",
    ),
    (
        lambda: MultiHeadAttention(2, 4)(F[0], F),
        ValueError,
        r"`query` must have shape \[batch, time, features\].*\(5, 8\)",
    ),
    (
        lambda: MultiHeadAttention(2, 4)(F, F[0]),
        ValueError,
        r"`key` must have shape.*\(5, 8\)",
    ),
    (
        attend(attention_mask=F[:, :, :5]),
        TypeError,
        "`attention_mask` must be a boolean mask.*float32",
    ),
    (
        attend(attention_mask=np.ones((5,), bool)),
        ValueError,
        "`attention_mask` must have rank 2 or 3 or 4",
    ),
    (attend(query_mask=np.ones((2, 5, 1), bool)), ValueError, "`query_mask` must have rank 2"),
    (attend(value_mask=F[:, :, 0]), TypeError, "`value_mask` must be a boolean mask"),
    (
        attend(key_mask=np.ones((2, 4), bool)),
        ValueError,
        r"`key_mask` must be broadcastable to \[B, S\], \(2, 5\).*\(2, 4\)",
    ),
    (
        attend(query_mask=np.ones((3, 5), bool)),
        ValueError,
        r"`query_mask` must be broadcastable to \[B, T\].*\(3, 5\)",
    ),
    (
        attend(value_mask=np.ones((2, 4), bool)),
        ValueError,
        r"`value_mask` must be broadcastable to \[B, S\].*\(2, 4\)",
    ),
    (
        attend(attention_mask=np.ones((3, 5, 5), bool)),
        ValueError,
        r"`attention_mask` must be broadcastable to \[B, H, T, S\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
