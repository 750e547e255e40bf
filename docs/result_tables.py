"""The tables of measured numbers, from the result files, by the reports of the examples.

`conf.py` writes them to `_generated`, from where the pages include them.
"""

import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "papers"), str(EXAMPLES / "benchmarks")]

import attention_report
import checkpoints
import comparison_report
import generation_report
import keras
import quickstart_report
import report
import retrofit
import study_report

from keras_ssattn.checkpoints.families import FAMILIES
from keras_ssattn.checkpoints.names import layout
from keras_ssattn.distribution import layout_map

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
NORMALIZERS = ("ssmax", "softmax", "softpick", "rectified_softpick")

# The text model of Devstral Small 2, of the family `ministral3`, as its config.json has it.
DEVSTRAL = {
    "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e8, "factor": 48.0,
                        "original_max_position_embeddings": 8192, "mscale": 1.0,
                        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}  # fmt: skip


def result(path: str) -> dict[str, Any]:
    """A result file of the examples."""
    return json.loads((EXAMPLES / path).read_text())


def benchmark(name: str) -> dict[str, dict[str, Any]]:
    """The results of a benchmark by backend."""
    return {b: result(f"benchmarks/results/{name}-{b}.json") for b in BACKENDS}


def quickstart() -> str:
    """Right answers of the main job, beside baselines and published figures."""
    rows = quickstart_report.speaker_rows(result("results/quickstart.json"))
    return report.table(["", "right answers"], [list(row) for row in rows])


def length_scales() -> str:
    """Loss by position of a released architecture, with each length scale."""
    found = result("results/checkpoints.json")
    return checkpoints.table(found["runs"], checkpoints.Settings(**found["settings"]))


def train_step() -> str:
    """Processor time of a training step, relative to Keras's own attention."""
    results = benchmark("train_step").values()
    rows = []
    for name in NORMALIZERS:
        times = [x["models"][name]["processor"] for x in results]
        cells = [f"{t['ratio']:.2f} ({t['ratio_low']:.2f} to {t['ratio_high']:.2f})" for t in times]
        rows.append([f"`{name}`", *cells])
    return report.table(["", *BACKENDS.values()], rows)


def train_language_model() -> str:
    """Time of a training step of a language model, relative to KerasHub's and Hugging Face's."""
    results = benchmark("train_language_model")
    rows = []
    for name in ("softmax", *(x for x in NORMALIZERS if x != "softmax")):
        cells = []
        for found in results.values():
            row = found["models"][name]
            ratios = [row[kind]["ratio"] for kind in ("wall", "to_transformers") if kind in row]
            cells.append(", ".join(f"x {x:.2f}" for x in ratios))
        rows.append([f"`{name}`", *cells])
    return report.table(["", *BACKENDS.values()], rows)


def import_time() -> str:
    """What `import keras_ssattn` takes after `import keras`."""
    times = [f"{1e3 * x['keras_ssattn_seconds']:.0f} ms" for x in benchmark("import_time").values()]
    return report.table(["", *BACKENDS.values()], [["`import keras_ssattn`", *times]])


def softpick_state() -> str:
    """The time of a token's attention with a running state, relative to cached values."""
    rows = {b: x["rows"][-1] for b, x in benchmark("softpick_state").items()}
    [length] = {x["length"] for x in rows.values()}
    cells = [f"x {x['seconds_ratio']:.2f}" for x in rows.values()]
    return report.table(["", *BACKENDS.values()], [[f"time over {length} keys", *cells]])


def sizes(model: Any, devices: int = 1) -> dict[str, int]:
    """How many numbers of each variable a device has, if `devices` share a model.

    Args:
        model: what a family reads from a config.json.
        devices: a number that divides what `layout_map` splits.

    Raises:
        ValueError: if it does not.
    """
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
            if parts % devices:
                raise ValueError(f"{place.variable} cannot be split over {devices} devices")
            found[place.variable] //= devices
    return found


def memory_of_devices() -> str:
    """Gigabytes of a large model on each of several devices, for use and for training."""
    model = FAMILIES["ministral3"].read(DEVSTRAL)
    counts = [sum(sizes(model, n).values()) for n in (1, 4, 8, 8)]
    rows = {
        "GB on each, weights in bfloat16": 2,
        "GB on each, weights, gradients and Adam's m and v in float32": 4 * 4,
    }
    header = ["devices", "1", "4", "8", "16, as 2 x 8"]
    return report.table(
        header, [[name, *(f"{1e-9 * x * n:.1f}" for n in counts)] for name, x in rows.items()]
    )


DEVICES = ("batch", "sequence", "model")  # axes of a mesh
CHANGES = {"batch": "twice the batch", "length": "twice the length", "width": "twice the width"}


def bytes_of_devices() -> str:
    """What a device sends in a step, and its part of the memory, by axis and sizes."""
    steps = result("benchmarks/results/devices-jax.json")["steps"]
    base, rows = steps[0], []
    for step in steps:
        changed = [x for x in (*CHANGES, "devices") if step[x] != base[x]]
        name = CHANGES.get(changed[0], f"{step['devices']} devices") if changed else (
            f"batch {step['batch']}, {step['length']} tokens, width {step['width']}, "
            f"{step['devices']} devices"
        )  # fmt: skip
        found = [step["along"][axis] for axis in DEVICES]
        parts = [
            f"{1e-6 * x['sent']:.0f} MB, {x['bytes'] / step['bytes_of_one']:.2f}" for x in found
        ]
        rows.append([name, *parts])
    return report.table(["", *(f"along {axis}" for axis in DEVICES)], rows)


def memory_along_time() -> str:
    """The memory of attention on each of four devices along time, and on one."""
    rows = [
        [
            f"{x['heads']} x {x['size']}, {x['key_heads']} x {x['size']}",
            *(f"{x[of] / 2**20:.0f} MiB" for of in ("bytes_of_one", "bytes")),
            f"{x['bytes'] / x['bytes_of_one']:.2f}",
        ]
        for x in result("benchmarks/results/devices-jax.json")["attention"]
    ]
    return report.table(["heads of queries, of keys", "one device", "each of four", "part"], rows)


def speed() -> str:
    """SSMax beside what users of each backend have, in one table: that of the README."""
    attention = attention_report.load(attention_report.RESULTS)
    generation = generation_report.load(generation_report.RESULTS)
    longest = {
        b: attention_report.rows_of(x, attention_report.served_by(b, "ssmax"))[-1]
        for b, x in attention.items()
    }
    [length] = {row["length"] for row in longest.values()}
    tokens = {
        b: next(r["ratio"] for r in x["rows"] if (r["name"], r["batch"]) == ("ssmax", 1))
        for b, x in generation.items()
    }
    steps = {b: x["models"]["ssmax"]["processor"] for b, x in benchmark("train_step").items()}
    ratios = {
        f"attention at T = {length}, time": {b: longest[b]["seconds_ratio"] for b in BACKENDS},
        f"attention at T = {length}, memory": {b: longest[b]["gibibytes_ratio"] for b in BACKENDS},
        "a training step at T = 60, time": {b: steps[b]["ratio"] for b in BACKENDS},
        "generation, tokens per second": tokens,
    }
    rows = [[k, *(f"x {x[b]:.2f}" for b in BACKENDS)] for k, x in ratios.items()]
    return report.table(["", *BACKENDS.values()], rows)


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "margins": study_report.margins,
    "normalizers": study_report.normalizers,
    "tables": study_report.tables,
    "copies": study_report.copies,
    "language_models": study_report.language_models,
    "sinks": study_report.sinks,
    "comparison": lambda: comparison_report.markdown(
        {x: result(f"results/{x}.json") for x in ("moe_routing", "feature_selection")}
    ),
    "retrofit": lambda: retrofit.table(result("results/retrofit.json")["losses"]),
    "length_scales": length_scales,
    "attention": lambda: attention_report.table(attention_report.load(attention_report.RESULTS)),
    "attention_alone": lambda: attention_report.table_alone(
        attention_report.RESULTS, attention_report.LONGEST
    ),
    "generation": lambda: generation_report.table(
        generation_report.load(generation_report.RESULTS)
    ),
    "train_step": train_step,
    "train_language_model": train_language_model,
    "import_time": import_time,
    "softpick_state": softpick_state,
    "memory_of_devices": memory_of_devices,
    "bytes_of_devices": bytes_of_devices,
    "memory_along_time": memory_along_time,
}


def write(folder: pathlib.Path) -> None:
    """Writes every table, as Markdown."""
    folder.mkdir(exist_ok=True)
    for name, make in TABLES.items():
        (folder / f"{name}.md").write_text(make() + "\n")
