"""One process tests one backend, named by KERAS_BACKEND."""

import gc
import os

import pytest
from support import BACKENDS, combinations

if os.environ.get("KERAS_BACKEND") not in BACKENDS:
    raise pytest.UsageError(
        f"KERAS_BACKEND must be set to one of {BACKENDS} to run the tests. "
        f"Received: {os.environ.get('KERAS_BACKEND')!r}"
    )

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis
import keras
import numpy as np

ON_TORCH = keras.backend.backend() == "torch"
EXAMPLES = 60 if ON_TORCH else 20  # the others compile each anew
COMBINATIONS = os.environ.get("KERAS_SSATTN_COMBINATIONS", "all" if ON_TORCH else "some")
hypothesis.settings.register_profile(
    "suite", max_examples=EXAMPLES, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("suite")


def pytest_collection_finish():
    _freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _kept_objects():
    """Keras collects garbage wherever a layer is quantized, and JAX keeps what it compiles."""
    yield
    _freeze()


def _freeze():
    """What is there stays: it need not be walked again in every collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    """`@pytest.mark.backend("jax")` is for tests of what the other backends do not have.

    Those marked `first` come first, so that the workers end at the same time. Of parameters that
    are crossed, PyTorch runs all combinations; where most of the time goes into compilers, some
    are run, in which each value of each parameter occurs.
    """
    if COMBINATIONS == "some" and not any("::" in argument for argument in config.args):
        left_out = {id(item) for item in combinations.to_leave_out(items)}
        config.hook.pytest_deselected(items=[x for x in items if id(x) in left_out])
        items[:] = [x for x in items if id(x) not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    for item in items:
        for marker in item.iter_markers("backend"):
            if not marker.args or not set(marker.args) <= set(BACKENDS):
                raise pytest.UsageError(f"{item.nodeid}: no backends: {marker.args}")
            if keras.backend.backend() not in marker.args:
                reason = f"for {' and '.join(marker.args)} only"
                if "reason" in marker.kwargs:
                    reason += f": {marker.kwargs['reason']}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def backend() -> str:
    return keras.backend.backend()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1729)


@pytest.fixture(autouse=True)
def _clean_keras():
    """Fixed seeds, and no dtype policy or layer name left over from another test."""
    keras.utils.set_random_seed(1729)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)
    keras.utils.clear_session(free_memory=False)
