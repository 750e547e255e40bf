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

import pytest
from support import BACKENDS, SCRIPTS, TESTS
from support.cases import MODELS

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
