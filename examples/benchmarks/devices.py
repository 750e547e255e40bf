"""What a training step of a language model keeps and sends on each of several devices, on JAX.

A step of `CausalLM` is compiled for simulated devices that lie along the batch, the sequence or
the model axis of a mesh, and nothing is run. XLA says how much memory a device needs. The bytes
that it sends are counted in the compiled program: a collective in a loop counts as often as the
loop runs, and each as engines carry it out along a ring of n devices:

    all-reduce  2 (n - 1) / n of its result     all-gather, all-to-all  (n - 1) / n of its result
    collective-permute  its result              reduce-scatter  n - 1 times its result

    KERAS_BACKEND=jax python examples/benchmarks/devices.py
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras

from keras_ssattn import __version__, ops
from keras_ssattn.distribution import layout_map
from keras_ssattn.models import CausalLM

MOST = 8  # devices
RESULTS = pathlib.Path(__file__).parent / "results"
AXES = ("batch", "sequence", "model")
BASE = {"batch": 8, "length": 2048, "width": 256, "devices": 4}
LARGER = ({}, {"batch": 16}, {"length": 4096}, {"width": 512}, {"devices": 2}, {"devices": 8})
LAYERS, HEADS, VOCABULARY = 2, 8, 256
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
SENT = {  # by n devices, in parts of the result
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "collective-permute": lambda _: 1,
}
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(SENT)})(?:-start)?\(")


@contextlib.contextmanager
def over(axis: str, count: int) -> Iterator[keras.distribution.DeviceMesh]:
    """A mesh whose devices all lie along one axis."""
    shape = [count if name == axis else 1 for name in AXES]
    devices = keras.distribution.list_devices()[:count]
    mesh = keras.distribution.DeviceMesh(shape, AXES, devices)
    layouts = layout_map(mesh, sequence_axis="sequence")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    try:
        yield mesh
    finally:
        keras.distribution.set_distribution(None)


def bytes_of(shapes: str) -> int:
    """The bytes of a result in a compiled program, such as `(f32[8,2]{1,0}, bf16[4])`."""
    return sum(
        BYTES[dtype] * math.prod(int(x) for x in sizes.split(",") if x)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )


def bytes_sent(program: str, count: int) -> float:
    """The bytes that a device sends in a compiled program, by collectives over all devices."""
    parts: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = "ENTRY" if head[1] else head[2]
            parts[name] = []
        elif name:
            parts[name].append(line)

    def total(name: str) -> float:
        found = 0.0
        for line in parts[name]:
            collective = COLLECTIVE.search(line)
            if collective:
                found += SENT[collective[2]](count) * bytes_of(collective[1])
                continue
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for inner in re.findall(r"(?:body|calls|to_apply|true_computation)=%?([\w.\-]+)", line):
                inside = total(inner)
                if inside and "body=" in line and not trips:
                    raise ValueError(f"a loop that sends has no known number of turns: {line}")
                found += inside * (int(trips[1]) if trips else 1)
        return found

    return total("ENTRY")


def compile_step(batch: int, length: int, width: int, mesh: Any = None) -> Any:
    """The compiled loss of a model and its gradients."""
    keras.utils.set_random_seed(0)
    model = CausalLM(VOCABULARY, width, LAYERS, HEADS, num_kv_heads=HEADS, implementation="tiled")
    values = [
        [v.value for v in x] for x in (model.trainable_variables, model.non_trainable_variables)
    ]

    def loss(trainable: Any, others: Any, tokens: Any) -> Any:
        logits, _ = model.stateless_call(trainable, others, tokens[:, :-1], training=True)
        return keras.ops.mean(
            keras.losses.sparse_categorical_crossentropy(tokens[:, 1:], logits, from_logits=True)
        )

    sharding = None
    if mesh is not None:
        spec = jax.sharding.PartitionSpec("batch", None)
        sharding = jax.sharding.NamedSharding(mesh.backend_mesh, spec)
    tokens = jax.ShapeDtypeStruct((batch, length + 1), "int32", sharding=sharding)
    places = [v.sharding for v in values[0]] if mesh is not None else None
    step = jax.jit(
        jax.value_and_grad(loss), out_shardings=None if places is None else (None, places)
    )
    return step.lower(*values, tokens).compile()


def compile_attention(heads: int, key_heads: int, size: int, length: int, mesh: Any = None) -> Any:
    """The compiled gradient of causal attention."""

    def loss(query: Any, key: Any, value: Any, weights: Any) -> Any:
        out = ops.attention(query, key, value, causal=True, implementation="tiled")
        return keras.ops.sum(out * weights)

    sharding = None
    if mesh is not None:
        spec = jax.sharding.PartitionSpec("batch", "sequence", "model", None)
        sharding = jax.sharding.NamedSharding(mesh.backend_mesh, spec)
    arrays = [
        jax.ShapeDtypeStruct((1, length, n, size), "float32", sharding=sharding)
        for n in (heads, key_heads, key_heads, heads)
    ]
    return jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=sharding).lower(*arrays).compile()


def memory(compiled: Any) -> int:
    """The bytes that a device needs at most, its inputs and results included."""
    found = compiled.memory_analysis()
    kinds = ("temp", "argument", "output")
    return sum(getattr(found, f"{kind}_size_in_bytes") for kind in kinds)


def measure_steps(cases: tuple[dict[str, int], ...], base: dict[str, int]) -> list[dict[str, Any]]:
    """For each case and each axis, what a device sends and keeps."""
    rows = []
    for change in cases:
        sizes = {**base, **change}
        count = sizes.pop("devices")
        row: dict[str, Any] = {**sizes, "devices": count}
        row["bytes_of_one"] = memory(compile_step(**sizes))
        for axis in AXES:
            with over(axis, count) as mesh:
                compiled = compile_step(**sizes, mesh=mesh)
            row[axis] = {
                "sent": bytes_sent(compiled.as_text(), count),
                "bytes": memory(compiled),
            }
        print(row, flush=True)
        rows.append(row)
    return rows


def measure_attention(length: int, count: int) -> list[dict[str, Any]]:
    """Memory of the gradient of attention on one device, and on each of several."""
    rows = []
    for heads, key_heads, size in ((4, 4, 64), (8, 2, 32), (1, 1, 8)):
        sizes = {"heads": heads, "key_heads": key_heads, "size": size, "length": length}
        alone = memory(compile_attention(**sizes))
        with over("sequence", count) as mesh:
            each = memory(compile_attention(**sizes, mesh=mesh))
        rows.append({**sizes, "devices": count, "bytes_of_one": alone, "bytes": each})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, of no meaning")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "devices-jax.json")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", MOST)
    base = {"batch": 4, "length": 32, "width": 32, "devices": 2} if args.small else BASE
    result = {
        "backend": keras.backend.backend(),
        "keras": keras.version(),
        "jax": jax.__version__,
        "keras_ssattn": __version__,
        "layers": LAYERS,
        "heads": HEADS,
        "vocabulary": VOCABULARY,
        "steps": measure_steps(LARGER[:1] if args.small else LARGER, base),
        "attention": measure_attention(64 if args.small else 32768, base["devices"]),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
