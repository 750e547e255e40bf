"""The words, the tables and the plot of quickstart.py, all made from its results."""

import numpy as np
from matplotlib.figure import Figure

COLORS = {
    "softmax": "#666666",
    "ssmax": "#d55e00",
    "softpick": "#0072b2",
    "rectified_softpick": "#009e73",
}
LABELS = {
    "softmax": "softmax",
    "ssmax": "SSMax",
    "softpick": "softpick",
    "rectified_softpick": "rectified softpick",
}


# --- Words ---------------------------------------------------------------------------------


def describe(results):
    """Returns the tables, what they show, and the differences elsewhere, as text."""
    seeds = len(results["settings"]["seeds"])
    return "\n".join(
        [
            "",
            f"Nine speakers: right answers to {results['utterances']['test']} test utterances",
            "(one seed)" if seeds == 1 else f"(models: mean of {seeds} seeds, lowest to highest)",
            *_aligned(speaker_rows(results)),
            "",
            "Looking up one of many items: right answers, and the weight on the right item",
            *_aligned([("items", *_lengths(results)), *look_up_rows(results)]),
            "",
            "What these numbers show",
            *(f"- {finding}" for finding in findings(results)),
            "",
            "Largest difference of an output of the SSMax model",
            *(f"- {line}" for line in _difference_lines(results)),
        ]
    )


def speaker_rows(results):
    """Returns a name and an accuracy for each model, each baseline and each published figure."""
    return [
        *((LABELS[name], spread(found)) for name, found in results["accuracies"].items()),
        *((name, f"{found:.3f}") for name, found in results["baselines"].items()),
        *(
            (f"published: {name}", f"{found['accuracy']:.3f}")
            for name, found in results["published"].items()
        ),
    ]


def spread(values):
    """Returns the mean of the seeds, with the lowest and the highest."""
    ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{ends}"


def look_up_rows(results):
    """Returns a name and a cell for each length, of right answers and of weights."""
    return [
        (f"{LABELS[name]}, {words}", *(f"{found[key]:.2f}" for found in by_length.values()))
        for key, words in (("accuracy", "right answers"), ("weight", "weight"))
        for name, by_length in results["look_up"]["models"].items()
    ]


def _lengths(results):
    return list(results["look_up"]["models"]["ssmax"])


def _aligned(rows):
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([name.ljust(first), *(x.rjust(w) for x, w in zip(cells, others, strict=True))])
        for name, *cells in rows
    ]


def findings(results):
    """Returns sentences that follow from the results, whatever these are."""
    return [*(_against(results, name) for name in results["accuracies"]), *_looking_up(results)]


def _against(results, name):
    """Which of the baselines a model beats with every seed."""
    accuracies = results["accuracies"][name]
    beaten = [x for x, found in results["baselines"].items() if min(accuracies) > found]
    count = {0: "none", len(results["baselines"]): "all"}.get(len(beaten), f"{len(beaten)}")
    return f"{LABELS[name]} ({np.mean(accuracies):.3f}) beats {count} of the baselines."


def _looking_up(results):
    lengths = _lengths(results)
    for name, by_length in results["look_up"]["models"].items():
        first, last = by_length[lengths[0]], by_length[lengths[-1]]
        yield (
            f"{LABELS[name]} is right on {first['accuracy']:.2f} of the questions among "
            f"{lengths[0]} items, as in training, and {last['accuracy']:.2f} among {lengths[-1]}; "
            f"its weight on the right item goes from {first['weight']:.2f} to {last['weight']:.2f}."
        )


def _difference_lines(results):
    elsewhere = dict(results["reload_difference"])
    yield f"without padding: {results['padding_difference']:.1e}"
    yield f"saved, loaded in the same process: {elsewhere.pop('this process'):.1e}"
    for backend, difference in elsewhere.items():
        yield f"saved, loaded in another process on {backend}: {difference:.1e}"
    if not elsewhere:
        yield "on another backend: not tried, because no other backend is installed"
    if "skipped" in results["export"]:
        yield f"exported: not tried: {results['export']['skipped']}"
    else:
        yield "exported to {file}, run without Keras: {difference:.1e}".format(**results["export"])


# --- The plot ------------------------------------------------------------------------------


def plot(results):
    """Returns a figure: what the normalizers are for on the left, the speakers on the right."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1), wspace=0.03)
    _plot_looking_up(left, results["look_up"])
    _plot_speakers(right, results)
    return figure


def _plot_looking_up(figure, look_up):
    figure.suptitle("Look one item up among many", fontsize=14, fontweight="bold")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name, by_length in look_up["models"].items():
        lengths = [int(length) for length in by_length]
        for axes, key in ((upper, "accuracy"), (lower, "weight")):
            values = [found[key] for found in by_length.values()]
            axes.plot(lengths, values, color=COLORS[name], marker="o", linewidth=2.5)
        _name_line(upper, lengths[-1], by_length[str(lengths[-1])]["accuracy"], name)
    upper.set_ylabel("right answers", fontsize=12)
    lower.set_ylabel("weight on the right item", fontsize=12)
    lower.set_xscale("log", base=2)
    lower.set_xticks(lengths, [str(x) for x in lengths])
    lower.set_xlabel(f"items in the context (trained on {look_up['train_length']})", fontsize=12)
    for axes in (upper, lower):
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        _tidy(axes, "both")


def _name_line(axes, x, y, name):
    axes.annotate(
        LABELS[name],
        (x, y),
        xytext=(0, -18),
        textcoords="offset points",
        ha="right",
        color=COLORS[name],
        fontsize=13,
        fontweight="bold",
    )


def _plot_speakers(figure, results):
    figure.suptitle("Tell nine speakers apart", fontsize=14, fontweight="bold")
    axes = figure.subplots()
    found = {
        "this package": [(LABELS[x], y, COLORS[x]) for x, y in results["accuracies"].items()],
        "without a network": [(x, [y], "#777777") for x, y in results["baselines"].items()],
        "published": [(x, [y["accuracy"]], "black") for x, y in results["published"].items()],
    }
    names, heights, height = [], [], 0.0
    for group, rows in found.items():
        names, heights = [*names, group], [*heights, height]
        for name, accuracies, color in rows:
            height += 1
            names, heights = [*names, name], [*heights, height]
            mean = float(np.mean(accuracies))
            axes.plot([min(accuracies), max(accuracies)], [height] * 2, color=color, linewidth=4)
            axes.plot(mean, height, "o", color=color, markersize=9)
            place = {"xytext": (12, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{mean:.3f}", (max(accuracies), height), **place, color=color, size=11)
        height += 1.4
    axes.set_yticks(heights, [name.removeprefix("logistic ") for name in names])
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in found else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(height, -0.9)
    axes.margins(x=0.25)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("right answers", fontsize=12)
    _tidy(axes, "x")


def _tidy(axes, grid):
    axes.grid(color="#e5e5e5", axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
