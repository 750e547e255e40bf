"""Padding goes unnoticed in models, `keras_ssattn`'s own and those of users."""

import keras
import numpy as np
import pytest
from support.cases import FEATURES, NORMALIZERS, TIME, randomize, sequence_model, sequences
from support.helpers import predict, train

import keras_ssattn
from keras_ssattn.layers import MultiHeadAttention, TransformerBlock


class Subclassed(keras.Model):
    """A user's model around a `keras_ssattn.build`, with padding masked out."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.masking = keras.layers.Masking()
        self.core = sequence_model(window_size=None, output_mode="all")
        self.pool = keras.layers.GlobalAveragePooling1D()
        self.head = keras.layers.Dense(3)

    def call(self, inputs, training=None):
        x = self.core(self.masking(inputs), training=training)
        return self.head(self.pool(x))


def functional():
    inputs = keras.Input((None, FEATURES))
    x = keras.layers.Masking()(inputs)
    x = sequence_model(window_size=None, output_mode="all")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def sequential():
    return keras.Sequential(
        [
            keras.layers.Masking(),
            sequence_model(window_size=None, output_mode="all"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3),
        ]
    )


def pad(x, left, right):
    return np.pad(x, ((0, 0), (left, right), (0, 0)))


@pytest.mark.parametrize("make", [functional, sequential, Subclassed])
def test_models_of_the_user_train_and_ignore_padding(make):
    model = make()
    x, y = sequences(8, 5), np.ones((8, 3), "float32")
    losses = train(model, pad(x, 0, 2), y, learning_rate=0.1, epochs=2)
    assert losses[1] < losses[0]
    np.testing.assert_allclose(predict(model, pad(x, 0, 6)), predict(model, x), atol=1e-5)


@pytest.mark.parametrize("normalizer", ["ssmax_bias", "softpick_scaled", "rectified_softpick"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("output_mode", ["last_timestep", "mean_pool", "all"])
def test_padding_does_not_change_the_output(normalizer, side, output_mode):
    core = sequence_model(normalizer, window_size=None, output_mode=output_mode)
    model = randomize(keras.Sequential([keras.layers.Masking(), core]))
    x = sequences(3, 5)
    left, right = (4, 0) if side == "left" else (0, 4)
    y = predict(model, pad(x, left, right))
    if output_mode == "all":
        y = y[:, left : left + 5]
    np.testing.assert_allclose(y, predict(model, x), atol=1e-5)


def padded_attention(normalizer):
    inputs = keras.Input((TIME, FEATURES))
    x = keras.layers.Masking()(inputs)
    x = MultiHeadAttention(2, 3, normalizer=NORMALIZERS[normalizer]())(x, x)
    return keras.Model(inputs, keras_ssattn.layers.MeanPool()(x))


def padded_sequence_model(normalizer):
    core = sequence_model(normalizer, window_size=None, output_mode="mean_pool")
    return keras.Sequential([keras.layers.Masking(), core])


@pytest.mark.parametrize(
    ("make", "normalizer"),
    [
        (padded_attention, "softmax"),
        (padded_attention, "ssmax_bias"),
        (padded_attention, "softpick_scaled"),
        (padded_attention, "rectified_softpick"),
        (padded_sequence_model, "ssmax_bias"),
    ],
)
def test_fully_padded_rows_train_and_predict_finite(make, normalizer):
    model = make(normalizer)
    x = sequences(4)
    x[1] = 0.0
    y = predict(model, x)
    loss = train(model, x, np.ones_like(y), learning_rate=0.1)
    assert np.isfinite(loss).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())
    y = predict(model, x)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[1], 0.0)


@pytest.mark.parametrize(
    "part",
    [
        lambda x: MultiHeadAttention(2, 3)(x, x),
        lambda x: TransformerBlock(2)(x),
        lambda x: keras_ssattn.layers.FeedForward(5)(x),
        lambda x: keras_ssattn.layers.Softpick()(x),
        lambda x: sequence_model(window_size=None, output_mode="all")(x),
    ],
    ids=["attention", "block", "feed_forward", "softpick", "sequence_model"],
)
def test_mask_is_passed_on(part):
    inputs = keras.Input((None, FEATURES))
    x = part(keras.layers.Masking()(inputs))
    model = randomize(keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(x)))
    x = sequences(3, 5)
    np.testing.assert_allclose(predict(model, pad(x, 0, 2)), predict(model, x), atol=1e-5)
