"""Saves models, or loads those that each backend saved. Run by test_cross_backend.py.

KERAS_BACKEND=jax python cross_backend.py save FOLDER
KERAS_BACKEND=jax python cross_backend.py load FOLDER BACKEND ...
KERAS_BACKEND=jax python cross_backend.py logits FOLDER ...
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
from support.cases import MODELS, language_model, randomize, sequence_model, sequences, tokens

BACKEND = keras.config.backend()


def make(name):
    return language_model() if name == "language_model" else sequence_model(name)


def outputs(model):
    """What a model computes; of a language model also the tokens that it generates."""
    if not hasattr(model, "generate"):
        return keras.ops.convert_to_numpy(model(sequences(), training=False))
    text = tokens()
    logits = keras.ops.convert_to_numpy(model(text, training=False))
    new = np.array(model.generate(text, 5, temperature=0.7, seed=1))
    return np.concatenate([logits.ravel(), new.ravel()])


def save(folder):
    keras.utils.set_random_seed(0)
    for name in MODELS:
        model = randomize(make(name))
        model.save(folder / f"{BACKEND}-{name}.keras")
        model.save_weights(folder / f"{BACKEND}-{name}.weights.h5")
        np.save(folder / f"{BACKEND}-{name}.npy", outputs(model))


def load(folder, saved_by):
    differences = {}
    for backend in saved_by:
        for name in MODELS:
            file = folder / f"{backend}-{name}"
            expected = np.load(f"{file}.npy")
            whole = keras.saving.load_model(f"{file}.keras")
            weights = make(name)
            weights.load_weights(f"{file}.weights.h5")
            for kind, model in (("keras", whole), ("weights", weights)):
                found = float(np.abs(outputs(model) - expected).max())
                differences[f"{backend}-{name}-{kind}"] = found
    (folder / f"loaded-{BACKEND}.json").write_text(json.dumps(differences))


def logits(folder):
    """Writes what the model in a folder predicts."""
    model = keras.saving.load_model(folder / "model.keras")
    np.save(folder / f"{BACKEND}.npy", keras.ops.convert_to_numpy(model(tokens())))


if __name__ == "__main__":
    role, folder, *others = sys.argv[1:]
    if role == "save":
        save(Path(folder))
    elif role == "load":
        load(Path(folder), others)
    else:
        for name in (folder, *others):
            logits(Path(name))
