"""Keras's own tests of attention, run on this package's layer; see scripts/keras_tests.py."""

import os
import subprocess
import sys

import keras
import pytest
from support import SCRIPTS


@pytest.mark.first
@pytest.mark.backend("torch", "tensorflow", reason="on JAX the same takes minutes of compiling")
@pytest.mark.skipif(
    not keras.version().startswith("3.15."),
    reason=f"the tests are those of Keras 3.15; Keras {keras.version()} has others",
)
def test_keras_tests_fail_only_where_there_is_a_reason():
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "keras_tests.py")],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
