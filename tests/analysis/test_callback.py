"""Measures in the logs of `fit`, and in what Keras's own callbacks make of them."""

import csv
import math

import keras
import numpy as np
import pytest
from support.cases import sequences
from support.helpers import to_numpy

import keras_ssattn
from keras_ssattn.analysis import (
    AttentionStatistics,
    attention_entropy,
    kurtosis,
    learned_scale,
    max_activation,
    record,
    sink_rate,
    sparsity,
    weight_on,
)
from keras_ssattn.layers import MultiHeadAttention, SSMax

X = sequences(8)
BLOCK = "attention/ssmax_block_1"


def make(normalizer="ssmax", dropout=0.2):
    keras.utils.set_random_seed(3)
    model = keras_ssattn.build(
        6, 6, 2, 1, dropout, window_size=7, normalizer=normalizer, output_mode="all"
    )
    model.compile(keras.optimizers.SGD(0.5), "mse")
    return model


def fit(model, *callbacks, epochs=2, **options):
    options = {"batch_size": 4, "verbose": 0, "shuffle": False, **options}
    return model.fit(X, -X, epochs=epochs, callbacks=list(callbacks), **options).history


def test_entries_are_the_measures_of_the_model_at_the_end_of_the_epoch():
    """Also on JAX, where `fit` keeps the weights outside of the model."""
    model = make(SSMax(use_bias=True))
    measures = ("entropy", "sink_rate", "sparsity", "kurtosis", "max_activation", "s", "b")
    history = fit(model, AttentionStatistics(X[:3], measures))
    recording = record(model, X[:3])
    attention, hidden = recording.attention["ssmax_block_1"], recording.hidden["ssmax_block_1"]
    expected = {
        "entropy": to_numpy(attention_entropy(*attention)).mean(),
        "sink_rate": to_numpy(sink_rate(*attention)),
        "sparsity": to_numpy(sparsity(*attention)).mean(),
        "kurtosis": to_numpy(kurtosis(*hidden)),
        "max_activation": to_numpy(max_activation(*hidden)),
        "s": learned_scale(model)["ssmax_block_1"].mean(),
        "b": learned_scale(model, "b")["ssmax_block_1"].mean(),
    }
    found = {key: x for key, x in history.items() if key != "loss"}
    assert found.keys() == {f"{BLOCK}/{name}" for name in expected}
    for name, value in expected.items():
        first, last = found[f"{BLOCK}/{name}"]
        assert isinstance(last, float)
        assert last == pytest.approx(float(value), rel=1e-5), name
        assert first != last or name in ("sink_rate", "sparsity"), name


def test_training_is_the_same_as_without():
    """Dropout draws what it would have drawn, and no weight moves."""
    histories = [fit(make(), *callbacks, validation_data=(X, X)) for callbacks in (
        [], [AttentionStatistics(X[:3])]
    )]  # fmt: skip
    assert histories[0]["loss"] == histories[1]["loss"]
    assert histories[0]["val_loss"] == histories[1]["val_loss"]


def test_default_entries_and_those_of_each_head():
    model = make()
    model(X)
    statistics = AttentionStatistics(X[:3], key_index=0, query_index=-1)
    statistics.set_model(model)
    names = ["entropy", "sink_rate", "kurtosis", "s", "weight_on_key"]
    by_layer = statistics.measure()
    assert list(by_layer) == [f"{BLOCK}/{name}" for name in names]
    statistics.per_head = True
    by_head = statistics.measure()
    heads = [f"{BLOCK}/head_{i}" for i in range(2)]
    assert set(by_head) == {
        f"{BLOCK}/sink_rate",
        f"{BLOCK}/kurtosis",
        *(f"{head}/{name}" for head in heads for name in ("entropy", "s", "weight_on_key")),
    }
    attention = record(model, X[:3]).attention["ssmax_block_1"]
    on_key = to_numpy(weight_on(attention.weights, 0, -1, attention.mask)).mean(axis=0)
    entropy = to_numpy(attention_entropy(*attention))
    for i, head in enumerate(heads):
        assert by_head[f"{head}/weight_on_key"] == pytest.approx(on_key[i], rel=1e-5)
        assert by_head[f"{head}/entropy"] == pytest.approx(entropy[i], rel=1e-5)
    assert by_layer[f"{BLOCK}/weight_on_key"] == pytest.approx(on_key.mean(), rel=1e-5)


def test_a_head_that_attends_to_nothing_is_left_out_of_the_mean():
    model = make("rectified_softpick", dropout=0.0)
    attention = model.get_layer("rectified_softpick_block_1").attention
    for dense in (attention.query_dense, attention.key_dense):  # head 0: all logits -1
        kernel, bias = (np.zeros(w.shape, "float32") for w in dense.weights)
        kernel[:, 1] = np.random.default_rng(0).normal(size=kernel[:, 1].shape)
        bias[0] = 1.0 if dense is attention.key_dense else -1.0
        dense.set_weights([kernel, bias])
    weights = record(model, X[:3]).attention["rectified_softpick_block_1"]
    expected = to_numpy(attention_entropy(*weights))
    assert np.isnan(expected[0])
    statistics = AttentionStatistics(X[:3], "entropy")
    statistics.set_model(model)
    [found] = statistics.measure().values()
    assert found == pytest.approx(expected[1])
    statistics.per_head = True
    assert math.isnan(statistics.measure()["attention/rectified_softpick_block_1/head_0/entropy"])


@pytest.mark.parametrize("name", ["entropy", "sink_rate", "sparsity", "kurtosis"])
def test_a_head_with_nan_is_not_left_out_of_the_mean(name):
    model = make(dropout=0.0)
    attention = model.get_layer("ssmax_block_1").attention
    # PyTorch's fused kernel gives zeros for a query of NaN, so that states need a value of NaN
    dense = attention.value_dense if name == "kurtosis" else attention.query_dense
    kernel, bias = dense.get_weights()
    kernel[:, 0] = np.nan  # of head 0
    dense.set_weights([kernel, bias])
    statistics = AttentionStatistics(X[:3], name)
    statistics.set_model(model)
    assert math.isnan(statistics.measure()[f"{BLOCK}/{name}"])
    if name == "entropy":
        statistics.per_head = True
        assert math.isfinite(statistics.measure()[f"{BLOCK}/head_1/entropy"])


def without_blocks(normalizer):
    inputs = keras.Input(X.shape[1:])
    attention = MultiHeadAttention(2, 3, normalizer=normalizer, name="att")
    model = keras.Model(inputs, attention(inputs, inputs), name="bare")
    model.compile("sgd", "mse")
    return model


def test_defaults_are_of_the_layers_that_there_are():
    history = fit(without_blocks("softmax"), AttentionStatistics(X[:3]), epochs=1)
    assert set(history) == {"loss", "attention/att/entropy", "attention/att/sink_rate"}


@pytest.mark.parametrize("name", ["kurtosis", "max_activation", "s", "b"])
def test_a_measure_that_no_layer_has_is_refused_before_the_first_epoch(name):
    model = without_blocks("softmax")
    before = model.get_weights()
    with pytest.raises(ValueError, match=f"`measures` must .*Received: '{name}', .* 'bare' has"):
        fit(model, AttentionStatistics(X[:3], ["entropy", name]))
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("first", "measured"), [(0, [0, 2, 4]), (1, [1, 2, 4])])
def test_other_epochs_have_the_same_entries_without_a_value(first, measured, tmp_path):
    """CSVLogger knows only the entries of its first epoch, and needs them in each."""
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    statistics = AttentionStatistics(X[:3], ["entropy", "s"], every=2)
    history = fit(make(), statistics, log, epochs=5, initial_epoch=first)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == list(range(first, 5))
    for name in ("entropy", "s"):
        values = [float(row[f"{BLOCK}/{name}"]) for row in rows]
        np.testing.assert_array_equal(values, history[f"{BLOCK}/{name}"])
        found = [int(row["epoch"]) for row, x in zip(rows, values, strict=True) if x == x]
        assert found == measured


def test_a_callback_that_comes_before_sees_nothing(tmp_path):
    before, after = (keras.callbacks.CSVLogger(tmp_path / name) for name in ("a.csv", "b.csv"))
    fit(make(), before, AttentionStatistics(X[:3]), after, epochs=1)
    assert "attention" not in (tmp_path / "a.csv").read_text()
    assert f"{BLOCK}/entropy" in (tmp_path / "b.csv").read_text().splitlines()[0]


def test_tensorboard_writes_them(tmp_path):
    pytest.importorskip("tensorflow", reason="Keras's TensorBoard writes by TensorFlow")
    pytest.importorskip("tensorboard", reason="Keras's TensorBoard writes by tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    board = keras.callbacks.TensorBoard(tmp_path)
    history = fit(make(), AttentionStatistics(X[:3]), board)
    events = EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    for name in ("entropy", "sink_rate", "kurtosis", "s"):
        written = events.Tensors(f"epoch_{BLOCK}/{name}")
        assert [event.step for event in written] == [0, 1]
        values = [float(make_ndarray(event.tensor_proto)) for event in written]
        assert values == pytest.approx(history[f"{BLOCK}/{name}"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measures": ["entropie"]}, ValueError, r"`measures` must .* \('entropie',\)"),
        ({"measures": []}, ValueError, r"`measures` must be one or more of .*Received: \(\)"),
        ({"measures": 5}, ValueError, r"`measures` must be one or more of .*Received: \(5,\)"),
        ({"every": 0}, ValueError, "`every` must be a positive integer. Received: every=0"),
        ({"per_head": "no"}, ValueError, "`per_head` must be True or False. Received: per_head='n"),
        ({"sink_threshold": -1}, ValueError, "`sink_threshold` must be a number, 0 or more. Rec"),
        ({"key_index": 1.5}, TypeError, "`key_index` must be integers. Received: dtype float64"),
        ({"key_index": 0, "query_index": [[0]]}, ValueError, "`query_index` must have shape"),
        ({"query_index": -1}, ValueError, "`key_index` must be given with `query_index`"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        AttentionStatistics(X, **options)
