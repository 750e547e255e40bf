"""Time and memory of causal attention, relative to `keras.ops.dot_product_attention`.

Forward and backward pass of every normalizer and of the reference, compiled (XLA on TensorFlow
and JAX), in turn in one process; the ratio of the medians is reported. Peak memory is that of a
process of its own for each, above what it held before the first call, compilation included.

    KERAS_BACKEND=jax python examples/benchmarks/attention.py --length 8192
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_ssattn

NORMALIZERS = ("ssmax", "softpick", "rectified_softpick")
REFERENCE = "keras.ops.dot_product_attention"
RESULTS = pathlib.Path(__file__).parent / "results"


def attention(name: str) -> Callable:
    """The function of query, key and value that a name stands for."""
    if name == REFERENCE:
        return lambda q, k, v: keras.ops.dot_product_attention(q, k, v, is_causal=True)
    return lambda q, k, v: keras_ssattn.ops.attention(q, k, v, name, causal=True)


def forward_and_backward(function: Callable, arrays: list[np.ndarray]) -> Callable:
    """A function without arguments that computes the gradients and waits for them."""
    *inputs, upstream = arrays
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def total(*xs: Any) -> Any:
            return (function(*xs) * upstream).sum()

        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        inputs = [jax.numpy.asarray(x) for x in inputs]
        return lambda: [x.block_until_ready() for x in gradient(*inputs)]
    if backend == "tensorflow":
        import tensorflow as tf

        tensors = [tf.constant(x) for x in inputs]

        @tf.function(jit_compile=True)
        def gradients(*xs: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(xs)
                total = tf.reduce_sum(function(*xs) * upstream)
            return tape.gradient(total, xs)

        return lambda: [x.numpy() for x in gradients(*tensors)]
    import torch

    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    upstream = torch.tensor(upstream)
    return lambda: torch.autograd.grad(function(*tensors), tensors, upstream)


def make_arrays(args: argparse.Namespace) -> list[np.ndarray]:
    """Query, key, value and the upstream gradient."""
    rng = np.random.default_rng(0)
    shape = (1, args.length, args.heads, args.size)
    return [rng.normal(size=shape).astype("float32") for _ in range(4)]


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """GiB that a process of its own needs for one pass, above what it held before it."""
    sizes = [f"--{x}={getattr(args, x)}" for x in ("length", "heads", "size")]
    done = subprocess.run(
        [sys.executable, __file__, *sizes, "--memory-of", name],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def print_peak_memory(args: argparse.Namespace) -> None:
    """What the process of `peak_memory` does."""
    compute = forward_and_backward(attention(args.memory_of), make_arrays(args))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compute()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) / 2**20)  # kibibytes on Linux


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times all in turn, and returns the table as a dictionary."""
    names = [*NORMALIZERS] if args.no_reference else [REFERENCE, *NORMALIZERS]
    arrays = make_arrays(args)
    computes = {name: forward_and_backward(attention(name), arrays) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(args.repeats + 1):  # the first compiles
        for name, compute in computes.items():
            start = time.perf_counter()
            compute()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    rows = {}
    for name in names:
        row = {"seconds": float(np.median(seconds[name]))}
        if not args.small:
            row["gibibytes"] = peak_memory(name, args)
        first = rows.get(REFERENCE, {})
        row |= {f"{key}_ratio": row[key] / first[key] for key in list(row) if first.get(key)}
        rows[name] = row
    sizes = {x: getattr(args, x) for x in ("length", "heads", "size", "repeats")}
    versions = {"keras": keras.version(), "keras_ssattn": keras_ssattn.__version__}
    backend = keras.backend.backend()
    return {"backend": backend, "cpu_count": os.cpu_count(), **versions, **sizes, "rows": rows}


def print_table(result: dict[str, Any]) -> None:
    """Prints the rows of a result."""
    print("Forward + backward on {backend}, T = {length}, {heads} heads of {size}".format(**result))
    for name, row in result["rows"].items():
        units = {"seconds": "s", "gibibytes": "GiB"}
        cells = [
            f"{row[key]:10.3f} {unit:3} x {row.get(f'{key}_ratio', 1.0):5.3f}"
            for key, unit in units.items()
            if key in row
        ]
        print(f"{name:34}{''.join(cells)}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="of each head")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-reference", action="store_true", help="where it would not fit")
    parser.add_argument("--small", action="store_true", help="a short input, and no memory")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file to write")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        args.length, args.heads, args.size, args.repeats = 800, 2, 8, 1
    if args.memory_of:
        print_peak_memory(args)
        return
    result = measure(args)
    print_table(result)
    output = args.output or RESULTS / f"attention-{args.length}-{result['backend']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
