"""Plots show the numbers that they are given, and can be read."""

import itertools
import json
import pathlib
import sys

import keras
import numpy as np
import pytest
import quickstart_report
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from support.docstrings import failing_examples

from keras_ssattn.analysis import AttentionMap, Recording, plot_attention, plot_scale, plots

BAD_SHAPE = AttentionMap(np.ones((1, 1, 3, 3)), np.ones((2, 2), bool))
BAD_DTYPE = AttentionMap(np.ones((1, 1, 3, 3)), np.ones((3, 3)))
CAUSAL = np.tril(np.ones((6, 6), bool))


@pytest.fixture
def rng():
    return np.random.default_rng(1729)


def softmax_map(rng, batch=2, heads=3):
    weights = np.exp(rng.normal(size=(batch, heads, 6, 6))) * CAUSAL
    weights /= weights.sum(-1, keepdims=True)
    return AttentionMap(weights.astype("float32"), np.broadcast_to(CAUSAL, weights.shape))


def signed_map(rng):
    weights, mask = softmax_map(rng)
    return AttentionMap(weights * np.sign(rng.normal(size=weights.shape)), mask)


def images(figure):
    """The images of the maps, without that of the color bar."""
    return [axes.images[0] for axes in figure.axes if axes.images]


def assert_legible(figure):
    """No text overlaps another, none is cut off, and none is tiny."""
    canvas, drawn, draw = FigureCanvasAgg(figure), [], Text.draw
    with pytest.MonkeyPatch.context() as patch:  # ticks out of sight have texts, too
        patch.setattr(Text, "draw", lambda text, *args: (drawn.append(text), draw(text, *args))[1])
        canvas.draw()
    texts = [t for t in drawn if t.get_visible() and t.get_text()]
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts]
    width, height = canvas.get_width_height()
    assert len(boxes) > 4
    for text, box in boxes:
        assert min(box.x0, box.y0) >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
    for (a, one), (b, other) in itertools.combinations(boxes, 2):
        apart = one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1
        assert apart or one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1, (a, b)
    assert min(t.get_fontsize() for t in texts) >= 8


def test_a_map_for_each_layer_and_head(rng):
    maps = {"block_1": softmax_map(rng), "block_2": softmax_map(rng)}
    figure = plot_attention(maps, sequence=1)
    shown = images(figure)
    expected = [head for weights, _ in maps.values() for head in weights[1]]
    assert len(shown) == len(expected) == 6
    for image, weights in zip(shown, expected, strict=True):
        array = image.get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(array), ~CAUSAL)
        np.testing.assert_array_equal(array[CAUSAL], weights[CAUSAL])
    assert [axes.get_title() for axes in figure.axes[:6]] == ["head 0", "head 1", "head 2"] + [
        ""
    ] * 3
    assert [axes.get_ylabel() for axes in figure.axes[:6:3]] == ["block_1", "block_2"]
    assert figure.get_supxlabel() == "key"
    assert figure.get_supylabel() == "query"
    assert figure.axes[-1].get_ylabel() == "weight"


def test_colors_start_at_zero_and_are_the_same_everywhere(rng):
    maps = {"a": softmax_map(rng, heads=2), "b": softmax_map(rng, heads=2)}
    maps["b"] = AttentionMap(maps["b"].weights / 4, maps["b"].mask)
    shown = images(plot_attention(maps))
    assert {(i.norm.vmin, i.norm.vmax, i.cmap.name) for i in shown} == {(0.0, 1.0, "Blues")}
    white = shown[0].cmap(shown[0].norm(0.0))
    assert min(white[:3]) > 0.95
    # a quarter of the largest weight is half way up the colors
    assert shown[0].norm(0.25) == pytest.approx(0.5)


def test_colors_of_signed_weights_are_centered_on_zero(rng):
    weights = signed_map(rng)
    image = images(plot_attention(weights))[0]
    largest = np.abs(weights.weights[0]).max()
    assert image.norm.vmax == -image.norm.vmin == pytest.approx(largest)
    assert image.norm(0.0) == pytest.approx(0.5)
    red, _, blue, _ = image.cmap(image.norm(largest / 2))
    assert red > blue
    red, _, blue, _ = image.cmap(image.norm(-largest / 2))
    assert blue > red


def test_weights_alone_as_tensors_are_plotted_too(rng):
    weights = np.zeros((1, 1, 2, 3))
    weights = keras.ops.convert_to_tensor(weights, "bfloat16")
    [image] = images(plot_attention(weights))
    assert image.get_array().shape == (2, 3)
    assert not np.ma.getmaskarray(image.get_array()).any()
    assert image.norm.vmax == 1.0  # of weights that are all zero


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: {"block_1": softmax_map(rng)},
        lambda rng: signed_map(rng),
        lambda rng: {f"block_{i}": softmax_map(rng, 1, 8) for i in range(8)},
        lambda rng: {f"transformer_block_{i}": softmax_map(rng, 1, 1) for i in range(26)},
        lambda rng: {"block_1/context_attention": rng.random((1, 5, 9, 4)), "b": softmax_map(rng)},
        lambda rng: rng.random((1, 1, 512, 512)),
    ],
    ids=["one", "signed", "8 by 8", "26 layers", "unlike", "long"],
)  # fmt: skip
def test_attention_plots_are_legible(make, rng):
    assert_legible(plot_attention(make(rng)))


def test_the_quickstart_plots_what_it_found():
    file = pathlib.Path(quickstart_report.__file__).parent / "results" / "quickstart.json"
    found = json.loads(file.read_text())
    figure = quickstart_report.plot(found)
    assert_legible(figure)
    upper, lower, speakers = figure.axes
    for axes, key in ((upper, "accuracy"), (lower, "weight")):
        for line, by_length in zip(axes.lines, found["look_up"]["models"].values(), strict=True):
            assert list(map(str, line.get_xdata())) == list(by_length)
            assert list(line.get_ydata()) == [x[key] for x in by_length.values()]
    expected = [
        *map(np.mean, found["accuracies"].values()),
        *found["baselines"].values(),
        *(x["accuracy"] for x in found["published"].values()),
    ]
    points = [line.get_xdata()[0] for line in speakers.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points, expected)
    assert [t.get_text() for t in speakers.texts] == [f"{x:.3f}" for x in expected]


def test_scales_by_layer_and_head():
    scales = {"block_1": np.array([0.5, -1.25]), "block_2": np.array([1.0, 2.0, 3.0]), "x": 0.1}
    figure = plot_scale(scales)
    [image] = figure.axes[0].images
    table = image.get_array()
    np.testing.assert_array_equal(
        table.filled(np.nan), [[0.5, -1.25, np.nan], [1, 2, 3], [0.1, np.nan, np.nan]]
    )
    assert (image.norm.vmin, image.norm.vmax, image.cmap.name) == (-3.0, 3.0, "RdBu_r")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(scales)
    written = [t.get_text() for t in figure.axes[0].texts]
    assert written == ["0.50", "-1.25", "1.00", "2.00", "3.00", "0.10"]
    assert figure.axes[1].get_ylabel() == "s"
    assert_legible(figure)
    figure = plot_scale({"block_1": np.ones(2)}, parameter="b")
    assert figure.axes[0].images[0].norm.vmin == 0.0
    assert figure.axes[1].get_ylabel() == "b"


@pytest.mark.parametrize("shape", [(1, 1), (12, 12), (2, 32), (24, 8)])
def test_scale_plots_are_legible(shape, rng):
    layers, heads = shape
    assert_legible(plot_scale({f"block_{i}": rng.normal(size=heads) for i in range(layers)}))


def test_examples_in_docstrings_run():
    assert failing_examples(plots) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install keras-ssattn\[plots\]"):
        plot_scale({"block_1": np.ones(2)})


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (plot_attention, [{}], "`attention` must have one layer or more. Received: none"),
        (plot_attention, [np.ones((2, 3, 3))], r"\[B, H, T, S\]. Received: shape \(2, 3, 3\)"),
        (plot_attention, [np.ones((2, 1, 3, 3)), 2], "from 0 to 1. Received: sequence=2"),
        (plot_attention, [np.ones((2, 1, 3, 3)), 0.5], "`sequence` must be .* sequence=0.5"),
        (plot_attention, [np.ones((2, 1, 3, 3)), True], "`sequence` must be .* sequence=True"),
        (plot_attention, [Recording({}, {})], "`attention` must be the `attention` of a"),
        (plot_attention, ["x"], "`attention` must be arrays of numbers. Received: 'x'"),
        (plot_attention, [BAD_SHAPE], r"broadcastable to its weights, \(1, 1, 3, 3\).*\(2, 2\)"),
        (plot_attention, [BAD_DTYPE], "`attention` must have a boolean mask .* dtype float64"),
        (plot_scale, [{}], "`scales` must have one layer or more"),
        (plot_scale, [{"x": "one"}], "`scales` must be arrays of numbers. Received: 'one'"),
        (plot_scale, [{"x": np.ones((2, 2))}], r"\[H\] or \[\]. Received: shape \(2, 2\)"),
    ],
)
def test_bad_arguments_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
