"""Converted layers that make their attention themselves: how often, by which class, and alone."""

import inspect
import threading

import keras
import numpy as np
import pytest
from support import custom_layers as custom
from support.cases import randomize
from support.helpers import predict, reload

from keras_ssattn.conversion.attention import ConvertedAttention
from keras_ssattn.conversion.holders import Converted, converted_below, foreign_below
from keras_ssattn.layers import SSMax
from keras_ssattn.models import convert_attention

SHAPE = (5, 6)
X = np.random.default_rng(3).normal(size=(2, *SHAPE)).astype("float32")
register = keras.saving.register_keras_serializable("tests")


class NotRegistered(custom.InBuild):
    """Is made by a layer that is registered, so files need not name it."""


@register
class AroundNotRegistered(custom.Lazy):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = NotRegistered(6)


def one_layer(layer):
    inputs = keras.Input(SHAPE, name="inputs")
    return randomize(keras.Model(inputs, layer(inputs)))


def own():
    model = custom.Own()
    model(np.zeros((1, *SHAPE), "float32"))
    return randomize(model)


def with_scales(model):
    converted = convert_attention(model, SSMax(init_s=1.0))
    rng = np.random.default_rng(11)
    for attention in converted_below(converted):
        attention.normalizer.s.assign(rng.uniform(1.0, 3.0, attention.normalizer.s.shape))
    return converted


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def attend(x):
    return keras.layers.MultiHeadAttention(2, 3)(x, x)


MODELS = {
    "keras": (lambda: one_layer(attend), 1),
    "in_constructor": (lambda: one_layer(custom.InConstructor(4)), 1),
    "in_build": (lambda: one_layer(custom.InBuild(6)), 1),
    "in_containers": (lambda: one_layer(custom.InContainers()), 3),
    "lazy": (lambda: one_layer(custom.Lazy()), 1),
    "around": (lambda: one_layer(custom.Around(custom.InConstructor(6))), 1),
    "embedded": (lambda: one_layer(custom.Embedded()), 1),
    "own": (own, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_attention_is_made_once(name, monkeypatch, tmp_path):
    function, count = MODELS[name]
    model = function()
    made = []
    for cls in (
        keras.layers.MultiHeadAttention,
        keras.layers.GroupQueryAttention,
        ConvertedAttention,
    ):

        def init(self, *args, _cls=cls, _init=cls.__init__, **kwargs):
            made.append(_cls)
            _init(self, *args, **kwargs)

        init.__signature__ = inspect.signature(cls.__init__)
        monkeypatch.setattr(cls, "__init__", init)
    converted = convert_attention(model, "softpick")
    assert made == [ConvertedAttention] * count
    made.clear()
    loaded = reload(converted, tmp_path / "model.keras", None)
    assert made == [ConvertedAttention] * count
    assert_close(predict(loaded, X), predict(converted, X))


INNER = {
    "lazy": (lambda: one_layer(custom.Lazy(name="outer")), lambda layer: layer.inner),
    "embedded": (lambda: one_layer(custom.Embedded(name="outer")), lambda layer: layer.inner),
    "around": (
        lambda: one_layer(custom.Around(custom.InConstructor(6), name="outer")),
        lambda layer: layer.layer,
    ),
    "not_registered": (
        lambda: one_layer(AroundNotRegistered(name="outer")),
        lambda layer: layer.inner,
    ),
}


@pytest.mark.parametrize("loads", [0, 1])
@pytest.mark.parametrize("name", INNER)
def test_what_a_converted_layer_holds_keeps_s_when_saved_by_itself(name, loads, tmp_path):
    function, inner = INNER[name]
    model = with_scales(function())
    for _ in range(loads):
        model = reload(model, tmp_path / "whole.keras", None)
    layer = inner(model.get_layer("outer"))
    assert isinstance(layer, Converted)
    inputs = keras.Input(SHAPE)
    alone = keras.Model(inputs, layer(inputs))
    alone.save(tmp_path / "inner.keras")
    with keras.saving.custom_object_scope({"NotRegistered": NotRegistered}):
        loaded = keras.saving.load_model(tmp_path / "inner.keras")
    assert_close(predict(loaded, X), predict(alone, X))


def test_one_class_is_found_by_the_name_in_files(tmp_path):
    layers = [custom.InBuild(6), custom.Around(custom.InConstructor(6)), custom.InContainers()]
    converted = with_scales(randomize(keras.Sequential([keras.Input(SHAPE), *layers])))
    assert keras.saving.get_registered_object("keras_ssattn>Converted") is Converted
    loaded = reload(converted, tmp_path / "model.keras", None)
    for new, old in zip(loaded.layers, layers, strict=True):
        assert isinstance(new, type(old))
        assert isinstance(new, Converted)
    assert_close(predict(loaded, X), predict(converted, X))


def test_classes_of_one_name_are_told_apart_by_their_packages(tmp_path):
    def same(package, base):
        cls = type("Same", (base,), {"__module__": __name__})
        return keras.saving.register_keras_serializable(package)(cls)

    first, second = same("first", custom.InBuild), same("second", custom.Lazy)
    outer = custom.Around(custom.Around(first(6)))
    model = keras.Sequential([keras.Input(SHAPE), outer, custom.Around(second())])
    converted = with_scales(randomize(model))
    loaded = reload(converted, tmp_path / "model.keras", None)
    assert isinstance(loaded.layers[0].layer.layer, first)
    assert isinstance(loaded.layers[1].layer, second)
    assert_close(predict(loaded, X), predict(converted, X))


@pytest.mark.parametrize("cls", [custom.InConstructor, custom.InBuild])
def test_the_class_of_a_converted_layer_makes_converted_layers(cls):
    converted = convert_attention(one_layer(cls(6, name="block")), "softpick")
    layer = type(converted.get_layer("block"))(6)
    layer.build((None, *SHAPE))
    layer(X)
    assert foreign_below(layer) == []
    [attention] = converted_below(layer)
    assert type(attention.normalizer).__name__ == "Softpick"
    assert type(cls(6)) is cls


def test_equal_conversions_give_one_class():
    first, second, third = (
        type(convert_attention(one_layer(custom.InBuild(6, name="block")), x).get_layer("block"))
        for x in ("softmax", "softmax", "softpick")
    )
    assert first is second
    assert first is not third


def test_threads_that_convert_at_once_do_not_mix():
    barrier, found = threading.Barrier(3), {}

    class Waits(custom.Lazy):
        together = False

        def __init__(self, **kwargs):
            if self.together:
                barrier.wait(timeout=60)
            super().__init__(**kwargs)
            if self.together:
                barrier.wait(timeout=60)

    models = {x: one_layer(Waits(name="block")) for x in ("softpick", "softmax", "ssmax")}
    Waits.together = True

    def convert(name):
        converted = convert_attention(models[name], name, 5 if name == "ssmax" else None)
        [attention] = converted_below(converted)
        found[name] = type(attention.normalizer).__name__

    threads = [threading.Thread(target=convert, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"softpick": "Softpick", "softmax": "Softmax", "ssmax": "SSMax"}
    assert "__new__" not in vars(keras.layers.MultiHeadAttention)
    assert "__new__" not in vars(Waits)
    assert type(keras.layers.MultiHeadAttention(2, 3)) is keras.layers.MultiHeadAttention
