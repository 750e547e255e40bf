"""What `record` returns is what the layers did, and it leaves no trace."""

import threading

import keras
import numpy as np
import pytest
from support import cases, oracle
from support.cases import randomize
from support.helpers import predict, relative_error, to_numpy, train, values
from support.language import language_model

import keras_ssattn
from keras_ssattn.analysis import record
from keras_ssattn.layers import MultiHeadAttention, TransformerBlock

# One size for all: JAX compiles every operation anew for another.
B, T, E = 2, 7, 12
CALLS = {layer: layer.call for layer in (MultiHeadAttention, TransformerBlock)}


@pytest.fixture(autouse=True)
def _no_trace():
    yield
    assert {layer: layer.call for layer in CALLS} == CALLS


def sequences(time=T):
    return cases.sequences(B, time, E)


def sequence_model(normalizer="ssmax"):
    return keras_ssattn.build(
        E, E, num_heads=2, num_layers=1, window_size=T, normalizer=normalizer, output_mode="all"
    )


def tokens():
    return cases.tokens(B, T)


OPTIONS = {
    "ssmax": {},
    "softmax": {"normalizer": "softmax"},
    "softpick": {"normalizer": "softpick"},
    "rectified_softpick": {"normalizer": "rectified_softpick"},
    "groups": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    "window": {"sliding_window": 3, "normalizer": "rectified_softpick"},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_weights_and_states_are_those_of_each_block(options):
    model = language_model(padding_id=0, **OPTIONS[options])
    text = tokens()
    text[0, :4] = 0
    recording = record(model, text)
    assert list(recording.attention) == list(recording.hidden) == ["block_1", "block_2"]
    padding = text != 0
    x = model.token_embedding(text)
    for block, name in zip(model.blocks, recording.attention, strict=True):
        weights, mask = recording.attention[name]
        inner = block.attention_norm(x)
        _, expected = block.attention(
            inner,
            inner,
            query_mask=padding,
            value_mask=padding,
            use_causal_mask=True,
            return_attention_scores=True,
        )
        assert relative_error(weights, to_numpy(expected)) < 1e-5
        visible = oracle.visible(
            T, T, B, model.num_heads, key_mask=padding, causal=True, window=model.sliding_window
        )
        np.testing.assert_array_equal(mask, visible & padding[:, None, :, None])
        assert np.all(weights[~mask] == 0.0)
        x = block(x, mask=padding)
        values, hidden_mask = recording.hidden[name]
        assert relative_error(values, to_numpy(x)) < 1e-5
        np.testing.assert_array_equal(hidden_mask, padding)
    # from the last state on, the model gives its logits
    last = keras.ops.convert_to_tensor(recording.hidden["block_2"].values)
    assert relative_error(to_numpy(model._logits(last)), predict(model, text)) < 1e-5


@pytest.mark.parametrize("name", ["softmax", "softpick", "rectified_softpick"])
def test_weights_are_those_of_numpy(name, rng):
    """Grouped heads, a window, dropout, and a mask of each kind, in a functional model."""
    inputs, context = keras.Input((T, E)), keras.Input((5, E))
    attention = MultiHeadAttention(
        2, 6, num_kv_heads=1, normalizer=name, sliding_window=4, dropout=0.5, name="mha"
    )
    given = keras.Input((T, 5), dtype="bool")
    model = keras.Model([inputs, context, given], attention(inputs, context, attention_mask=given))
    randomize(model)
    x, c = rng.normal(size=(B, T, E)), rng.normal(size=(B, 5, E))
    seen = rng.random((B, T, 5)) > 0.3
    query, key, value = (
        to_numpy(dense(keras.ops.convert_to_tensor(a, "float32")))
        for dense, a in zip(attention.projections(), (x, c, c), strict=False)
    )
    expected = oracle.attention(
        query, key, value, name, window=4, mask=seen[:, None], return_weights=True
    )[1]
    weights, mask = record(model, [x, c, seen]).attention["mha"]
    assert relative_error(weights, expected) < 1e-5
    np.testing.assert_array_equal(mask, oracle.visible(T, 5, B, 2, window=4, mask=seen[:, None]))
    assert weights.dtype == "float32"


def test_segments_and_options_of_the_call():
    model = language_model(num_layers=1)
    ids = np.repeat([[0, 0, 0, 1, 1, 2, 2]], B, axis=0)
    weights, mask = record(model, tokens(), segment_ids=ids).attention["block_1"]
    visible = oracle.visible(T, T, B, 2, causal=True, segment_ids=(ids, ids))
    np.testing.assert_array_equal(mask, visible)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


class Decoder(keras.Model):
    """Blocks in a list, one of them twice, with a cross-attention and a layer by itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [TransformerBlock(2, cross_attention=i == 1, name=f"b{i}") for i in (0, 1)]
        self.last = MultiHeadAttention(2, 6, name="last")

    def call(self, inputs):
        x, context = inputs
        x = self.blocks[0](self.blocks[0](x))
        x = self.blocks[1](x, context)
        scores = self.last(x, x, use_causal_mask=True, return_attention_scores=True)[1]
        return keras.ops.reshape(scores, (B, 2, T, T))


def test_subclassed_model_not_built_with_a_layer_that_runs_twice():
    model = Decoder()
    recording = record(model, [sequences(), sequences(5)])
    names = ["b0", "b0@2", "b1", "b1/context_attention", "last"]
    assert list(recording.attention) == names
    assert list(recording.hidden) == ["b0", "b0@2", "b1"]
    assert recording.attention["b1/context_attention"].weights.shape == (B, 2, T, 5)
    x = keras.ops.convert_to_tensor(recording.hidden["b0"].values)
    assert relative_error(to_numpy(model.blocks[0](x)), recording.hidden["b0@2"].values) < 1e-5


class Twin(keras.layers.Layer):
    """A layer that holds a functional model, twice the same in name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [sequence_model(), sequence_model()]

    def call(self, x):
        return self.parts[0](x) + self.parts[1](x)


def test_functional_models_nested_in_layers_of_a_model():
    inputs = keras.Input((T, E))
    model = keras.Model(inputs, keras.layers.Dense(1)(Twin(name="twin")(inputs)))
    recording = record(model, sequences())
    names = ["ssmax_block_1", "ssmax_block_1#2"]
    assert list(recording.attention) == list(recording.hidden) == names


def test_runs_that_only_build_a_layer_are_not_recorded():
    """Keras builds a layer without `build` by running it, on PyTorch with values."""

    class Wrapper(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="wrapper")
            self.block = TransformerBlock(2, name="block")

        def call(self, x):
            return self.block(x)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.wrapper = Wrapper()

        def build(self, input_shape):
            self.built = True

        def call(self, x):
            return self.wrapper(x)

    model = Model()
    model.build((None, T, E))
    recording = record(model, sequences())
    assert list(recording.attention) == list(recording.hidden) == ["wrapper/block"]


def test_a_layer_that_the_model_does_not_hold():
    hidden = TransformerBlock(2, name="block")

    class Caller(keras.layers.Layer):
        def call(self, x):
            return hidden(hidden(x))

    hidden.build((None, T, E))
    recording = record(keras.Sequential([Caller()]), sequences())
    assert list(recording.attention) == list(recording.hidden) == ["block", "block@2"]


@pytest.mark.parametrize("cross_attention", [False, True])
def test_mask_of_a_tensor_and_a_bare_layer(cross_attention):
    """Keras gives the mask by one name to a layer with one input, by another with two."""
    masked = keras.layers.Masking()(np.where(np.arange(T)[:, None] > 2, sequences(), 0.0))
    block = TransformerBlock(2, cross_attention=cross_attention, name="block")
    context = {"context": keras.ops.convert_to_tensor(sequences())} if cross_attention else {}
    recording = record(block, masked, **context)
    assert next(iter(recording.attention)) == "attention"
    seen = np.arange(T) > 2
    np.testing.assert_array_equal(recording.hidden["block"].mask, [seen, seen])
    expected = np.broadcast_to(seen[:, None] & seen, (B, 2, T, T))
    np.testing.assert_array_equal(recording.attention["attention"].mask, expected)


def test_attention_with_a_cache_in_a_model():
    class Step(keras.Model):
        def __init__(self):
            super().__init__()
            self.block = TransformerBlock(2, causal=True, name="block")
            self.block.build((None, None, E))

        def call(self, x):
            cache = self.block.make_cache(B, 9)
            y, cache = self.block(x, cache=cache, mask=[np.arange(T) > 1] * B)
            return self.block(x[:, :1], cache=cache, cache_index=T)[0] + y

    recording = record(Step(), sequences())
    real = np.array([False] * 2 + [True] * 7)
    visible = oracle.visible(1, 9, B, 2, key_mask=[real] * B, causal=True, query_offset=T)
    np.testing.assert_array_equal(recording.attention["block@2"].mask, visible)
    np.testing.assert_allclose(recording.attention["block@2"].weights.sum(-1), 1.0, rtol=1e-5)
    assert recording.hidden["block@2"].values.shape == (B, 1, E)
    assert not recording.hidden["block"].mask[:, :2].any()


def test_compiled_and_trained_model_is_left_as_it_is():
    model = keras.Sequential([sequence_model(), keras.layers.Dense(1)])
    x = sequences()
    train(model, x, x[..., :1])
    before, outputs = values(model.variables), model.predict(x, verbose=0)
    layer = model.layers[0].get_layer("ssmax_block_1").attention
    attributes = set(vars(layer))
    recording = record(model, x)
    assert set(vars(layer)) == attributes
    after = values(model.variables)
    assert all(np.array_equal(before[path], after[path]) for path in before)
    np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)
    again = record(model, x).attention
    for name, (weights, _) in recording.attention.items():
        np.testing.assert_array_equal(again[name].weights, weights)
    assert train(model, x, x[..., :1])[0] > 0  # and it trains on


def test_recorded_states_are_copies():
    """What a model adds to a state in place, as PyTorch does, is not in it."""

    class Added(keras.Model):
        def __init__(self):
            super().__init__()
            self.block = TransformerBlock(2, name="block")

        def call(self, x):
            h = self.block(x)
            h += 100.0
            return h

    model = Added()
    states = record(model, sequences()).hidden["block"].values
    assert relative_error(states, predict(model, sequences()) - 100.0) < 1e-4


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_is_recorded_in_float32(dtype):
    model = language_model(num_layers=1, dtype=dtype)
    recording = record(model, tokens())
    weights, _ = recording.attention["block_1"]
    assert weights.dtype == recording.hidden["block_1"].values.dtype == "float32"
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=0.02)


def test_an_error_in_the_model_leaves_no_trace():
    class Raises(keras.layers.Layer):
        def call(self, x):
            if raises:
                raise RuntimeError("in the middle")
            return x

    raises = False
    model = keras.Sequential([sequence_model(), Raises()])
    model.build((None, T, E))
    raises = True
    with pytest.raises(RuntimeError, match="in the middle"):
        record(model, sequences())
    assert {layer: layer.call for layer in CALLS} == CALLS
    raises = False
    assert len(record(model, sequences()).attention) == 1


def test_calls_of_other_threads_are_not_recorded():
    other = sequence_model()

    class Busy(keras.layers.Layer):
        def call(self, x):
            thread = threading.Thread(target=lambda: results.append(predict(other, x)))
            thread.start()
            thread.join()
            return x

        def compute_output_shape(self, x_shape):  # so that `call` only runs with values
            return x_shape

    results = []
    model = keras.Sequential([Busy(), sequence_model(normalizer="softpick")])
    recording = record(model, sequences())
    assert list(recording.attention) == ["softpick_block_1"]
    np.testing.assert_array_equal(results[-1], predict(other, sequences()))


def test_recordings_of_several_threads_take_turns():
    models = [sequence_model(normalizer=n) for n in ("ssmax", "softpick", "softmax")]
    found = {}
    start = threading.Barrier(len(models))

    def work(i):
        start.wait(timeout=60)
        found[i] = [list(record(models[i], sequences()).attention) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"{n}_block_1" for n in ("ssmax", "softpick", "softmax")]
    assert found == {i: [[name]] * 3 for i, name in enumerate(names)}


def test_a_model_without_attention_is_refused():
    model = keras.Sequential([keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"`model` must run .*MultiHeadAttention.*in which none"):
        record(model, sequences())


@pytest.mark.backend("tensorflow", "jax", reason="a compiled function of PyTorch has values")
def test_attention_in_a_compiled_function_is_refused(backend):
    block = TransformerBlock(2, name="block")
    block.build((None, None, E))

    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.block = block
            self.built = True

        def call(self, x):
            if backend == "jax":
                import jax

                return jax.jit(lambda x: self.block(x))(x)
            import tensorflow as tf

            return tf.function(lambda x: self.block(x))(x)

    with pytest.raises(ValueError, match="must run its attention layers eagerly. Received: block"):
        record(Compiled(), sequences())
