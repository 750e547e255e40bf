"""Numbers on the pages are those of the result files."""

import itertools
import math
import re

import numpy as np
import pytest
from support.pages import DOCS, PAGES

pytest.importorskip("matplotlib", reason="the reports of the examples make plots, too")

import result_tables
import runs
import study_report
from result_tables import BACKENDS, EXAMPLES, report, result

from keras_ssattn.checkpoints.families import FAMILIES
from keras_ssattn.layers import LogLengthScale
from keras_ssattn.models import CausalLM


def assert_on(page, text):
    """Whatever its line breaks."""
    assert " ".join(text.split()) in " ".join((DOCS / f"{page}.md").read_text().split())


def test_every_table_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    included = re.findall(r"```\{include\} _generated/(.*)\.md", text)
    assert sorted(included) == sorted(result_tables.TABLES)


@pytest.mark.parametrize("name", result_tables.TABLES)
def test_tables_have_equally_many_cells_in_each_row(name):
    for part in result_tables.TABLES[name]().split("\n\n"):
        header, *rows = part.splitlines()
        assert len(rows) >= 2
        assert {row.count("|") for row in rows} == {header.count("|")}


# The README


def assert_in_readme(text):
    assert " ".join(text.split()) in " ".join((DOCS.parent / "README.md").read_text().split())


def test_speed_in_the_readme():
    assert_in_readme(result_tables.speed())


def test_main_job_in_the_readme():
    look_up = result("results/quickstart.json")["look_up"]
    last = max(look_up["models"]["ssmax"], key=int)
    softmax, ssmax = (f"{look_up['models'][x][last]['accuracy']:.2f}" for x in ("softmax", "ssmax"))
    assert_in_readme(
        f"learned to look one item up among {look_up['train_length']} (left). Among {last} items "
        f"softmax is right on {softmax} of the questions, and SSMax on {ssmax} (one seed; over "
        f"three, softmax on {accuracy('softmax', 2048)})."
    )


# The main job


def test_what_is_said_of_the_quickstart():
    found = result("results/quickstart.json")
    models, baselines = found["accuracies"], found["baselines"].values()
    means = [np.mean(x) for x in models.values()]
    assert sum(x < min(means) for x in baselines) >= 3
    assert sum(x > max(means) for x in baselines) == 1
    assert np.ptp(means) < 0.02
    utterances = found["utterances"]
    assert_on(
        "experiments", f"{utterances['train']} to train on and {utterances['test']} to test on"
    )


# Retrieval


def accuracy(arm, length):
    runs = report.load(EXAMPLES / "papers" / "results" / "retrieval.jsonl")[arm]
    return f"{np.mean([run['by_length'][str(length)]['accuracy'] for run in runs]):.2f}"


def test_retrieval():
    softmax, ssmax = ([accuracy(x, n) for n in (512, 2048)] for x in ("softmax", "ssmax"))
    assert_on(
        "when_it_helps",
        f"Softmax is right on {softmax[0]} of the questions among 512 items and on {softmax[1]} "
        f"among 2048. SSMax is right on {ssmax[0]} and {ssmax[1]}",
    )
    plain, scaled = (accuracy(f"rectified_softpick{x}", 2048) for x in ("", ", s log n"))
    assert_on(
        "when_it_helps",
        f"fades like softmax ({plain} among 2048); with a length scale of s log n it does not "
        f"({scaled}). Signed softpick hardly learns the task ({accuracy('softpick', 64)} "
        "among 64)",
    )
    arm = "ssmax, s from 1/mean(log n)"
    assert {accuracy(arm, 64 * 2**i) for i in range(6)} == {"1.00"}
    assert_on("when_it_helps", f"at the training length ({accuracy('ssmax', 64)} against 1.00)")


# The study. A difference is one if the ranges over the seeds do not meet.

AUTO = study_report.AUTO


def above(values, others):
    return min(values) > max(others)


def alike(values, others):
    return not above(values, others) and not above(others, values)


def study(name):
    return study_report.conditions(study_report.RESULTS / f"{name}.jsonl")


def right_answers(arms, arm, end=-1):
    """Among the most items, or the fewest, by seed."""
    return study_report.at(arms[arm], list(arms[arm][0]["by_length"])[end], "accuracy")


FEW = {"learned keys, weight decay 1", *(f"{x} keys, 1 question" for x in
                                         ("learned", "noisy", "orthogonal"))}  # fmt: skip


def test_where_softmax_fades():
    found = study("margins")
    assert {*found} > FEW
    gaps = {}
    for name, arms in found.items():
        softmax, ssmax = (right_answers(arms, x) for x in ("softmax", AUTO))
        gaps[name] = np.mean(ssmax) - np.mean(softmax)
        assert (alike if name == "aggregate" else above)(ssmax, softmax), name
        at_first = (right_answers(arms, x, 0) for x in (AUTO, "softmax"))
        if name in FEW:
            assert above(*at_first)
        first, last = (
            np.mean(study_report.at(arms["softmax"], x, "margin")) for x in ("64", "2048")
        )
        assert (last > first - 0.1) == name.startswith("aggregate")
    assert {*sorted(gaps, key=gaps.get)[-len(FEW) :]} == FEW
    changed = [gaps[f"learned keys, {x}"] for x in ("QK-norm", "dropout 0.1 on weights")]
    assert np.abs(np.subtract(changed, gaps["learned keys"])).max() < 0.05
    middle = [study_report.at(found["aggregate"][x], "512", "accuracy") for x in (AUTO, "softmax")]
    assert above(*reversed(middle))
    assert_on("when_it_helps", "({:.2f} against {:.2f} among 512)".format(*map(np.mean, middle)))
    noise = found["aggregate, noise 1"]
    for arm in ("softmax", AUTO):
        assert above(right_answers(noise, arm), right_answers(noise, arm, 0))


def test_learned_s():
    names = ("learned keys", "noisy keys", "aggregate", "aggregate, noise 1")
    arms = {name: study("margins")[name][AUTO] for name in names}
    found = [
        np.mean([s for run in runs_of for s in run["learned_scales"].values()])
        for runs_of in arms.values()
    ]
    start = LogLengthScale(init_s="auto", train_length=64).start_of_s()
    text = (
        "From {:.2f} it grows to {:.2f} with learned keys and to {:.2f} with noisy ones, in the "
        "mean over heads and seeds; for the aggregates it falls to {:.2f}, and to {:.2f} with"
    )
    assert_on("when_it_helps", text.format(start, *found))


def losses_of_table(arms, arm, name, count=None):
    by_count = [run["by_table"][name] for run in arms[arm]]
    return [x[count or list(x)[-1]]["loss"] for x in by_count]


STARTS = (AUTO, "ssmax, s from 0.43", "ssmax, s from 0.2")


def test_starts_of_s():
    """In retrieval all are near each other; elsewhere 1 is the worst where one is worse."""
    for name, arms in study("margins").items():
        ends = [np.mean(right_answers(arms, x)) for x in (*STARTS, "ssmax, s from 1")]
        assert np.ptp(ends) < 0.07, name
    arms = study("tables")["in context"]
    names = list(arms["softmax"][0]["by_table"])
    losses = {x: [losses_of_table(arms, x, name) for name in names] for x in (*STARTS, "ssmax")}
    worse = {
        (x, y): sum(above(*pair) for pair in zip(losses[x], losses[y], strict=True))
        for x, y in itertools.permutations(losses, 2)
    }
    assert {pair for pair, number in worse.items() if number} == {("ssmax", x) for x in STARTS}
    assert_on(
        "when_it_helps", f"With tables 1 was worse on {worse['ssmax', STARTS[-1]]} of {len(names)},"
    )
    for name, arms in study("study_positions").items():
        one, auto, softmax = (losses_of_text(arms, x) for x in ("ssmax", AUTO, "softmax"))
        assert (alike if name == "swan" else above)(one, auto)
        assert alike(auto, softmax)


def test_other_normalizers():
    for name in ("learned keys", "noisy keys"):
        arms = study("margins")[name]
        found = {arm: right_answers(arms, arm) for arm in arms}
        for arm in (AUTO, "softmax, QueryAwareScale", "softmax, AdaptiveLogScale"):
            assert above(found[arm], found["softmax"])
            assert alike(found[arm], found[AUTO])
        fixed = found["ssmax, s fixed at 1/mean(log n)"]
        assert above(fixed, found["softmax"])
        assert (alike if name == "learned keys" else above)(found[AUTO], fixed)
        assert alike(found["sink_softmax"], found["softmax"])
        assert alike(found["softmax, gate"], found["softmax"])
        assert above(found["softmax"], found["rectified_softpick"])
        scaled = found["rectified_softpick, s log n"]
        assert above(scaled, found["rectified_softpick"])
        assert (alike if name == "learned keys" else above)(scaled, found["softmax"])
        if name == "noisy keys":
            assert np.mean(scaled) > np.mean(found[AUTO]) - 0.02
        for arm in ("softpick", "softpick, s log n"):
            assert max(right_answers(arms, arm, 0)) < 0.7


def losses_of_text(arms, arm, part="1 x length"):
    places = slice(*study_report.PARTS[part])
    return [np.mean(run["loss_by_position"]["1"][places]) for run in arms[arm]]


def test_loss_by_position():
    for name, arms in study("study_positions").items():
        for arm in arms:
            first, last = (
                np.mean(losses_of_text(arms, arm, x)) for x in ("1 x length", "10 to 20")
            )
            assert (last > first + 0.2) == (name != "swan"), (name, arm)
    quarter = study("study_positions")["quarter rotary"]
    one, softmax = (losses_of_text(quarter, x, "10 to 20") for x in ("ssmax", "softmax"))
    assert above(softmax, one)
    softmax = study("study_positions")["swan"]
    lost = {part: [] for part in study_report.PARTS}
    for file in ("study_positions", "study_starts_language_model"):
        arms = study(file)["swan"]
        for arm, part in itertools.product([x for x in arms if "ssmax" in x], lost):
            ours, theirs = (
                losses_of_text(x, y, part) for x, y in ((arms, arm), (softmax, "softmax"))
            )
            lost[part].append(np.mean(ours) - np.mean(theirs))
            assert part == "10 to 20" or alike(ours, theirs), (file, arm, part)
    bible = study("study_bible")["swan"]
    for part in lost:
        assert alike(*(losses_of_text(bible, x, part) for x in ("softmax", AUTO)))
    limit = math.ceil(100 * max(lost["10 to 20"])) / 100
    assert min(lost["10 to 20"]) > 0
    assert_on("when_it_helps", f"SSMax loses up to {limit:.2f} nats to softmax")


def test_copies():
    arms = study("study_copies")["swan"]
    kept = {}
    for arm, found in arms.items():
        use = [[x["first"] - x["second"] for x in run["copies"].values()] for run in found]
        kept[arm] = np.mean(use, 0)[-1] / np.mean(use, 0)[0]
    lost = {arm: f"{100 * (1 - x):.0f} %" for arm, x in kept.items()}
    assert_on(
        "when_it_helps",
        f"softmax loses {lost['softmax']} of what the copy is worth, and SSMax {lost[AUTO]}. The",
    )
    for part in ("2 to 4", "10 to 20"):
        plain, scaled = (losses_of_text(arms, x, part) for x in ("softmax", AUTO))
        assert above(scaled, plain)
    assert_on(
        "when_it_helps", f"{np.mean(scaled):.2f} against {np.mean(plain):.2f} nats at 10 to 20"
    )


def cells(name, row):
    """Of a generated table, by its columns."""
    header, _, *lines = result_tables.TABLES[name]().splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    [found] = [line for line in split[1:] if line[0] == row]
    return dict(zip(split[0], found, strict=True))


def shown(values, digits=2):
    low, mean, high = (f"{x:.{digits}f}" for x in (min(values), np.mean(values), max(values)))
    return f"{mean} ({low} to {high})"


def test_cells_are_those_of_the_stored_runs():
    """One of each table of the study, from the records alone."""
    stored = runs.read_runs(study_report.RESULTS / "study_copies.jsonl")
    last = [x["copies"]["1280"] for x in stored if x["arm"] == AUTO]
    worth = [x["first"] - x["second"] for x in last]
    assert cells("copies", "SSMax, s from 1/mean(log n)")["1280 bytes"] == shown(worth)
    stored = runs.read_runs(study_report.RESULTS / "study_sinks.jsonl")
    weights = [np.mean(x["weight_on_first"]) for x in stored if x["arm"] == "rectified_softpick"]
    assert cells("sinks", "rectified softpick")["weight on the first token"] == shown(weights)
    stored = runs.read_runs(study_report.RESULTS / "study_bible.jsonl")
    losses = [
        np.mean(x["loss_by_position"]["1"][20:])
        for x in stored
        if (x["arm"], x["learning_rate"]) == ("softmax", 0.003)
    ]
    assert cells("language_models", "swan, another text: softmax")["10 to 20"] == shown(losses)
    stored = runs.read_runs(study_report.RESULTS / "margins.jsonl")
    chosen = [
        x["by_length"]["2048"]["accuracy"]
        for x in stored
        if (x["condition"], x["arm"], x["learning_rate"])
        == ("noisy keys", "rectified_softpick, s log n", 0.01)
    ]
    found = cells("normalizers", "rectified softpick, s log n")
    assert found["noisy keys, 2048 items"] == shown(chosen)


def test_sinks():
    arms = study("study_sinks")[""]
    assert list(arms) == ["softmax", "rectified_softpick", "sink_softmax", "softmax, gate"]

    def measured(measure):
        return {arm: [np.mean(run[measure]) for run in arms[arm]] for arm in arms}

    first, values = measured("weight_on_first"), measured("value_norm_of_first")
    softmax, *others = arms
    assert all(above(first[softmax], first[x]) for x in others[:2])
    assert alike(first[softmax], first[others[2]])
    assert max(values[softmax]) < 0.75
    assert sum(np.mean(run["sink_rate"]) > 0 for run in arms[softmax]) == 1
    assert all(max(x) < 0.7 for arm, x in measured("sum_of_weights").items() if arm in others[:2])
    for measure in ("kurtosis", "bigram_loss"):
        assert all(alike(x, measured(measure)[softmax]) for x in measured(measure).values())
    assert min(min(x) for x in measured("copy_accuracy").values()) > 0.99
    even = np.mean(1 / np.arange(2, arms[softmax][0]["settings"]["length"] + 1))
    mean = {arm: f"{np.mean(x):.2f}" for arm, x in first.items()}
    assert_on(
        "when_it_helps",
        f"Softmax puts {mean[softmax]} of its weight on the first token, where even weights would "
        f"put {even:.2f}, and",
    )
    text = f"a learned sink put {mean[others[0]]} and {mean[others[1]]} on it"
    assert_on("when_it_helps", text)
    assert_on("when_it_helps", f"A gate leaves {mean[others[2]]}, which")


def test_tables_in_context():
    arms = study("tables")["in context"]
    names = list(arms["softmax"][0]["by_table"])

    def better(arm, other, count=None):
        pairs = ((losses_of_table(arms, y, x, count) for y in (other, arm)) for x in names)
        return [name for name, pair in zip(names, pairs, strict=True) if above(*pair)]

    on = better(AUTO, "softmax")
    assert {*names} - {*on} == {"diabetes, above the median", "weather"}
    assert better(AUTO, "softmax", "64") == on
    assert names[0] == on[0] == "made up"
    text = f"softmax on {len(on) - 1} of the {len(names) - 1} real tables and on the made-up ones"
    assert_on("when_it_helps", text)
    right = {
        name: [
            [list(run["by_table"][name].values())[-1]["accuracy"] for run in arms[x]]
            for x in (AUTO, "softmax")
        ]
        for name in names
    }
    assert [name for name, pair in right.items() if not alike(*pair)] == ["digits, odd or even"]
    first = {
        run["arm"]: [list(run["by_table"][x].values())[-1]["loss"] for x in names]
        for run in runs.read_runs(study_report.RESULTS / "tables.jsonl")
        if (run["learning_rate"], run["seed"]) == (0.003, 0)
    }
    assert np.all(np.less(first[AUTO], first["softmax"]))
    fitted = study("tables")["fitted"]
    ends = {
        x: [list(fitted[x][0]["by_table"][name].values())[-1]["loss"] for name in names]
        for x in study_report.FITTED
    }
    ours = [np.mean(losses_of_table(arms, AUTO, name)) for name in names]
    behind = np.greater(ours, ends["logistic regression"])
    assert [name for name, x in zip(names, behind, strict=True) if not x] == ["digits, odd or even"]
    assert 0 < np.greater(ours, ends["nearest neighbors"]).sum() < len(names)
    assert better("softmax", AUTO) == better("ssmax", AUTO) == []
    assert better("query-aware scale", "softmax") == on
    assert better("query-aware scale", AUTO) == []
    for pair in ("softmax", "rectified softpick"), ("rectified softpick", "softmax"):
        assert better(*pair) == []


# A released architecture


def test_released_model_on_every_backend():
    found = result("results/checkpoints.json")["checks"]
    assert found.keys() == {*BACKENDS, "transformers"}
    assert all(x["tokens_equal"] for x in found.values())
    logits = max(x["logits"] for x in found.values())
    assert_on("experiments", f"logits agree within {logits:.0e} of their deviation")


def test_length_scales_are_alike_after_training():
    runs = result("results/checkpoints.json")["runs"]
    settings = result("results/checkpoints.json")["settings"]
    ends = [n * settings["train_length"] // settings["bin_size"] for n in (0, 1, 2, 4)]
    parts = [slice(*x) for x in itertools.pairwise(ends)]
    tuned = np.array(
        [[[np.mean(x["tuned"][part]) for part in parts] for x in run["losses"].values()]
         for run in runs]
    )  # fmt: skip
    scales, seeds = np.ptp(tuned, axis=1).max(), np.ptp(tuned, axis=0).max()
    assert_on(
        "experiments", f"they differ by {scales:.3f} nats at most, and the seeds by {seeds:.2f}"
    )


# Memory of devices


def test_sizes_are_those_of_a_model():
    options = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "key_dim": 6, "qk_norm": True}
    small = {
        "vocab_size": 20, "hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    }  # fmt: skip
    model = CausalLM(
        20, 12, normalizer="softmax", ffn_expansion=1.5, tie_embeddings=False, **options
    )
    expected = {w.path.removeprefix(f"{model.name}/"): math.prod(w.shape) for w in model.weights}
    assert result_tables.sizes(FAMILIES["qwen3"].read(small)) == expected


def test_memory_of_devices():
    """Of weights in bfloat16."""
    fields = result_tables.DEVSTRAL
    model = FAMILIES["ministral3"].read(fields)
    sizes = result_tables.sizes(model)
    assert_on("devices", f"of {1e-9 * sum(sizes.values()):.1f} billion parameters in bfloat16")
    with pytest.raises(ValueError, match="block_1/attention/key/kernel cannot be split over 16"):
        result_tables.sizes(model, 16)  # of 8 key heads
    rows, columns = fields["vocab_size"], fields["hidden_size"]
    assert_on("devices", f"{rows} x {columns}, of {2e-9 * rows * columns:.2f} GB")
    layers, heads, size = (
        fields[x] for x in ("num_hidden_layers", "num_key_value_heads", "head_dim")
    )
    position = 2 * layers * heads * size * 2
    assert_on(
        "devices",
        f"take 2 x {layers} layers x {heads} heads x {size} x 2 bytes, {1e-3 * position:.0f} kB; "
        f"of 32768 positions, {1e-9 * 32768 * position:.1f} GB",
    )


def test_what_devices_send():
    found = result("benchmarks/results/devices-jax.json")
    base, *larger = found["steps"]
    sent = {axis: base["along"][axis]["sent"] for axis in result_tables.DEVICES}
    for step in larger[:2]:  # twice the batch, and twice the length
        assert step["along"]["batch"]["sent"] < 1.03 * sent["batch"]
        assert 1.9 < step["along"]["sequence"]["sent"] / sent["sequence"] < 2
    for step in found["steps"]:
        n, width = step["devices"], step["width"]
        activations = 4 * step["batch"] * step["length"] * width * found["layers"]
        weights = step["along"]["batch"]["sent"]
        # keys and values n - 1 times forward and backward, their gradients once more, to be home
        turns = 2 * (n - 1) + 2 * (n - 1) + 2 * n
        expected = activations / n * turns + weights
        all_sent = step["along"]["sequence"]["sent"]
        # of two devices XLA keeps the keys of the forward pass for the backward pass
        assert math.isclose(all_sent, expected, rel_tol=0.02) or (n == 2 and all_sent < expected)
    least = 4 * 2 * (3 / 4) * 4 * base["batch"] * base["length"] * base["width"] * found["layers"]
    assert math.isclose(sent["model"] / least, 2, rel_tol=0.02)
    *parts, small = (x["bytes"] / x["bytes_of_one"] for x in found["attention"])
    assert max(parts) <= 0.35 < small
