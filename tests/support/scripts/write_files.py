"""Writes the models of support/saved.py to files, with what they predict.

KERAS_BACKEND=tensorflow PYTHONPATH=tests python write_files.py tests/data/VERSION

`tests/data/0.1.0` was written by version 0.1.0, with Keras 3.15.1 on TensorFlow, and is never
written again: it shows that later versions load what 0.1.0 saved. A version that adds options
writes a folder of its own. The script refuses to write to a folder that has files. Not on
PyTorch: compiled models saved there name optimizers that Keras has there only.

`models.zip` has NAME.keras and NAME.weights.h5 of each model, as Keras writes them: an eighth of
their size. `predictions.npz` has what a model is given and gives, NAME/input_0, ... and
NAME/output, and the losses of the trained one as it goes on. Outputs are those of float64 where
the model has no dtype of its own, so that loading one adds no second rounding to the first.
"""

import re
import sys
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
from support.helpers import predict
from support.saved import MODELS, go_on

import keras_ssattn


def write(name, folder):
    """Writes the files of a model, and returns its inputs and outputs by name."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(7)
    saved, inputs = MODELS[name], MODELS[name].inputs()
    model = saved.prepare(saved.make(), 7)
    model.save(folder / f"{name}.keras")
    model.save_weights(folder / f"{name}.weights.h5")
    arrays = {f"{name}/input_{i}": x for i, x in enumerate(inputs)}
    given = inputs[0] if len(inputs) == 1 else list(inputs)
    output = predict(model, given)
    exact = (
        output if name.endswith(("int8", "bfloat16")) else predict(in_float64(model, saved), given)
    )
    np.testing.assert_allclose(output, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())
    arrays[f"{name}/output"] = exact
    if name.endswith("trained"):
        arrays[f"{name}/losses"] = np.array(go_on(model), "float32")
    return arrays


def in_float64(model, saved):
    keras.utils.clear_session()
    keras.config.set_dtype_policy("float64")
    exact = saved.prepare(saved.make(), 7)
    keras.config.set_dtype_policy("float32")
    exact.set_weights(model.get_weights())
    return exact


def unwritten(folder):
    """The package's public classes that Keras can load and that no file has."""
    registered = {x for x in keras.saving.get_custom_objects() if x.startswith("keras_ssattn>")}
    for file in folder.glob("*.keras"):
        with zipfile.ZipFile(file) as archive:
            config = archive.read("config.json").decode()
        registered -= set(re.findall(r'"registered_name": "([^"]*)"', config))
    public = {*keras_ssattn.layers.__all__, *keras_ssattn.models.__all__}
    return {x for x in registered if x.partition(">")[2] in public}


def write_all(folder):
    """Writes every model to files in a new folder, and these to `folder`."""
    arrays = {}
    with tempfile.TemporaryDirectory() as loose:
        for name in MODELS:
            arrays |= write(name, Path(loose))
        if missing := unwritten(Path(loose)):
            sys.exit(f"no file has {missing}")
        with zipfile.ZipFile(folder / "models.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(Path(loose).iterdir()):
                archive.write(file, file.name)
    np.savez_compressed(folder / "predictions.npz", **arrays)


if __name__ == "__main__":
    [folder] = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} has files, which are never written again")
    write_all(folder)
    print(f"{len(MODELS)} models of keras_ssattn {keras_ssattn.__version__}")
