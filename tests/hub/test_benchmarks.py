"""The benchmarks of language models compare models of one size that do the same."""

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from support.cases import COMPARED

pytest.importorskip("keras_hub.models", reason="KerasHub is not installed")
if keras.backend.backend() == "torch":
    pytest.importorskip("transformers", reason="transformers is not installed")
SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "benchmarks" / "generation.py"
OTHERS = ["keras_hub", *(["transformers"] if keras.backend.backend() == "torch" else [])]


def test_writes_a_row_for_each_model(tmp_path, backend):
    output = tmp_path / "generation.json"
    result = run(SCRIPT, output)
    assert result["backend"] == backend
    assert {row["name"] for row in result["rows"]} == {*OTHERS, *COMPARED}
    assert set(result["seconds_per_token"]) == {*COMPARED}
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])


def run(script, output):
    """The result of a short run of a script."""
    command = [sys.executable, str(script), "--small", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_training_steps_of_all_models_learn_alike(tmp_path, backend):
    script = SCRIPT.with_name("train_language_model.py")
    result = run(script, tmp_path / "train_language_model.json")
    assert result["backend"] == backend
    assert {*result["models"]} == {*OTHERS, *COMPARED}
    assert result["models"]["keras_hub"]["wall"]["ratio"] == 1
    for row in result["models"].values():  # of a thousand tokens, nothing learned yet
        assert abs(row["loss"] - np.log(1000)) < 0.3
        assert row["processor"]["seconds"] > 0


def test_the_reference_is_of_the_same_size_and_generates_as_much():
    spec = importlib.util.spec_from_file_location("generation_benchmark", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    args = argparse.Namespace(layers=2, heads=2, hidden_size=32)
    ours, reference = benchmark.make_ours(args, "softmax"), benchmark.make_reference(args)
    assert ours.count_params() == reference.count_params()
    prompts = np.random.default_rng(0).integers(1, benchmark.VOCABULARY, (3, 7))
    models = [ours, reference]
    if keras.backend.backend() == "torch":
        models.append(benchmark.make_transformers(args))
        count = sum(x.numel() for x in models[-1].parameters())
        assert count == ours.count_params()
    for model in models:
        assert benchmark.generator_of(model, prompts, 5)().shape == (3, 5)
