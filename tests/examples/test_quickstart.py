"""The quickstart runs at a small size, leaks nothing, and reports what it measured."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.cases import COMPARED

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def quickstart():
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def utterances(quickstart):
    return quickstart.data.load()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--small", "--output", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "quickstart.json").read_text()), done.stdout, folder


def test_reports_every_model_and_baseline(run, backend, quickstart):
    results, printed, folder = run
    assert results["backend"] == backend
    assert set(results["accuracies"]) == set(COMPARED)
    for name, found in quickstart.report.speaker_rows(results):
        assert any(line.startswith(name) and line.endswith(found) for line in printed.splitlines())
    shares = [*results["baselines"].values(), *map(np.mean, results["accuracies"].values())]
    assert all(0 <= x <= 1 for x in shares)
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "quickstart.keras").exists()


def test_reloads_here_and_on_every_other_backend(run):
    results, printed, _ = run
    others = {b for b in ("tensorflow", "jax", "torch") if importlib.util.find_spec(b)}
    others -= {results["backend"]}
    assert set(results["reload_difference"]) == {"this process", *others}
    for where, difference in results["reload_difference"].items():
        assert difference < 1e-5
        place = "the same process" if where == "this process" else f"another process on {where}"
        assert f"loaded in {place}: {difference:.1e}" in printed


def test_what_is_exported_and_padded_gives_the_same(run):
    results, _, folder = run
    assert results["padding_difference"] < 1e-5
    if "skipped" in results["export"]:
        assert importlib.util.find_spec("tensorflow") is None
    else:
        assert (folder / results["export"]["file"]).exists()
        assert results["export"]["difference"] < 1e-5


def test_looks_up_by_the_stored_models(run):
    """They are right at their training length, as their own results say."""
    look_up = run[0]["look_up"]
    assert look_up["train_length"] == 64
    for by_length in look_up["models"].values():
        assert list(by_length) == ["64", "128"]
        assert by_length["64"]["accuracy"] > 0.9
        assert 0 < by_length["64"]["weight"] < 1


def test_utterances_are_those_of_the_data_set(utterances):
    for part, counts in zip(utterances, ([30] * 9, None), strict=True):
        assert {x.shape[1] for x in part.series} == {12}
        assert {len(x) for x in part.series} <= {*range(7, 30)}
        found = np.bincount(part.speakers).tolist()
        assert len(found) == 9
        assert counts is None or found == counts
    assert [len(part.series) for part in utterances] == [270, 370]


def test_no_utterance_is_in_two_parts(quickstart, utterances):
    held_out = quickstart.data.hold_out(utterances[0])
    for one, other in (utterances, held_out):
        seen = {x.tobytes() for x in one.series}
        assert not any(x.tobytes() in seen for x in other.series)
    assert sum(len(x.series) for x in held_out) == 270


def test_the_scale_is_of_what_is_trained_on(quickstart, utterances):
    train, test = utterances
    scale = quickstart.data.measure_scale(train)
    steps = np.concatenate(quickstart.data.scaled(train, scale))
    np.testing.assert_allclose(steps.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(steps.std(0), 1, atol=1e-4)
    inputs = quickstart.data.to_inputs(test, scale)
    assert inputs.shape == (370, 29, 12)
    lengths = [len(x) for x in test.series]
    np.testing.assert_array_equal((inputs != 0).any(-1).sum(1), lengths)


def test_time_warping_is_that_of_the_definition(quickstart, rng):
    """Against the plain recursion, one pair at a time."""
    ones, others = ([rng.normal(size=(n, 12)) for n in lengths] for lengths in ((3, 7), (5, 2, 6)))

    def distance(x, y):
        costs = np.full((len(x) + 1, len(y) + 1), math.inf)
        costs[0, 0] = 0
        for i in range(len(x)):
            for j in range(len(y)):
                before = min(costs[i, j], costs[i, j + 1], costs[i + 1, j])
                costs[i + 1, j + 1] = np.sum((x[i] - y[j]) ** 2) + before
        return costs[-1, -1]

    expected = [[distance(x, y) for y in others] for x in ones]
    actual = quickstart.data.time_warping_distances(ones, others)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
