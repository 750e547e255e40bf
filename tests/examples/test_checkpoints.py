"""The example of released models runs at a small size and reports what it measured."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "checkpoints.py"
SCALES = ["temperature by position", "none", "SSMax, s log n", "Qwen's log n"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("checkpoints", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["checkpoints"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_reports_every_length_scale_at_every_position(tmp_path, backend):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", "--backends", backend, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "checkpoints.json").read_text())
    assert results["backend"] == backend
    assert (tmp_path / "checkpoints.png").stat().st_size > 10000
    expected = {backend}
    if backend == "torch" and importlib.util.find_spec("transformers"):
        expected.add("transformers")
    assert results["checks"].keys() == expected
    for name, found in results["checks"].items():
        assert found["logits"] < 5e-5
        assert found["tokens_equal"]
        assert f"{name}: logits within" in done.stdout
    [found] = results["runs"]
    assert list(found["losses"]) == list(found["texts"]) == SCALES
    for name, by_time in found["losses"].items():
        assert list(by_time) == ["at once", "tuned"]
        for when, losses in by_time.items():
            assert len(losses) == 8
            assert all(map(math.isfinite, losses))
            mean = np.mean(losses[4:])  # of the last column
            assert f"| {name}, {when} |" in done.stdout
            assert f" {mean:.3f} ({mean:.3f} to {mean:.3f}) |\n" in done.stdout
        assert by_time["tuned"] != by_time["at once"]
    [s] = found["s"]["SSMax, s log n"]  # of one layer, by head
    assert all(0 < abs(x - 8 / math.lgamma(9)) < 0.1 for x in s)


def test_losses_are_at_the_positions_of_their_tokens(example):
    """A model that expects each token to come again, and windows where some do."""
    settings = dataclasses.replace(example.SMALL, bin_size=1)
    windows = np.random.default_rng(3).integers(0, 40, (5, 33)).astype("int32")
    windows[:, 20:25] = windows[:, 19:20]
    tokens = keras.Input((None,), dtype="int32")
    again = keras.layers.Embedding(40, 40, embeddings_initializer=keras.initializers.Identity(9.0))
    losses = example.measure(keras.Model(tokens, again(tokens)), windows, settings)
    hit = windows[:, 1:] == windows[:, :-1]
    assert hit[:, 19:24].all()
    expected = np.log(np.exp(9.0) + 39) - 9.0 * hit.mean(0)
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_columns_are_ranges_of_positions(example):
    positions = np.arange(1, 257).reshape(-1, 16)
    for name, part in example.columns(example.Settings()).items():
        first, last = positions[part].min(), positions[part].max()
        assert name == f"{first} to {last}"


def test_windows_start_with_the_token_of_starts(example):
    text = np.arange(1, 50)
    windows = example.draw_windows(text, 200, 8, np.random.default_rng(0))
    assert windows.shape == (200, 9)
    assert (windows[:, 0] == example.START).all()
    assert (np.diff(windows[:, 1:]) == 1).all()
    assert (windows.min(0)[1], windows.max()) == (1, 48)


def test_bytes_are_a_tokenizer(example):
    tokenizer = example.Bytes()
    tokens = tokenizer.encode("naïve")
    assert len(tokens) == 6
    assert all(example.START < token < tokenizer.size for token in tokens)
    assert tokenizer.decode([example.START, *tokens]) == "naïve"
