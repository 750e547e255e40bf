"""What earlier versions saved loads and predicts the same; see support/scripts/write_files.py."""

import json
import zipfile

import keras
import numpy as np
import pytest
from support import TESTS
from support.cases import randomize
from support.helpers import predict
from support.saved import MODELS, go_on

import keras_ssattn

DATA = TESTS / "data"
# Of earlier versions: what this one saves and loads, the other tests of files say.
PREDICTIONS = {
    file.parent.name: np.load(file)
    for file in sorted(DATA.glob("*/predictions.npz"))
    if file.parent.name != keras_ssattn.__version__
}
FILES = [
    pytest.param(version, name, id=f"{version}-{name}")
    for version, arrays in PREDICTIONS.items()
    for name in sorted({key.split("/")[0] for key in arrays})
]
# Of the largest output. In float32 it is the rounding of sums in another order.
TOLERANCE = {
    "bfloat16": 2.0**-6,  # its rounding is 2^-9 of a number, several times in a row
    "int8": 1e-2,  # an input at the boundary of two of 255 steps falls to either side
}


def test_this_version_has_files_of_every_model():
    arrays = np.load(DATA / keras_ssattn.__version__ / "predictions.npz")
    assert {key.split("/")[0] for key in arrays} == {*MODELS}
    assert "0.1.0" in PREDICTIONS


def tolerance(name):
    return TOLERANCE.get(name.split("_")[-1], 1e-6)


def extract(version, name, folder):
    with zipfile.ZipFile(DATA / version / "models.zip") as archive:
        return archive.extract(name, folder)


def load(version, name, folder):
    path = extract(version, f"{name}.keras", folder)
    with zipfile.ZipFile(path) as archive:
        writer = json.loads(archive.read("metadata.json"))["keras_version"]
    if release(keras.version()) < release(writer):
        pytest.skip(f"Keras {keras.version()} does not load what Keras {writer} has written")
    return keras.saving.load_model(path)


def release(version):
    return tuple(int(number) for number in version.split(".")[:2])


def assert_predicts(model, version, name):
    arrays = PREDICTIONS[version]
    inputs = [arrays[key] for key in arrays if key.startswith(f"{name}/input_")]
    actual = predict(model, inputs[0] if len(inputs) == 1 else inputs)
    expected = arrays[f"{name}/output"]
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / max(1.0, np.abs(expected).max())
    assert error <= tolerance(name)


@pytest.mark.parametrize(("version", "name"), FILES)
def test_model_predicts_the_same(version, name, tmp_path):
    model = load(version, name, tmp_path)
    assert_predicts(model, version, name)


def new_model(version, name, folder):
    """A model like the one in the file, with weights of its own.

    SSMax's "shift" formula may be gone from the constructor: such a model is made of the config
    in its file.
    """
    if name.endswith("_shift"):
        return randomize(load(version, name, folder), 8)
    return MODELS[name].prepare(MODELS[name].make(), 8)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize(("version", "name"), FILES)
def test_weights_load_into_a_new_model(version, name, tmp_path):
    model = new_model(version, name, tmp_path)
    model.load_weights(extract(version, f"{name}.weights.h5", tmp_path))
    assert_predicts(model, version, name)


@pytest.mark.parametrize("version", PREDICTIONS)
def test_training_goes_on(version, tmp_path):
    model = load(version, "attention_trained", tmp_path)
    assert int(model.optimizer.iterations) == 2
    np.testing.assert_allclose(
        go_on(model), PREDICTIONS[version]["attention_trained/losses"], rtol=1e-5
    )


@pytest.mark.parametrize("version", PREDICTIONS)
def test_settings_are_those_of_the_file(version, tmp_path):
    theta = load(version, "language_theta", tmp_path)
    assert {block.attention.rotary.theta for block in theta.blocks} == {777.0}
    frozen = load(version, "attention_frozen", tmp_path)
    assert frozen.get_layer("attention").trainable is False
    assert frozen.trainable_weights == []
    int8 = load(version, "attention_int8", tmp_path)
    assert [w.dtype for w in int8.weights if w.name == "kernel"] == ["int8"] * 4
    layer = load(version, "attention_bfloat16", tmp_path).get_layer("attention")
    assert (layer.compute_dtype, layer.variable_dtype) == ("bfloat16", "float32")
    assert load(version, "language_remat", tmp_path).remat is True
