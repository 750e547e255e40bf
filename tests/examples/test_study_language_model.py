"""The study's language models: the copy task, the schemes, and a trial of the program."""

import json
import pathlib

import copies
import keras
import language_model
import numpy as np
import pytest
import runs
import training

PAPERS = pathlib.Path(__file__).parents[2] / "examples" / "papers"
STUDY = PAPERS / "study"
NAMES = ["positions", "starts_language_model", "bible", "copies"]


@pytest.fixture(scope="module")
def positions():
    return runs.read_config(STUDY / "positions.json", small=True)


def places_of_repeats(original, repeated):
    """Of each row that changed: the start of the copy, its end, and the distance to the first."""
    for before, after in zip(original, repeated, strict=True):
        changed = np.flatnonzero(before != after)
        if len(changed):
            start, end = changed[0], changed[-1] + 1
            first = int(after[start])  # bytes of `original` are their positions
            yield start, end, start - first, after


def test_a_share_of_the_training_sequences_has_a_passage_twice(rng):
    windows = np.broadcast_to(np.arange(65), (400, 65))
    repeated = copies.repeat_passages(rng, windows, 0.25, [8, 32])
    found = list(places_of_repeats(windows, repeated))
    assert 0.15 < len(found) / 400 < 0.35
    for start, end, distance, row in found:
        assert 8 <= end - start <= min(32, distance)  # the copies do not overlap
        np.testing.assert_array_equal(row[start:end], row[start - distance : end - distance])
        np.testing.assert_array_equal(row[:start], np.arange(start))
        np.testing.assert_array_equal(row[end:], np.arange(end, 65))
    lengths = {end - start for start, end, *_ in found}
    distances = {distance for _, _, distance, _ in found}
    assert min(lengths) < 12 < 28 < max(lengths)
    assert min(distances) < 20 < 50 < max(distances)
    assert min(x for x, *_ in found) < 32
    assert max(x for _, x, *_ in found) == 65


@pytest.mark.parametrize("share", [0, 1])
def test_no_or_every_training_sequence_has_a_passage_twice(rng, share):
    windows = np.broadcast_to(np.arange(20), (50, 20))
    repeated = copies.repeat_passages(rng, windows, share, [4, 8])
    assert (repeated != windows).any(axis=1).sum() == 50 * share


def test_the_training_batch_has_the_repeats_in_tokens_and_targets(positions):
    config = {**positions, "batch_size": 6, "copies": {**positions["copies"], "share": 1}}
    tokens, targets = language_model.draw_training(config, np.random.default_rng(3))
    assert tokens.shape == targets.shape == (6, positions["length"])
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    plain = {k: v for k, v in config.items() if k != "copies"}
    plain, _ = language_model.draw_training(plain, np.random.default_rng(3))
    assert (plain != tokens).any()


def texts_of(text, number, length, distance):
    starts = np.random.default_rng(0).integers(0, len(text) - distance, number)
    return copies.texts_with_copies(text, starts, length, distance)


def test_a_text_begins_and_ends_with_a_passage():
    starts = np.array([0, 7, 4900])
    for distance in (8, 100):
        texts = copies.texts_with_copies(np.arange(5000), starts, 8, distance)
        assert texts.shape == (3, distance + 8)
        np.testing.assert_array_equal(texts[:, -8:], starts[:, None] + np.arange(8))
        np.testing.assert_array_equal(texts[:, :-8], starts[:, None] + np.arange(distance))


def test_the_loss_is_that_of_the_copies():
    """Of bytes 4 to 7 of each copy, counted by a model's stand-in that knows the positions."""
    texts = texts_of(np.arange(300), 3, 8, 20)
    assert texts.shape[1] == 28

    def losses(model, tokens, targets, batch):
        assert (targets[:, :-1] == tokens[:, 1:]).all()
        place = np.arange(1, 28)  # of the target in the text
        right = np.where(place < 8, 1.0, np.where(place < 20, 100.0, 10.0))
        return np.broadcast_to(np.where(place % 20 < 4, 1000.0, right), tokens.shape)

    assert copies.copy_losses(losses, None, texts, 8) == {"first": 1.0, "second": 10.0}


def test_the_weight_is_that_on_the_byte_to_copy(monkeypatch):
    """The queries stand before the bytes of the second copy, their keys on those of the first."""
    texts = texts_of(np.arange(251), 3, 8, 20)

    def looked_at(model, tokens, places):
        queries = np.arange(tokens.shape[1] - places.shape[1], tokens.shape[1])
        asked = texts[:, 1:][:, queries]
        np.testing.assert_array_equal(np.take_along_axis(tokens, places, 1), asked)
        np.testing.assert_array_equal(queries + 1, np.arange(20 + copies.SKIP, 28))
        return "weights"

    monkeypatch.setattr(copies, "weight_on_needle", looked_at)
    assert copies.weight_on_copied(None, texts, 8) == "weights"


def test_a_model_that_has_learned_to_copy_has_a_lower_loss_on_the_second_copy(rng):
    """And one that has not is the same on both: random bytes tell nothing else."""
    text = rng.integers(0, 64, 100_000)
    found = {}
    for name, answer in [("copies", 20), ("does not", None)]:

        def losses(model, tokens, targets, batch, answer=answer):
            rows = np.full(tokens.shape, np.log(64.0))
            if answer:
                earlier = np.roll(targets, answer, axis=1)
                rows[earlier == targets] = 0.0
            return rows

        texts = texts_of(text, 50, 8, 20)
        found[name] = copies.copy_losses(losses, None, texts, 8)
    assert found["copies"]["second"] == 0.0 < 3 < found["copies"]["first"]
    assert found["does not"]["second"] == found["does not"]["first"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("small", [False, True])
def test_the_schemes_are_what_their_names_say(name, small):
    config = runs.read_config(STUDY / f"{name}.json", small)
    for condition, options in config["conditions"].items():
        task = {**config, **options}
        for arm in task["arms"].values():
            blocks = training.make_model(task, arm["normalizer"]).blocks
            rotaries = [x.attention.rotary for x in blocks]
            plain = [x.attention.normalizer.__class__.__name__ for x in blocks]
            if condition == "swan":
                assert [x is None for x in rotaries] == [True, False, True]
                windows = [x.attention.sliding_window for x in blocks]
                assert windows[0] is windows[2] is None
                assert windows[1] < task["length"] / 2
                assert plain[1] == "Softmax"
                assert plain[0] == plain[2]
            else:
                assert len(set(plain)) == 1
                assert len({x and (x.theta, x.fraction) for x in rotaries}) == 1
                if condition == "none":
                    assert rotaries[0] is None
                else:
                    assert rotaries[0].theta == (5e5 if "50" in condition else 1e4)
                    assert rotaries[0].fraction == (0.25 if "quarter" in condition else 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_trained_alike(name):
    """One text, one grid of rates and one size for all; no arm has options of training."""
    config = runs.read_config(STUDY / f"{name}.json")
    shared = runs.read_config(STUDY / "positions.json")
    own = {"about", "results", "conditions", "arms", "text"}
    if name == "copies":  # which trains longer, with the rate that all others chose there
        own |= {"steps_per_epoch", "batch_size", "learning_rates", "copies"}
    assert {k: v for k, v in config.items() if k not in own} == {
        k: v for k, v in shared.items() if k not in own
    }
    for condition, options in config["conditions"].items():
        assert options == shared["conditions"][condition]
    for arm in config["arms"].values():
        assert set(arm) <= {"normalizer", "model_options"}
        start = str(arm["normalizer"])
        assert "train_length" not in start or f"'train_length': {config['length']}" in start


def folder_of_texts(folder):
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}").write_text(f"{i} in the beginning " * 20)
    return str(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_runs_in_every_scheme(name, backend, tmp_path):
    config = runs.read_config(STUDY / f"{name}.json", small=True)
    file, results = tmp_path / "config.json", tmp_path / "results.jsonl"
    if "text" in config:
        config["text"] = folder_of_texts(tmp_path / "text")
    file.write_text(json.dumps(config))
    arms = ["ssmax"] if name == "positions" else list(config["arms"])
    runs.run_all(file, results, language_model.run_one, only=arms)
    records = runs.read_runs(results)
    pairs = [(x["condition"], x["arm"]) for x in records]
    assert pairs == [(c, a) for c in config["conditions"] for a in arms]
    for record in records:
        assert record["backend"] == backend
        assert np.isfinite(record["validation"])
        assert list(record["loss_by_position"]) == ["1"]
        assert len(record["loss_by_position"]["1"]) == 2 * config["test_factor"]
        assert np.isfinite(record["loss_by_position"]["1"]).all()
        assert list(record["copies"]) == ["8", "16", "32", "64"]
        firsts = [x["first"] for x in record["copies"].values()]  # of the same passages
        np.testing.assert_allclose(firsts, firsts[0], rtol=1e-4)
        for measured in record["copies"].values():
            assert np.isfinite([measured["first"], measured["second"]]).all()
            assert np.shape(measured["weight"]) == (3, 2)


def test_options_of_an_arm_reach_its_model(positions, tmp_path):
    gated = runs.read_config(STUDY / "starts_language_model.json", small=True)
    condition = next(iter(gated["conditions"].values()))
    task = {**gated, **condition}
    counts = {
        arm: language_model.run_one(task, arm, 0.003, 0, tmp_path)["parameters"]
        for arm in ("softmax, gated", "rectified_softpick")
    }
    hidden = task["model"]["hidden_size"]
    assert counts["softmax, gated"] - counts["rectified_softpick"] == 3 * hidden**2


def test_measures_are_the_same_again(positions, tmp_path):
    """Of a model's weights alone: the texts of the tests do not depend on what ran before."""
    task = {**positions, **positions["conditions"]["none"]}
    keras.utils.set_random_seed(0)
    model = training.make_model(task, "ssmax")
    text = language_model.load_text()["test"]
    first, again = (
        copies.measure_copies(task, language_model.losses, model, text) for _ in range(2)
    )
    assert first == again
