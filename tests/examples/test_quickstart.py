"""The quickstart runs at a small size, leaks nothing, and reports what it measured."""

import importlib.util
import itertools
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


def test_reports_every_model_at_every_length(run, backend):
    results, printed, folder = run
    assert results["backend"] == backend
    assert set(results["errors"]) == set(COMPARED)
    for name, by_length in results["errors"].items():
        assert name in printed
        assert set(by_length) == {"60", "240", "480"}
        assert all(math.isfinite(x) and x > 0 for xs in by_length.values() for x in xs)
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "quickstart.keras").exists()


def test_reloads_here_and_on_every_other_backend(run, backend):
    results, printed, _ = run
    others = {b for b in ("tensorflow", "jax", "torch") if importlib.util.find_spec(b)} - {backend}
    assert set(results["reload_difference"]) == {"this process", *others}
    for where, difference in results["reload_difference"].items():
        assert difference < 1e-5
        assert f"{backend if where == 'this process' else where}: {difference:.1e}" in printed


def test_persistence_is_what_it_says(run, quickstart):
    results, _, _ = run
    part = quickstart.split(quickstart.load_table())["test"]
    temperatures = part["temp"].to_numpy()
    errors = []
    for hour in quickstart.forecast_hours(part, 480, quickstart.SMALL.test_step):
        errors += [abs(temperatures[hour + k] - temperatures[hour - 1]) for k in range(24)]
    assert results["baselines"]["persistence"] == pytest.approx(np.mean(errors), rel=1e-6)


def test_parts_follow_each_other_in_time(quickstart):
    parts = list(quickstart.split(quickstart.load_table()).values())
    for earlier, later in itertools.pairwise(parts):
        assert earlier.index[-1] < later.index[0]


@pytest.mark.parametrize("length", [60, 480])
def test_inputs_end_before_what_is_forecast(quickstart, length):
    """Changing every hour from the forecast's start on leaves the inputs as they were."""
    part = quickstart.split(quickstart.load_table())["test"].copy()
    scale = quickstart.Scale(1.0, 1.0)
    hours = quickstart.forecast_hours(part, length, 25)[:1]
    inputs, targets = quickstart.make_windows(part, hours, length, scale)
    part.iloc[hours[0] :, part.columns.get_loc("temp")] += 100.0
    again, moved = quickstart.make_windows(part, hours, length, scale)
    assert inputs.shape == (1, length, 3)
    assert np.isfinite(inputs).all()
    np.testing.assert_array_equal(inputs, again)
    np.testing.assert_allclose(moved - targets, 100.0, rtol=1e-4)
