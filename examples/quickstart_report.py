"""The words, the table and the plot of quickstart.py, all made from its results."""

import numpy as np
from matplotlib.figure import Figure

COLORS = {
    "softmax": "#666666",
    "ssmax": "#d55e00",
    "softpick": "#0072b2",
    "rectified_softpick": "#009e73",
}


def describe(results):
    """Returns the table, what it shows, and the differences after reloading, as text."""
    seeds = len(results["settings"]["seeds"])
    return "\n".join(
        [
            "",
            "Mean absolute error of the test forecasts in °F, by hours looked back",
            "(one seed)" if seeds == 1 else f"({seeds} seeds: mean, lowest-highest)",
            table(results),
            "",
            "What these numbers show",
            *(f"- {finding}" for finding in findings(results)),
            "",
            "Largest difference of an output when the SSMax model is saved and loaded again",
            f"(outputs are in units of {results['output_unit_in_degrees']:.1f} °F)",
            *(f"- {line}" for line in _reload_lines(results)),
        ]
    )


def _reload_lines(results):
    elsewhere = dict(results["reload_difference"])
    yield f"in the same process, on {results['backend']}: {elsewhere.pop('this process'):.1e}"
    for backend, difference in elsewhere.items():
        yield f"in another process, on {backend}: {difference:.1e}"
    if not elsewhere:
        yield "on another backend: not tried, because no other backend is installed"


def table(results):
    """Returns the errors and seconds of every model, and the errors of the baselines, as text."""
    lengths = _lengths(results["errors"])
    rows = [("", *lengths, "seconds")]
    for name, errors in results["errors"].items():
        seconds = results["model_seconds"][name]
        rows.append((name, *(_cell(errors[length]) for length in lengths), f"{seconds:.0f}"))
    for name, error in results["baselines"].items():
        rows.append((name, *[f"{error:.2f}"] * len(lengths), ""))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(x.rjust(w) for x, w in zip(cells, others, strict=True))])
        for name, *cells in rows
    )


def _cell(errors):
    spread = f" ({min(errors):.2f}-{max(errors):.2f})" if len(errors) > 1 else ""
    return f"{np.mean(errors):.2f}{spread}"


def _lengths(errors):
    """The lengths of windows, that of training first."""
    return list(next(iter(errors.values())))


def findings(results):
    """Returns sentences that follow from the results, whatever these are."""
    errors = results["errors"]
    lengths = _lengths(errors)
    short, long = lengths[0], lengths[-1]
    before, after = _means(errors, short), _means(errors, long)
    return [
        *(
            f"With the {short} hours of training {_who_beats(before, error)} {name} ({error:.2f})."
            for name, error in results["baselines"].items()
        ),
        f"Looking back {long} hours instead of {short} multiplies the error by "
        + _ascending({name: after[name] / before[name] for name in errors}),
        f"The errors with {long} hours are {_ascending(after)}",
        *(_ssmax_against_softmax(errors, length) for length in lengths),
        _movement_of_s(results["initial_s"], results["learned_s"]),
        _trust(errors),
    ]


def _means(errors, length):
    return {name: float(np.mean(by_length[length])) for name, by_length in errors.items()}


def _ascending(values):
    ordered = sorted(values, key=values.get)
    return ", ".join(f"{values[name]:.2f} ({name})" for name in ordered) + "."


def _who_beats(means, error):
    better = [name for name, mean in means.items() if mean < error]
    if len(better) in (0, len(means)):
        return "every model beats" if better else "no model beats"
    return f"only {' and '.join(better)} beat{'s' if len(better) == 1 else ''}"


def verdict(ssmax, softmax):
    """Returns whether SSMax `"helps"`, `"hurts"` or is `"unclear"`: the seeds' ranges overlap."""
    if max(ssmax) < min(softmax):
        return "helps"
    return "hurts" if min(ssmax) > max(softmax) else "unclear"


def _ssmax_against_softmax(errors, length):
    words = {
        "helps": "SSMax helps: every seed is below softmax's",
        "hurts": "SSMax does not help: every seed is above softmax's",
        "unclear": "SSMax does not clearly help: the seeds overlap softmax's",
    }
    ssmax, softmax = errors["ssmax"][length], errors["softmax"][length]
    return (
        f"With {length} hours {words[verdict(ssmax, softmax)]} "
        f"({np.mean(ssmax):.2f} against {np.mean(softmax):.2f})."
    )


def _movement_of_s(initial, learned):
    layers = np.swapaxes(learned, 0, 1)  # [layers, seeds, heads]
    ranges = [f"{s.min():.2f} to {s.max():.2f} in layer {i}" for i, s in enumerate(layers, 1)]
    return (
        f"The s of SSMax began at {np.mean(initial):.2f}, its default, and ended at "
        f"{' and '.join(ranges)}."
    )


def _trust(errors):
    cells = [cell for by_length in errors.values() for cell in by_length.values()]
    if len(cells[0]) == 1:
        return "This is one seed: another may order the models otherwise."
    spread = max(max(cell) - min(cell) for cell in cells)
    return (
        f"Seeds of one model differ by up to {spread:.2f}, and {len(cells[0])} seeds are few: "
        "do not rank models that are closer."
    )


def plot(results, known, shown):
    """Returns a figure of a forecast, the errors by hours looked back, and the learned s.

    `known` is a series of the hours before and during the forecast, `shown` the forecast by
    hours looked back and by model.
    """
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    first = figure.add_subplot(2, 2, 1)
    axes = [first, figure.add_subplot(2, 2, 2, sharey=first)]
    for axis, (length, forecasts) in zip(axes, shown.items(), strict=True):
        _plot_forecasts(axis, known, forecasts, length)
    axes += [figure.add_subplot(2, 2, 3), figure.add_subplot(2, 2, 4)]
    _plot_errors(axes[2], results)
    _plot_scales(axes[3], results)
    for axis in axes:
        axis.grid(color="#e5e5e5")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Temperature in Seattle, forecast with four kinds of attention", fontsize=14)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _plot_forecasts(axis, known, forecasts, length):
    horizon = len(next(iter(forecasts.values())))
    hours = np.arange(-len(known) + horizon, horizon)
    axis.plot(hours, known, color="black", linewidth=2.5, label="measured")
    for name, forecast in forecasts.items():
        axis.plot(hours[-horizon:], forecast, color=COLORS[name], linewidth=1.5, label=name)
    axis.axvline(-0.5, color="black", linestyle=":", linewidth=1)
    axis.set_title(f"One day's forecasts from the last {length} hours")
    axis.set_xlabel(f"hours from {known.index[-horizon]:%d %B %Y, %H:%M}")
    axis.set_ylabel("temperature, °F")


def _plot_errors(axis, results):
    lengths = [int(length) for length in _lengths(results["errors"])]
    for name, by_length in results["errors"].items():
        errors = np.array(list(by_length.values()))  # [lengths, seeds]
        low, high = errors.min(axis=1), errors.max(axis=1)
        axis.plot(lengths, errors.mean(axis=1), color=COLORS[name], marker="o")
        axis.fill_between(lengths, low, high, color=COLORS[name], alpha=0.12)
    for name, error in results["baselines"].items():
        axis.axhline(error, color="black", linestyle="--", linewidth=1)
        axis.text(lengths[-1], error, name, ha="right", va="bottom")
    axis.set_title("Error of all test forecasts: mean and range of the seeds")
    axis.set_xlabel(f"hours looked back (trained on {lengths[0]})")
    axis.set_xticks(lengths)
    axis.set_ylabel("mean absolute error, °F")
    axis.set_ylim(bottom=0)


def _plot_scales(axis, results):
    seeds = zip(results["settings"]["seeds"], results["learned_s"], strict=True)
    for (seed, layers), marker in zip(seeds, "os^D", strict=False):
        heads = [f"{i}.{j}" for i, s in enumerate(layers, 1) for j in range(1, len(s) + 1)]
        axis.plot(heads, np.ravel(layers), marker, color=COLORS["ssmax"], label=f"seed {seed}")
    initial = np.mean(results["initial_s"])
    axis.axhline(initial, color="black", linestyle="--", linewidth=1, label="before training")
    low, high = axis.get_ylim()
    axis.set_ylim(min(0, low), max(1.3 * initial, high))
    axis.set_title("The s of SSMax after training")
    axis.set_xlabel("layer.head")
    axis.set_ylabel("s")
    axis.legend(loc="lower right", ncols=3)
