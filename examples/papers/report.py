"""The tables and plots of what was run, from the stored runs alone.

    python examples/papers/report.py

Writes `RESULTS.md` and the plots beside it. The learning rate of each arm is the one with the
lowest validation loss with the first seed.
"""

import argparse
import pathlib
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from runs import best_rate, read_runs

HERE = pathlib.Path(__file__).parent
Arms = dict[str, list[dict[str, Any]]]


def load(results: pathlib.Path, condition: str = "") -> Arms:
    """The runs of each arm at its chosen learning rate, by seed, within a condition."""
    records = [x for x in read_runs(results) if x.get("condition", "") == condition]
    arms: Arms = {}
    for record in sorted(records, key=_order):
        arms.setdefault(record["arm"], []).append(record)
    chosen = {}
    for arm, runs in arms.items():
        first = [x for x in runs if x["seed"] == runs[0]["seed"]]
        chosen[arm] = [x for x in runs if x["learning_rate"] == best_rate(first)]
    return chosen


def _order(record: dict[str, Any]) -> tuple:
    """Softmax first; last what goes on from the training of another arm."""
    return record["arm"] != "softmax", record["settings"].get("from", ""), record["seed"]


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean and range over the seeds."""
    low, mean, high = (f"{x:{form}}" for x in (min(values), np.mean(values), max(values)))
    return f"{mean} ({low} to {high})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def about(arms: Arms) -> str:
    """What every run of an experiment had in common."""
    runs = [run for arm in arms.values() for run in arm]
    parameters = sorted({run["parameters"] for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    counts = f"{parameters[0]:,}" + (f" to {parameters[-1]:,}" if parameters[1:] else "")
    return (
        f"{counts} parameters, {runs[0]['tokens']:,} tokens of training in sequences of "
        f"{runs[0]['settings']['length']}, {len(seeds)} seeds, {runs[0]['backend']} backend."
    )


def report_retrieval(folder: pathlib.Path, name: str) -> str:
    """Accuracy by length and by depth, and the weight on the needle."""
    arms = load(folder / f"{name}.jsonl")
    if not arms:
        return ""
    lengths = list(next(iter(arms.values()))[0]["by_length"])
    columns = -(-len(arms) // 2)  # two rows of maps beside the curves
    figure = plt.figure(figsize=(4.4 + 2.2 * columns, 5.6))
    grid = figure.add_gridspec(2, 1 + columns, width_ratios=[2.4] + [1] * columns)
    curves = figure.add_subplot(grid[:, 0])
    rows = []
    for i, (arm, runs) in enumerate(arms.items()):
        axis = figure.add_subplot(grid[i // columns, 1 + i % columns])
        accuracy = [[run["by_length"][x]["accuracy"] for x in lengths] for run in runs]
        weights = [
            [np.max(run["by_length"][x]["weight_on_needle"]) for x in lengths] for run in runs
        ]
        depths = [[run["by_length"][x]["accuracy_by_depth"] for x in lengths] for run in runs]
        rows.append(
            [f"`{arm}`", f"{runs[0]['learning_rate']:g}"]
            + [spread([row[i] for row in accuracy]) for i in range(len(lengths))]
            + [f"{np.mean(weights, 0)[i]:.2f}" for i in (0, -2)]
        )
        [line] = curves.plot([int(x) for x in lengths], np.mean(accuracy, 0), marker=".", label=arm)
        edges = np.min(accuracy, 0), np.max(accuracy, 0)
        curves.fill_between([int(x) for x in lengths], *edges, alpha=0.15, color=line.get_color())
        image = axis.imshow(np.mean(depths, 0), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set(title=arm, xlabel="depth", xticks=[0, 7], xticklabels=["first", "last"])
        axis.set(yticks=range(len(lengths)), yticklabels=lengths)
        axis.title.set_fontsize(8)
        figure.colorbar(image, ax=axis)
    curves.set(xscale="log", xlabel="items in the context", ylabel="accuracy", ylim=(0, 1.03))
    curves.set_xticks([int(x) for x in lengths], lengths)
    curves.minorticks_off()
    curves.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    save(figure, folder / f"{name}.png")
    header = ["", "learning rate", *(f"{x} items" for x in lengths)]
    header += [f"weight on the item, {lengths[i]}" for i in (0, -2)]
    return f"{about(arms)}\n\n{table(header, rows)}\n\n![Accuracy]({folder.name}/{name}.png)\n"


def report_language_model(folder: pathlib.Path, name: str) -> str:
    """Loss by position, and what attention does."""
    arms = load(folder / f"{name}.jsonl")
    if not arms:
        return ""
    settings = next(iter(arms.values()))[0]["settings"]
    length, factor = settings["length"], settings["test_factor"]
    parts = {"1": (0, 2), "2 to 4": (2, 8), "4 to 10": (8, 20), "10 to 20": (20, 40)}
    parts = {k: v for k, v in parts.items() if v[1] <= 2 * factor}
    thetas = list(next(iter(arms.values()))[0]["loss_by_position"])
    figure, axes = plt.subplots(1, len(thetas), figsize=(4.6 * len(thetas), 3.4), sharey=True)
    rows, attention = [], []
    for i, (arm, runs) in enumerate(arms.items()):
        row = [f"`{arm}`", f"{runs[0]['learning_rate']:g}"]
        row.append(spread([run["validation"] for run in runs], ".3f"))
        for theta, axis in zip(thetas, axes, strict=True):
            curves = np.array([run["loss_by_position"][theta] for run in runs])
            for first, last in list(parts.values())[theta == thetas[-1] :]:
                row.append(spread(curves[:, first:last].mean(1).tolist()))
            positions = (np.arange(curves.shape[1]) + 0.5) * length / 2
            axis.plot(positions, curves.mean(0), label=arm, color=f"C{i}")
        rows.append(row)
        for at, measures in runs[0]["attention"].items():
            means = {k: np.mean([run["attention"][at][k] for run in runs]) for k in measures}
            attention.append([f"`{arm}`", at, *(f"{x:.3g}" for x in means.values())])
    for theta, axis in zip(thetas, axes, strict=True):
        axis.set(xscale="log", xlabel="position", title=f"theta x {theta}")
        axis.axvline(length, color="gray", linewidth=0.8, linestyle=":")
    axes[0].set_ylabel("loss, nats per byte")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, folder / f"{name}.png")
    header = ["", "learning rate", "validation"]
    header += [f"{x} x length" for x in parts]
    header += [f"{x} x length, theta x {thetas[-1]}" for x in list(parts)[1:]]
    measures = ["", "length", *next(iter(arms.values()))[0]["attention"][str(length)]]
    return (
        f"{about(arms)}\n\n{table(header, rows)}\n\n![Loss by position]({folder.name}/{name}.png)"
        f"\n\n{table(measures, attention)}\n"
    )


def report_length_scale(folder: pathlib.Path, name: str) -> str:
    """The p[n] that each layer learned, and the best a1 log n + a2."""
    runs = [run for arm in load(folder / f"{name}.jsonl").values() for run in arm]
    if not runs:
        return ""
    layers = list(runs[0]["learned_scales"])
    figure, axes = plt.subplots(
        1, len(layers), figsize=(3.4 * len(layers), 3), sharey=True, squeeze=False
    )
    rows = []
    for layer, axis in zip(layers, axes[0], strict=True):
        fits = []
        for i, run in enumerate(runs):
            p = np.array(run["learned_scales"][layer])[2:]  # of one key p has no effect
            n = np.arange(2, len(p) + 2)
            fit = np.polyfit(np.log(n), p, 1)
            error = p - np.polyval(fit, np.log(n))
            fits.append([*fit, 1 - error.var() / p.var()])
            axis.plot(n, p, ".", markersize=2, color=f"C{i}")
            axis.plot(n, np.polyval(fit, np.log(n)), color=f"C{i}", label=f"seed {run['seed']}")
        axis.set(xscale="log", xlabel="n", title=layer.split("/")[0])
        columns = zip(*fits, strict=True)
        rows.append([f"`{layer.split('/')[0]}`", *(spread(list(x)) for x in columns)])
    axes[0, 0].set_ylabel("p[n]")
    axes[0, 0].legend(fontsize=7)
    save(figure, folder / f"{name}.png")
    validation = spread([run["validation"] for run in runs], ".3f")
    return (
        f"{about({name: runs})} Validation loss {validation}.\n\n"
        f"{table(['', 'a1', 'a2', 'share of the variance explained'], rows)}\n\n"
        f"![p by n]({folder.name}/{name}.png)\n"
    )


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a plot."""
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


SECTIONS = {
    "retrieval": ("Key-value retrieval", report_retrieval),
    "language_model": ("Language modelling", report_language_model),
    "length_scale": ("A learned p[n] in place of s log n", report_length_scale),
}


def render(folder: pathlib.Path) -> str:
    """The text of `RESULTS.md`; writes the plots."""
    sections = [
        f"## {title}\n\n{text}"
        for name, (title, write) in SECTIONS.items()
        if (text := write(folder, name))
    ]
    return "\n".join(["# Results\n\nWritten by `report.py`.\n", *sections])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    folder = parser.parse_args().results
    (folder.parent / "RESULTS.md").write_text(render(folder))
