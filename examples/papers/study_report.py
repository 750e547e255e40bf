"""The tables and figures of the study of when length scales help, from the stored runs alone.

    python examples/papers/study_report.py

Writes the figures to `results`. The documentation includes the tables. Each cell has the mean and
the range over the seeds, at the learning rate with the lowest validation loss with the first seed.
"""

import argparse
import pathlib
from typing import Any

import numpy as np
import report
from report import Arms, load, plt, spread, table
from runs import read_runs

RESULTS = report.HERE / "results"
SHOWN = {
    "softmax": "softmax",
    "ssmax, s from 1/mean(log n)": "SSMax, s from 1/mean(log n)",
    "ssmax, s from 1": "SSMax, s from 1",
    "ssmax, s from 0.43": "SSMax, s from 0.43",
    "ssmax, s from 0.2": "SSMax, s from 0.2",
    "ssmax": "SSMax, s from 1",
}
STARTS = list(SHOWN)[:-1]  # the arms of margins.json; the last is of the other experiments
AUTO = "ssmax, s from 1/mean(log n)"


def conditions(results: pathlib.Path) -> dict[str, Arms]:
    """The chosen runs by condition and arm, of the arms that have every seed of softmax's."""
    names = dict.fromkeys(run.get("condition", "") for run in read_runs(results))
    found = {name: load(results, name) for name in names}
    return {
        name: {arm: runs for arm, runs in arms.items() if len(runs) >= len(arms[next(iter(arms))])}
        for name, arms in found.items()
    }


def at(runs: list[dict[str, Any]], length: str, measure: str) -> list[float]:
    """A measure at a length by seed; of several heads, of the one with the largest weight."""
    found = []
    for run in runs:
        values = run["by_length"][length]
        head = int(np.argmax(values["weight"]))
        found.append(np.atleast_1d(values[measure])[head if np.ndim(values[measure]) else 0])
    return [float(x) for x in found]


# --- Margins ---------------------------------------------------------------------------------


def margins(folder: pathlib.Path = RESULTS) -> str:
    """Accuracy among the most items, and why: margins and weights of softmax."""
    rows = []
    for name, arms in conditions(folder / "margins.jsonl").items():
        softmax = arms["softmax"]
        first, *_, last = softmax[0]["by_length"]
        ends = (first, last)
        rows.append(
            [
                name,
                spread(at(softmax, first, "accuracy")),
                *(spread(at(arms[x], last, "accuracy")) if x in arms else "" for x in STARTS),
                *(
                    " to ".join(f"{np.mean(at(softmax, x, measure)):.{digits}f}" for x in ends)
                    for measure, digits in (("margin", 1), ("weight", 2))
                ),
            ]
        )
    header = ["", f"softmax, {first} items", *(f"{SHOWN[x]}, {last} items" for x in STARTS)]
    both = f"{first} to {last} items"
    return table([*header, f"margin of softmax, {both}", f"weight of softmax, {both}"], rows)


def normalizers(folder: pathlib.Path = RESULTS) -> str:
    """Accuracy among few and among the most items, for every arm of two conditions."""
    found = conditions(folder / "margins.jsonl")
    names = ("learned keys", "noisy keys")
    lengths = list(found[names[0]]["softmax"][0]["by_length"])
    rows = [
        [
            SHOWN.get(arm, arm.replace("_", " ")),
            *(
                spread(at(found[name][arm], x, "accuracy"))
                for name in names
                for x in (lengths[0], lengths[-1])
            ),
        ]
        for arm in found[names[0]]
        if arm not in ("ssmax, s from 0.43", "ssmax, s from 0.2")
    ]
    return table(["", *(f"{x}, {n} items" for x in names for n in (lengths[0], lengths[-1]))], rows)


def draw_margins(folder: pathlib.Path = RESULTS) -> None:
    """Accuracy by the number of items, for each condition."""
    found = conditions(folder / "margins.jsonl")
    figure, axes = grid(list(found))
    for axis, arms in zip(axes, found.values(), strict=False):
        for i, arm in enumerate(STARTS):
            if arm in arms:
                band(axis, [run["by_length"] for run in arms[arm]], "accuracy", f"C{i}", SHOWN[arm])
        first = arms["softmax"][0]["by_length"]
        if "possible" in first["64"]:
            values = [x["possible"] for x in first.values()]
            axis.plot([int(x) for x in first], values, ":", color="gray", label="best possible")
    finish(figure, axes, "items", "right answers", folder / "margins.png")


def grid(names: list[str]) -> tuple[Any, list[Any]]:
    """A figure with a place for each name."""
    rows = -(-len(names) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9, 2.4 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        axis.set_title(name, fontsize=9)
        axis.set(xscale="log")
        axis.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1024"])
        axis.minorticks_off()
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    return figure, list(axes.flat)


def finish(figure: Any, axes: list[Any], x: str, y: str, path: pathlib.Path) -> None:
    """Labels, the legend below, and the file."""
    labels = {k: v for a in axes for v, k in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(
        labels.values(), labels.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3,
        fontsize=9, frameon=False,
    )  # fmt: skip
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    report.save(figure, path)


def band(axis: Any, runs: list[dict[str, Any]], measure: str, color: str, label: str) -> None:
    """A line of the mean and a band of the range over the seeds, by length."""
    lengths = [int(x) for x in runs[0]]
    values = [[x[measure] for x in run.values()] for run in runs]
    axis.plot(lengths, np.mean(values, 0), marker=".", markersize=3, color=color, label=label)
    axis.fill_between(lengths, np.min(values, 0), np.max(values, 0), color=color, alpha=0.15)
    axis.set_xlim(0.9 * lengths[0], 1.1 * lengths[-1])


# --- Tables ----------------------------------------------------------------------------------

FITTED = ("nearest neighbors", "logistic regression")


def tables(folder: pathlib.Path = RESULTS, measure: str = "loss") -> str:
    """Log-loss with 64 and with all rows, beside models that are fitted on the same rows."""
    found = conditions(folder / "tables.jsonl")
    arms = found["in context"]
    header = ["", "rows", *(SHOWN.get(x, x) for x in arms), *FITTED]
    rows = []
    for name in arms["softmax"][0]["by_table"]:
        counts = list(arms["softmax"][0]["by_table"][name])
        for count in dict.fromkeys(("64", counts[-1])):
            cells = [
                spread([run["by_table"][name][count][measure] for run in runs])
                for runs in arms.values()
            ]
            fitted = [found["fitted"][x][0]["by_table"][name][count][measure] for x in FITTED]
            rows.append([name, count, *cells, *(f"{x:.2f}" for x in fitted)])
    return table(header, rows)


def draw_tables(folder: pathlib.Path = RESULTS) -> None:
    """Log-loss by the number of rows, for each table."""
    found = conditions(folder / "tables.jsonl")
    arms = found["in context"]
    names = list(arms["softmax"][0]["by_table"])
    figure, axes = grid(names)
    for axis, name in zip(axes, names, strict=False):
        for i, (arm, runs) in enumerate(arms.items()):
            band(
                axis, [run["by_table"][name] for run in runs], "loss", f"C{i}", SHOWN.get(arm, arm)
            )
        for fitted, style in zip(FITTED, (":", "--"), strict=True):
            losses = found["fitted"][fitted][0]["by_table"][name]
            values = [x["loss"] for x in losses.values()]
            axis.plot([int(x) for x in losses], values, style, color="gray", label=fitted)
    finish(figure, axes, "rows in context", "log-loss", folder / "tables.png")


# --- Language models -------------------------------------------------------------------------

LANGUAGE_MODELS = ("study_positions", "study_starts_language_model", "study_bible")
PARTS = {"1 x length": (0, 2), "2 to 4": (2, 8), "10 to 20": (20, 40)}  # in half lengths


def language_models(folder: pathlib.Path = RESULTS) -> str:
    """The loss by position of every scheme of positions and arm, in nats per byte."""
    rows = []
    for file in LANGUAGE_MODELS:
        for name, arms in conditions(folder / f"{file}.jsonl").items():
            text = f"{name}, another text" if file == "study_bible" else name
            for arm, runs in arms.items():
                losses = [run["loss_by_position"]["1"] for run in runs]
                rows.append(
                    [
                        f"{text}: {SHOWN.get(arm, arm.replace('_', ' '))}",
                        f"{runs[0]['learning_rate']:g}",
                        *(spread([np.mean(x[slice(*p)]) for x in losses]) for p in PARTS.values()),
                    ]
                )
    return table(["", "learning rate", *PARTS], rows)


def worth_of_copies(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By how much the loss on the second copy is lower than on the first, by distance."""
    return {d: {"worth": x["first"] - x["second"]} for d, x in run["copies"].items()}


def copies(folder: pathlib.Path = RESULTS) -> str:
    """What a copy is worth by its distance, for each arm."""
    [arms] = conditions(folder / "study_copies.jsonl").values()
    found = {arm: list(map(worth_of_copies, runs)) for arm, runs in arms.items()}
    distances = list(found["softmax"][0])
    rows = [
        [SHOWN[arm], *(spread([x[d]["worth"] for x in runs]) for d in distances)]
        for arm, runs in found.items()
    ]
    return table(["", *(f"{d} bytes" for d in distances)], rows)


def draw_copies(folder: pathlib.Path = RESULTS) -> None:
    """What a copy is worth by its distance."""
    [arms] = conditions(folder / "study_copies.jsonl").values()
    figure, axis = plt.subplots(figsize=(5, 3))
    for i, (arm, runs) in enumerate(arms.items()):
        band(axis, list(map(worth_of_copies, runs)), "worth", f"C{i}", SHOWN[arm])
    axis.axvline(arms["softmax"][0]["settings"]["length"], color="gray", linestyle=":")
    axis.set(xscale="log", xlabel="distance of the copies, bytes", ylabel="nats per byte")
    axis.set_ylim(bottom=0)
    axis.set_xticks([32, 64, 128, 256, 512, 1280], ["32", "64", "128", "256", "512", "1280"])
    axis.minorticks_off()
    axis.legend(fontsize=9, frameon=False)
    report.save(figure, folder / "copies.png")


# --- Sinks -----------------------------------------------------------------------------------

SINKS = {
    "right copies": ("copy_accuracy", 2),
    "loss above the least": ("bigram_loss", 3),
    "sink rate": ("sink_rate", 2),
    "weight on the first token": ("weight_on_first", 2),
    "sum of the weights": ("sum_of_weights", 2),
    "value of the first token": ("value_norm_of_first", 2),
    "kurtosis": ("kurtosis", 1),
}


def sinks(folder: pathlib.Path = RESULTS) -> str:
    """What attention does where it has nothing to do; mean over heads."""
    rows = [
        [
            SHOWN.get(arm, arm.replace("_", " ")),
            *(spread([np.mean(x[m]) for x in runs], f".{digits}f") for m, digits in SINKS.values()),
        ]
        for arm, runs in load(folder / "study_sinks.jsonl").items()
    ]
    return table(["", *SINKS], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    folder = parser.parse_args().results
    draw_margins(folder)
    draw_tables(folder)
    draw_copies(folder)
