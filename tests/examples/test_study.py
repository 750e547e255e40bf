"""The parts of the study on margins and sinks: their tasks, and each script at a small size."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import margins
import numpy as np
import pytest
import report
import runs
import sinks
import study_report
import training
from keras import ops

PAPERS = pathlib.Path(__file__).parents[2] / "examples" / "papers"
STUDY = [
    ("margins.py", "study/margins.json"),
    ("margins.py", "study/normalizers.json"),
    ("sinks.py", "study/sinks.json"),
]
CONDITIONS = runs.read_config(PAPERS / "study" / "margins.json")["conditions"]


def config_of(condition, file="margins"):
    config = runs.read_config(PAPERS / "study" / f"{file}.json", small=True)
    return {**config, **config["conditions"][condition]}


@pytest.mark.parametrize(("script", "config"), STUDY, ids=[c for _, c in STUDY])
def test_every_arm_runs_in_a_condition(script, config, backend, tmp_path):
    arms = list(runs.read_config(PAPERS / config)["arms"])
    chosen = arms[-1:] if config == "study/margins.json" else arms
    command = [sys.executable, str(PAPERS / script), config, "--small", "--output", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", *chosen], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = tmp_path.glob("*.jsonl")
    records = runs.read_runs(results)
    assert {x["arm"] for x in records} == set(chosen)
    assert all(np.isfinite(x["validation"]) and x["backend"] == backend for x in records)
    conditions = runs.read_config(PAPERS / config).get("conditions", {"": {}})
    assert all(set(report.load(results, name)) == set(chosen) for name in conditions)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_right_items_have_the_answer(condition, rng):
    """The value that is most frequent among the items that answer the question."""
    config = config_of(condition)
    n = np.array([32, 9, 32, 17])
    batch = margins.draw(rng, config, n, config["questions"])
    assert batch.mask.sum(1).tolist() == n.tolist()
    assert not np.any(batch.right & ~batch.mask[:, None])
    for row, question in np.ndindex(batch.answers.shape):
        counts = np.bincount(batch.values[row, batch.right[row, question]], minlength=1)
        assert batch.valid[row, question] == (np.sum(counts == counts.max()) == 1)
        if batch.valid[row, question]:
            assert batch.answers[row, question] == counts.argmax()


@pytest.mark.parametrize("kind", ["learned", "orthogonal"])
def test_one_item_has_the_key_of_a_question(kind, rng):
    config = config_of(f"{kind} keys")
    batch = margins.draw(rng, config, np.full(5, 700), 8)
    keys, query = (x if x.ndim == 3 else x[..., None] for x in (batch.keys, batch.query))
    same = np.all(keys[:, None] == query[:, :, None], -1)
    np.testing.assert_array_equal(same, batch.right)
    assert np.all(same.sum(-1) == 1)
    assert np.all(batch.valid == 1)
    assert len(np.unique(query[0], axis=0)) == 8


def test_noise_has_the_deviation_that_bounds_the_margin(rng):
    """A question is its item's key and noise; another key is at right angles in the mean."""
    config = config_of("noisy keys")
    batch = margins.draw(rng, config, np.full(40, 300), 8)
    keys, noise = batch.keys, config["noise"]
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, rtol=1e-5)
    own = keys[np.nonzero(batch.right)[0], np.nonzero(batch.right)[2]]
    error = batch.query.reshape(own.shape) - own
    assert error.std() == pytest.approx(noise, rel=0.03)
    products = batch.query @ keys.swapaxes(1, 2)
    assert products[batch.right].mean() == pytest.approx(1, abs=0.05)
    others = products[~batch.right]
    assert others.mean() == pytest.approx(0, abs=0.02)
    assert others.std() == pytest.approx(math.sqrt(1 / config["key_size"] + noise**2), rel=0.1)


def test_the_best_possible_loss_is_that_of_the_keys_probabilities(rng):
    """With two items, by hand: the probability that the right one is meant."""
    config = {**config_of("noisy keys"), "noise": 0.7}
    batch = margins.draw(rng, config, np.full(500, 2), 1)
    differ = batch.values[:, 0] != batch.values[:, 1]
    batch = margins.Batch(*(x[differ] for x in batch))
    weights = np.full((len(batch.keys), 1, 1, 2), 0.5, "float32")
    logits = np.zeros((len(batch.keys), 1, config["values"]))
    found = margins.measure_batch(config, batch, logits, weights, weights, weights)
    gap = ((batch.keys[:, 0] - batch.keys[:, 1]) * batch.query[:, 0]).sum(-1) / 0.7**2
    gap = np.where(batch.right[:, 0, 0], gap, -gap)
    assert found["possible_loss"] == pytest.approx(np.log1p(np.exp(-gap)).mean(), rel=1e-4)
    assert found["possible"] == np.mean(gap > 0)


def test_an_aggregate_is_of_a_quarter_of_the_items(rng):
    config = config_of("aggregate")
    batch = margins.draw(rng, config, np.full(6, 2000), margins.ATTRIBUTES)
    assert np.all(batch.right.sum(1) == 1)  # an item has one attribute
    np.testing.assert_allclose(batch.right.mean(-1), 1 / margins.ATTRIBUTES, atol=0.05)
    share = (batch.values[:, None] == batch.answers[..., None])[batch.right].mean()
    expected = margins.WINNER + (1 - margins.WINNER) / config["values"]
    assert share == pytest.approx(expected, abs=0.03)


def test_the_largest_item_answers(rng):
    batch = margins.draw(rng, config_of("largest"), np.array([20, 7]), 1)
    for row in range(2):
        numbers = batch.keys[row, batch.mask[row], 0]
        assert batch.right[row, 0].nonzero()[0].tolist() == [numbers.argmax()]


NORMALIZERS = runs.read_config(PAPERS / "study" / "normalizers.json")["arms"]


@pytest.mark.parametrize(
    "arm", [x for x in NORMALIZERS if x.startswith(("ssmax", "softmax, Q", "softmax, A"))]
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_margins_are_of_the_logits_that_make_the_weights(arm, qk_norm, rng):
    """After the length scale; and looking gives the model's answers."""
    config = {**config_of("noisy keys"), "attention": {"qk_norm": qk_norm}}
    model = margins.Reader(config, NORMALIZERS[arm]["normalizer"])
    batch = margins.draw(rng, config, np.full(3, 40), 5)
    answers, weights, before, after = model.look(batch.inputs())
    expected = np.exp(after - np.logaddexp.reduce(after, -1, keepdims=True))
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    np.testing.assert_allclose(
        answers, ops.convert_to_numpy(model(batch.inputs())), rtol=1e-4, atol=1e-5
    )
    if "SSMax" in str(NORMALIZERS[arm]["normalizer"]):
        scale = math.log(40) / (math.lgamma(65) / 64)
        np.testing.assert_allclose(after, before * scale, rtol=1e-4)


def test_a_run_does_not_depend_on_the_runs_before(tmp_path):
    """The compiled model is used again, with new weights and a new state of the optimizer."""
    config = config_of("learned keys")
    first = margins.train(config, "ssmax", 0.01, 3).get_weights()
    margins.train(config, "ssmax", 0.003, 4)
    margins.prepare.cache_clear()
    margins.train(config, "ssmax", 0.003, 5)
    again = margins.train(config, "ssmax", 0.01, 3).get_weights()
    for a, b in zip(first, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_trigger_is_followed_by_the_token_before_it(rng):
    tokens, targets = sinks.draw_sequences(rng, 64, 50, 40)
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    assert np.all(tokens[:, 0] == sinks.FIRST)
    assert np.all(targets != sinks.FIRST)
    copies = sinks.is_trigger(tokens)
    assert not copies[:, 1].any()
    rows, places = np.nonzero(copies)
    np.testing.assert_array_equal(targets[rows, places], tokens[rows, places - 1])
    assert not sinks.is_trigger(targets[rows, places]).any()


def test_other_tokens_follow_the_table(rng):
    tokens, targets = sinks.draw_sequences(rng, 12, 400, 100)
    table = sinks.bigrams(12)
    counts = np.zeros((12, 12))
    np.add.at(counts, (tokens, targets), 1)
    usual = [0, *range(1 + sinks.TRIGGERS, 12)]
    np.testing.assert_allclose(table[usual].sum(1), 1)
    shares = counts[usual] / counts[usual].sum(1, keepdims=True)
    often = counts[usual].sum(1) > 300
    assert often.any()
    np.testing.assert_allclose(shares[often], table[usual][often], atol=0.08)


def test_measures_of_a_sink():
    """Values of the first token, and weights on it, of a model in which they are known."""
    config = runs.read_config(PAPERS / "study" / "sinks.json", small=True)
    model = training.make_model(config, "softmax")
    attention = model.blocks[0].attention
    attention.query_dense.kernel.assign(ops.zeros_like(attention.query_dense.kernel))
    data = sinks.draw_sequences(np.random.default_rng(0), 64, 5, 12)
    found = sinks.measure(model, *data)
    copies = sinks.is_trigger(data[0])
    seen = np.broadcast_to(np.arange(1, 13), copies.shape)  # uniform attention over so many keys
    dormant = ~copies & (seen > 1)
    np.testing.assert_allclose(found["weight_on_first"], (1 / seen)[dormant].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["weight_on_copied"], (1 / seen)[copies].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["sum_of_weights"], 1, rtol=1e-5)
    x = model.blocks[0].attention_norm(model.token_embedding(data[0]))
    norms = np.linalg.norm(ops.convert_to_numpy(attention.value_dense(x)), axis=-1)
    expected = norms[:, 0].mean(0) / norms[:, 1:].mean((0, 1))
    np.testing.assert_allclose(found["value_norm_of_first"][0], expected, rtol=1e-5)


def test_tables_and_figures_are_made_of_the_stored_runs(tmp_path):
    """An arm that has not run with every seed is left out."""
    for name in ("margins", "tables"):
        stored = runs.read_runs(study_report.RESULTS / f"{name}.jsonl")
        last = [x for x in stored if x["arm"] == "ssmax" and x["seed"] == 2]
        kept = [x for x in stored if x not in last]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in kept))
    assert "| SSMax, s from 1 |" not in study_report.tables(tmp_path)
    assert "| SSMax, s from 1 |" in study_report.tables()
    assert study_report.margins(tmp_path) == study_report.margins()
    study_report.draw_margins(tmp_path)
    study_report.draw_tables(tmp_path)
    shutil.copy(study_report.RESULTS / "study_copies.jsonl", tmp_path)
    study_report.draw_copies(tmp_path)
    assert {x.stem for x in tmp_path.glob("*.png")} == {"margins", "tables", "copies"}
