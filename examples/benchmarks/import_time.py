"""Time that `import keras_ssattn` adds to `import keras`.

Each repetition is a fresh interpreter that imports the one and then the other.

    KERAS_BACKEND=jax python examples/benchmarks/import_time.py
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

RESULTS = pathlib.Path(__file__).parent / "results"

IMPORTS = """
import importlib, json, time
start = time.perf_counter()
import keras
middle = time.perf_counter()
import keras_ssattn
end = time.perf_counter()
backend = keras.backend.backend()
versions = {
    "keras": keras.version(),
    backend: importlib.import_module(backend).__version__,
    "keras_ssattn": keras_ssattn.__version__,
}
print(json.dumps([middle - start, end - middle, versions]))
"""


def choose_backend() -> str:
    """Returns KERAS_BACKEND, which it sets to an installed backend where it is unset."""
    if "KERAS_BACKEND" not in os.environ:
        installed = [b for b in ("tensorflow", "jax", "torch") if importlib.util.find_spec(b)]
        os.environ["KERAS_BACKEND"] = installed[0]
        print(f"KERAS_BACKEND is not set: using {installed[0]}")
    return os.environ["KERAS_BACKEND"]


def measure() -> tuple[float, float, dict[str, str]]:
    """Seconds to import keras, and then keras_ssattn, in a fresh interpreter; the versions."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def run(backend: str, repeats: int) -> dict:
    """Measures, and returns the medians."""
    _, _, versions = measure()  # writes the bytecode
    keras_seconds, added_seconds, _ = zip(*(measure() for _ in range(repeats)), strict=True)
    return {
        "backend": backend,
        "versions": {"python": platform.python_version(), **versions},
        "cpu_count": os.cpu_count(),
        "repeats": repeats,
        "keras_seconds": round(statistics.median(keras_seconds), 4),
        "keras_ssattn_seconds": round(statistics.median(added_seconds), 4),
        "keras_ssattn_seconds_least": round(min(added_seconds), 4),
        "keras_ssattn_seconds_most": round(max(added_seconds), 4),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="one repetition")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file to write")
    args = parser.parse_args()
    result = run(choose_backend(), 1 if args.small else args.repeats)
    print("import keras on {backend}: {keras_seconds:.3f} s".format(**result))
    print(
        "import keras_ssattn after it: {keras_ssattn_seconds:.3f} s "
        "({keras_ssattn_seconds_least:.3f} to {keras_ssattn_seconds_most:.3f})".format(**result)
    )
    output = args.output or RESULTS / f"import_time-{result['backend']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
