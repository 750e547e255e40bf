"""The benchmarks run, write what they should, and compare like with like. Nothing is timed."""

import importlib.util
import itertools
import json
import math
import operator
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from support.cases import COMPARED
from support.helpers import relative_error, to_numpy

import keras_ssattn
from keras_ssattn.models import CausalLM

BENCHMARKS = pathlib.Path(__file__).parents[2] / "examples" / "benchmarks"
BACKENDS = ("tensorflow", "jax", "torch")
SIZES = {"embed_dim": 12, "num_heads": 2, "num_layers": 2, "window_size": 7}
LAYERS_OF_BLOCK = {  # of the reference: of our block
    "attention_norm": "attention_norm",
    "attention": "attention",
    "feed_forward_norm": "feed_forward_norm",
    "up": "feed_forward.up",
    "down": "feed_forward.down",
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_step():
    return load("train_step")


def run_small(script, output, *options):
    command = [sys.executable, str(BENCHMARKS / script), "--small", "--output", str(output)]
    command += options
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout


def numbers_in(value):
    """All numbers in nested dictionaries."""
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers_in(entry)]
    return [] if isinstance(value, str) else [value]


def build_ours(normalizer, **options):
    sizes = {**SIZES, "hidden_size": SIZES["embed_dim"]}
    return keras_ssattn.build(**sizes, normalizer=normalizer, **options)


def copy_weights(ours, reference):
    for i in range(1, SIZES["num_layers"] + 1):
        block = ours.get_layer(f"softmax_block_{i}")
        for name, path in LAYERS_OF_BLOCK.items():
            assign(operator.attrgetter(path)(block), reference.get_layer(f"{name}_{i}"))
    assign(ours.get_layer("final_norm"), reference.get_layer("final_norm"))


def assign(layer, source):
    for weight, value in zip(layer.weights, source.weights, strict=True):
        weight.assign(to_numpy(value))  # JAX would share the array, and training deletes it


@pytest.mark.backend("jax", reason="its devices are simulated")
def test_devices_reports_what_each_sends(tmp_path):
    """Along the batch, the gradients of all weights; and none of them needs more than one alone."""
    result, _ = run_small("devices.py", tmp_path / "result.json")
    [step], count = result["steps"], result["steps"][0]["devices"]
    model = CausalLM(result["vocabulary"], step["width"], result["layers"], result["heads"])
    share = 4 * 2 * (count - 1) / count
    weights, embedding = share * model.count_params(), share * result["vocabulary"] * step["width"]
    # the gradient of a tied embedding may be summed in two parts
    assert weights <= step["along"]["batch"]["sent"] < 1.02 * (weights + embedding)
    for found in step["along"].values():
        assert found["sent"] > 0.99 * weights or found is step["along"]["model"]
        assert 0 < found["bytes"] < step["bytes_of_one"]
    assert all(0 < x["bytes"] < x["bytes_of_one"] for x in result["attention"])


def test_train_step_reports_every_model(tmp_path, backend):
    result, printed = run_small("train_step.py", tmp_path / "result.json")
    assert result["backend"] == backend
    assert set(result["versions"]) == {"python", "keras", backend, "keras_ssattn"}
    assert set(result["models"]) == {"keras.layers.MultiHeadAttention", *COMPARED}
    for name, row in result["models"].items():
        assert name in printed
        for clock in ("wall", "processor"):
            assert set(row[clock]) == {"seconds", "ratio", "ratio_low", "ratio_high"}
    assert all(math.isfinite(x) and x > 0 for x in numbers_in(result))


def test_import_time_reports_both_imports(tmp_path, backend):
    result, printed = run_small("import_time.py", tmp_path / "result.json")
    assert result["backend"] == backend
    assert {"keras_seconds", "keras_ssattn_seconds"} <= set(result)
    assert "import keras_ssattn" in printed
    assert all(math.isfinite(x) and x > 0 for x in numbers_in(result))


def test_attention_reports_every_implementation(tmp_path, backend):
    result, printed = run_small("attention.py", tmp_path / "result.json")
    assert result["backend"] == backend
    implementations = {"tiled", "dense"}
    expected = {f"{x}, {y}" for x in COMPARED if x != "softmax" for y in implementations}
    expected |= {"keras.ops.dot_product_attention"}
    if backend == "torch":
        expected |= {"ssmax, fused", "torch scaled_dot_product_attention"}
    rows = {(row["name"], row["length"], row["pass"]): row for row in result["rows"]}
    passes = ("forward", "forward + backward")
    assert set(rows) == set(itertools.product(expected, (400, 800), passes))
    for (name, length, which), row in rows.items():
        reference = rows["keras.ops.dot_product_attention", length, which]
        assert name in printed
        assert row["seconds"] > 0
        assert row["seconds_ratio"] == pytest.approx(row["seconds"] / reference["seconds"])
        assert row["processor_seconds"] > 0
        assert row["processor_ratio"] == pytest.approx(
            row["processor_seconds"] / reference["processor_seconds"]
        )
    for name, exponent in result["growth_exponent"].items():
        short, long = (rows[name, length, passes[1]]["seconds"] for length in (400, 800))
        assert exponent == pytest.approx(math.log2(long / short))
    assert set(result["growth_exponent"]) == expected


def test_attention_reports_what_is_asked_for_alone(tmp_path):
    result, _ = run_small("attention.py", tmp_path / "result.json", "--only", "softpick, tiled")
    names = {row["name"] for row in result["rows"]}
    assert names == {"keras.ops.dot_product_attention", "softpick, tiled"}


def test_attention_on_a_gpu_is_measured_in_bfloat16_too(tmp_path, backend, monkeypatch):
    """Where there is none, the kernel that needs one is replaced."""
    attention = load("attention")
    monkeypatch.setattr(attention, "on_gpu", lambda: True)
    options = ["--small", "--output", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["attention.py", *options])
    asked = []
    if backend == "jax":
        import jax

        kept = jax.nn.dot_product_attention

        def replaced(query, *args, implementation=None, **kwargs):
            asked.append((implementation, str(query.dtype)))
            return kept(query, *args, **kwargs)

        monkeypatch.setattr(jax.nn, "dot_product_attention", replaced)
    attention.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["gpu"]
    names = {}
    for row in result["rows"]:
        names.setdefault(row["dtype"], set()).add(row["name"])
    assert attention.REFERENCE in names["float32"] <= names["bfloat16"]
    assert names["bfloat16"] - names["float32"] == (
        {attention.JAX_REFERENCE} if backend == "jax" else set()
    )
    assert {x for x in asked if x[0] == "cudnn"} == (
        {("cudnn", "bfloat16")} if backend == "jax" else set()
    )


def test_attention_reports_memory_of_a_longer_input(tmp_path):
    result, _ = run_small("attention.py", tmp_path / "result.json", "--alone")
    assert [row["name"].split(", ")[1] for row in result["rows"]] == ["tiled"] * 3
    for row in result["rows"]:
        assert row["gibibytes"] > 0
        assert row["seconds_with_compilation"] > 0


def test_softpick_state_is_the_same_attention(tmp_path):
    result, _ = run_small("softpick_state.py", tmp_path / "result.json")
    assert [row["length"] for row in result["rows"]] == [32, 64]
    for row in result["rows"]:
        assert row["relative_difference"] < 1e-5
        assert row["seconds_ratio"] > 0
        size = result["size"]
        assert row["bytes_ratio"] == pytest.approx((row["length"] + size) / (2 * row["length"]))


def tables_of(printed):
    """The cells of each table of Markdown, by the name of its row."""
    tables = [table.splitlines()[2:] for table in printed.strip().split("\n\n")]
    rows = ((line.strip("|").split("|") for line in lines) for lines in tables)
    return [{name.strip(" `"): cells for name, *cells in table} for table in rows]


def rows_of(path, **chosen):
    """The rows of a result file with these entries, by name and pass."""
    rows = json.loads(path.read_text())["rows"]
    rows = [row for row in rows if chosen.items() <= row.items()]
    return {(row["name"], row["pass"]): row for row in rows}


def test_the_tables_of_attention_are_those_of_the_results(tmp_path):
    for path in (BENCHMARKS / "results").glob("attention-*.json"):
        shutil.copy(path, tmp_path)
    script = BENCHMARKS / "attention_report.py"
    command = [sys.executable, str(script), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ratios, alone = tables_of(done.stdout)
    for column, backend in enumerate(BACKENDS):
        longest = rows_of(tmp_path / f"attention-{backend}.json", length=8192, dtype="float32")
        single = rows_of(tmp_path / f"attention-131072-{backend}.json", dtype="float32")
        for normalizer in ("ssmax", "softpick", "rectified_softpick"):
            fused = backend == "torch" and normalizer == "ssmax"
            row = longest[f"{normalizer}, {'fused' if fused else 'tiled'}", "forward + backward"]
            expected = f"{row['seconds_ratio']:.2f} time, {row['gibibytes_ratio']:.3f} memory"
            assert expected in ratios[normalizer][column]
            row = single[f"{normalizer}, tiled", "forward + backward"]
            assert f"{row['gibibytes']:.2f} GiB" in alone[normalizer][column]
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_generation_are_those_of_the_results():
    script = BENCHMARKS / "generation_report.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    speed, _ = tables_of(done.stdout)
    for i, backend in enumerate(BACKENDS):
        path = BENCHMARKS / "results" / f"generation-{backend}.json"
        for row in json.loads(path.read_text())["rows"]:
            if row.get("batch") in (1, 8) and "tokens_per_second" in row:
                cell = speed[row["name"]][2 * i + (row["batch"] == 8)]
                assert f" {row['tokens_per_second']:.0f} " in cell
                if row["name"] not in ("keras_hub", "transformers"):
                    assert f"x {row['ratio']:.2f}" in cell


@pytest.mark.parametrize("normalizer", COMPARED)
def test_the_models_compared_have_equally_many_parameters(train_step, normalizer):
    s = SIZES["num_heads"] * SIZES["num_layers"] if normalizer == "ssmax" else 0
    reference = train_step.build_reference(**SIZES)
    assert build_ours(normalizer).count_params() == reference.count_params() + s


def test_the_models_compared_have_equal_outputs_and_training(train_step, rng):
    reference = train_step.build_reference(**SIZES, dropout=0.0)
    for weight in reference.weights:  # biases and gains that are not all 0 and 1
        weight.assign(rng.normal(0.3, 0.2, weight.shape).astype("float32"))
    ours = build_ours("softmax", dropout=0.0)
    copy_weights(ours, reference)
    x = rng.normal(size=(5, SIZES["window_size"], SIZES["embed_dim"])).astype("float32")
    y = rng.normal(size=(5, SIZES["embed_dim"])).astype("float32")
    assert relative_error(to_numpy(ours(x)), to_numpy(reference(x))) < 1e-5
    losses = []
    for model in (ours, reference):
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
        losses.append([float(model.train_on_batch(x, y)) for _ in range(3)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_the_models_compared_drop_out_at_as_many_places(train_step):
    def rates(model):
        return [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]

    num_layers = SIZES["num_layers"]
    ours = build_ours("ssmax")
    blocks = [ours.get_layer(f"ssmax_block_{i}") for i in range(1, num_layers + 1)]
    inside = [b.attention_dropout.rate for b in blocks]
    inside += [b.feed_forward_dropout.rate for b in blocks]
    assert [b.attention.dropout for b in blocks] == [0.0] * num_layers
    assert rates(ours) + inside == [0.1] * (3 * num_layers - 1)
    assert rates(train_step.build_reference(**SIZES)) == [0.1] * (3 * num_layers - 1)
