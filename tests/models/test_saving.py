"""Models survive `.keras` files and files of weights, and go on from them."""

import keras
import numpy as np
import pytest
from support.cases import (
    FEATURES,
    NORMALIZERS,
    TIME,
    attention_model,
    randomize,
    sequence_model,
    sequences,
)
from support.helpers import FORMATS, assert_survives, predict

from keras_ssattn.layers import FeedForward, MultiHeadAttention, SSMax, TransformerBlock

X = sequences(3)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_attention_survives_saving(normalizer, ending, tmp_path):
    assert_survives(lambda: attention_model(normalizer), tmp_path / f"model{ending}", X)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("normalizer", ["ssmax_bias", "softpick_scaled"])
def test_sequence_model_survives_saving(normalizer, ending, tmp_path):
    assert_survives(lambda: sequence_model(normalizer), tmp_path / f"model{ending}", X)


@keras.saving.register_keras_serializable("keras_ssattn_tests")
class Subclassed(keras.Model):
    """A user's model whose `build` is Keras's."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.masking = keras.layers.Masking()
        self.block = TransformerBlock(2, normalizer=SSMax(use_bias=True), causal=True)
        self.core = sequence_model("softpick_scaled")
        self.head = keras.layers.Dense(3)

    def call(self, inputs, training=None):
        x = self.block(self.masking(inputs), training=training)
        return self.head(self.core(x, training=training))


def subclassed():
    model = Subclassed()
    model(X)
    return model


def functional():
    inputs = keras.Input((TIME, FEATURES))
    x = keras.layers.Masking()(inputs)
    x = TransformerBlock(2, normalizer="rectified_softpick", name="block")(x)
    return keras.Model(inputs, keras.layers.Dense(3)(sequence_model("ssmax_bias")(x)))


def sequential():
    return keras.Sequential(
        [
            keras.Input((TIME, FEATURES)),
            keras.layers.Masking(),
            sequence_model("ssmax_bias"),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("make", [functional, sequential, subclassed])
def test_models_of_the_user_survive_saving(make, ending, tmp_path):
    x = X.copy()
    x[1, 3:] = 0.0
    assert_survives(make, tmp_path / f"model{ending}", x)


def test_mixed_precision_model_survives_saving(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = randomize(sequence_model("ssmax_bias"))
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert {w.dtype for w in loaded.weights} == {"float32"}
    assert keras.utils.standardize_dtype(loaded(X).dtype) == "bfloat16"
    np.testing.assert_array_equal(predict(loaded, X), predict(model, X))


def test_training_continues_from_a_file(tmp_path):
    y = sequences(3, seed=4)
    options = dict(epochs=1, shuffle=False, verbose=0)
    model = attention_model("ssmax_bias")
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(X, y, **options)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.fit(X, y, **options).history["loss"]
    np.testing.assert_allclose(loaded.fit(X, y, **options).history["loss"], expected, rtol=1e-6)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["ssmax", "attention", "block", "feed_forward"])
def test_frozen_layer_is_frozen_when_loaded_and_can_be_thawed(frozen, tmp_path):
    inputs = keras.Input((TIME, FEATURES))
    outputs = {
        "ssmax": lambda x: SSMax(use_bias=True)(x),
        "attention": lambda x: MultiHeadAttention(2, 3)(x, x),
        "block": lambda x: TransformerBlock(2)(x),
        "feed_forward": lambda x: FeedForward(5)(x),
    }[frozen](inputs)
    model = keras.Model(inputs, outputs)
    paths = {w.path for w in model.trainable_weights}
    model.layers[-1].trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.trainable_weights == []
    loaded.layers[-1].trainable = True
    assert {w.path for w in loaded.trainable_weights} == paths
