"""Routing runs at a small size; what it and every comparison measure is right."""

import functools
import importlib
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from support import SCRIPTS
from support.cases import COMPARED
from support.helpers import launch, relative_error, to_numpy

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
ARMS = (*COMPARED, "no router")


@pytest.fixture(scope="module")
def routing():
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module("moe_routing")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe_routing")
    script = str(EXAMPLES / "moe_routing.py")
    command = [sys.executable, script, "--small", "--seed", "5", "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "moe_routing.json").read_text()), done.stdout, folder


def test_reports_every_arm(run, backend):
    results, printed, folder = run
    assert results["backend"] == backend
    assert set(results["versions"]) == {"keras", backend, "keras_ssattn", "scikit-learn"}
    assert results["settings"]["seeds"] == [5, 6]
    assert tuple(results["arms"]) == ARMS
    for name, arm in results["arms"].items():
        assert name in printed
        assert set(arm["measured"]) == set(arm["summary"])
        assert all(math.isfinite(x) for column in arm["measured"].values() for x in column)
        assert np.shape(arm["shown"]) == (10, 8)
    assert (folder / "moe_routing.png").read_bytes().startswith(b"\x89PNG")


def test_routers_differ_as_their_normalizers_do(run):
    measured = {name: arm["measured"] for name, arm in run[0]["arms"].items()}
    assert measured["no router"]["balance"] == pytest.approx([1, 1])
    assert measured["no router"]["experts_used"] == [8, 8]
    assert min(measured["rectified_softpick"]["zeros"]) > 0.05
    assert min(measured["softpick"]["negative"]) > 0.05
    for name in COMPARED:
        assert (max(measured[name]["zeros"]) > 0) == (name == "rectified_softpick")
        assert (max(measured[name]["negative"]) > 0) == (name == "softpick")


def test_parameters_differ_by_the_s_of_ssmax_only(run):
    parameters = [run[0]["arms"][name]["num_parameters"] for name in ARMS]
    experts = 64 * 64 + 64 + 8 * 8 * 10 + 8 * 10
    router = 64 * 8 + 8
    assert parameters == [experts + x for x in (router, router + 1, router, router, 0)]


def test_experts_are_the_weighted_sum_of_perceptrons(routing, rng):
    layer = routing.Experts(num_experts=3, hidden_size=5, output_size=2)
    x, w = rng.normal(size=(7, 4)), rng.normal(size=(7, 3))
    layer.build(x.shape, w.shape)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    first, bias = (to_numpy(v).astype("float64") for v in layer.hidden.weights)
    second, shift = (to_numpy(v).astype("float64") for v in (layer.kernel, layer.bias))
    expected = np.zeros((7, 2))
    for e in range(3):
        columns = slice(5 * e, 5 * e + 5)
        hidden = np.maximum(x @ first[:, columns] + bias[columns], 0)
        expected += w[:, e : e + 1] * (hidden @ second[e] + shift[e])
    actual = to_numpy(layer(x.astype("float32"), w.astype("float32")))
    assert relative_error(actual, expected) < 1e-5


def test_measures_of_routing(routing):
    weights = np.array([[0.5, -0.5, 0, 0], [0.996, 0.004, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1.0]])
    found = routing.measure_routing(weights)
    load = np.array([1.496, 0.504, 1]) / 3
    assert found == pytest.approx(
        {
            "experts_used": (2 + 1 + 0 + 1) / 4,
            "balance": -(load * np.log(load)).sum() / np.log(4),
            "zeros": 11 / 16,
            "negative": 0.5 / 3,
            "unrouted": 0.25,
        }
    )


def test_parts_share_no_row_and_have_the_same_classes(routing):
    y = np.repeat(np.arange(5), 40)
    sizes = {"test": 60, "validation": 40}
    parts = routing.comparison.split(np.arange(200), y, sizes, seed=3)
    assert [len(part.x) for part in parts] == [100, 40, 60]
    assert sorted(np.concatenate([part.x for part in parts])) == list(range(200))
    for part in parts:
        np.testing.assert_array_equal(part.y, y[part.x])
        assert np.bincount(part.y).tolist() == [len(part.y) // 5] * 5
    other = routing.comparison.split(np.arange(200), y, sizes, seed=4)
    assert set(other.test.x) != set(parts.test.x)


def test_the_validation_loss_alone_chooses(routing):
    def outcome(loss, accuracy):
        return routing.Outcome(loss, {"accuracy": accuracy}, [accuracy])

    found = routing.comparison.choose(
        [
            {0.1: outcome(0.3, 0.9), 1.0: outcome(0.2, 0.6), 10.0: outcome(0.2, 0.8)},
            {0.1: outcome(0.1, 0.5), 1.0: outcome(0.4, 1.0), 10.0: outcome(0.5, 1.0)},
        ]
    )
    assert found["chosen"] == [1.0, 0.1]
    assert found["measured"] == {"accuracy": [0.6, 0.5]}
    assert found["validation_losses"] == {"0.1": [0.3, 0.1], "1.0": [0.2, 0.4], "10.0": [0.2, 0.5]}
    summary = {"mean": 0.55, "deviation": math.sqrt(2 * 0.05**2)}
    assert found["summary"]["accuracy"] == pytest.approx(summary)
    assert found["shown"] == [0.6]


def test_training_starts_anew(routing):
    """Trained again with the same seed, a used model comes to the same weights."""
    settings, [part, *_] = routing.SETTINGS.small(), routing.load(0)
    make = functools.partial(routing.make_model, "softpick")
    model, found = make(), []
    for seed, rate in ((1, 0.01), (2, 0.1), (1, 0.01)):
        routing.comparison.train(model, make, part, settings, seed, rate)
        found.append([np.array(weight) for weight in model.get_weights()])
    for first, other, again in zip(*found, strict=True):
        np.testing.assert_allclose(again, first, atol=1e-6)
        assert np.abs(other - first).max() > 1e-3


@pytest.mark.parametrize("example", ["moe_routing", "feature_selection"])
def test_summaries_are_those_of_the_seeds(example):
    results = json.loads((EXAMPLES / "results" / f"{example}.json").read_text())
    assert len(results["settings"]["seeds"]) >= 5
    for arm in results["arms"].values():
        for measure, column in arm["measured"].items():
            assert len(column) == len(results["settings"]["seeds"])
            assert arm["summary"][measure]["mean"] == pytest.approx(np.mean(column))
            assert arm["summary"][measure]["deviation"] == pytest.approx(np.std(column, ddof=1))


def test_the_printed_table_has_the_stored_accuracies():
    command = [sys.executable, str(EXAMPLES / "comparison_report.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(" `"): line for line in done.stdout.splitlines()[2:]}
    assert len(rows) == 6
    for example in ("moe_routing", "feature_selection"):
        arms = json.loads((EXAMPLES / "results" / f"{example}.json").read_text())["arms"]
        for name, arm in arms.items():
            row = rows.get(name) or rows["no router, no gate"]
            accuracies = arm["measured"]["accuracy"]
            assert f" {np.mean(accuracies):.3f} ± {np.std(accuracies, ddof=1):.3f} " in row


def test_the_table_says_who_beats_softmax(routing):
    def arm(*accuracies):
        summary = {"mean": float(np.mean(accuracies)), "deviation": 0.125}
        return {"measured": {"accuracy": accuracies}, "summary": {"accuracy": summary}}

    arms = {"softmax": arm(0.5, 0.5, 0.5, 0.5), "softpick": arm(0.6, 0.5, 0.4, 0.2)}
    results = {"moe_routing": {"arms": {**arms, "no router": arm(0.7, 0.8, 0.9, 0.6)}}}
    lines = routing.report.markdown({**results, "feature_selection": {"arms": arms}}).splitlines()
    assert lines[2].startswith("| `softmax` | 0.500 ± 0.125 |")
    assert lines[3].startswith("| `softpick` | 0.425 ± 0.125 (1 : 2) |")
    assert lines[4].startswith("| no router, no gate | 0.750 ± 0.125 (4 : 0) |")


@pytest.mark.backend("jax", reason="keras.distribution is for JAX")
def test_experts_over_devices(tmp_path):
    launch(SCRIPTS / "distribute_experts.py", tmp_path / "experts.json")
    found = json.loads((tmp_path / "experts.json").read_text())
    np.testing.assert_allclose(found["parallel"], found["single"], atol=1e-5)
    assert list(found["shares"].values()) == [0.25] * 4
