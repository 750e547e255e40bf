"""Plots of attention maps and of learned scales, by matplotlib."""

import importlib
import numbers
from typing import Any

import numpy as np
from keras import ops

from keras_ssattn.analysis.recording import Recording

UNSEEN = "0.82"  # gray, where a query does not see a key
LARGEST = 16.0  # inches, of the maps on a side of a figure


def plot_attention(attention: Any, sequence: int = 0) -> Any:
    """Plots the attention maps of one sequence: a row for each layer, a column for each head.

    All maps share one scale of colors, finer near zero, so that they can be compared. Where
    weights are negative, as signed softpick's are, it is centered on zero: red above, blue
    below. Keys that a query does not see are gray.

    Args:
        attention: the `attention` of a `Recording`, a dictionary of names and `AttentionMap`s or
            weights `[B, H, T, S]`; or one of either.
        sequence: which of the batch.

    Returns:
        A `matplotlib.figure.Figure`: `figure.savefig("attention.png")` writes it.

    Raises:
        ImportError: without matplotlib, an extra: `pip install keras-ssattn[plots]`.
        ValueError: for weights of another rank, a mask that does not fit them, no layer, or a
            sequence outside the batch.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn import analysis, models
    >>> model = models.CausalLM(vocabulary_size=50, hidden_size=16, num_layers=2, num_heads=2)
    >>> recording = analysis.record(model, np.array([[1, 2, 3]]))
    >>> figure = analysis.plot_attention(recording.attention)
    >>> [axes.get_title() for axes in figure.axes][:2]
    ['head 0', 'head 1']
    """
    if isinstance(attention, Recording):
        raise ValueError(
            "`attention` must be the `attention` of a `Recording`. Received: all of it"
        )
    maps = {name: _maps(name, x, sequence) for name, x in _by_name("attention", attention).items()}
    rows, columns = len(maps), max(len(x) for x in maps.values())
    side = max(1.0, min(2.0, LARGEST / max(rows, columns)))
    figure = _new_figure(columns * side + 2.5, rows * side + 0.8)
    grid = figure.subplots(rows, columns, squeeze=False)
    alike = len({x.shape[1:] for x in maps.values()}) == 1  # ticks on the outer maps will do
    colors = _colors(np.concatenate([x.compressed() for x in maps.values()]), sharp=True)
    for row, (name, heads) in enumerate(maps.items()):
        grid[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
        for column, axes in enumerate(grid[row]):
            if row == 0:
                axes.set_title(f"head {column}", fontsize="medium")
            if column >= len(heads):
                axes.set_axis_off()
                continue
            image = axes.imshow(heads[column], aspect="auto", interpolation="nearest", **colors)
            axes.set_facecolor(UNSEEN)
            axes.locator_params(nbins=4, integer=True)
            axes.tick_params(
                labelsize="small",
                labelleft=column == 0 or not alike,
                labelbottom=row == rows - 1 or not alike,
            )
    figure.supxlabel("key", fontsize="medium")
    figure.supylabel("query", fontsize="medium")
    figure.colorbar(image, ax=grid, label="weight", aspect=max(8.0, 10.0 * rows))
    return figure


def plot_scale(scales: Any, parameter: str = "s") -> Any:
    """Plots the learned s: a row for each layer, a column for each head.

    Where values are negative, colors are centered on zero: red above, blue below.

    Args:
        scales: what `learned_scale` returns, a dictionary of names and arrays `[H]` or `[]`.
        parameter: its name in the plot.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: without matplotlib, an extra: `pip install keras-ssattn[plots]`.
        ValueError: for no layer, or arrays of another rank.

    Example:

    >>> import keras_ssattn
    >>> from keras_ssattn.analysis import learned_scale, plot_scale
    >>> model = keras_ssattn.build(embed_dim=8, hidden_size=8, num_heads=2, num_layers=1)
    >>> plot_scale(learned_scale(model)).axes[0].get_xlabel()
    'head'
    """
    values = {name: _scale(name, x) for name, x in _by_name("scales", scales).items()}
    columns = max(len(x) for x in values.values())
    table = np.ma.masked_all((len(values), columns))
    for row, x in enumerate(values.values()):
        table[row, : len(x)] = x
    figure = _new_figure(0.7 * columns + 3.5, 0.45 * len(values) + 1.3)
    axes = figure.subplots()
    image = axes.imshow(table, aspect="auto", **_colors(table.compressed()))
    axes.set_facecolor(UNSEEN)
    axes.set_xticks(range(columns))
    axes.set_yticks(range(len(values)), list(values))
    axes.set_xlabel("head")
    for row, column in zip(*np.nonzero(~np.ma.getmaskarray(table)), strict=True):
        red, green, blue, _ = image.cmap(image.norm(table[row, column]))
        ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
        text = f"{table[row, column]:.2f}"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize="small")
    figure.colorbar(image, ax=axes, label=parameter)
    return figure


def _new_figure(width: float, height: float) -> Any:
    return _matplotlib("figure").Figure((width, height), layout="constrained")


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, an extra: pip install keras-ssattn[plots]"
        ) from error


def _colors(values: np.ndarray, sharp: bool = False) -> dict[str, Any]:
    """The colors for these values: from zero up, or to both sides of it if some are negative.

    `sharp` is finer near zero: the weights of long rows are small, those of short rows are not.
    """
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    signed = bool(np.any(values < 0))
    norms = _matplotlib("colors")
    limits = {"vmin": -largest if signed else 0.0, "vmax": largest}
    norm = norms.FuncNorm((_root, _square), **limits) if sharp else norms.Normalize(**limits)
    return {"cmap": "RdBu_r" if signed else "Blues", "norm": norm}


def _root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return np.sign(x) * np.square(x)


def _by_name(argument: str, values: Any) -> dict[str, Any]:
    values = values if isinstance(values, dict) else {"": values}
    if not values:
        raise ValueError(f"`{argument}` must have one layer or more. Received: none")
    return values


def _maps(name: str, attention: Any, sequence: int) -> Any:
    """The maps of a layer, `[H, T, S]`, masked where a query does not see a key."""
    pair = isinstance(attention, tuple) and len(attention) == 2
    weights, mask = attention if pair else (attention, None)
    weights = _numbers("attention", weights)
    if weights.ndim != 4:
        raise ValueError(
            "`attention` must be weights of shape [B, H, T, S]. Received: shape "
            f"{weights.shape} for layer {name!r}"
        )
    if (
        isinstance(sequence, bool)
        or not isinstance(sequence, numbers.Integral)
        or not 0 <= sequence < len(weights)
    ):
        raise ValueError(
            f"`sequence` must be one of the batch, from 0 to {len(weights) - 1}. Received: "
            f"sequence={sequence!r}"
        )
    seen = np.asarray(True) if mask is None else _to_numpy(mask)
    try:
        seen = np.broadcast_to(seen, weights.shape)
    except ValueError as error:
        raise ValueError(
            f"`attention` must have a mask broadcastable to its weights, {weights.shape}. "
            f"Received: a mask of shape {seen.shape} for layer {name!r}"
        ) from error
    if seen.dtype.kind not in "biu":
        raise ValueError(
            "`attention` must have a boolean mask (True = attend). Received: a mask of dtype "
            f"{seen.dtype} for layer {name!r}"
        )
    return np.ma.masked_array(weights, ~seen.astype(bool))[sequence]


def _scale(name: str, values: Any) -> np.ndarray:
    values = np.atleast_1d(_numbers("scales", values))
    if values.ndim != 1:
        raise ValueError(
            f"`scales` must be arrays of shape [H] or []. Received: shape {values.shape} for "
            f"layer {name!r}"
        )
    return values


def _numbers(argument: str, x: Any) -> np.ndarray:
    try:
        return _to_numpy(x).astype("float64")
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{argument}` must be arrays of numbers. Received: {x!r}") from error


def _to_numpy(x: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(x) if ops.is_tensor(x) else x)
