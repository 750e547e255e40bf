"""The study of tables in context: what rows see, the tables, the methods beside, a small run."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import runs
import tables

PAPERS = pathlib.Path(__file__).parents[2] / "examples" / "papers"
CONFIG = PAPERS / "study" / "tables.json"
ARMS = runs.read_config(CONFIG)["arms"]


@pytest.fixture(scope="module")
def small():
    return runs.read_config(CONFIG, small=True)


@pytest.fixture
def batch(rng, small):
    (x, labels), _, _ = tables.draw_batch(rng, {**small, "least_rows": 20})
    return x, labels


def randomized(small, arm):
    """A model whose weights all take part, with learned scales that differ from their start."""
    model = tables.make_model(small, ARMS[arm]["normalizer"])
    rng = np.random.default_rng(0)
    for x in model.weights:
        value = keras.ops.convert_to_numpy(x)
        x.assign(value + 0.1 * rng.normal(size=value.shape))
    return model


def logits(model, x, labels):
    return keras.ops.convert_to_numpy(model((x, labels)))


@pytest.mark.parametrize("arm", ARMS)
def test_a_row_in_question_is_seen_by_no_other(arm, small, batch):
    x, labels = batch
    model = randomized(small, arm)
    before, other = logits(model, x, labels), x.copy()
    last = x.shape[1] - 1
    assert (labels[:, last] == tables.IN_QUESTION).all()
    other[:, last] += 3.0
    after = logits(model, other, labels)
    np.testing.assert_allclose(after[:, :last], before[:, :last], atol=1e-5)
    assert np.abs(after[:, last] - before[:, last]).max() > 1e-2
    without = logits(model, x[:, :last], labels[:, :last])
    np.testing.assert_allclose(without, before[:, :last], atol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_the_order_of_shown_rows_does_not_matter(arm, small, batch, rng):
    x, labels = batch
    model = randomized(small, arm)
    rows, asked = small["rows"], small["asked"]
    order = np.r_[rng.permutation(rows), rows : rows + asked]
    before, after = logits(model, x, labels), logits(model, x[:, order], labels[:, order])
    np.testing.assert_allclose(after[:, rows:], before[:, rows:], atol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_padding_does_not_matter_and_shown_rows_do(arm, small, batch):
    x, labels = batch
    model = randomized(small, arm)
    rows = small["rows"]
    assert (labels == tables.PADDING).any()
    before = logits(model, x, labels)[:, rows:]
    other = np.where((labels == tables.PADDING)[..., None], 7.0, x).astype("float32")
    np.testing.assert_allclose(logits(model, other, labels)[:, rows:], before, atol=1e-5)
    one, kept = x[:1], labels[0] != tables.PADDING
    assert not kept.all()
    alone = logits(model, one[:, kept], labels[:1, kept])[:, -small["asked"] :]
    np.testing.assert_allclose(alone, before[:1], atol=1e-5)
    fewer = labels.copy()
    fewer[:, :10] = tables.PADDING
    assert np.abs(logits(model, x, fewer)[:, rows:] - before).max() > 1e-3


def test_made_up_tables_are_what_they_say(rng):
    x, classes, used = tables.draw_tables(rng, 64, 200)
    assert x.shape == (64, 200, tables.FEATURES)
    np.testing.assert_array_equal((x != 0).any(1), used)
    assert used.sum(1).min() == 2
    assert used.sum(1).max() == tables.FEATURES
    numbers = {len(np.unique(one)) for one in classes}
    assert {2, 3, 4} <= numbers
    assert set(np.unique(classes)) == {0, 1, 2, 3}


def test_a_batch_shows_classes_and_asks_for_others(rng, small):
    (x, labels), answers, weights = tables.draw_batch(rng, {**small, "batch_size": 64})
    rows = small["rows"]
    shown = labels < tables.CLASSES
    np.testing.assert_array_equal(labels[shown], answers[shown])
    assert (labels[:, rows:] == tables.IN_QUESTION).all()
    assert (labels[:, :rows] != tables.IN_QUESTION).all()
    numbers = shown.sum(1)
    assert numbers.min() >= small["least_rows"]
    assert numbers.max() <= rows
    assert len(set(numbers)) > 5
    np.testing.assert_array_equal(weights > 0, labels == tables.IN_QUESTION)
    assert weights.mean() == pytest.approx(1)
    for one, seen in zip(x, shown, strict=True):
        np.testing.assert_allclose(one[seen].mean(0), 0, atol=0.6)  # but for what is cut off


def test_features_are_standardized_by_shown_rows_alone(rng):
    x = rng.normal(3.0, 2.0, (50, 4))
    shown = np.arange(50) < 30
    used = np.array([True, True, False, True])
    found = tables.standardize(x, shown, used)
    expected = (x - x[:30].mean(0)) / x[:30].std(0) * np.sqrt(tables.FEATURES / 3)
    np.testing.assert_allclose(found[:, used], expected[:, used])
    assert (found[:, 2] == 0).all()
    x[40:] += 1.0
    np.testing.assert_array_equal(tables.standardize(x, shown, used)[:40], found[:40])


@pytest.mark.parametrize("name", tables.real_tables())
def test_a_part_of_a_real_table(name):
    """Rows in question are not shown; they stay the same, and more rows are shown, as n grows."""
    x, y = tables.real_tables()[name]
    few, all_rows = tables.split(name, 3, 16, 20), tables.split(name, 3, None, 20)
    assert len(few.shown) == len(few.classes) == 16
    assert len(all_rows.shown) + len(all_rows.asked) == len(x)
    np.testing.assert_array_equal(few.answers, all_rows.answers)
    np.testing.assert_array_equal(few.classes, all_rows.classes[:16])
    assert set(few.classes) == set(y) == set(range(len(set(y))))
    counts = np.bincount(all_rows.classes) + np.bincount(all_rows.answers)
    np.testing.assert_array_equal(counts, np.bincount(y))
    assert few.shown.shape[1] == min(x.shape[1], tables.FEATURES)
    other = tables.split(name, 4, None, 20)
    assert not np.array_equal(other.asked, all_rows.asked)


def test_rows_in_question_do_not_change_the_features_of_others(monkeypatch):
    x, y = tables.real_tables()["wine"]
    expected = tables.split("wine", 0, 30, 20)
    order = np.random.default_rng((0, len(y))).permutation(len(y))
    changed = x.copy()
    changed[order[:20]] *= 2.0
    monkeypatch.setattr(tables, "real_tables", lambda: {"wine": (changed, y)})
    found = tables.split("wine", 0, 30, 20)
    np.testing.assert_array_equal(found.shown, expected.shown)
    assert not np.allclose(found.asked, expected.asked)


def test_the_model_and_other_methods_get_the_same_rows(small, monkeypatch):
    """The very numbers: nothing is drawn anew for another method."""
    seen = {}

    def note(arm):
        def fit(part):
            seen.setdefault(arm, []).append(part)
            return tables.fit_frequencies(part)

        return fit

    def classify(model, parts):
        return [note("in context")(part) for part in parts]

    monkeypatch.setattr(tables, "FITTED", {name: note(name) for name in tables.FITTED})
    monkeypatch.setattr(tables, "classify", classify)
    monkeypatch.setattr(tables, "train", lambda *_: tables.make_model(small, "softmax"))
    monkeypatch.setattr(tables, "validate", lambda *_: 1.0)
    arms = {**small["conditions"]["fitted"]["arms"], **small["arms"]}
    for arm in ("nearest neighbors", "logistic regression", "softmax"):
        tables.run_one({**small, "arms": arms}, arm, 0.0, 0, None)
    assert set(seen) == {"nearest neighbors", "logistic regression", "in context"}
    for parts in zip(*seen.values(), strict=True):
        for values in zip(*parts, strict=True):
            for other in values[1:]:
                np.testing.assert_array_equal(other, values[0])


def separable(rng, rows=40):
    classes = np.arange(rows) % 3
    x = np.eye(3)[classes] * 4 + 0.1 * rng.normal(size=(rows, 3))
    return tables.Rows(x[:30], classes[:30], x[30:], classes[30:])


@pytest.mark.parametrize("name", tables.FITTED)
def test_fitted_methods_give_probabilities(name, rng):
    part = separable(rng)
    found = tables.FITTED[name](part)
    assert found.shape == (10, 3)
    np.testing.assert_allclose(found.sum(1), 1)
    assert found.min() > 0
    right = (found.argmax(1) == part.answers).mean()
    assert right == 1 or name == "class frequencies"


def test_a_class_that_is_not_shown_costs_a_finite_loss(rng):
    part = separable(rng)
    seen = part.classes == 1
    part = part._replace(shown=part.shown[seen], classes=part.classes[seen])
    for fit in tables.FITTED.values():
        found = fit(part)
        assert np.isfinite(tables.scores([part], [found])["loss"])


def test_scores():
    part = tables.Rows(np.zeros((2, 1)), np.array([0, 1]), np.zeros((2, 1)), np.array([0, 1]))
    sure = np.array([[0.8, 0.2], [0.6, 0.4]])
    found = tables.scores([part, part], [sure, sure[::-1]])
    losses = -np.log([0.8, 0.4]).mean(), -np.log([0.6, 0.2]).mean()
    np.testing.assert_allclose(found["loss_by_part"], losses)
    assert found["loss"] == pytest.approx(np.mean(losses))
    assert found["accuracy"] == 0.5


def test_probabilities_are_of_the_rows_in_question(small, rng):
    """Padded to the model's features, among the table's classes."""
    model = randomized(small, "ssmax")
    parts = [separable(rng), separable(rng)]
    found = tables.classify(model, parts)
    x = np.zeros((1, 40, tables.FEATURES), "float32")
    x[0, :, :3] = np.concatenate([parts[1].shown, parts[1].asked])
    labels = np.r_[parts[1].classes, np.full(10, tables.IN_QUESTION)][None].astype("int32")
    values = np.exp(logits(model, x, labels)[0, 30:, :3])
    np.testing.assert_allclose(found[1], values / values.sum(1, keepdims=True), rtol=1e-4)


def test_a_small_run_of_the_study_stores_every_arm(backend, tmp_path):
    command = [sys.executable, str(PAPERS / "tables.py"), "study/tables.json", "--small"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    fitted = [x["arm"] for x in records if x["condition"] == "fitted"]
    assert fitted == list(tables.FITTED)
    assert [x["arm"] for x in records if x["condition"] == "in context"] == list(ARMS)
    names = {"made up", *tables.real_tables()}
    for record in records:
        assert np.isfinite(record["validation"])
        assert set(record["by_table"]) == names
        assert all(x["loss"] > 0 for table in record["by_table"].values() for x in table.values())
    counts = [{name: list(x["by_table"][name]) for name in names} for x in records]
    assert all(x == counts[0] for x in counts)
