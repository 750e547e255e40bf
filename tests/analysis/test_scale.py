"""The learned s and b, by layer and head."""

import keras
import numpy as np
import pytest
from support.cases import randomize, sequence_model, sequences
from support.helpers import FORMATS, reload, values
from support.language import language_model

from keras_ssattn.analysis import learned_scale, record
from keras_ssattn.layers import (
    LogLengthScale,
    MultiHeadAttention,
    Softpick,
    SSMax,
    TransformerBlock,
)


def test_s_of_each_block_and_head():
    model = language_model(num_heads=4, normalizer=SSMax(use_bias=True))
    scales, biases = learned_scale(model), learned_scale(model, "b")
    assert list(scales) == list(biases) == ["block_1", "block_2"]
    for block, name in zip(model.blocks, scales, strict=True):
        normalizer = block.attention.normalizer
        np.testing.assert_array_equal(scales[name], keras.ops.convert_to_numpy(normalizer.s.value))
        np.testing.assert_array_equal(biases[name], keras.ops.convert_to_numpy(normalizer.b.value))
        assert scales[name].shape == (4,)
        assert scales[name].dtype == "float32"
        assert len(set(scales[name])) == 4


def test_every_normalizer_with_a_length_scale_and_no_other():
    x = inputs = keras.Input((7, 6))
    softpick = Softpick(length_scale=LogLengthScale(0.3))
    for name, normalizer in [("scaled", softpick), ("plain", "softmax"), ("fixed", "ssmax")]:
        x = MultiHeadAttention(2, 3, normalizer=normalizer, name=name)(x, x)
    x = SSMax(init_s=0.5, name="alone")(x)
    model = keras.Model(inputs, x)
    model.get_layer("fixed").trainable = False
    found = learned_scale(model)
    assert {name: x.tolist() for name, x in found.items()} == {
        "scaled": [pytest.approx(0.3)] * 2,
        "fixed": [pytest.approx(0.2)] * 2,
        "alone": 0.5,
    }
    assert learned_scale(model, "b") == {}


def test_names_are_those_of_a_recording():
    model = keras.Sequential([sequence_model(num_layers=2), keras.layers.Dense(1)])
    names = list(record(model, sequences(2)).attention)
    assert list(learned_scale(model)) == names == ["ssmax_block_1", "ssmax_block_2"]


def test_two_models_with_the_same_names_are_told_apart():
    inputs = keras.Input((7, 6))
    towers = [randomize(sequence_model(name=f"tower_{seed}"), seed) for seed in (1, 2)]
    model = keras.Model(inputs, towers[0](inputs) + towers[1](inputs))
    found = learned_scale(model)
    assert list(found) == ["ssmax_block_1", "ssmax_block_1#2"]
    for tower, scales in zip(towers, found.values(), strict=True):
        np.testing.assert_array_equal(scales, next(iter(learned_scale(tower).values())))


class Pairs(keras.Model):
    """Holds two layers of each name, and runs the second of them first, and twice."""

    def __init__(self):
        super().__init__()
        self.plain = TransformerBlock(2, normalizer="softmax", name="block")
        self.block = TransformerBlock(2, normalizer=SSMax(init_s=2.0), name="block")
        self.decoder = MultiHeadAttention(2, 3, normalizer=SSMax(init_s=3.0), name="att")
        self.encoder = MultiHeadAttention(2, 3, normalizer=SSMax(init_s=0.0), name="att")

    def call(self, x):
        x = x + self.encoder(self.encoder(x, x), x)
        return self.plain(self.block(self.decoder(x, x)))


def test_names_of_layers_of_one_path_are_those_of_a_recording():
    """In the order in which the model holds them, whichever runs first or has an s."""
    model = Pairs()
    recording = record(model, sequences(6))
    names = ["att#2", "att#2@2", "att", "block#2", "block"]
    assert list(recording.attention) == names
    assert list(recording.hidden) == ["block#2", "block"]
    found = learned_scale(model)
    assert {name: s.tolist() for name, s in found.items()} == {
        "block#2": [2.0, 2.0],
        "att": [3.0, 3.0],
        "att#2": [0.0, 0.0],
    }
    uniform = [name for name, x in recording.attention.items() if np.ptp(x.weights) < 1e-6]
    assert uniform == ["att#2", "att#2@2"]  # the layer whose s is 0


LOOKS = {
    "learned_scale": lambda model, x: learned_scale(model),
    "record": lambda model, x: {k: m.weights for k, m in record(model, x).attention.items()},
}


@pytest.mark.parametrize("name", LOOKS)
def test_during_fit_of_another_model_that_one_has_the_weights(name, backend):
    """On JAX, where the variables of both have no values until it is synchronized."""
    model, x, found = sequence_model(name="inner"), sequences(6), []
    outer = keras.Sequential([model, keras.layers.Dense(1)])

    def look(*_, **__):
        if backend == "jax":
            with pytest.raises(RuntimeError, match=r"`jax_state_sync\(\)` of it.* named 'inner'"):
                LOOKS[name](model, x)
            outer.jax_state_sync()
        found.append(LOOKS[name](model, x)["ssmax_block_1"])

    before = LOOKS[name](model, x)["ssmax_block_1"]
    outer.compile(keras.optimizers.SGD(0.5), "mse")
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    outer.fit(x, x[..., :1], verbose=0, callbacks=[callback])
    assert np.abs(found[0] - before).max() > 1e-4
    np.testing.assert_allclose(LOOKS[name](model, x)["ssmax_block_1"], found[0], rtol=1e-6)


@pytest.mark.parametrize("suffix", FORMATS)
def test_names_and_values_survive_saving(suffix, tmp_path):
    model = language_model(normalizer="ssmax", name="first")
    loaded = reload(model, tmp_path / f"model{suffix}", lambda: language_model(name="second"))
    expected = learned_scale(model)
    found = learned_scale(loaded)
    assert list(found) == list(expected)
    np.testing.assert_array_equal(list(found.values()), list(expected.values()))


def test_scales_are_copies():
    model = language_model()
    before = learned_scale(model)
    kept = {name: x.copy() for name, x in before.items()}
    for weight in model.weights:
        weight.assign(keras.ops.zeros(weight.shape))
    before["block_1"][:] = 5.0  # nor does the model change with them
    assert values(model.blocks[0].attention.normalizer.weights).popitem()[1].tolist() == [0.0, 0.0]
    np.testing.assert_array_equal(before["block_2"], kept["block_2"])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`parameter` must be one of \('s', 'b'\). Received"):
        learned_scale(language_model(), "c")
    with pytest.raises(ValueError, match="`model` must be built.*MultiHeadAttention named 'x'"):
        learned_scale(MultiHeadAttention(2, 3, name="x"))
