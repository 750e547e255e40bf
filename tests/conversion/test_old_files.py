"""Files of converted models that version 0.1.0 saved load, and predict what they did there."""

from pathlib import Path

import keras
import numpy as np
import pytest
from support import custom_layers  # noqa: F401, as the files name its classes
from support.helpers import predict

from keras_ssattn.conversion.holders import Converted

DATA = Path(__file__).parents[1] / "data" / "0.1.0"
EXPECTED = dict(np.load(DATA / "converted.npz"))
X = np.random.default_rng(3).normal(size=(2, 5, 6)).astype("float32")


@pytest.mark.parametrize("name", EXPECTED)
def test_files_of_0_1_0_predict_the_same(name):
    model = keras.saving.load_model(DATA / f"converted-{name}.keras")
    np.testing.assert_allclose(predict(model, X), EXPECTED[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_such_a_file_gives_is_saved_and_loaded(name, tmp_path):
    model = keras.saving.load_model(DATA / f"converted-{name}.keras")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(predict(again, X), EXPECTED[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "inner"), [("lazy", "inner"), ("around", "layer")])
def test_what_is_inside_keeps_s_when_saved_by_itself(name, inner, tmp_path):
    model = keras.saving.load_model(DATA / f"converted-{name}.keras")
    layer = getattr(model.get_layer("block"), inner)
    assert isinstance(layer, Converted)
    inputs = keras.Input(X.shape[1:])
    alone = keras.Model(inputs, layer(inputs))
    alone.save(tmp_path / "inner.keras")
    loaded = keras.saving.load_model(tmp_path / "inner.keras")
    np.testing.assert_allclose(predict(loaded, X), predict(alone, X), rtol=1e-6, atol=1e-6)
