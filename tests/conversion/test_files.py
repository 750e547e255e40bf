"""What `convert_attention` makes of layers of a user's own, in files and in scopes of Keras's."""

import keras
import numpy as np
import pytest
from support import custom_layers as custom
from support.cases import randomize
from support.helpers import predict

from keras_ssattn.conversion.holders import converted_below
from keras_ssattn.layers import SSMax
from keras_ssattn.models import convert_attention

SHAPE = (5, 6)
X = np.random.default_rng(3).normal(size=(2, *SHAPE)).astype("float32")


def one_layer(layer):
    inputs = keras.Input(SHAPE)
    return randomize(keras.Model(inputs, layer(inputs)))


def with_scales(model):
    converted = convert_attention(model, SSMax(init_s=1.0))
    rng = np.random.default_rng(11)
    for attention in converted_below(converted):
        attention.normalizer.s.assign(rng.uniform(1.0, 3.0, attention.normalizer.s.shape))
    return converted


def reload(model, folder, **options):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras", **options)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda layer: layer, custom.Around], ids=["plain", "inside"])
@pytest.mark.parametrize("scope", [False, True])
def test_custom_objects_are_found(wrap, scope, tmp_path):
    model = one_layer(wrap(custom.Unregistered(6)))
    assert_close(predict(convert_attention(model, "softmax"), X), predict(model, X))
    converted = with_scales(model)
    objects = {"Unregistered": custom.Unregistered}
    if scope:
        with keras.saving.custom_object_scope(objects):
            loaded = reload(converted, tmp_path)
    else:
        loaded = reload(converted, tmp_path, custom_objects=objects)
    assert_close(predict(loaded, X), predict(converted, X))


def test_a_scope_around_the_conversion_is_kept():
    def double(x):
        return 2.0 * x

    dense = custom.Around(keras.layers.Dense(6, activation=double))
    model = keras.Sequential([keras.Input(SHAPE), dense, custom.InBuild(6)])
    with keras.saving.custom_object_scope({"double": double}):
        converted = convert_attention(model, "softmax")
        assert keras.saving.get_registered_object("double") is double
    assert_close(predict(converted, X), predict(model, X))


@pytest.mark.parametrize("twice", [False, True])
def test_a_configuration_in_another_is_loaded(twice, tmp_path):
    converted = with_scales(one_layer(custom.Embedded()))
    loaded = reload(converted, tmp_path)
    loaded = reload(loaded, tmp_path) if twice else loaded
    assert len(converted_below(loaded)) == 1
    assert_close(predict(loaded, X), predict(converted, X))


def test_what_was_converted_before_keeps_its_normalizer(tmp_path):
    inner = convert_attention(one_layer(custom.InBuild(6, name="block")), "softpick")
    layers = [custom.Around(inner.get_layer("block")), custom.InConstructor(6)]
    model = keras.Sequential([keras.Input(SHAPE), *layers])
    converted = convert_attention(randomize(model), SSMax(init_s=2.0))
    names = ["Softpick", "SSMax"]
    assert [type(x.normalizer).__name__ for x in converted_below(converted)] == names
    loaded = reload(converted, tmp_path)
    assert [type(x.normalizer).__name__ for x in converted_below(loaded)] == names
    assert_close(predict(loaded, X), predict(converted, X))


def test_float_masks_are_true_where_they_are_not_0(tmp_path):
    inputs, mask = keras.Input(SHAPE), keras.Input((5, 5))
    x = keras.layers.MultiHeadAttention(2, 3)(inputs, inputs, attention_mask=mask)
    x = keras.layers.GroupQueryAttention(5, 4, 2)(x, x, attention_mask=mask)
    model = randomize(keras.Model([inputs, mask], custom.FloatMask()(x)))
    seen = np.random.default_rng(7).integers(0, 2, (2, 5, 5)) | np.eye(5, dtype=int)
    arrays = [X, seen.astype("float32")]
    converted = convert_attention(model, "softmax")
    expected = predict(model, arrays)
    assert_close(predict(converted, arrays), expected)
    assert_close(predict(reload(converted, tmp_path), arrays), expected)
