"""`use_gate=True`: Keras's gated attention, in files, in blocks and with a cache."""

import functools

import keras
import numpy as np
import pytest
from support.cases import HAS_GATE, attention_model, randomize, sequences, tokens
from support.helpers import FORMATS, compiled, predict, relative_error, reload, to_numpy, twins
from support.language import PROMPTS, assert_greedy, language_model

from keras_ssattn.layers import MultiHeadAttention, RotaryEmbedding, TransformerBlock

SHAPES = (2, 5, 8), (2, 7, 6)
needs_gate = pytest.mark.skipif(not HAS_GATE, reason="this Keras has no gates")


@needs_gate
def test_equals_keras(rng):
    options = {"use_bias": False, "value_dim": 5, "output_shape": 3}
    theirs = keras.layers.MultiHeadAttention(2, 3, use_gate=True, **options)
    ours = MultiHeadAttention(2, 3, normalizer="softmax", use_gate=True, **options)
    twins(theirs, ours, *SHAPES)
    assert [w.shape for w in ours.weights] == [w.shape for w in theirs.weights]
    inputs = [rng.normal(size=shape).astype("float32") for shape in SHAPES]
    mask = rng.random((2, 5, 7)) < 0.6
    mask[..., 0] = True
    for masks in ({}, {"attention_mask": mask}, {"use_causal_mask": True}):
        expected, scores = theirs(*inputs, return_attention_scores=True, **masks)
        found, our_scores = ours(*inputs, return_attention_scores=True, **masks)
        np.testing.assert_allclose(to_numpy(our_scores), to_numpy(scores), rtol=1e-5, atol=1e-6)
        for output in (found, ours(*inputs, **masks)):
            np.testing.assert_allclose(to_numpy(output), to_numpy(expected), rtol=1e-5, atol=2e-6)


@needs_gate
def test_a_file_of_keras_loads_and_its_config_too(tmp_path):
    inputs = keras.Input((7, 6))
    layer = keras.layers.MultiHeadAttention(2, 3, use_gate=True, name="attention")
    theirs = randomize(keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True)))
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours = attention_model("softmax", use_gate=True)
    ours.load_weights(tmp_path / "theirs.weights.h5")
    expected = predict(theirs, sequences(3))
    np.testing.assert_allclose(predict(ours, sequences(3)), expected, rtol=1e-5, atol=1e-6)
    assert MultiHeadAttention.from_config(layer.get_config()).use_gate


def test_a_gate_is_the_sigmoid_of_the_query_for_each_feature_of_each_head(rng):
    query, value = (rng.normal(size=shape).astype("float32") for shape in SHAPES)
    gated = MultiHeadAttention(2, 3, value_dim=4, use_gate=True)
    plain = MultiHeadAttention(2, 3, value_dim=4, output_shape=(2, 4), use_bias=False)
    for layer in (gated, plain):
        layer.build(*SHAPES)
    randomize(gated)
    for name in ("query_dense", "key_dense", "value_dense"):
        ours = getattr(gated, name)
        getattr(plain, name).kernel.assign(ours.kernel)
        ours.bias.assign(np.zeros(ours.bias.shape))
    plain.normalizer.set_weights(gated.normalizer.get_weights())
    heads = np.eye(8).reshape(2, 4, 2, 4)
    plain.output_dense.kernel.assign(heads)
    gate = gated.projections()[2]
    logits = np.einsum("bte,ehd->bthd", query, to_numpy(gate.kernel)) + to_numpy(gate.bias)
    expected = to_numpy(compiled(plain)(query, value)) / (1 + np.exp(-logits))
    expected = np.einsum("bthd,hde->bte", expected, to_numpy(gated.output_dense.kernel))
    expected += to_numpy(gated.output_dense.bias)
    assert relative_error(to_numpy(compiled(gated)(query, value)), expected) < 2e-6


def block_model(use_gate, cross_attention=False):
    x = keras.Input((7, 6))
    options = {"use_gate": use_gate, "cross_attention": cross_attention}
    block = TransformerBlock(2, name="block", **options)
    return keras.Model(x, block(x, x[:, :5]) if cross_attention else block(x))


MODELS = {
    "attention": (lambda gate: attention_model("ssmax", use_gate=gate), sequences(3)),
    "language": (lambda gate: language_model(num_layers=1, use_gate=gate), tokens()),
}


@pytest.mark.parametrize("name", MODELS)
def test_files_with_a_gate_load_where_there_is_one(name, tmp_path):
    make, x = MODELS[name]
    models = {gate: randomize(make(gate)) for gate in (True, False)}
    expected = predict(models[True], x)
    for ending in FORMATS:
        loaded = reload(models[True], tmp_path / f"model{ending}", lambda: make(True))
        np.testing.assert_allclose(predict(loaded, x), expected, rtol=1e-6, atol=1e-6)
    models[False].save_weights(tmp_path / "plain.weights.h5")
    with pytest.raises(ValueError, match="(?s)name=gate.*expected 0 variables"):
        models[False].load_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="variables, but received 0 variables"):
        models[True].load_weights(tmp_path / "plain.weights.h5")


def test_a_block_gates_all_its_attention():
    model = block_model(True, cross_attention=True)
    block = model.get_layer("block")
    assert block.attention.use_gate
    assert block.context_attention.use_gate
    assert len(block.projections()) == len(block_model(False, True).layers[-1].projections()) + 2
    assert block.get_config()["use_gate"] is True


def test_a_cache_gives_what_the_whole_pass_does(rng):
    x = rng.normal(size=(2, 6, 8)).astype("float32")
    block = TransformerBlock(4, num_kv_heads=2, causal=True, use_gate=True,
                             rotary=RotaryEmbedding())  # fmt: skip
    block.build(x.shape)
    randomize(block)
    expected = to_numpy(compiled(block)(x))
    cache, found = block.make_cache(2, 8), []
    for part in (slice(0, 4), slice(4, 6)):
        step = compiled(functools.partial(block, cache_index=part.start))
        y, cache = step(x[:, part], cache=cache)
        found.append(to_numpy(y))
    assert relative_error(np.concatenate(found, 1), expected) < 2e-6


def test_a_gated_model_generates_what_it_does_without_a_cache():
    model = language_model(num_layers=1, use_gate=True)
    assert_greedy(model, PROMPTS, model.generate(PROMPTS, 4))
