"""Time, memory and growth of causal attention, relative to what Keras has.

Every normalizer in every implementation, beside `keras.ops.dot_product_attention`, compiled (XLA
on TensorFlow and JAX), in turn in one process; the median of the rounds' ratios is reported, of the
time on the clock and of the processor time, which other programs disturb less. On
PyTorch `scaled_dot_product_attention` is measured too; where there is a GPU, also the flash
kernels of PyTorch and of JAX in bfloat16. Peak memory is that of a process of its own for each,
above what it held before the first pass, compilation included. The growth exponent is the slope
of log(time) over log(T).

    KERAS_BACKEND=jax python examples/benchmarks/attention.py --lengths 2048 4096 8192

A longer input, where the reference does not fit, each once and in its own process:

    KERAS_BACKEND=jax python examples/benchmarks/attention.py --lengths 131072 --alone
"""

import argparse
import json
import os
import pathlib
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

BACKEND = keras.backend.backend()
NORMALIZERS = ("ssmax", "softpick", "rectified_softpick")
REFERENCE = "keras.ops.dot_product_attention"
TORCH_REFERENCE = "torch scaled_dot_product_attention"
JAX_REFERENCE = "jax.nn.dot_product_attention, cuDNN"
DENSE_UP_TO = 4096  # a dense pass needs several T x T tensors for each head
PASSES = ("forward", "forward + backward")
PAUSE = 0.5  # seconds before each pass: JAX frees gigabytes of the one before after its result
RESULTS = pathlib.Path(__file__).parent / "results"


def on_gpu() -> bool:
    """Whether the backend computes on a GPU."""
    if BACKEND == "torch":
        import torch

        return torch.cuda.is_available()
    if BACKEND == "jax":
        import jax

        return jax.default_backend() == "gpu"
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def names_at(length: int, dtype: str) -> list[str]:
    """What is measured at a length; the reference first. cuDNN's flash kernel takes no float32."""
    names = [REFERENCE]
    if BACKEND == "torch":
        names.append(TORCH_REFERENCE)
    if BACKEND == "jax" and on_gpu() and dtype == "bfloat16":
        names.append(JAX_REFERENCE)
    for normalizer in NORMALIZERS:
        fused = BACKEND == "torch" and normalizer == "ssmax"
        implementations = ["tiled"] + ["fused"] * fused + ["dense"] * (length <= DENSE_UP_TO)
        names += [f"{normalizer}, {x}" for x in implementations]
    return names


def attention(name: str) -> Callable:
    """The function of query, key and value, `[B, T, H, D]`, that a name stands for."""
    if name == REFERENCE:
        return lambda q, k, v: keras.ops.dot_product_attention(q, k, v, is_causal=True)
    if name == JAX_REFERENCE:
        import jax

        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
    if name == TORCH_REFERENCE:
        import torch

        def heads_first(*xs: Any) -> Any:
            xs = [x.transpose(1, 2) for x in xs]
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(*xs, is_causal=True).transpose(1, 2)

        return heads_first
    normalizer, implementation = name.split(", ")
    return lambda q, k, v: keras_ssattn.ops.attention(
        q, k, v, normalizer, causal=True, implementation=implementation
    )


def make_arrays(args: argparse.Namespace, length: int) -> list[np.ndarray]:
    """Query, key, value and the upstream gradient."""
    rng = np.random.default_rng(0)
    shape = (1, length, args.heads, args.size)
    return [rng.normal(size=shape).astype("float32") for _ in range(4)]


def make_passes(function: Callable, arrays: list[np.ndarray], dtype: str) -> dict[str, Callable]:
    """Functions without arguments that compute and wait, by name of the pass."""
    *inputs, upstream = (keras.ops.convert_to_tensor(x, dtype) for x in arrays)

    if BACKEND == "torch":
        import torch

        inputs = [x.detach().requires_grad_(True) for x in inputs]

        def finished(x: Any) -> Any:
            if x.is_cuda:
                torch.cuda.synchronize()
            return x

        def forward() -> Any:
            with torch.no_grad():
                return finished(function(*inputs))

        def both() -> Any:
            return finished(torch.autograd.grad(function(*inputs), inputs, upstream)[0])

        return dict(zip(PASSES, (forward, both), strict=True))
    if BACKEND == "jax":
        import jax

        def gradients(upstream: Any, *xs: Any) -> Any:
            return jax.vjp(function, *xs)[1](upstream)

        compiled = jax.jit(function), jax.jit(gradients)
    else:
        import tensorflow as tf

        def gradients(upstream: Any, *xs: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(xs)
                y = function(*xs)
            return tape.gradient(y, xs, upstream)

        compiled = tuple(tf.function(f, jit_compile=True) for f in (function, gradients))

    def wait(results: Any) -> None:
        first = results[0] if isinstance(results, (list, tuple)) else results
        first.block_until_ready() if BACKEND == "jax" else first[0, 0, 0].numpy()

    calls = (lambda: wait(compiled[0](*inputs)), lambda: wait(compiled[1](upstream, *inputs)))
    return dict(zip(PASSES, calls, strict=True))


def time_in_turn(args: argparse.Namespace, length: int, dtype: str) -> list[dict[str, Any]]:
    """A row for each name and pass, with its median time and its ratio to the reference."""
    arrays, names = make_arrays(args, length), names_at(length, dtype)
    names = [x for x in names if not args.only or x in (REFERENCE, *args.only)]
    passes = {name: make_passes(attention(name), arrays, dtype) for name in names}
    rows = []
    for which in PASSES:
        clock: dict[str, list[float]] = {name: [] for name in names}
        processor: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(args.repeats + 1):  # the first compiles
            for name in names:
                time.sleep(0 if args.small else PAUSE)
                start, used = time.perf_counter(), time.process_time()
                passes[name][which]()
                if repeat:
                    clock[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - used)
        rows += [
            {
                "name": name,
                "length": length,
                "pass": which,
                "dtype": dtype,
                "seconds": float(np.median(clock[name])),
                "seconds_ratio": float(np.median(np.divide(clock[name], clock[REFERENCE]))),
                "processor_seconds": float(np.median(processor[name])),
                "processor_ratio": float(
                    np.median(np.divide(processor[name], processor[REFERENCE]))
                ),
            }
            for name in names
        ]
    return rows


def add_memory(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Adds the peak of forward + backward to its rows, from a process of its own for each."""
    reference = None
    for row in rows:
        if row["pass"] == PASSES[0] or row["dtype"] != "float32":
            continue
        row["gibibytes"], once = run_alone(args, row["name"], row["length"])
        row.setdefault("seconds_with_compilation", once)
        reference = row["gibibytes"] if row["name"] == REFERENCE else reference
        if reference:
            row["gibibytes_ratio"] = row["gibibytes"] / reference
        print(f"{row['length']:7} {row['name']:36}{row['gibibytes']:9.3f} GiB", flush=True)


def run_alone(args: argparse.Namespace, name: str, length: int) -> tuple[float, float]:
    """Peak GiB and seconds of one pass forward and backward, compilation included."""
    sizes = [f"--heads={args.heads}", f"--size={args.size}", f"--lengths={length}"]
    command = [sys.executable, __file__, *sizes, "--memory-of", name]
    # what is freed goes back to the system at once, so that the peak is of what was in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    gibibytes, seconds = done.stdout.split()[-2:]
    return float(gibibytes), float(seconds)


def print_peak_memory(args: argparse.Namespace) -> None:
    """What the process of `run_alone` does."""
    arrays = make_arrays(args, args.lengths[0])
    compute = make_passes(attention(args.memory_of), arrays, "float32")[PASSES[1]]
    before, start = peak_memory(), time.perf_counter()
    compute()
    print((peak_memory() - before) / 2**30, time.perf_counter() - start)


def peak_memory() -> int:
    """Bytes: of the device where it is a GPU, else of the process, on Linux."""
    if on_gpu() and BACKEND == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    if on_gpu() and BACKEND == "jax":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    if on_gpu():
        import tensorflow as tf

        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    # not ru_maxrss, which a process inherits from the one that started it
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The exponent p of time ~ T^p, for what was measured at two lengths or more."""
    times: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["pass"] == PASSES[1] and row["dtype"] == "float32" and "seconds" in row:
            times.setdefault(row["name"], []).append((row["length"], row["seconds"]))
    return {
        name: float(np.polyfit(*np.log(np.array(points).T), 1)[0])
        for name, points in times.items()
        if len(points) > 1
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns the table as a dictionary."""
    rows: list[dict[str, Any]] = []
    for length in sorted(args.lengths):
        if args.alone:
            names = [name for name in names_at(length, "float32") if name.endswith("tiled")]
            rows += [
                {"name": x, "length": length, "pass": PASSES[1], "dtype": "float32"} for x in names
            ]
        else:
            for dtype in ("float32", "bfloat16") if on_gpu() else ("float32",):
                rows += time_in_turn(args, length, dtype)
    if args.alone or not args.small:
        add_memory(args, rows)
    sizes = {x: getattr(args, x) for x in ("heads", "size", "repeats")}
    versions = {"keras": keras.version(), "keras_ssattn": keras_ssattn.__version__}
    device = {"gpu": on_gpu(), "cpu_count": os.cpu_count()}
    return {
        "backend": BACKEND,
        **device,
        **versions,
        **sizes,
        "rows": rows,
        "growth_exponent": growth(rows),
    }


def print_table(result: dict[str, Any]) -> None:
    """Prints the rows of a result."""
    print("Causal attention on {backend}, {heads} heads of {size}".format(**result))
    for row in result["rows"]:
        cells = f"{row['length']:7} {row['dtype']:9}{row['name']:36}{row['pass']:19}"
        if "seconds" in row:
            cells += f"{row['seconds']:9.3f} s   x {row['seconds_ratio']:6.3f}"
            cells += f"   of the processor x {row['processor_ratio']:6.3f}"
        if "gibibytes" in row:
            cells += f"{row['gibibytes']:9.3f} GiB"
        if "gibibytes_ratio" in row:
            cells += f" x {row['gibibytes_ratio']:6.3f}"
        print(cells)
    for name, exponent in result["growth_exponent"].items():
        print(f"{name:36} time ~ T^{exponent:.2f}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="of each head")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names to measure beside the reference")
    parser.add_argument("--alone", action="store_true", help="tiles only, each once")
    parser.add_argument("--small", action="store_true", help="short inputs; memory if --alone")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file to write")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        args.lengths, args.heads, args.size, args.repeats = [400, 800], 2, 8, 1
        args.lengths = args.lengths[args.alone :]
    if args.memory_of:
        print_peak_memory(args)
        return
    result = measure(args)
    print_table(result)
    kind = f"-{args.lengths[-1]}" if args.alone else ""
    output = args.output or RESULTS / f"attention{kind}-{BACKEND}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
