"""Checkpoints that do not fit are refused; those of Keras's own attention load."""

import zipfile

import h5py
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
from support.helpers import FORMATS, predict

from keras_ssattn.layers import TransformerBlock

X = sequences(3)

UNFIT = [
    pytest.param(saved, loaded, f"expected {wanted} variables, but received {got} variables",
                 id=f"{saved}-{loaded}")
    for saved, got, loaded, wanted in [
        ("softmax", 0, "ssmax", 1),
        ("ssmax", 1, "softmax", 0),
        ("softpick", 0, "softpick_scaled", 1),
        ("softpick_scaled", 1, "softpick", 0),
        ("rectified_softpick", 0, "ssmax_bias", 2),
        ("ssmax_bias", 2, "rectified_softpick", 0),
        ("ssmax", 1, "ssmax_bias", 2),
        ("ssmax_bias", 2, "ssmax", 1),
    ]
]  # fmt: skip


def save(model, path):
    model.save(path) if path.suffix == ".keras" else model.save_weights(path)
    return path


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(("saved", "loaded", "message"), UNFIT)
def test_weights_with_s_or_b_too_many_or_too_few_do_not_load(
    saved, loaded, message, ending, tmp_path
):
    path = save(attention_model(saved), tmp_path / f"model{ending}")
    with pytest.raises(ValueError, match=message):
        attention_model(loaded).load_weights(path)


class Around(keras.Model):
    """A user's subclassed model, of which Keras tries the layers under several names."""

    def __init__(self, normalizer):
        super().__init__()
        self.blocks = [TransformerBlock(2, normalizer=NORMALIZERS[normalizer]())]

    def call(self, inputs):
        return self.blocks[0](inputs)


@pytest.mark.parametrize(("saved", "loaded", "message"), UNFIT)
def test_subclassed_model_refuses_s_or_b_too_many_or_too_few(saved, loaded, message, tmp_path):
    models, x = {}, sequences(2)
    for name in (saved, loaded):
        models[name] = Around(name)
        models[name](x)
        save(models[name], tmp_path / f"{name}.weights.h5")
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            models[loaded].load_weights(tmp_path / f"{saved}.weights.h5")
        models[loaded].load_weights(tmp_path / f"{loaded}.weights.h5")


@pytest.mark.parametrize(("saved", "loaded", "message"), UNFIT)
def test_keras_file_with_s_or_b_too_many_or_too_few_does_not_load(saved, loaded, message, tmp_path):
    weights = save(sequence_model(saved, name="core"), tmp_path / "weights.keras")
    config = save(sequence_model(loaded, name="core"), tmp_path / "config.keras")
    with (
        zipfile.ZipFile(weights) as has_weights,
        zipfile.ZipFile(config) as has_config,
        zipfile.ZipFile(tmp_path / "both.keras", "w") as both,
    ):
        both.writestr("config.json", has_config.read("config.json"))
        both.writestr("metadata.json", has_config.read("metadata.json"))
        both.writestr("model.weights.h5", has_weights.read("model.weights.h5"))
    with pytest.raises(ValueError, match=message):
        keras.saving.load_model(tmp_path / "both.keras")


@pytest.mark.parametrize(("saved", "loaded", "message"), UNFIT)
def test_set_weights_with_s_or_b_too_many_or_too_few(saved, loaded, message):
    weights = attention_model(saved).get_weights()
    model = attention_model(loaded)
    with pytest.raises(
        ValueError, match=f"list of length {len(weights)}.*expecting {len(model.weights)} weights"
    ):
        model.set_weights(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "key_norm"),
        ({"ffn_type": "gated", "ffn_expansion": 4}, "gate"),
        ({"cross_attention": True}, "context_attention_norm"),
    ],
    ids=["qk_norm", "gate", "cross_attention"],
)
def test_weights_of_parts_that_the_model_lacks_do_not_load(options, message, tmp_path):
    def model(**options):
        x = keras.Input((TIME, FEATURES))
        arguments = (x, x) if "cross_attention" in options else (x,)
        return keras.Model(x, TransformerBlock(2, **options)(*arguments))

    path = save(model(**options), tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match=f"(?s)name={message}.*expected 0 variables"):
        model().load_weights(path)
    path = save(model(), tmp_path / "plain.weights.h5")
    with pytest.raises(ValueError, match="variables, but received 0 variables"):
        model(**options).load_weights(path)


def test_file_whose_s_was_removed_does_not_load(tmp_path):
    path = save(attention_model("ssmax"), tmp_path / "model.weights.h5")
    with h5py.File(path, "r+") as file:
        (name,) = [name for name in walk(file) if "length_scale" in name]
        del file[name]
    with pytest.raises(ValueError, match="expected 1 variables, but received 0 variables"):
        attention_model("ssmax").load_weights(path)


def walk(file):
    """The paths of the arrays in an HDF5 file."""
    names = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names


# Weights of Keras's own attention


def keras_attention_model(value_dim=None, **options):
    inputs = keras.Input((TIME, FEATURES))
    attention = keras.layers.MultiHeadAttention(2, 3, value_dim, name="attention", **options)
    return keras.Model(inputs, attention(inputs, inputs, use_causal_mask=True))


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    "options", [{}, {"use_bias": False}, {"output_shape": (4, 5)}, {"value_dim": 3}], ids=str
)
def test_weights_of_keras_attention_load(options, ending, tmp_path):
    theirs = randomize(keras_attention_model(**options))
    path = save(theirs, tmp_path / f"model{ending}")
    ours = attention_model("softmax", **options)
    ours.load_weights(path)
    np.testing.assert_allclose(predict(ours, X), predict(theirs, X), rtol=1e-5, atol=1e-6)


def test_weights_of_keras_attention_do_not_load_without_s(tmp_path):
    path = save(keras_attention_model(), tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="expected 1 variables, but received 0 variables"):
        attention_model("ssmax").load_weights(path)
