"""The retrofit runs at a small size, compares on the same bytes, and reports what it measured."""

import importlib.util
import json
import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import keras
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "retrofit.py"


@pytest.fixture(scope="module")
def retrofit():
    spec = importlib.util.spec_from_file_location("retrofit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["retrofit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_reports_every_model_at_every_length(tmp_path, backend):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "retrofit.json").read_text())
    assert results["backend"] == backend
    [losses] = results["losses"]
    tuned = [f"{name}, tuned at {n}" for n in (8, 32) for name in ("original", "converted")]
    assert list(losses) == ["original", "converted", *tuned]
    for name, by_length in losses.items():
        assert list(by_length) == ["8", "32", "64"]
        for loss in by_length.values():
            assert math.isfinite(loss)
            assert f"| {name} |" in done.stdout
            assert f" {loss:.3f} " in done.stdout
    start = 8 / math.lgamma(9)
    for name, [s] in results["s"][0].items():  # of one layer, by head
        assert name.startswith("converted, tuned")
        assert len(s) == 2
        assert all(0 < abs(x - start) < 0.1 for x in s)


def test_no_file_is_in_both_parts(retrofit):
    train, test = retrofit.read_text()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sizes = [file.stat().st_size for file in files]
    assert len(test) == sum(sizes[9::10])
    assert len(train) + len(test) == sum(sizes)
    assert bytes(test[: sizes[9]].astype("uint8")) == files[9].read_bytes()


def test_the_same_bytes_are_scored_at_every_length(retrofit):
    """A model that expects each byte to come again: its loss tells which bytes are scored."""
    settings = retrofit.SMALL
    rng = np.random.default_rng(3)
    windows = rng.integers(0, 256, (5, 65)).astype("int32")
    windows[:2, -settings.scored :] = windows[:2, -settings.scored - 1 : -settings.scored]
    tokens = keras.Input((None,), dtype="int32")
    again = keras.layers.Embedding(
        256, 256, embeddings_initializer=keras.initializers.Identity(9.0)
    )
    losses = retrofit.measure(keras.Model(tokens, again(tokens)), windows, settings)
    hit = windows[:, 1:] == windows[:, :-1]
    expected = np.log(np.exp(9.0) + 255) - 9.0 * hit[:, -settings.scored :].mean()
    assert set(losses) == {"8", "32", "64"}
    assert hit[:, -settings.scored :].mean() >= 0.4
    np.testing.assert_allclose(list(losses.values()), expected, rtol=1e-5)
