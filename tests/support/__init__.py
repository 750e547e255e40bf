"""What the tests share: the oracle, helpers, models, data, and scripts that they launch."""

import pathlib

BACKENDS = ("tensorflow", "jax", "torch")
TESTS = pathlib.Path(__file__).parents[1]
ROOT = TESTS.parent
SCRIPTS = TESTS / "support" / "scripts"  # run with TESTS in PYTHONPATH
