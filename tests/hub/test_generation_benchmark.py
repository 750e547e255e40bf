"""The benchmark of generation compares models of one size that generate as many tokens."""

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


def test_writes_a_row_for_each_model(tmp_path, backend):
    output = tmp_path / "generation.json"
    command = [sys.executable, str(SCRIPT), "--small", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["backend"] == backend
    others = {"keras_hub", *(["transformers"] if backend == "torch" else [])}
    assert {row["name"] for row in result["rows"]} == others | {*COMPARED}
    assert set(result["seconds_per_token"]) == {*COMPARED}
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])


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
