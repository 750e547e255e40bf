"""The numbers in the README are those of the result files."""

import json
import pathlib

import numpy as np
import pytest
from support.cases import COMPARED

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def result(path):
    return json.loads((EXAMPLES / path).read_text())


def benchmark(name):
    return {b: result(f"benchmarks/results/{name}-{b}.json") for b in BACKENDS}


def assert_in_readme(text):
    """Whatever its line breaks."""
    assert " ".join(text.split()) in " ".join(README.split())


def spread(values, form=".2f"):
    low, mean, high = (f"{x:{form}}" for x in (min(values), np.mean(values), max(values)))
    return f"{mean} ({low} to {high})"


@pytest.mark.parametrize("normalizer", COMPARED)
def test_quickstart(normalizer):
    errors = result("results/quickstart.json")["errors"][normalizer].values()
    assert_in_readme(f"| `{normalizer}` | " + " | ".join(map(spread, errors)) + " |")


@pytest.mark.parametrize("name", ["persistence", "same hour yesterday"])
def test_baselines_of_the_quickstart(name):
    error = result("results/quickstart.json")["baselines"][name]
    assert_in_readme(f"| {name} |" + f" {error:.2f} |" * 3)


def test_reloading_elsewhere():
    differences = result("results/quickstart.json")["reload_difference"].values()
    assert_in_readme(f"after reloading elsewhere: {max(differences):.0e})")


@pytest.mark.parametrize("normalizer", COMPARED)
def test_training_step(normalizer):
    rows = [x["models"][normalizer]["processor"] for x in benchmark("train_step").values()]
    cells = [f"{x['ratio']:.2f} ({x['ratio_low']:.2f} to {x['ratio_high']:.2f})" for x in rows]
    assert_in_readme(f"| `{normalizer}` | " + " | ".join(cells) + " |")


def test_import_time():
    results = benchmark("import_time").items()
    times = [f"{1e3 * x['keras_ssattn_seconds']:.0f} ms on {BACKENDS[b]}" for b, x in results]
    assert_in_readme(f"`import keras_ssattn` takes {', '.join(times)} (median")


def test_running_state_of_softpick():
    ratios = {b: x["rows"][-1]["seconds_ratio"] for b, x in benchmark("softpick_state").items()}
    assert_in_readme(
        f"x {ratios['jax']:.2f} on JAX, {ratios['tensorflow']:.2f} on TensorFlow, "
        f"{ratios['torch']:.2f} on PyTorch"
    )


def accuracy(arm, length, rate="0.003"):
    runs = [result(f"papers/results/retrieval/{arm}-{rate}-seed-{seed}.json") for seed in range(3)]
    return f"{np.mean([run['by_length'][str(length)]['accuracy'] for run in runs]):.2f}"


def test_retrieval():
    """Of the learning rate that is best for each of these arms."""
    softmax, ssmax = ([accuracy(x, n) for n in (512, 2048)] for x in ("softmax", "ssmax"))
    assert_in_readme(
        f"Softmax is right on {softmax[0]} of the questions among 512 items and on {softmax[1]} "
        f"among 2048. SSMax is right on {ssmax[0]} and {ssmax[1]}"
    )
    plain, scaled = (accuracy(f"rectified-softpick{x}", 2048) for x in ("", "-s-log-n"))
    assert_in_readme(
        f"fades like softmax ({plain} among 2048); with a length scale of s log n it does not "
        f"({scaled}). Signed softpick hardly learns the task ({accuracy('softpick', 64, '0.001')} "
        "among 64)"
    )
    arm = "ssmax-s-from-1-mean-log-n"
    assert {accuracy(arm, 64 * 2**i) for i in range(6)} == {"1.00"}
    assert_in_readme(f"at the training length ({accuracy('ssmax', 64)} against 1.00)")


@pytest.mark.parametrize("name", ["original", "converted"])
@pytest.mark.parametrize("tuning", ["", ", tuned at 64", ", tuned at 256"])
def test_retrofit(name, tuning):
    losses = [x[name + tuning] for x in result("results/retrofit.json")["losses"]]
    cells = [spread([x[n] for x in losses], ".3f") for n in losses[0]]
    assert_in_readme(f"| {name}{tuning} | " + " | ".join(cells) + " |")
