"""Feature selection runs at a small size, and its columns, gate and measures are as it says."""

import importlib
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from support.cases import COMPARED
from support.helpers import relative_error, to_numpy

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def selection():
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module("feature_selection")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feature_selection")
    script = str(EXAMPLES / "feature_selection.py")
    command = [sys.executable, script, "--small", "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "feature_selection.json").read_text()), done.stdout, folder


def test_reports_every_arm(run, backend):
    results, printed, folder = run
    assert results["backend"] == backend
    assert results["settings"]["seeds"] == [0, 1]
    assert tuple(results["arms"]) == (*COMPARED, "no gate", "L1 linear SVM")
    for name, arm in results["arms"].items():
        assert name in printed
        assert set(arm["measured"]) == set(arm["summary"])
        assert ("noise_weight" in arm["measured"]) == (name != "no gate")
        assert all(math.isfinite(x) for column in arm["measured"].values() for x in column)
    network = 120 * 16 + 16 + 16 + 1
    parameters = [arm["num_parameters"] for arm in results["arms"].values()]
    assert parameters == [*(network + x for x in (120, 121, 120, 120, 0)), 121]
    assert (folder / "feature_selection.png").read_bytes().startswith(b"\x89PNG")


def test_weights_shown_are_those_of_trained_gates(run):
    for name in COMPARED:
        shown = np.array(run[0]["arms"][name]["shown"])
        assert shown.shape == (120,)
        assert 0.9 < np.abs(shown).sum() < 1.01  # rounded to 4 digits
        assert np.ptp(shown) > 1e-3


def test_columns_of_noise_are_real_ones_shuffled(selection):
    parts = selection.load(0)
    assert {k: len(part.x) for k, part in parts._asdict().items()} == selection.SIZES
    x = np.concatenate([part.x for part in parts]).astype("float64")
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    real, noise = x[:, :30], x[:, 30:]
    for copy in np.split(noise, 3, axis=1):
        np.testing.assert_allclose(np.sort(copy, axis=0), np.sort(real, axis=0), atol=1e-4)
    correlations = np.corrcoef(x, rowvar=False) - np.eye(120)
    assert np.abs(correlations[:30, :30]).max() > 0.9
    assert np.abs(correlations[30:]).max() < 0.3  # with the real ones, and among themselves


def test_columns_are_scaled_by_the_training_part(selection):
    train, _, test = selection.load(0)
    np.testing.assert_allclose(train.x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.x.std(axis=0), 1, rtol=1e-4)
    assert np.abs(test.x.mean(axis=0)).max() > 0.05


@pytest.mark.parametrize("normalizer", COMPARED)
def test_gate_multiplies_each_feature_by_its_weight(selection, rng, normalizer):
    gate = selection.FeatureGate(selection.NORMALIZERS[normalizer]())
    x = rng.normal(size=(7, 5))
    start = to_numpy(gate(x.astype("float32")))
    even = 5 / 6 if normalizer == "softpick" else 1
    assert relative_error(start, even * x) < 1e-5
    logits = np.array([2.0, -1.0, 0.5, 0.0, -3.0])
    gate.logits.assign(logits)
    scaled = np.exp(np.log(5) * logits)
    weights = {
        "softmax": np.exp(logits) / np.exp(logits).sum(),
        "ssmax": scaled / scaled.sum(),
        "softpick": logits / (1 + np.abs(logits).sum()),
        "rectified_softpick": np.maximum(np.expm1(logits), 0) / np.abs(np.expm1(logits)).sum(),
    }[normalizer]
    assert relative_error(to_numpy(gate(x.astype("float32"))), 5 * weights * x) < 1e-5


def test_measures_of_selection(selection):
    weights = np.zeros(120)
    weights[:20] = 0.03  # real
    weights[30:39] = -0.04  # noise, larger than any real one
    assert selection.measure_selection(weights) == pytest.approx(
        {
            "noise_weight": 0.36 / 0.96,
            "noise_zeros": 81 / 90,
            "real_zeros": 10 / 30,
            "ranking": (20 * 81 + 10 * 81 / 2) / (30 * 90),
        }
    )


def test_no_weight_at_all_is_none_on_noise(selection):
    found = selection.measure_selection(np.zeros(120))
    assert found == {"noise_weight": 0, "noise_zeros": 1, "real_zeros": 1, "ranking": 0.5}


def test_the_linear_model_drops_columns_as_the_penalty_grows(selection):
    low, high = (selection.run_linear(0, cost) for cost in (1.0, 0.01))
    assert high.measured["noise_zeros"] > low.measured["noise_zeros"] > 0
    assert high.measured["real_zeros"] > low.measured["real_zeros"] > 0
    assert min(low.measured["accuracy"], high.measured["accuracy"]) > 0.85
