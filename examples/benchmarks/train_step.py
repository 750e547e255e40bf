"""Time of a training step of `keras_ssattn.build`, relative to Keras's own attention.

Every normalizer, and the same model made with `keras.layers.MultiHeadAttention`, are trained in
turn in one process, one step each, so that whatever else the machine does falls on all alike.
The ratio of each step to the reference's step of the same round is a pair; the median of the
pairs is reported, with its 90 % bootstrap interval. The same is done for processor time, summed
over the threads of the process: it matters less what else runs, and it says nothing of a GPU.

    KERAS_BACKEND=jax python examples/benchmarks/train_step.py
"""

import argparse
import importlib
import importlib.util
import json
import os
import pathlib
import platform
import time

if "KERAS_BACKEND" not in os.environ:
    _installed = [b for b in ("tensorflow", "jax", "torch") if importlib.util.find_spec(b)]
    os.environ["KERAS_BACKEND"] = _installed[0]
    print(f"KERAS_BACKEND is not set: using {_installed[0]}")

import keras
import numpy as np

import keras_ssattn

NORMALIZERS = ("ssmax", "softmax", "softpick", "rectified_softpick")
REFERENCE = "keras.layers.MultiHeadAttention"
RESULTS = pathlib.Path(__file__).parent / "results"


def build_reference(
    embed_dim: int = 256,
    num_heads: int = 4,
    num_layers: int = 6,
    dropout: float = 0.1,
    window_size: int = 60,
) -> keras.Model:
    """Builds the model of `keras_ssattn.build` with `keras.layers.MultiHeadAttention`."""
    layers = keras.layers
    inputs = x = keras.Input((window_size, embed_dim))
    for i in range(1, num_layers + 1):
        y = layers.LayerNormalization(epsilon=1e-5, name=f"attention_norm_{i}")(x)
        attention = layers.MultiHeadAttention(
            num_heads, embed_dim // num_heads, name=f"attention_{i}"
        )
        x = x + layers.Dropout(dropout)(attention(y, y, use_causal_mask=True))
        y = layers.LayerNormalization(epsilon=1e-5, name=f"feed_forward_norm_{i}")(x)
        y = layers.Dense(4 * embed_dim, activation="gelu", name=f"up_{i}")(y)
        y = layers.Dense(embed_dim, name=f"down_{i}")(y)
        x = x + layers.Dropout(dropout)(y)
        if i < num_layers:
            x = layers.Dropout(dropout)(x)
    x = layers.LayerNormalization(epsilon=1e-5, name="final_norm")(x)
    return keras.Model(inputs, x[:, -1], name="reference")


def make_models(embed_dim: int, window: int, num_layers: int) -> dict[str, keras.Model]:
    """Makes the reference and one model for each normalizer, compiled."""
    options = {"embed_dim": embed_dim, "window_size": window, "num_layers": num_layers}
    models = {REFERENCE: build_reference(**options)}
    for name in NORMALIZERS:
        models[name] = keras_ssattn.build(hidden_size=embed_dim, normalizer=name, **options)
    for model in models.values():
        model.compile(optimizer="adam", loss="mse", jit_compile="auto")
    return models


def time_of_step(model: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Trains one step; returns its wall time and processor time, in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    float(model.train_on_batch(x, y))  # the loss comes back as a number, so the step is over
    return time.perf_counter() - wall, time.process_time() - processor


def measure(
    models: dict[str, keras.Model], x: np.ndarray, y: np.ndarray, steps: int, warmup: int
) -> dict[str, np.ndarray]:
    """Times `[steps, 2]` of each model, trained in turn; the turns rotate."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    names = list(models)
    for i in range(-warmup, steps):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            time_taken = time_of_step(models[name], x, y)
            if i >= 0:
                times[name].append(time_taken)
    return {name: np.array(values) for name, values in times.items()}


def summary(seconds: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The median time, the median of the paired ratios, and its 90 % bootstrap interval."""
    ratios = seconds / reference
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (5, 95))
    return {
        "seconds": round(float(np.median(seconds)), 6),
        "ratio": round(float(np.median(ratios)), 4),
        "ratio_low": round(float(low), 4),
        "ratio_high": round(float(high), 4),
    }


def run(args: argparse.Namespace) -> dict:
    """Measures, and returns the table as a dictionary."""
    keras.utils.set_random_seed(0)
    models = make_models(args.embed_dim, args.window, args.layers)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(args.batch, args.window, args.embed_dim)).astype("float32")
    y = rng.normal(size=(args.batch, args.embed_dim)).astype("float32")
    times = measure(models, x, y, args.steps, args.warmup)
    rows = {}
    for name, model in models.items():
        wall, processor = (summary(times[name][:, i], times[REFERENCE][:, i]) for i in (0, 1))
        rows[name] = {"parameters": model.count_params(), "wall": wall, "processor": processor}
    backend = keras.backend.backend()
    sizes = {name: getattr(args, name) for name in ("embed_dim", "layers", "batch", "window")}
    return {
        "backend": backend,
        "versions": {
            "python": platform.python_version(),
            "keras": keras.version(),
            backend: importlib.import_module(backend).__version__,
            "keras_ssattn": keras_ssattn.__version__,
        },
        "cpu_count": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "steps": args.steps,
        **sizes,
        "models": rows,
    }


def print_table(result: dict) -> None:
    """Prints the rows of a result."""
    print("Training step on {backend}, batch {batch}, window {window}".format(**result))
    header = f"{'ms':>9}{'ratio':>7}  {'90 % interval':16}"
    print(f"{'':36}{'':11}  {'wall time':34}processor time")
    print(f"{'model':36}{'parameters':>11}{header}{header}")
    for name, row in result["models"].items():
        print(f"{name:36}{row['parameters']:11}{cells(row['wall'])}{cells(row['processor'])}")


def cells(times: dict[str, float]) -> str:
    """Formats a `summary`."""
    interval = f"{times['ratio_low']:.3f} to {times['ratio_high']:.3f}"
    return f"{1000 * times['seconds']:9.1f}{times['ratio']:7.3f}  {interval:16}"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each model")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each model before those")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--window", type=int, default=60, help="time steps")
    parser.add_argument("--small", action="store_true", help="a small model and few steps")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file to write")
    args = parser.parse_args()
    args.embed_dim, args.layers = 256, 6
    if args.small:
        args.embed_dim, args.layers = 16, 1
        args.steps, args.warmup, args.batch, args.window = 2, 1, 3, 7
    return args


def main() -> None:
    """Runs the benchmark."""
    args = parse_arguments()
    result = run(args)
    print_table(result)
    output = args.output or RESULTS / f"train_step-{result['backend']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
