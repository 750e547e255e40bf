"""Options of attention that are Keras's own, and `implementation=` in layers and models."""

import functools

import keras
import numpy as np
import pytest
from support.cases import HAS_GATE, NAMES, implementations, randomize, tokens
from support.derivatives import assert_twice_differentiable
from support.helpers import compiled, relative_error, to_numpy, twins

from keras_ssattn.layers import MultiHeadAttention, SSMax, TransformerBlock
from keras_ssattn.models import CausalLM
from keras_ssattn.ops._attention import choice

SHAPES = (2, 5, 8), (2, 7, 6)


@pytest.fixture
def inputs(rng):
    return [rng.normal(size=shape).astype("float32") for shape in SHAPES]


# flash_attention


def test_flash_attention_is_had_or_refused(inputs):
    """None of the tests runs on a GPU that has it for these inputs."""
    layer = MultiHeadAttention(2, 3, normalizer="softmax", flash_attention=True)
    with pytest.raises((ValueError, RuntimeError), match="(?i)flash|fused"):
        layer(*inputs)
    layer = MultiHeadAttention(2, 3, normalizer="softpick", flash_attention=True)
    with pytest.raises(ValueError, match="flash_attention=True serves softmax.*softpick"):
        layer(*inputs)


def test_flash_attention_of_none_and_false_asks_for_nothing(inputs):
    layers = [MultiHeadAttention(2, 3, flash_attention=x) for x in (None, False)]
    for layer in layers:
        layer.build(*SHAPES)
    layers[1].set_weights(layers[0].get_weights())
    found, expected = (to_numpy(layer(*inputs)) for layer in layers)
    np.testing.assert_array_equal(found, expected)
    assert [x.get_config()["flash_attention"] for x in layers] == [None, False]


def test_flash_attention_with_what_it_does_not_do_is_refused_as_in_keras(inputs):
    for cls in (keras.layers.MultiHeadAttention, MultiHeadAttention):
        with pytest.raises(ValueError, match="Dropout is not supported when flash attention"):
            cls(2, 3, dropout=0.1, flash_attention=True)
        with pytest.raises(ValueError, match="Returning attention scores is not supported"):
            cls(2, 3, flash_attention=True)(*inputs, return_attention_scores=True)


# Regularizers


@pytest.mark.parametrize(
    "options",
    [
        {"activity_regularizer": keras.regularizers.L2(0.1)},
        {"activity_regularizer": "l1", "kernel_regularizer": "l2", "bias_regularizer": "l1"},
    ],
    ids=["activity", "all"],
)
def test_regularizers_give_the_losses_of_keras(options, inputs):
    gate = {"use_gate": True} if HAS_GATE else {}
    theirs = keras.layers.MultiHeadAttention(2, 3, **options, **gate)
    ours = MultiHeadAttention(2, 3, normalizer="softmax", **options, **gate)
    twins(theirs, ours, *SHAPES)
    losses = []
    for layer in (theirs, ours):
        layer(*inputs)
        losses.append(sorted(float(x) for x in layer.losses))
    assert len(losses[0]) == (4 + len(gate)) * (1 if len(options) == 1 else 3)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert min(losses[0]) > 0


def test_an_activity_regularizer_is_part_of_what_fit_lowers(inputs):
    losses = []
    for regularizer in (None, keras.regularizers.L2(10.0)):
        x = keras.Input((7, 6))
        layer = MultiHeadAttention(
            2, 3, activity_regularizer=regularizer, kernel_initializer="ones", name="attention"
        )
        model = keras.Model(x, layer(x, x))
        model.compile(keras.optimizers.SGD(0.0), "mse")
        losses.append(model.evaluate(inputs[1], inputs[1], verbose=0))
    assert losses[1] > 2 * losses[0]


# Configs of Keras


def test_a_config_of_keras_makes_our_layer(inputs):
    theirs = keras.layers.MultiHeadAttention(
        2,
        3,
        value_dim=4,
        dropout=0.2,
        use_bias=False,
        output_shape=(3, 2),
        attention_axes=(1,),
        kernel_initializer="he_normal",
        kernel_regularizer="l2",
        activity_regularizer="l1",
        bias_constraint="non_neg",
        seed=3,
        name="some_name",
    )
    config = theirs.get_config()
    ours = MultiHeadAttention.from_config({**config, "normalizer": "softmax"})
    theirs.build(*SHAPES)
    ours.build(*SHAPES)
    ours.set_weights(theirs.get_weights())
    expected = to_numpy(theirs(*inputs))
    np.testing.assert_allclose(to_numpy(ours(*inputs)), expected, rtol=1e-5, atol=2e-6)
    kept = ours.get_config()
    differing = {name for name, value in config.items() if kept[name] != value}
    assert differing <= {"dtype"}
    config = keras.layers.MultiHeadAttention(2, 3).get_config()
    assert type(MultiHeadAttention.from_config(config).normalizer) is SSMax  # the default


# implementation=


def attention(implementation, normalizer):
    x = keras.Input((7, 6))
    options = {"normalizer": normalizer, "implementation": implementation, "num_kv_heads": 1}
    return keras.Model(x, MultiHeadAttention(2, 3, **options)(x, x, use_causal_mask=True))


def block(implementation, normalizer):
    x = keras.Input((7, 6))
    options = {"normalizer": normalizer, "implementation": implementation, "causal": True}
    return keras.Model(x, TransformerBlock(2, cross_attention=True, **options)(x, x[:, :5]))


def language(implementation, normalizer):
    return CausalLM(13, 8, 1, 2, normalizer=normalizer, implementation=implementation, padding_id=0)


KINDS = {"attention": attention, "block": block, "language": language}


@pytest.mark.parametrize(
    ("kind", "normalizer"),
    [*(("attention", name) for name in NAMES), ("block", "ssmax"), ("language", "softpick")],
)
def test_implementations_agree(kind, normalizer, rng, monkeypatch):
    monkeypatch.setattr("keras_ssattn.ops._attention.tiled.band.QUERY_TILE", 4)
    monkeypatch.setattr("keras_ssattn.ops._attention.tiled.band.KEY_TILE", 3)
    x = tokens(2, 7) if kind == "language" else rng.normal(size=(2, 7, 6)).astype("float32")
    models = {i: KINDS[kind](i, normalizer) for i in implementations(normalizer)}
    randomize(models["dense"])
    for name, model in models.items():
        model.set_weights(models["dense"].get_weights())
        parts = [x for x in model._flatten_layers() if isinstance(x, MultiHeadAttention)]
        assert {part.implementation for part in parts} == {name}
        if kind == "language":
            assert model.get_config()["implementation"] == name
    expected, *others = (to_numpy(compiled(model)(x)) for model in models.values())
    for found in others:
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["dense", "tiled"])
def test_an_implementation_is_what_runs(name, inputs, monkeypatch):
    taken = []
    for other, original in list(choice.IMPLEMENTATIONS.items()):
        spy = lambda *args, other=other, run=original: taken.append(other) or run(*args)  # noqa: E731
        monkeypatch.setitem(choice.IMPLEMENTATIONS, other, spy)
    MultiHeadAttention(2, 3, implementation=name)(*inputs)
    assert taken == [name]


@pytest.mark.parametrize("normalizer", ["ssmax", "sink_softmax"])
def test_dense_attention_can_be_differentiated_twice(normalizer, rng):
    layer = MultiHeadAttention(2, 3, normalizer=normalizer, implementation="dense")
    x = rng.normal(size=(1, 4, 6)).astype("float32")
    layer.build(x.shape, x.shape)
    attend = functools.partial(layer, use_causal_mask=True)
    assert_twice_differentiable(lambda x: attend(x, x), x, rng)


@pytest.mark.parametrize("wrong", ["flash", "Dense", None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_unknown_implementations_are_refused(kind, wrong):
    with pytest.raises(ValueError, match="`implementation` must be one of.*'tiled'.*Received"):
        KINDS[kind](wrong, "ssmax")


def test_fused_is_refused_where_it_cannot_be_had(inputs):
    for normalizer in NAMES:
        if "fused" not in implementations(normalizer):
            layer = MultiHeadAttention(
                2, 3, normalizer=normalizer, implementation="fused", sliding_window=2
            )
            with pytest.raises(ValueError, match='implementation="fused" serves'):
                layer(*inputs)
