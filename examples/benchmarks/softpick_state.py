"""What a running state in place of the cached values would save when signed softpick decodes.

Signed softpick's numerator is linear in the logits: sum_j (q . k_j) v_j = q . sum_j (k_j v_j^T).
Without a window, a cache could hold that D x Dv matrix per head and no values. The denominator
needs every key all the same. One new token that sees S cached ones, both ways in turn in one
process, compiled; the median of the rounds' ratios is reported, and the largest difference.

    KERAS_BACKEND=jax python examples/benchmarks/softpick_state.py
"""

import argparse
import json
import os
import pathlib
import time
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

import keras_ssattn
from keras_ssattn._keras.compiling import compile_function

RESULTS = pathlib.Path(__file__).parent / "results"


def with_values(query: Any, key: Any, value: Any) -> Any:
    """What the package does: `[B, 1, H, D]` and the cache's keys and values, `[B, S, H, D]`."""
    offset = key.shape[1] - 1
    return keras_ssattn.ops.attention(
        query, key, value, "softpick", causal=True, query_offset=offset
    )


def with_state(query: Any, key: Any, state: Any) -> Any:
    """The same from the keys and the state `[B, H, D, Dv]`, scaled as `attention` does."""
    query = ops.swapaxes(query, 1, 2) / query.shape[-1] ** 0.5  # [B, H, 1, D]
    logits = ops.einsum("bhqd,bshd->bhqs", query, key)
    total = 1.0 + ops.sum(ops.abs(logits), axis=-1, keepdims=True)
    return ops.swapaxes(ops.matmul(query, state) / total, 1, 2)


def measure(length: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    rng = np.random.default_rng(0)
    shape = (args.batch, length, args.heads, args.size)
    key, value = (rng.normal(size=shape).astype("float32") for _ in range(2))
    query = rng.normal(size=(args.batch, 1, args.heads, args.size)).astype("float32")
    state = np.einsum("bshd,bshe->bhde", key, value)
    steps = []
    for function, last in ((with_values, value), (with_state, state)):
        inputs = [ops.convert_to_tensor(x) for x in (query, key, last)]
        steps.append((compile_function(function, []), inputs))
    seconds: list[list[float]] = [[], []]
    outputs: list[Any] = [None, None]
    for repeat in range(args.repeats + 3):  # the first compile
        for i, (step, inputs) in enumerate(steps):
            start = time.perf_counter()
            for _ in range(args.tokens):
                outputs[i] = step(*inputs)
            outputs[i] = ops.convert_to_numpy(outputs[i])
            if repeat >= 3:
                seconds[i].append((time.perf_counter() - start) / args.tokens)
    return {
        "length": length,
        "seconds_with_values": float(np.median(seconds[0])),
        "seconds_ratio": float(np.median(np.divide(seconds[1], seconds[0]))),
        "bytes_ratio": float((key.nbytes + state.nbytes) / (key.nbytes + value.nbytes)),
        "relative_difference": float(
            np.abs(outputs[1] - outputs[0]).max() / np.abs(outputs[0]).max()
        ),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048, 16384, 65536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="of each head")
    parser.add_argument("--tokens", type=int, default=20, help="steps in a round")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="a short run, of no meaning")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file to write")
    args = parser.parse_args()
    if args.small:
        args.lengths, args.repeats, args.tokens = [32, 64], 1, 2
    result = {
        "backend": keras.backend.backend(),
        "keras": keras.version(),
        "keras_ssattn": keras_ssattn.__version__,
        "cpu_count": os.cpu_count(),
        **{x: getattr(args, x) for x in ("batch", "heads", "size", "tokens", "repeats")},
        "rows": [measure(length, args) for length in args.lengths],
    }
    print(f"A state in place of values, signed softpick, one token, {result['backend']}")
    for row in result["rows"]:
        print(
            f"{row['length']:7} keys: {1e6 * row['seconds_with_values']:9.0f} us with values, "
            f"time x {row['seconds_ratio']:.2f}, bytes x {row['bytes_ratio']:.2f}, "
            f"difference {row['relative_difference']:.1e}"
        )
    output = args.output or RESULTS / f"softpick_state-{result['backend']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
