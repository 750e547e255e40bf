"""A model saved on any backend loads on any other and predicts the same: all pairs installed.

With KERAS_SSATTN_ALL_BACKENDS=1 all three must be installed. Each backend works in processes of
its own, so this file does the same whichever KERAS_BACKEND it is run under.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support import BACKENDS, SCRIPTS, TESTS
from support.cases import MODELS
from support.processes import KINDS, train

pytestmark = pytest.mark.first
INSTALLED = [b for b in BACKENDS if importlib.util.find_spec(b)]


def run(backend, *arguments):
    subprocess.run(
        [sys.executable, str(SCRIPTS / "cross_backend.py"), *arguments],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(TESTS)},
        check=True,
    )


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """The largest difference of outputs, by loading backend and by file."""
    folder = tmp_path_factory.mktemp("models")
    for backend in INSTALLED:
        run(backend, "save", str(folder))
    for backend in INSTALLED:
        run(backend, "load", str(folder), *INSTALLED)
    return {b: json.loads((folder / f"loaded-{b}.json").read_text()) for b in INSTALLED}


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """Of models that two processes saved, by kind of training and by loading backend."""
    kinds = [kind for kind, backend in KINDS.items() if backend in INSTALLED]
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in kinds}
    for kind, folder in folders.items():
        codes, written = train(kind, folder)
        assert not any(codes), written
    for backend in INSTALLED:
        run(backend, "logits", *map(str, folders.values()))
    return {kind: {b: np.load(x / f"{b}.npy") for b in INSTALLED} for kind, x in folders.items()}


def test_all_backends_are_here_where_they_must_be():
    if os.environ.get("KERAS_SSATTN_ALL_BACKENDS") == "1":
        assert set(INSTALLED) == set(BACKENDS)
    assert INSTALLED


@pytest.mark.parametrize("kind", ["keras", "weights"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), list(itertools.product(INSTALLED, repeat=2)), ids=lambda b: b
)
def test_predicts_the_same(saved_by, loaded_by, model, kind, differences):
    assert differences[loaded_by][f"{saved_by}-{model}-{kind}"] <= 1e-5


@pytest.mark.parametrize("kind", [kind for kind, backend in KINDS.items() if backend in INSTALLED])
def test_what_two_processes_saved_predicts_the_same(kind, logits):
    for array in logits[kind].values():
        np.testing.assert_allclose(array, logits[kind][KINDS[kind]], atol=1e-5)
