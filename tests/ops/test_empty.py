"""Axes of no entries: no queries, no keys, no batch."""

import functools

import numpy as np
import pytest
from support.cases import NAMES, implementations
from support.helpers import compiled, gradients, to_numpy

import keras_ssattn
from keras_ssattn import layers, ops

OPTIONS = [{}, {"causal": True}, {"window": 2}, {"causal": True, "window": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_counts_and_masks_of_nothing(options):
    for lengths in ((5, 0), (0, 5), (0, 0)):
        queries, keys = lengths
        count = to_numpy(ops.key_count(*lengths, key_mask=np.zeros((2, keys), bool), **options))
        assert np.broadcast_to(count, (2, 3, queries)).sum() == 0
        assert count.dtype == "int32"
        assert count.shape[0] == 2
        count = to_numpy(ops.key_count(*lengths, **options))
        assert np.broadcast_to(count, (2, 3, queries)).sum() == 0
        visible = ops.visible_keys(*lengths, mask=np.ones(lengths, bool), **options)
        assert tuple(visible.shape[-2:]) == lengths
        segments = np.zeros((2, queries), "int32"), np.zeros((2, keys), "int32")
        count = to_numpy(ops.key_count(*lengths, segment_ids=segments, **options))
        np.testing.assert_array_equal(count, np.zeros((2, 1, queries)))


CASES = {
    "nothing hidden": {},
    "causal": {"causal": True},
    "key_mask": {"key_mask": lambda t, s: np.ones((2, s), bool), "window": 2},
    "mask": {"mask": lambda t, s: np.ones((2, 1, t, s), bool)},
    "mask of two axes": {"mask": lambda t, s: np.ones((t, s), bool), "causal": True},
    "segments": {
        "segment_ids": lambda t, s: (np.zeros((2, t), "int32"), np.zeros((2, s), "int32"))
    },
}


@pytest.mark.parametrize("lengths", [(4, 0), (0, 4), (0, 0)], ids=str)
@pytest.mark.parametrize("normalizer", NAMES)
def test_attention_of_nothing_is_zero_with_finite_gradients(normalizer, lengths, backend):
    queries, keys = lengths
    shapes = (2, queries, 2, 3), (2, keys, 1, 3), (2, keys, 1, 2)
    arrays = [np.ones(shape, "float32") for shape in shapes]
    # JAX compiles each case anew
    cases = ("causal", "key_mask") if backend == "jax" else CASES
    for name in cases:
        options = {k: v(*lengths) if callable(v) else v for k, v in CASES[name].items()}
        for implementation in (*implementations(normalizer), "auto"):
            function = compiled(
                functools.partial(
                    ops.attention, normalizer=normalizer, implementation=implementation, **options
                )
            )
            found = to_numpy(function(*arrays))
            np.testing.assert_array_equal(found, np.zeros((2, queries, 2, 2)))
            for gradient in gradients(function, arrays, np.ones(found.shape, "float32")):
                assert (gradient == 0).all()
        weights = ops.attention_weights(*arrays[:2], normalizer, **options)
        assert tuple(weights.shape) == (2, 2, queries, keys)


def test_a_batch_of_nothing(rng):
    x = np.ones((0, 4, 2, 3), "float32")
    options = {"key_mask": np.ones((0, 4), bool), "causal": True}
    for implementation in (*implementations("ssmax"), "auto"):
        found = ops.attention(x, x, x, "ssmax", implementation=implementation, **options)
        assert tuple(found.shape) == (0, 4, 2, 3)
    layer = layers.MultiHeadAttention(2, 4)
    assert tuple(layer(x[..., 0], x[..., 0]).shape) == (0, 4, 2)


def test_layers_on_no_steps_and_on_no_context(rng):
    layer = layers.MultiHeadAttention(2, 3)
    x, none = rng.normal(size=(2, 4, 5)).astype("float32"), np.zeros((2, 0, 5), "float32")
    layer.build(x.shape, x.shape)
    layer.output_dense.bias.assign(np.arange(5.0))
    y, scores = layer(x, none, return_attention_scores=True, value_mask=np.ones((2, 0), bool))
    np.testing.assert_array_equal(to_numpy(y), np.broadcast_to(np.arange(5.0), (2, 4, 5)))
    assert tuple(scores.shape) == (2, 2, 4, 0)
    assert tuple(layer(none, x, use_causal_mask=True).shape) == (2, 0, 5)
    rotated = layers.MultiHeadAttention(2, 4, rotary=layers.RotaryEmbedding(), use_gate=True)
    assert tuple(rotated(none, none, use_causal_mask=True).shape) == (2, 0, 5)


@pytest.mark.parametrize("output_mode", ["last_timestep", "all", "mean_pool"])
def test_a_model_of_windows_of_no_steps_gives_zeros(output_mode, backend):
    model = keras_ssattn.build(
        4, hidden_size=8, num_heads=2, num_layers=1, window_size=None, output_mode=output_mode
    )
    found = to_numpy(model(np.zeros((2, 0, 4), "float32")))
    expected = np.zeros((2, 0, 8) if output_mode == "all" else (2, 8))
    np.testing.assert_array_equal(found, expected)
    some = to_numpy(model(np.ones((2, 3, 4), "float32")))
    assert np.isfinite(some).all()
    assert np.abs(some).max() > 0
    if backend == "tensorflow":  # whose graph knows no length
        found = model.predict(np.zeros((2, 0, 4), "float32"), verbose=0)
        np.testing.assert_array_equal(found, expected)
