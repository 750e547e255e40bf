"""The plot and the table of what `attention.py` measured, from its result files.

python examples/benchmarks/attention_report.py
"""

import argparse
import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = pathlib.Path(__file__).parent / "results"
BACKENDS = {"tensorflow": "TensorFlow (XLA)", "jax": "JAX", "torch": "PyTorch"}
NORMALIZERS = {"ssmax": "C0", "softpick": "C1", "rectified_softpick": "C2"}
LONGEST = 131072  # measured alone: all weights would be hundreds of GiB
REFERENCE = "keras.ops.dot_product_attention"
MEASURES = {"seconds": "seconds, forward + backward", "gibibytes": "peak GiB above the inputs"}


def load(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The results of each backend that has been measured."""
    paths = {backend: folder / f"attention-{backend}.json" for backend in BACKENDS}
    return {b: json.loads(path.read_text()) for b, path in paths.items() if path.exists()}


def rows_of(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Forward and backward passes in float32 of one name, by length."""
    return [
        row
        for row in result["rows"]
        if (row["name"], row["pass"], row["dtype"]) == (name, "forward + backward", "float32")
    ]


def served_by(backend: str, normalizer: str) -> str:
    """The implementation that `auto` takes for long causal inputs."""
    fused = backend == "torch" and normalizer == "ssmax"
    return f"{normalizer}, {'fused' if fused else 'tiled'}"


def plot(results: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """One column for each backend; time above, memory below."""
    figure, axes = plt.subplots(
        2, len(results), figsize=(3.6 * len(results), 6), sharex=True, sharey="row", squeeze=False
    )
    for column, (backend, result) in enumerate(results.items()):
        for axis, (measure, label) in zip(axes[:, column], MEASURES.items(), strict=True):
            lines = {REFERENCE: (REFERENCE, "black", "--")}
            for normalizer, color in NORMALIZERS.items():
                lines[normalizer] = (served_by(backend, normalizer), color, "-")
                lines[f"{normalizer}, all weights"] = (f"{normalizer}, dense", color, ":")
            for shown, (name, color, style) in lines.items():
                rows = [row for row in rows_of(result, name) if measure in row]
                points = [(row["length"], row[measure]) for row in rows]
                if points:
                    axis.loglog(
                        *zip(*points, strict=True), style, color=color, marker=".", label=shown
                    )
            axis.set_xticks(sorted({r["length"] for r in result["rows"]}), minor=False)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].set_title(BACKENDS[backend])
        axes[1, column].set_xlabel("T")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Ratios to the reference at the greatest length, as Markdown."""
    lines = ["| | " + " | ".join(BACKENDS[b] for b in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for normalizer in NORMALIZERS:
        cells = []
        for backend, result in results.items():
            name = served_by(backend, normalizer)
            row = rows_of(result, name)[-1]
            cells.append(
                f"{row['seconds_ratio']:.2f} time, {row['gibibytes_ratio']:.3f} memory, "
                f"T^{result['growth_exponent'][name]:.1f}"
            )
        lines.append(f"| `{normalizer}` | " + " | ".join(cells) + " |")
    cells = []
    for result in results.values():
        row = rows_of(result, REFERENCE)[-1]
        exponent = result["growth_exponent"][REFERENCE]
        cells.append(f"{row['seconds']:.1f} s, {row['gibibytes']:.2f} GiB, T^{exponent:.1f}")
    lines.append(f"| `{REFERENCE}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_alone(folder: pathlib.Path, length: int) -> str:
    """Memory of a pass that was measured alone, at a greater length, as Markdown."""
    paths = {b: folder / f"attention-{length}-{b}.json" for b in BACKENDS}
    results = {b: json.loads(path.read_text()) for b, path in paths.items() if path.exists()}
    lines = [f"| T = {length:,} | " + " | ".join(BACKENDS[b] for b in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for normalizer in NORMALIZERS:
        rows = [rows_of(result, f"{normalizer}, tiled")[-1] for result in results.values()]
        cells = [f"{row['gibibytes']:.2f} GiB" for row in rows]
        lines.append(f"| `{normalizer}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Plots and prints what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    folder = parser.parse_args().results
    results = load(folder)
    if not results:
        raise SystemExit(f"no attention-BACKEND.json in {folder}: run attention.py first")
    plot(results, folder / "attention.png")
    print(table(results))
    print()
    print(table_alone(folder, LONGEST))


if __name__ == "__main__":
    main()
