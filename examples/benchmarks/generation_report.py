"""The tables of what `generation.py` measured, from its result files.

python examples/benchmarks/generation_report.py
"""

import argparse
import json
import pathlib
from typing import Any

from attention_report import BACKENDS, NORMALIZERS, RESULTS

MODELS = ("softmax", *NORMALIZERS)


def load(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The results of each backend that has been measured."""
    paths = {backend: folder / f"generation-{backend}.json" for backend in BACKENDS}
    return {b: json.loads(path.read_text()) for b, path in paths.items() if path.exists()}


def cell(row: dict[str, Any]) -> str:
    """Tokens per second, and of our models the ratios to the others'."""
    ratios = [row[kind] for kind in ("ratio", "ratio_to_transformers") if kind in row]
    ours = row["name"] in MODELS
    ratio = f" (x {', x '.join(f'{x:.2f}' for x in ratios)})" if ours else ""
    return f"{row['tokens_per_second']:.0f}{ratio}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Tokens per second and their ratio to KerasHub's, and the time of a token, as Markdown."""
    batches = sorted({row["batch"] for result in results.values() for row in result["rows"]})
    columns = [(backend, batch) for backend in results for batch in batches]
    header = [f"{BACKENDS[b]}, batch {n}" for b, n in columns]
    lines = ["| tokens per second | " + " | ".join(header) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in (*MODELS, "keras_hub", "transformers"):
        cells = []
        for backend, batch in columns:
            rows = results[backend]["rows"]
            found = [x for x in rows if (x["name"], x["batch"]) == (name, batch)]
            cells.append(cell(found[0]) if found else "")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    cores = {1: "one core", 2: "two cores"}
    names = [
        f"{BACKENDS[b]}, {cores.get(x['cpu_count'], x['cpu_count'])}" for b, x in results.items()
    ]
    lines += ["", "| ms per token with a cache of so many positions | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for name in MODELS:
        cells = []
        for result in results.values():
            by_length = result["seconds_per_token"][name]
            cells.append(", ".join(f"{n}: {1e3 * x:.1f}" for n, x in by_length.items()))
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    folder = parser.parse_args().results
    results = load(folder)
    if not results:
        raise SystemExit(f"no generation-BACKEND.json in {folder}: run generation.py first")
    print(table(results))


if __name__ == "__main__":
    main()
