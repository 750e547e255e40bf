"""The tables and plots of the comparisons of normalizers, all made from their results.

    python examples/comparison_report.py

prints the table of both comparisons, routing and feature selection, as Markdown.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from quickstart_report import COLORS

BASELINE = "softmax"  # to which the others are compared
LABELS = dict.fromkeys(("no router", "no gate"), "no router, no gate")  # one row for both
COLUMNS = {  # of the table in Markdown: example, measure, digits
    f"routing: accuracy (seeds above : below `{BASELINE}`)": ("moe_routing", "accuracy", 3),
    "experts used, of 8": ("moe_routing", "experts_used", 1),
    "weights at 0": ("moe_routing", "zeros", 2),
    "negative": ("moe_routing", "negative", 2),
    "selection: accuracy (the same)": ("feature_selection", "accuracy", 3),
    "weight on noise": ("feature_selection", "noise_weight", 2),
    "noise at 0": ("feature_selection", "noise_zeros", 2),
}


def cell(arm: dict[str, Any], measure: str, digits: int) -> str:
    """A measure's mean and deviation over the seeds; nothing where it was not measured."""
    if measure not in arm["summary"]:
        return ""
    mean, deviation = (arm["summary"][measure][x] for x in ("mean", "deviation"))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if mean or deviation else "0"


def above_and_below(arms: dict[str, Any], name: str) -> tuple[int, int]:
    """How many seeds have a higher accuracy than the baseline's on the same data, and a lower."""
    accuracies = (arms[x]["measured"]["accuracy"] for x in (name, BASELINE))
    difference = np.subtract(*accuracies)
    return int((difference > 0).sum()), int((difference < 0).sum())


def table(arms: dict[str, Any], measures: dict[str, int]) -> str:
    """The measures, each with so many digits, of every arm, as text."""
    rows = [("", "parameters", *(x.replace("_", " ") for x in measures))]
    for name, arm in arms.items():
        cells = [cell(arm, measure, digits) for measure, digits in measures.items()]
        rows.append((name, str(arm["num_parameters"]), *cells))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(x.rjust(w) for x, w in zip(cells, others, strict=True))])
        for name, *cells in rows
    )


def describe(results: dict[str, Any], measures: dict[str, int]) -> str:
    """The table, who beats the baseline how often, and choices at the ends of the grids."""
    arms, num_seeds = results["arms"], len(results["settings"]["seeds"])
    lines = ["", f"Mean ± deviation of {num_seeds} seeds, each with new parts of the data"]
    lines += [table(arms, measures), "", f"Seeds more and less accurate than {BASELINE}:"]
    for name in arms:
        if name != BASELINE:
            above, below = above_and_below(arms, name)
            lines.append(f"- {name}: {above} and {below}, and {num_seeds - above - below} equal")
    lines.append("Seeds that chose the lowest and the highest value of the grid:")
    for name, arm in arms.items():
        grid = [float(x) for x in arm["validation_losses"]]
        low, high = (arm["chosen"].count(x) for x in (grid[0], grid[-1]))
        lines.append(f"- {name}: {low} and {high}")
    return "\n".join(lines)


def markdown(examples: dict[str, dict[str, Any]]) -> str:
    """The table of both examples, as Markdown.

    Args:
        examples: the results by example, "moe_routing" and "feature_selection".
    """
    rows: dict[str, dict[str, str]] = {}
    for heading, (example, measure, digits) in COLUMNS.items():
        arms = examples[example]["arms"]
        for name, arm in arms.items():
            label = LABELS.get(name, f"`{name}`" if name in COLORS else name)
            text = cell(arm, measure, digits)
            if measure == "accuracy" and name != BASELINE:
                text += " ({} : {})".format(*above_and_below(arms, name))
            rows.setdefault(label, dict.fromkeys(COLUMNS, ""))[heading] = text
    lines = [["", *COLUMNS], *([label, *cells.values()] for label, cells in rows.items())]
    heading, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([heading, "|---" * (len(COLUMNS) + 1) + "|", *others])


def strip(axis: Any, arms: dict[str, Any], measure: str, title: str) -> None:
    """Plots a measure: a dot for each seed, a bar at the mean, a row for each arm."""
    for row, (name, arm) in enumerate(arms.items()):
        if measure not in arm["measured"]:
            continue
        values = np.array(arm["measured"][measure])
        color = COLORS.get(name, "black")
        axis.plot(values, row + np.linspace(-0.2, 0.2, len(values)), "o", color=color, alpha=0.45)
        axis.plot([values.mean()] * 2, [row - 0.32, row + 0.32], color=color, linewidth=3)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set_title(title, fontsize=11)
    axis.grid(color="#e5e5e5")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def two_rows(title: str, columns: tuple[int, int], height: float) -> tuple[Any, Any, Any]:
    """A figure, and its axes above and below; each row shares its vertical axis."""
    figure = Figure(figsize=(12, height), layout="constrained")
    figure.suptitle(title, fontsize=14)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    return (
        figure,
        above.subplots(1, columns[0], sharey=True),
        below.subplots(1, columns[1], sharey=True),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of the results that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    folder = parser.parse_args(arguments).results
    names = ("moe_routing", "feature_selection")
    print(markdown({name: json.loads((folder / f"{name}.json").read_text()) for name in names}))


if __name__ == "__main__":
    main()
