"""A visibility that is made once and given to several layers."""

import keras
import numpy as np
import pytest
from support.helpers import to_numpy

from keras_ssattn.layers import MultiHeadAttention, TransformerBlock
from keras_ssattn.ops import Visibility

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
KEPT = np.arange(5) < np.array([[3], [5]])
CAUSAL = Visibility.of(5, 5, causal=True)


def attention():
    return MultiHeadAttention(2, 4)


def block():
    return TransformerBlock(2, causal=True)


def test_a_visibility_takes_the_place_of_masks():
    layer = attention()
    expected = layer(X, X, value_mask=KEPT, use_causal_mask=True)
    seen = Visibility.of(5, 5, key_mask=KEPT, causal=True)
    np.testing.assert_allclose(to_numpy(layer(X, X, visibility=seen)), to_numpy(expected))
    layer = block()
    expected = layer(X, mask=KEPT)
    np.testing.assert_allclose(to_numpy(layer(X, mask=KEPT, visibility=seen)), to_numpy(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": np.ones((5, 5), "bool")}, "takes the place.*attention_mask"),
        ({"segment_ids": np.zeros((2, 5), "int32")}, "takes the place.*segment_ids"),
        ({"cache_index": 3}, "`cache_index` goes with `cache`"),
    ],
)
@pytest.mark.parametrize("make", [attention, block])
def test_what_a_visibility_replaces_is_refused_beside_it(make, options, message):
    inputs = (X, X) if make is attention else (X,)
    with pytest.raises(ValueError, match=message):
        make()(*inputs, visibility=CAUSAL, **options)


def test_causality_that_a_visibility_lacks_is_refused():
    with pytest.raises(ValueError, match="use_causal_mask=True, with causal=False"):
        attention()(X, X, use_causal_mask=True, visibility=Visibility.of(5, 5))
    with pytest.raises(ValueError, match="use_causal_mask=True, with causal=False"):
        block()(X, visibility=Visibility.of(5, 5))


@pytest.mark.parametrize("visibility", ["causal", KEPT, {"causal": True}])
def test_anything_else_is_refused(visibility):
    with pytest.raises(TypeError, match=r"`visibility` must be a `keras_ssattn\.ops\.Visibility`"):
        attention()(X, X, visibility=visibility)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="must be of 5 queries and 5 keys"):
        attention()(X, X, visibility=Visibility.of(4, 5))


def test_parts_of_other_dtype_policies_are_called_as_keras_calls_them():
    """On PyTorch, where Keras's own work around a call is otherwise left out."""
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    for name in ("query", "query_norm", "key", "key_norm"):
        policies[f"^(.*/)?{name}$"] = keras.DTypePolicy("bfloat16")
    layer = MultiHeadAttention(2, 4, qk_norm=True, dtype=policies)
    reference = MultiHeadAttention(2, 4, qk_norm=True)
    expected = to_numpy(reference(X, X))
    layer.build(X.shape, X.shape)
    layer.set_weights(reference.get_weights())
    assert keras.backend.standardize_dtype(layer.query_norm.variable_dtype) == "bfloat16"
    np.testing.assert_allclose(to_numpy(layer(X, X)), expected, atol=0.05)
