"""The papers' experiments run at a small size, resume, and report what was stored."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import keras
import language_model
import numpy as np
import pytest
import report
import retrieval
import runs
import training

PAPERS = pathlib.Path(__file__).parents[2] / "examples" / "papers"
CONFIGS = [f"{x.parent.name}/{x.name}" for x in sorted(PAPERS.glob("s[so]*/*.json"))]
RUN = [
    ("language_model.py", "ssmax/language_model.json"),
    ("retrieval.py", "softpick/retrieval.json"),
]


def run(script, config, output):
    command = [sys.executable, str(PAPERS / script), config, "--small", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("config", CONFIGS)
def test_every_arm_of_a_configuration_can_be_trained(config):
    config = runs.read_config(PAPERS / config, small=True)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    config["model"] = {**config["model"], **sizes}
    tokens = np.arange(12).reshape(2, 6)
    for options in config["arms"].values():
        model = training.make_model(config, options["normalizer"])
        training.compile_model(config, model, 0.01)
        assert np.isfinite(model.train_on_batch(tokens, tokens))


@pytest.mark.parametrize(("script", "config"), RUN, ids=[c for _, c in RUN])
def test_runs_every_arm_and_does_not_run_it_again(script, config, backend, tmp_path):
    arms = runs.read_config(PAPERS / config)["arms"]
    printed = run(script, config, tmp_path)
    assert len(printed.splitlines()) == len(arms)
    [results] = tmp_path.glob("*.jsonl")
    records = runs.read_runs(results)
    assert {x["arm"] for x in records} == set(arms)
    assert all(np.isfinite(x["validation"]) and x["backend"] == backend for x in records)
    assert run(script, config, tmp_path) == ""


@pytest.fixture(scope="module")
def small():
    return runs.read_config(PAPERS / "ssmax" / "language_model.json", small=True)


def draw(rng):
    return language_model.draw_windows(rng, language_model.load_text()["train"], 4, 16)


def weights(model):
    return {x.path: keras.ops.convert_to_numpy(x) for x in model.variables}


def test_a_stopped_run_goes_on_where_it_was(small, tmp_path):
    """With the same weights in the end as one that was not stopped."""
    whole = training.train(small, "ssmax", 0.01, 0, draw, tmp_path / "whole")
    half = tmp_path / "half" / "ssmax-0.01-seed-0"
    half.mkdir(parents=True)
    for epoch in (1, 2):
        shutil.copy(tmp_path / "whole" / half.name / f"{epoch}.keras", half)
    resumed = training.train(small, "ssmax", 0.01, 0, draw, tmp_path / "half")
    expected = weights(whole)
    for path, value in weights(resumed).items():
        np.testing.assert_allclose(value, expected[path], atol=1e-6, err_msg=path)


def test_an_arm_goes_on_from_the_training_of_another(small, tmp_path):
    """After training: softmax's weights as they were, and s at 1 / mean(log n)."""
    before = weights(training.train(small, "softmax", 0.01, 0, draw, tmp_path))
    after = weights(training.train(small, "ssmax after training", 0.01, 0, draw, tmp_path))
    scales = set(after) - set(before)
    assert {path.rsplit("/", 1)[-1] for path in scales} == {"s"}
    for path in before:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    expected = 1 / np.log(np.arange(1, 129)).mean()
    for path in scales:
        np.testing.assert_allclose(after[path], expected, rtol=1e-6)


def test_only_matrices_decay(small):
    """With gradients of zero and decay alone, vectors and s stay."""
    model = training.make_model(small, "ssmax")
    training.compile_model({**small, "weight_decay": 0.5}, model, 0.01)
    before = {x.path: keras.ops.convert_to_numpy(x) for x in model.trainable_variables}
    for _ in range(3):  # warm-up starts at 0
        gradients = [keras.ops.zeros(x.shape) for x in model.trainable_variables]
        model.optimizer.apply(gradients, model.trainable_variables)
    for variable in model.trainable_variables:
        same = np.array_equal(keras.ops.convert_to_numpy(variable), before[variable.path])
        assert same == (variable.ndim < 2), variable.path


def test_results_of_other_settings_are_refused(tmp_path):
    config = {"arms": {"a": {"x": 1}}, "learning_rates": [0.1], "seeds": [0]}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    results = tmp_path / "out.jsonl"
    runs.run_all(file, results, lambda *_: {"validation": 1.0})
    file.write_text(json.dumps({**config, "arms": {"a": {"x": 2}}}))
    with pytest.raises(ValueError, match="has the run 'a-0.1-seed-0' with other settings"):
        runs.run_all(file, results, lambda *_: {"validation": 1.0})


def test_the_best_learning_rate_gets_the_other_seeds(tmp_path):
    calls = []

    def run_one(config, arm, rate, seed, folder):
        calls.append((arm, rate, seed))
        return {"validation": abs(rate - {"a": 0.1, "b": 0.3}[arm])}

    arms = {"a": {}, "b": {}, "c": {"from": "a"}}
    config = {"arms": arms, "learning_rates": [0.1, 0.3], "seeds": [0, 1]}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))

    def also_c(config, arm, rate, seed, folder):
        return run_one(config, "a" if arm == "c" else arm, rate, seed, folder)

    chosen = runs.run_all(file, tmp_path / "out.jsonl", also_c)[""]
    assert calls == [
        *(("a", 0.1, 0), ("a", 0.3, 0), ("a", 0.1, 1)),
        *(("b", 0.1, 0), ("b", 0.3, 0), ("b", 0.3, 1)),
        *(("a", 0.1, 0), ("a", 0.1, 1)),  # c, with the rate of a
    ]
    assert {arm: {x["learning_rate"] for x in found} for arm, found in chosen.items()} == {
        "a": {0.1}, "b": {0.3}, "c": {0.1}
    }  # fmt: skip


def test_the_learning_rate_is_chosen_within_each_condition(tmp_path):
    """A condition replaces options; a run is stored once for each, in one file."""
    best, calls = {1: 0.1, 2: 0.3}, []

    def run_one(config, arm, rate, seed, folder):
        calls.append((config["size"], rate, seed, folder.name))
        return {"validation": abs(rate - best[config["size"]]), "measured": 1 / 3}

    conditions = {"easy": {"size": 1}, "Hard one": {"size": 2}}
    config = {"arms": {"a": {}}, "size": 0, "conditions": conditions}
    file, results = tmp_path / "config.json", tmp_path / "out.jsonl"
    file.write_text(json.dumps({**config, "learning_rates": [0.1, 0.3], "seeds": [0, 1]}))
    chosen = runs.run_all(file, results, run_one)
    assert calls == [
        *((1, 0.1, 0, "easy"), (1, 0.3, 0, "easy"), (1, 0.1, 1, "easy")),
        *((2, 0.1, 0, "hard-one"), (2, 0.3, 0, "hard-one"), (2, 0.3, 1, "hard-one")),
    ]
    stored = runs.read_runs(results)
    assert [x["condition"] for x in stored] == ["easy"] * 3 + ["Hard one"] * 3
    assert {x["measured"] for x in stored} == {0.33333}
    assert chosen["Hard one"]["a"] == report.load(results, "Hard one")["a"] == stored[-2:]
    assert runs.run_all(file, results, run_one) == chosen
    assert len(calls) == 6


def test_only_the_arms_that_are_named_run(tmp_path):
    """Also where a condition has arms of its own."""
    config = {"arms": {"a": {}, "b": {}}, "learning_rates": [0.1], "seeds": [0]}
    file, results = tmp_path / "config.json", tmp_path / "out.jsonl"
    file.write_text(json.dumps({**config, "conditions": {"own": {"arms": {"c": {}}}, "both": {}}}))
    runs.run_all(file, results, lambda *_: {"validation": 1.0}, only=["b"])
    assert [(x["condition"], x["arm"]) for x in runs.read_runs(results)] == [("both", "b")]
    with pytest.raises(ValueError, match=r"`only` must name arms: \['a', 'b', 'c'\].*\['d'\]"):
        runs.run_all(file, results, lambda *_: {"validation": 1.0}, only=["d"])
    file.write_text(json.dumps({**config, "arms": {"a": {}, "b": {"from": "a"}}}))
    with pytest.raises(ValueError, match="`only` must name 'a', which 'b' goes on from"):
        runs.run_all(file, tmp_path / "new.jsonl", lambda *_: {"validation": 1.0}, only=["b"])


def test_the_task_has_one_answer(rng):
    config = {"keys": 11, "values": 5, "queries": 3}
    tokens, answers, places = retrieval.draw_task(rng, config, 7, 29)
    assert tokens.shape == (7, 32)
    for row, right, place in zip(tokens, answers, places, strict=True):
        keys, values = np.divmod(row[:29], 5)
        asked = row[29:] - 55
        assert len(set(asked)) == 3
        for key, answer, where in zip(asked, right, place, strict=True):
            assert np.flatnonzero(keys == key).tolist() == [where]
            assert answer == 55 + 11 + values[where]


@pytest.mark.parametrize("arm", ["softmax", "ssmax"])
@pytest.mark.parametrize("length", [64, 512])
def test_a_reported_accuracy_is_measured_again(arm, length):
    """From the weights kept with the results, on any backend."""
    results = PAPERS / "results" / "retrieval.jsonl"
    [stored] = (
        x
        for x in runs.read_runs(results)
        if (x["arm"], x["learning_rate"], x["seed"]) == (arm, 0.003, 0)
    )
    name = runs.run_name(arm, 0.003, 0)
    settings = {**stored["settings"], "test_sequences": 64}
    model = training.make_model(settings, settings["normalizer"])
    model.load_weights(results.with_suffix("") / f"{name}.weights.h5")
    found = retrieval.measure(settings, model, length, seed=2)
    expected = stored["by_length"][str(length)]
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=2.5 / (64 * 8))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2, abs=1e-4)
    np.testing.assert_allclose(
        found["weight_on_needle"], expected["weight_on_needle"], rtol=1e-2, atol=1e-4
    )


def test_the_results_are_those_of_the_stored_runs(tmp_path):
    """Tables in the text that is kept; the plots are drawn."""
    shutil.copytree(
        PAPERS / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png")
    )
    text = report.render(tmp_path / "results")
    assert text == (PAPERS / "RESULTS.md").read_text()
    for line in text.splitlines():
        if line.startswith("!["):
            name = line.split("(")[1].removesuffix(")")
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
            assert (PAPERS / name).exists()
