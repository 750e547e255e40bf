"""The numbers in the README are those of the result files."""

import itertools
import json
import math
import pathlib

import keras
import numpy as np
import pytest
from support.cases import COMPARED

from keras_ssattn.checkpoints.families import FAMILIES
from keras_ssattn.checkpoints.names import layout
from keras_ssattn.distribution import layout_map
from keras_ssattn.models import CausalLM

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


# The text model of Devstral Small 2, of the family `ministral3`, as its config.json has it.
DEVSTRAL = {
    "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e8, "factor": 48.0,
                        "original_max_position_embeddings": 8192, "mscale": 1.0,
                        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}  # fmt: skip


def sizes(model, devices=1):
    """How many numbers of each variable a device has, if `devices` share a model."""
    mesh = keras.distribution.DeviceMesh(
        (1, devices), ("batch", "model"), [f"cpu:{i}" for i in range(devices)]
    )
    layouts, found = layout_map(mesh), {}
    places, shapes = layout(model)
    for place in places:
        found[place.variable] = (place.end - place.first) * math.prod(shapes[place.name][1:])
        split = layouts[f"model/{place.variable}"]
        if split is not None and "model" in split.axes:
            key_heads = place.variable.split("/")[-2] in ("key", "value")
            parts = model.num_kv_heads if key_heads else found[place.variable]
            assert parts % devices == 0, place
            found[place.variable] //= devices
    return found


def test_sizes_are_those_of_a_model():
    options = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "key_dim": 6, "qk_norm": True}
    small = {
        "vocab_size": 20, "hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    }  # fmt: skip
    model = CausalLM(
        20, 12, normalizer="softmax", ffn_expansion=1.5, tie_embeddings=False, **options
    )
    expected = {w.path.removeprefix(f"{model.name}/"): math.prod(w.shape) for w in model.weights}
    assert sizes(FAMILIES["qwen3"].read(small)) == expected


def test_memory_of_devices():
    """Of weights in bfloat16; on 16 devices, two groups of eight have half of a batch each."""
    model = FAMILIES["ministral3"].read(DEVSTRAL)
    assert f"{sum(sizes(model).values()):.3g}" == "2.36e+10"
    weights = [f"{2e-9 * sum(sizes(model, devices).values()):.1f}" for devices in (1, 4, 8)]
    with pytest.raises(AssertionError, match="block_1/attention/key/kernel"):
        sizes(model, 16)  # of 8 key heads
    assert_in_readme("| GB of weights on each | " + " | ".join([*weights, weights[-1]]) + " |")


def checkpoints():
    return result("results/checkpoints.json")


@pytest.mark.parametrize("when", ["at once", "tuned"])
@pytest.mark.parametrize(
    "name", ["temperature by position", "none", "SSMax, s log n", "Qwen's log n"]
)
def test_length_scales_of_a_released_model(name, when):
    found = checkpoints()
    size, length = (found["settings"][x] for x in ("bin_size", "train_length"))
    bins = np.array([run["losses"][name][when] for run in found["runs"]])
    ends = [0, *(times * length // size for times in (1, 2, 4))]
    cells = [spread(bins[:, a:b].mean(1), ".3f") for a, b in itertools.pairwise(ends)]
    assert_in_readme(f"| {name}, {when} | " + " | ".join(cells) + " |")


def test_released_model_on_every_backend():
    found = checkpoints()["checks"]
    assert found.keys() == {*BACKENDS, "transformers"}
    assert all(x["tokens_equal"] for x in found.values())
    assert_in_readme(f"within {max(x['logits'] for x in found.values()):.0e} of their deviation")
