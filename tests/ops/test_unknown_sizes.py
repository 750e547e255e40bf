"""Sizes that are unknown until a graph runs are compared then, and those known at once."""

import functools

import keras
import numpy as np
import pytest
from support import oracle
from support.cases import NAMES
from support.helpers import relative_error, to_numpy

from keras_ssattn import layers, ops

TF = pytest.mark.backend("tensorflow", reason="the other backends know all sizes")


def x(rng, *shape):
    return rng.normal(size=shape).astype("float32")


def graph(function, *arrays):
    """The function for arrays of these ranks, all sizes but the last of floats unknown."""
    import tensorflow as tf

    specs = [
        tf.TensorSpec([None] * a.ndim if a.dtype.kind != "f" else _shape(a), a.dtype)
        for a in arrays
    ]
    return tf.function(lambda *a: function(*a), input_signature=specs)


def _shape(a):
    return [None, None, *a.shape[2:]]


# In functions


def attend(query, key, value, *others, names=(), **options):
    return ops.attention(query, key, value, **dict(zip(names, others, strict=True)), **options)


MISMATCHES = {
    "value of another length": ((), lambda q: (q, q, q[:, :5])),
    "key of another length": ((), lambda q: (q, q[:, :5], q)),
    "key of another batch": ((), lambda q: (q, q[:1], q[:1])),
    "query of one row": ((), lambda q: (q[:1], q, q)),
    "value of one row": ((), lambda q: (q, q, q[:1])),
    "key_mask": (("key_mask",), lambda q: (q, q, q, np.ones((2, 5), bool))),
    "key_mask of one key": (("key_mask",), lambda q: (q, q, q, np.ones((2, 1), bool))),
    "key_mask of twice the keys": (("key_mask",), lambda q: (q, q, q, np.ones((2, 14), bool))),
    "segment_ids": (("segment_ids",), lambda q: (q, q, q, np.zeros((2, 5), "int32"))),
    "segment_ids of one": (("segment_ids",), lambda q: (q, q, q, np.zeros((2, 1), "int32"))),
    "segment_ids of three rows": (
        ("segment_ids",),
        lambda q: (q, q, q, np.zeros((3, 7), "int32")),
    ),
    "mask": (("mask",), lambda q: (q, q, q, np.ones((2, 1, 7, 5), bool))),
    "mask of three rows": (("mask",), lambda q: (q, q, q, np.ones((3, 1, 7, 7), bool))),
    "mask of five queries": (("mask",), lambda q: (q, q, q, np.ones((5, 7), bool))),
    "query_offset": (("query_offset",), lambda q: (q, q, q, np.zeros(3, "int32"))),
}


@TF
@pytest.mark.parametrize(
    ("case", "implementation"),
    [*((case, "auto") for case in MISMATCHES), ("value of another length", "dense")],
)
def test_sizes_that_do_not_fit_raise_when_the_graph_runs(case, implementation, rng):
    import tensorflow as tf

    names, make = MISMATCHES[case]
    arrays = make(x(rng, 2, 7, 2, 4))
    run = graph(
        functools.partial(attend, names=names, implementation=implementation, causal=True), *arrays
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(*arrays)


@TF
@pytest.mark.parametrize("function", [ops.key_count, ops.visible_keys, ops.attention_weights])
@pytest.mark.parametrize("name", ["key_mask", "segment_ids"])
def test_so_they_do_in_counts_masks_and_weights(name, function, rng):
    import tensorflow as tf

    def call(query, given):
        length = tf.shape(query)[1]
        sizes = (query, query) if function is ops.attention_weights else (length, length)
        return function(*sizes, **{name: given}, causal=True)

    query = x(rng, 2, 7, 2, 4)
    given = np.ones((2, 5), bool if name == "key_mask" else "int32")
    run = graph(call, query, given)
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(query, given)
    assert np.isfinite(to_numpy(tf.cast(run(query[:, :5], given), "float32"))).all()


@TF
@pytest.mark.parametrize("implementation", ["dense", "tiled", "auto"])
@pytest.mark.parametrize("normalizer", NAMES)
def test_sizes_that_fit_give_the_eager_result(normalizer, implementation, rng):
    options = {"normalizer": normalizer, "causal": True, "implementation": implementation}
    names, run = ("key_mask", "query_offset"), None
    for length in (7, 3):
        query, key = x(rng, 2, length, 2, 4), x(rng, 2, length + 2, 2, 4)
        mask, offset = rng.random((2, length + 2)) < 0.7, np.array([2, 1], "int32")
        arrays = query, key, key, mask, offset
        function = functools.partial(attend, names=names, **options)
        run = run or graph(function, *arrays)
        found = to_numpy(run(*arrays))
        assert relative_error(found, to_numpy(function(*arrays))) < 2e-6
        expected = oracle.attention(
            query, key, key, normalizer, causal=True, key_mask=mask, query_offset=offset
        )
        assert relative_error(found, expected) < 2e-6


# In layers


LAYER_MISMATCHES = {
    "value_mask": lambda q: {"value_mask": np.ones((2, 5), bool)},
    "key_mask": lambda q: {"key_mask": np.ones((2, 5), bool)},
    "query_mask": lambda q: {"query_mask": np.ones((2, 5), bool)},
    "query_mask of three rows": lambda q: {"query_mask": np.ones((3, 7), bool)},
    "attention_mask": lambda q: {"attention_mask": np.ones((2, 7, 5), bool)},
    "segment_ids": lambda q: {"segment_ids": np.zeros((2, 5), "int32")},
    "key": lambda q: {"key": q[:, :5]},
    "key of one row": lambda q: {"key": q[:1]},
}


@TF
@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("case", LAYER_MISMATCHES)
def test_layers_compare_them_too(case, scores, rng):
    import tensorflow as tf

    query = x(rng, 2, 7, 4)
    [(name, given)] = LAYER_MISMATCHES[case](query).items()
    layer = layers.MultiHeadAttention(2, 4)
    layer.build(query.shape, query.shape)

    def call(query, given):
        return layer(query, query, **{name: given}, return_attention_scores=scores)

    run = graph(call, query, given)
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(query, given)


@TF
def test_positions_that_do_not_fit_raise(rng):
    import tensorflow as tf

    heads = x(rng, 2, 7, 2, 4)
    frequencies = ops.rotary_frequencies(4)
    for positions in (np.zeros(5, "int32"), np.zeros((2, 5), "int32"), np.zeros((3, 7), "int32")):
        run = graph(lambda h, p: ops.rotary_embedding(h, p, frequencies), heads, positions)
        with pytest.raises(tf.errors.InvalidArgumentError):
            run(heads, positions)
    layer = layers.RotaryEmbedding()
    layer.build(heads.shape)
    offset = np.zeros(3, "int32")
    run = graph(lambda h, o: layer(h, offset=o), heads, offset)
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(heads, offset)


@TF
@pytest.mark.parametrize("axes", [2, (1, 2)])
def test_attended_axes_of_unknown_sizes(axes, rng):
    import tensorflow as tf

    query = x(rng, 2, 3, 5, 4)
    layer = layers.MultiHeadAttention(2, 4, attention_axes=axes)
    layer.build(query.shape, query.shape)
    run = tf.function(
        lambda q, v: layer(q, v, return_attention_scores=True),
        input_signature=[tf.TensorSpec((None, None, None, 4))] * 2,
    )
    for found, expected in zip(
        run(query, query), layer(query, query, return_attention_scores=True), strict=True
    ):
        assert relative_error(to_numpy(found), to_numpy(expected)) < 2e-6
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(query, query[:1])
    if axes == 2:
        with pytest.raises(tf.errors.InvalidArgumentError):
            run(query, query[:, :2])


@TF
@pytest.mark.parametrize("normalizer", NAMES)
def test_layers_of_unknown_sizes_give_the_eager_result(normalizer, rng):
    layer = layers.MultiHeadAttention(
        2, 4, normalizer=normalizer, rotary=layers.RotaryEmbedding(), use_gate=True
    )
    query, mask = x(rng, 2, 7, 4), np.arange(7) < np.array([[4], [7]])
    call = functools.partial(layer, use_causal_mask=True)
    expected = to_numpy(call(query, query, value_mask=mask))
    found = graph(lambda q, m: call(q, q, value_mask=m), query, mask)(query, mask)
    assert relative_error(to_numpy(found), expected) < 2e-6


# Sizes that are known


F = np.zeros((2, 7, 4), "float32")
SHORT = "`value` and `key` must be equal in all sizes but the features.*7, 4.*5, 4"


def symbolic(*shape):
    return keras.Input(shape)


REFUSED = {
    "build": lambda layer: layer.build((2, 7, 4), (2, 7, 4), (2, 5, 4)),
    "build with unknown batch": lambda layer: layer.build((None, 3, 4), (None, 7, 4), (2, 5, 4)),
    "compute_output_shape": lambda layer: layer.compute_output_shape(
        (2, 7, 4), (2, 7, 4), (2, 5, 4)
    ),
    "symbolic": lambda layer: layer(symbolic(7, 4), symbolic(7, 4), symbolic(5, 4)),
    "symbolic query of unknown length": lambda layer: layer(
        symbolic(None, 4), symbolic(7, 4), symbolic(5, 4)
    ),
    "call": lambda layer: layer(F, F, F[:, :5]),
    "scores": lambda layer: layer(F, F, F[:, :5], return_attention_scores=True),
    "training": lambda layer: layer(F, F, F[:, :5], training=True),
}


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_key_of_another_length_than_the_value_is_refused(case, built):
    layer = layers.MultiHeadAttention(2, 4, dropout=0.5)
    if built:
        layer.build(F.shape, F.shape)
    with pytest.raises(ValueError, match=SHORT):
        REFUSED[case](layer)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("scores", [False, True])
def test_a_value_of_another_batch_than_the_query_is_refused(scores, built):
    layer = layers.MultiHeadAttention(2, 4)
    if built:
        layer.build(F.shape, F.shape)
    for value in (F[:1], np.zeros((3, 5, 4), "float32")):
        with pytest.raises(ValueError, match="`query` and `value` must have the same batch size"):
            layer(F, value, return_attention_scores=scores)


def test_unknown_lengths_of_keras_inputs_are_left_to_the_call():
    layer = layers.MultiHeadAttention(2, 4)
    inputs = [symbolic(None, 4), symbolic(None, 4), symbolic(None, 4)]
    model = keras.Model(inputs, layer(*inputs))
    assert model.output_shape == (None, None, 4)
    assert model([F, F[:, :5], F[:, :5]]).shape == (2, 7, 4)
    with pytest.raises(ValueError, match=SHORT):
        model([F, F, F[:, :5]])
