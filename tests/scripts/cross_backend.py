"""Saves models, or loads those that each backend saved. Run by test_cross_backend.py.

KERAS_BACKEND=jax python cross_backend.py save FOLDER
KERAS_BACKEND=jax python cross_backend.py load FOLDER BACKEND ...
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
from cases import NORMALIZERS, randomize, sequence_model, sequences

BACKEND = keras.config.backend()


def save(folder):
    for name in NORMALIZERS:
        model = randomize(sequence_model(name))
        model.compile("adam", "mse")
        model.fit(sequences(), np.zeros((8, 10), "float32"), verbose=0)
        model.save(folder / f"{BACKEND}-{name}.keras")
        model.save_weights(folder / f"{BACKEND}-{name}.weights.h5")
        np.save(folder / f"{BACKEND}-{name}.npy", model.predict(sequences(), verbose=0))


def load(folder, saved_by):
    differences = {}
    for backend in saved_by:
        for name in NORMALIZERS:
            file = folder / f"{backend}-{name}"
            expected = np.load(f"{file}.npy")
            whole = keras.saving.load_model(f"{file}.keras")
            weights = sequence_model(name)
            weights.load_weights(f"{file}.weights.h5")
            for kind, model in (("keras", whole), ("weights", weights)):
                found = model.predict(sequences(), verbose=0)
                differences[f"{backend}-{name}-{kind}"] = float(np.abs(found - expected).max())
    (folder / f"loaded-{BACKEND}.json").write_text(json.dumps(differences))


if __name__ == "__main__":
    role, folder, *backends = sys.argv[1:]
    save(Path(folder)) if role == "save" else load(Path(folder), backends)
