"""`convert_attention` finds attention wherever it is, and what it makes saves and trains."""

import threading

import keras
import numpy as np
import pytest
from support import custom_layers as custom
from support.helpers import reload

from keras_ssattn.conversion.holders import Converted, converted_below, foreign_below
from keras_ssattn.layers import MultiHeadAttention, SSMax
from keras_ssattn.models import convert_attention

SHAPE = (5, 6)


def one_layer(layer):
    inputs = keras.Input(SHAPE, name="inputs")
    return keras.Model(inputs, layer(inputs))


def shared():
    """The same attention twice; one that is also in a model inside."""
    inputs = keras.Input(SHAPE)
    twice = keras.layers.MultiHeadAttention(2, 3, name="twice")
    both = keras.layers.MultiHeadAttention(2, 3, name="both")
    inner_inputs = keras.Input(SHAPE)
    inner = keras.Model(inner_inputs, both(inner_inputs, inner_inputs) + 1.0, name="inner")
    x = twice(inputs, twice(inputs, inputs, use_causal_mask=True))
    return keras.Model(inputs, [inner(inner(x)), both(x, inputs)])


def nested():
    """A functional model in a sequential one in a functional one."""
    inputs = keras.Input(SHAPE)
    x = keras.layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    inner = keras.Model(inputs, keras.layers.BatchNormalization()(x), name="inner")
    middle = keras.Sequential([inner, keras.layers.Dropout(0.1), custom.InBuild(6)], name="middle")
    outer = keras.Input(SHAPE)
    return keras.Model({"x": outer}, {"y": middle(outer)[:, 0], "z": outer * 2.0}, name="outer")


def time_distributed():
    inputs = keras.Input((3, *SHAPE))
    return keras.Model(inputs, keras.layers.TimeDistributed(custom.InBuild(6))(inputs))


def owned():
    model = custom.Own()
    model(np.zeros((1, *SHAPE), "float32"))
    return model


def graph():
    inputs = keras.Input(SHAPE)
    return custom.Graph(inputs, custom.InConstructor(4)(inputs), name="graph")


def mixed():
    """Attention of both kinds: this package's keeps its own normalizer."""
    inputs = keras.Input(SHAPE)
    x = MultiHeadAttention(2, 3, normalizer=SSMax(init_s=1.7))(inputs, inputs)
    return keras.Model(inputs, keras.layers.MultiHeadAttention(2, 3)(x, x))


def lambdas():
    inputs = keras.Input(SHAPE)
    x = keras.layers.MultiHeadAttention(2, 3)(inputs, inputs)
    return keras.Model(inputs, keras.layers.Lambda(lambda t: keras.ops.mean(t, axis=1))(x))


def adapted():
    """Values that no weight has: found by `adapt`, used as tensors."""
    normalization = keras.layers.Normalization()
    normalization.adapt(np.random.default_rng(5).normal(3.0, 2.0, (4, *SHAPE)))
    return keras.Sequential([keras.Input(SHAPE), normalization, custom.InConstructor(4)])


MODELS = {
    "in_constructor": (lambda: one_layer(custom.InConstructor(4)), 1),
    "in_build": (lambda: one_layer(custom.InBuild(6)), 1),
    "in_containers": (lambda: one_layer(custom.InContainers()), 3),
    "lazy": (lambda: one_layer(custom.Lazy()), 1),
    "given": (lambda: one_layer(custom.Given(keras.layers.MultiHeadAttention(2, 3))), 1),
    "wrapper": (lambda: one_layer(custom.Around(custom.InConstructor(6))), 1),
    "time_distributed": (time_distributed, 1),
    "shared": (shared, 2),
    "nested": (nested, 2),
    "own_model": (owned, 2),
    "own_model_inside": (lambda: one_layer(custom.Own()), 2),
    "own_graph": (graph, 1),
    "adapted": (adapted, 1),
    "lambda": (lambdas, 1),
    "mixed": (mixed, 2),
}


def outputs(model, x):
    ys = model({"x": x} if model.name == "outer" else x, training=False)
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(ys)]


def make(name):
    function, count = MODELS[name]
    model = function()
    adapted = {id(w) for x in model.layers if isinstance(x, keras.layers.Normalization)
               for w in x.weights}  # fmt: skip
    rng = np.random.default_rng(7)
    for weight in model.weights:
        if id(weight) not in adapted:  # noise above 0: there are variances among them
            noise = np.abs(rng.normal(0.0, 0.2, weight.shape)).astype("float32")
            weight.assign(keras.ops.convert_to_numpy(weight) + noise)
    x = np.random.default_rng(3).normal(size=(2, *([3] * (name == "time_distributed")), *SHAPE))
    return model, x.astype("float32"), count


def assert_same(model, other, x):
    for actual, expected in zip(outputs(model, x), outputs(other, x), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_converted_wherever_it_is(name):
    model, x, count = make(name)
    converted = convert_attention(model, "softmax")
    assert foreign_below(converted) == []
    assert len(converted_below(converted)) == count
    assert isinstance(converted, type(model))
    assert_same(converted, model, x)
    assert [w.shape for w in converted.weights] == [w.shape for w in model.weights]


# Keras loads no functions, and no layer that models share
@pytest.mark.parametrize(
    "name", sorted({*MODELS} - {"lambda", "shared", "adapted", "in_constructor", "mixed"})
)
def test_a_trained_s_is_saved_and_loaded(name, tmp_path):
    model, x, count = make(name)
    converted = convert_attention(model, SSMax(init_s=0.3, use_bias=True))
    rng = np.random.default_rng(9)
    for attention in converted_below(converted):
        attention.normalizer.s.assign(rng.normal(1.0, 0.5, attention.normalizer.s.shape))
    loaded = reload(converted, tmp_path / "model.keras", None)
    assert foreign_below(loaded) == []
    assert len(converted_below(loaded)) == count
    assert_same(loaded, converted, x)
    fresh = reload(
        loaded,
        tmp_path / "model.weights.h5",
        lambda: convert_attention(model, SSMax(use_bias=True)),
    )
    assert_same(fresh, converted, x)
    assert_same(reload(loaded, tmp_path / "again.keras", None), converted, x)


@pytest.mark.parametrize("name", ["own_model", "nested"])
def test_a_copy_of_it_keeps_s(name):
    model, x, _ = make(name)
    converted = convert_attention(model, SSMax(init_s=2.0))
    clone = keras.models.clone_model(converted)
    clone(x) if name != "nested" else None
    clone.set_weights(converted.get_weights())
    assert foreign_below(clone) == []
    assert_same(clone, converted, x)


@pytest.mark.parametrize("name", ["nested", "own_graph"])
def test_it_trains(name):
    model, x, count = make(name)
    converted = convert_attention(model, train_length=5)
    scales = [attention.normalizer.s for attention in converted_below(converted)]
    before = [keras.ops.convert_to_numpy(s) for s in scales]
    untouched = outputs(model, x)
    converted.compile(keras.optimizers.SGD(0.5), "mse")
    targets = keras.tree.map_structure(keras.ops.zeros_like, converted(x))
    converted.fit({"x": x} if name == "nested" else x, targets, verbose=0)
    assert len(before) == count
    for s, old in zip(scales, before, strict=True):
        assert np.abs(keras.ops.convert_to_numpy(s) - old).min() > 0
    for actual, expected in zip(outputs(model, x), untouched, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_shared_layer_stays_one():
    model, _, _ = make("shared")
    converted = convert_attention(model, train_length=5)
    inner = converted.get_layer("inner")
    assert inner.get_layer("both") is converted.get_layer("both")
    assert len(converted.weights) == len(model.weights) + 2


def test_classes_and_names_stay():
    model, _, _ = make("own_model")
    converted = convert_attention(model, train_length=5)
    assert isinstance(converted, custom.Own)
    assert type(converted).__name__ == "Own"
    assert isinstance(converted, Converted)
    assert converted.who() == "Own(6)"
    nested = convert_attention(make("nested")[0], train_length=5)
    middle = nested.get_layer("middle")
    assert nested.name == "outer"
    assert middle.layers[0].name == "inner"
    assert isinstance(middle.layers[0].get_layer("attention"), MultiHeadAttention)


def test_values_that_no_weight_has_are_carried_over():
    model, x, _ = make("adapted")
    converted = convert_attention(model, "softmax")
    assert_same(keras.Sequential(converted.layers[:1]), keras.Sequential(model.layers[:1]), x)


def test_attention_that_a_layer_holds_stays_frozen():
    model, _, _ = make("own_model")
    model.blocks[0].attention.trainable = False
    converted = convert_attention(model, train_length=5)
    frozen, free = converted_below(converted)
    assert not frozen.trainable_variables
    assert not frozen.normalizer.s.trainable
    assert len(free.trainable_variables) == 9


def test_a_layer_that_two_models_share_keeps_its_flag():
    shared = keras.layers.Dense(6, name="shared")
    attention = keras.layers.MultiHeadAttention(2, 3, name="attention")
    inputs = keras.Input(SHAPE)
    first = keras.Model(inputs, keras.layers.Dense(6)(shared(inputs)))
    x = shared(inputs)
    second = keras.Model(inputs, keras.layers.Dense(6)(attention(x, x)))
    model = keras.Model(inputs, attention(second(first(inputs)), inputs))
    second.trainable = False
    shared.trainable = attention.trainable = True
    converted = convert_attention(model, train_length=5)
    [new] = converted_below(converted)
    expected = [w.path for w in model.trainable_variables]
    paths = [w.path for w in converted.trainable_variables if w is not new.normalizer.s]
    assert sorted(paths) == sorted(expected)
    assert len(paths) == 12
    assert new.normalizer.s.trainable


def test_the_flag_of_a_variable_beside_layers_survives():
    layer = custom.InBuild(6)
    model = one_layer(layer)
    layer.scale.trainable = False
    [copy] = [x for x in convert_attention(model, "softmax").layers if isinstance(x, Converted)]
    assert not copy.scale.trainable
    assert copy.norm.gamma.trainable


def test_what_a_loaded_layer_makes_when_called_can_be_saved_by_itself(tmp_path):
    converted = convert_attention(make("lazy")[0], train_length=5)
    loaded = reload(converted, tmp_path / "model.keras", None)
    [lazy] = [layer for layer in loaded.layers if isinstance(layer, custom.Lazy)]
    assert isinstance(lazy.inner, Converted)
    assert isinstance(lazy.inner, custom.InBuild)


@pytest.mark.backend("tensorflow", reason="a lookup is a part of models on TensorFlow only")
def test_a_vocabulary_is_carried_over():
    lookup = keras.layers.IntegerLookup()
    lookup.adapt(np.array([[17, 4, 17, 99]]))
    inputs = keras.Input((5,), dtype="int64")
    x = keras.layers.Embedding(4, 6)(lookup(inputs))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 3)(x, x))
    assert_same(convert_attention(model, "softmax"), model, np.array([[4, 99, 17, 5, 4]]))


def test_a_file_whose_class_makes_less_attention_is_refused(tmp_path, monkeypatch):
    model, _, _ = make("in_containers")
    convert_attention(model, train_length=5).save(tmp_path / "model.keras")

    def changed(self, depth=1, **kwargs):
        keras.layers.Layer.__init__(self, **kwargs)
        self.depth, self.stack = depth, []
        self.named = {"last": keras.layers.Identity(), "dense": keras.layers.Identity()}

    monkeypatch.setattr(custom.InContainers, "__init__", changed)
    monkeypatch.setattr(custom.InContainers, "call", lambda self, x: self.named["dense"](x))
    with pytest.raises(ValueError, match="must make 3 attention layers.*Received: 0"):
        keras.saving.load_model(tmp_path / "model.keras")


def test_others_get_the_layers_of_keras_all_the_while():
    made = []

    class Meanwhile(custom.InConstructor):
        def __init__(self, **kwargs):
            super().__init__(4)
            thread = threading.Thread(target=lambda: made.append(custom.InConstructor(4)))
            thread.start()
            thread.join()

    converted = convert_attention(one_layer(Meanwhile()), "softmax")
    assert len(converted_below(converted)) == 1
    assert made
    assert {len(foreign_below(layer)) for layer in made} == {1}
    assert type(keras.layers.MultiHeadAttention(2, 3)) is keras.layers.MultiHeadAttention
    assert "__new__" not in vars(keras.layers.MultiHeadAttention)
