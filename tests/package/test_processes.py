"""Two processes train a language model as one does, and none of them waits for a dead one."""

import json

import keras
import numpy as np
import pytest
from support.processes import BATCH, KILLED, KINDS, STEPS, make_compiled, text, train

KINDS_HERE = [pytest.param(x, marks=pytest.mark.backend(backend)) for x, backend in KINDS.items()]


pytestmark = pytest.mark.first


@pytest.fixture(scope="module")
def alone():
    """The model that one process trains; the losses, and the weights after each step."""
    model, losses, weights = make_compiled(), [], []
    for step in range(STEPS):
        losses += model.fit(*text(step), batch_size=BATCH, verbose=0).history["loss"]
        weights.append([np.array(x) for x in model.get_weights()])  # PyTorch gives views
    return model, losses, weights


def same(weights, expected):
    return all(np.allclose(*pair, atol=1e-4) for pair in zip(weights, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_two_processes_train_as_one(kind, alone, tmp_path):
    codes, written = train(kind, tmp_path)
    assert not any(codes), written
    model, losses, weights = alone
    found = json.loads((tmp_path / "losses.json").read_text())
    np.testing.assert_allclose(found, losses, atol=1e-4)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert same(loaded.get_weights(), weights[-1])
    assert not same(loaded.get_weights(), weights[-2])
    tokens, _ = text(STEPS)
    expected = keras.ops.convert_to_numpy(model(tokens))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loaded(tokens)), expected, atol=1e-4)
    np.testing.assert_array_equal(loaded.generate(tokens, 5), model.generate(tokens, 5))
    assert not list(tmp_path.glob("part*"))


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_killed_process_ends_the_others(kind, alone, tmp_path):
    codes, written = train(kind, tmp_path, "killed")
    assert all(codes), (codes, written)
    assert not (tmp_path / "losses.json").exists()
    loaded = keras.saving.load_model(tmp_path / "model.keras").get_weights()
    # of the step before, unless the first process was ended before it had written it
    assert any(same(loaded, weights) for weights in alone[2][:KILLED])
