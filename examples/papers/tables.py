"""Classification of tables in context: from rows with a class, the classes of other rows.

The use that TabICLv2 (arXiv 2602.11139) makes of SSMax, at a small size. A model learns on made-up
tables of up to 64 rows that show their class. It is then tested on real tables, of which it sees up
to all rows, without further training, beside methods that are fitted to the same rows.

    KERAS_BACKEND=torch python examples/papers/tables.py study/tables.json

A row is one token: its features, and its class if it is shown. Every row attends to the rows that
show their class and to no others, so that the rows in question do not see each other.
"""

import functools
import math
import os
import pathlib
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from attention_statistics import learned_scales
from keras import ops
from runs import main
from sklearn import datasets, decomposition, linear_model, neighbors
from training import Batches, compile_model
from vega_datasets import local_data

from keras_ssattn.layers import TransformerBlock
from keras_ssattn.ops import Visibility

CLASSES, FEATURES = 4, 10  # at most
IN_QUESTION, PADDING = CLASSES, CLASSES + 1  # in place of a class
LARGEST = 5.0  # features are cut off at so many standard deviations


class Rows(NamedTuple):
    """Rows that show their class, and rows in question."""

    shown: np.ndarray  # [N, F]
    classes: np.ndarray  # [N]
    asked: np.ndarray  # [Q, F]
    answers: np.ndarray  # [Q]


def draw_tables(rng: np.random.Generator, number: int, rows: int) -> tuple[np.ndarray, ...]:
    """Made-up tables of 2 to `FEATURES` features and 2 to `CLASSES` classes.

    The class of a row is that with the highest score. Scores come from linear functions, small
    networks, the nearest of some prototypes, or the clusters that the rows are drawn from, a
    quarter of the tables each. They are noisy, more so in some tables.

    Returns:
        Features `[number, rows, FEATURES]`; classes `[number, rows]`; and which features a table
        has, `[number, FEATURES]`.
    """
    used = np.arange(FEATURES) < rng.integers(2, FEATURES + 1, (number, 1))
    mixing = rng.normal(size=(number, FEATURES, FEATURES)) * rng.uniform(0, 0.6, (number, 1, 1))
    x = rng.normal(size=(number, rows, FEATURES)) * used[:, None]
    x = (x + x @ mixing) * used[:, None]
    scores = np.empty((number, rows, CLASSES))
    for part, family in enumerate((_linear, _network, _prototypes, _clusters)):
        x[part::4], scores[part::4] = family(rng, x[part::4] * used[part::4, None])
    scores = (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-6)
    scores += 0.8 * rng.uniform(size=(number, 1, 1)) ** 2 * rng.normal(size=scores.shape)
    scores += 0.3 * rng.normal(size=(number, 1, CLASSES))
    possible = np.arange(CLASSES) < rng.integers(2, CLASSES + 1, (number, 1, 1))
    classes = np.where(possible, scores, -np.inf).argmax(-1)
    kind = rng.integers(0, 4, (number, 1, FEATURES))  # half of the features stay as they are
    x = np.where(kind == 0, np.sign(x) * x**2, np.where(kind == 1, np.round(2 * x) / 2, x))
    return x * used[:, None], classes, used


def _linear(rng: np.random.Generator, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x, x @ rng.normal(size=(len(x), FEATURES, CLASSES))


def _network(rng: np.random.Generator, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inner = np.tanh(x @ rng.normal(size=(len(x), FEATURES, 16)) + rng.normal(size=(len(x), 1, 16)))
    return x, inner @ rng.normal(size=(len(x), 16, CLASSES))


def _prototypes(rng: np.random.Generator, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = np.exp(rng.normal(size=(len(x), 1, FEATURES)))
    points = rng.normal(size=(len(x), 3 * CLASSES, FEATURES)) * x.std(1, keepdims=True)
    square = ((x[:, :, None] - points[:, None]) ** 2 * weights[:, None]).sum(-1)
    return x, -np.sqrt(square.reshape(*square.shape[:2], 3, CLASSES).min(2))


def _clusters(rng: np.random.Generator, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centers = 1.5 * rng.normal(size=(len(x), 2 * CLASSES, FEATURES))
    cluster = rng.integers(0, 2 * CLASSES, x.shape[:2])
    x = x + np.take_along_axis(centers, cluster[..., None], 1)
    return x, np.eye(CLASSES)[cluster % CLASSES]


def standardize(x: np.ndarray, shown: np.ndarray, used: np.ndarray | None = None) -> np.ndarray:
    """Features of mean 0 and deviation 1 among the rows that are shown; as long a row on average.

    Args:
        x: `[..., rows, F]`.
        shown: boolean `[..., rows]`.
        used: boolean `[..., F]`: which features a table has; all by default.
    """
    number = shown.sum(-1)[..., None, None]
    mean = (x * shown[..., None]).sum(-2, keepdims=True) / number
    deviation = np.sqrt((((x - mean) * shown[..., None]) ** 2).sum(-2, keepdims=True) / number)
    x = np.clip((x - mean) / np.where(deviation > 1e-6, deviation, 1.0), -LARGEST, LARGEST)
    if used is None:
        used = np.ones(x.shape[-1], bool)
    return x * used[..., None, :] * np.sqrt(FEATURES / used.sum(-1))[..., None, None]


def draw_batch(rng: np.random.Generator, config: dict[str, Any]) -> tuple:
    """Made-up tables of different lengths: (features, classes shown), answers, their weights."""
    number, longest, asked = config["batch_size"], config["rows"], config["asked"]
    x, answers, used = draw_tables(rng, number, longest + asked)
    rows = rng.integers(config["least_rows"], longest + 1, (number, 1))
    places = np.arange(longest + asked)
    labels = np.where(places < rows, answers, np.where(places < longest, PADDING, IN_QUESTION))
    weights = np.where(places < longest, 0.0, (longest + asked) / asked)
    x = standardize(x, labels < CLASSES, used)
    weights = np.broadcast_to(weights, answers.shape).astype("float32")
    return (x.astype("float32"), labels.astype("int32")), answers.astype("int32"), weights


@functools.cache
def real_tables() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features and classes of the tables that come with scikit-learn, and one of vega_datasets."""
    digits, numbers = datasets.load_digits(return_X_y=True)
    diabetes, progress = datasets.load_diabetes(return_X_y=True)
    weather = local_data.seattle_weather()
    weather = weather[weather["weather"].isin(["fog", "rain", "sun"])]
    columns = ["precipitation", "temp_max", "temp_min", "wind"]
    return {
        "iris": datasets.load_iris(return_X_y=True),
        "wine": datasets.load_wine(return_X_y=True),
        "breast cancer": datasets.load_breast_cancer(return_X_y=True),
        "diabetes, above the median": (diabetes, (progress > np.median(progress)).astype(int)),
        "digits 0 to 3": (digits[numbers < CLASSES], numbers[numbers < CLASSES]),
        "digits, odd or even": (digits, numbers % 2),
        "weather": (
            weather[columns].to_numpy(),
            np.unique(weather["weather"], return_inverse=True)[1],
        ),
    }


def split(name: str, number: int, count: int | None, asked: int) -> Rows:
    """A random part of a real table: `count` rows to show, or all, and up to `asked` in question.

    The rows in question are the same for every count, and a smaller count has a part of the rows
    of a larger one. Shown rows have the classes in proportion. Of more than `FEATURES` features
    that many principal components are left, which are those of the rows shown.
    """
    x, y = real_tables()[name]
    rng = np.random.default_rng((number, len(y)))
    order = rng.permutation(len(y))
    asked = min(asked, len(y) // 4)
    asked_rows, others = order[:asked], order[asked:]
    rank = np.empty(len(others))
    for one in np.unique(y):
        places = np.flatnonzero(y[others] == one)
        rank[places] = (np.arange(len(places)) + 0.5) / len(places)
    shown = others[np.argsort(rank, kind="stable")][:count]
    chosen = np.concatenate([shown, asked_rows])
    is_shown = np.arange(len(chosen)) < len(shown)
    x, y = standardize(x[chosen], is_shown), y[chosen]
    if x.shape[1] > FEATURES:
        x = decomposition.PCA(FEATURES, random_state=0).fit(x[is_shown]).transform(x)
        x = standardize(x, is_shown)
    return Rows(x[is_shown], y[is_shown], x[~is_shown], y[~is_shown])


@functools.cache
def made_up_tables(number: int, rows: int, asked: int) -> tuple[np.ndarray, ...]:
    """Tables for tests; a smaller count has a part of the rows of a larger one."""
    return draw_tables(np.random.default_rng((2, number)), number, rows + asked)


def tests(config: dict[str, Any]) -> list[tuple[str, int, list[Rows]]]:
    """The tests: a table's name, the number of rows shown, and several parts of the table."""
    found, counts, asked = [], config["counts"], config["test_asked"]
    number, longest = config["made_up_tables"], max(counts)
    all_x, all_y, all_used = made_up_tables(number, longest, asked)
    for count in counts:
        rows = np.r_[:count, longest : longest + asked]
        shown = np.arange(len(rows)) < count
        parts = []
        for x, y, used in zip(all_x[:, rows], all_y[:, rows], all_used, strict=True):
            x = standardize(x, shown, used)[:, used]
            parts.append(Rows(x[shown], y[shown], x[~shown], y[~shown]))
        found.append(("made up", count, parts))
    for name, (_, y) in real_tables().items():
        total = len(y) - min(asked, len(y) // 4)
        for count in [*(x for x in counts if x < total), total]:
            parts = [split(name, i, count, asked) for i in range(config["splits"])]
            found.append((name, count, parts))
    return found


class RowClassifier(keras.Model):
    """A transformer on a set of rows, without positions.

    Args:
        normalizer: of all attention.
        hidden_size, num_layers, num_heads: of the blocks.

    Call arguments:
        inputs: features `[B, rows, FEATURES]`, and integers `[B, rows]`: the class, `IN_QUESTION`
            or `PADDING`. No row attends to either.

    Returns:
        Logits of the classes of all rows, `[B, rows, CLASSES]`.
    """

    def __init__(
        self, normalizer: Any, hidden_size: int, num_layers: int, num_heads: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.features = keras.layers.Dense(hidden_size)
        self.labels = keras.layers.Embedding(CLASSES + 2, hidden_size)
        self.blocks = [
            TransformerBlock(num_heads, normalizer=normalizer, ffn_expansion=2, name=f"block_{i}")
            for i in range(num_layers)
        ]
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5)
        self.logits = keras.layers.Dense(CLASSES)

    def call(self, inputs: tuple[Any, Any]) -> Any:
        features, labels = inputs
        rows = ops.shape(features)[1]
        shown = Visibility.of(rows, rows, key_mask=labels < CLASSES)
        x = self.features(features) + self.labels(labels)
        for block in self.blocks:
            x = block(x, visibility=shown)
        return self.logits(self.norm(x))


def make_model(config: dict[str, Any], normalizer: Any) -> RowClassifier:
    model = RowClassifier(normalizer, **config["model"], name="model")
    model((np.zeros((1, 2, FEATURES), "float32"), np.zeros((1, 2), "int32")))
    return model


def train(config: dict[str, Any], arm: str, rate: float, seed: int) -> RowClassifier:
    """The trained model."""
    keras.utils.set_random_seed(seed)
    model = make_model(config, config["arms"][arm]["normalizer"])
    compile_model(config, model, rate)
    batches = Batches(lambda rng: draw_batch(rng, config), seed, config["steps_per_epoch"])
    follow = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _logs: setattr(batches, "epoch", epoch)
    )
    model.fit(batches, epochs=config["epochs"], shuffle=False, verbose=0, callbacks=[follow])
    return model


def validate(config: dict[str, Any], model: RowClassifier) -> float:
    """The loss on made-up tables of the lengths of training."""
    batches = Batches(lambda rng: draw_batch(rng, config), 10**6, config["validation_batches"])
    return float(model.evaluate(batches, verbose=0))


def classify(model: RowClassifier, parts: list[Rows]) -> list[np.ndarray]:
    """Probabilities of the classes of the rows in question, `[Q, classes of the table]`.

    All parts have the same number of rows.
    """
    rows, asked = len(parts[0].shown), len(parts[0].asked)
    x = np.zeros((len(parts), rows + asked, FEATURES), "float32")
    labels = np.full((len(parts), rows + asked), IN_QUESTION, "int32")
    for i, part in enumerate(parts):
        x[i, :, : part.shown.shape[1]] = np.concatenate([part.shown, part.asked])
        labels[i, :rows] = part.classes
    logits = ops.convert_to_numpy(model.predict_on_batch((x, labels)))[:, rows:].astype("float64")
    found = [one[:, : number_of_classes(part)] for part, one in zip(parts, logits, strict=True)]
    return [np.exp(one - np.logaddexp.reduce(one, -1, keepdims=True)) for one in found]


def number_of_classes(part: Rows) -> int:
    return int(max(part.classes.max(), part.answers.max())) + 1


def fit_frequencies(part: Rows) -> np.ndarray:
    """How often each class is shown, with one row more of each."""
    number = number_of_classes(part)
    counts = np.bincount(part.classes, minlength=number) + 1.0
    return np.tile(counts / counts.sum(), (len(part.answers), 1))


def fit_neighbors(part: Rows) -> np.ndarray:
    """How often each class is among the nearest sqrt(n) rows, with one row more of each."""
    number = number_of_classes(part)
    nearest = neighbors.NearestNeighbors(n_neighbors=round(math.sqrt(len(part.shown))))
    found = part.classes[nearest.fit(part.shown).kneighbors(part.asked, return_distance=False)]
    counts = np.eye(number)[found].sum(1) + 1.0
    return counts / counts.sum(1, keepdims=True)


def fit_logistic(part: Rows) -> np.ndarray:
    """Logistic regression with scikit-learn's defaults, mixed as if one shown row were uniform."""
    number, rows = number_of_classes(part), len(part.shown)
    if len(np.unique(part.classes)) == 1:
        return fit_frequencies(part)
    fitted = linear_model.LogisticRegression(max_iter=1000).fit(part.shown, part.classes)
    found = np.zeros((len(part.asked), number))
    found[:, fitted.classes_] = fitted.predict_proba(part.asked)
    return (rows * found + 1 / number) / (rows + 1)


FITTED = {
    "class frequencies": fit_frequencies,
    "nearest neighbors": fit_neighbors,
    "logistic regression": fit_logistic,
}


def scores(parts: list[Rows], probabilities: list[np.ndarray]) -> dict[str, Any]:
    """Log-loss and accuracy, means over the parts of a table, and the losses of each part."""
    losses, right = [], []
    for part, found in zip(parts, probabilities, strict=True):
        losses.append(float(-np.log(found[np.arange(len(found)), part.answers]).mean()))
        right.append(float((found.argmax(1) == part.answers).mean()))
    return {
        "loss": float(np.mean(losses)),
        "accuracy": float(np.mean(right)),
        "loss_by_part": losses,
    }


def measure(config: dict[str, Any], predict: Any) -> dict[str, dict[str, Any]]:
    """Scores by table and number of rows shown.

    Args:
        config: the configuration.
        predict: of parts of a table, all with the same number of rows; returns probabilities.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, count, parts in tests(config):
        found.setdefault(name, {})[str(count)] = scores(parts, predict(parts))
    return found


def run_one(
    config: dict[str, Any], arm: str, rate: float, seed: int, _folder: pathlib.Path
) -> dict[str, Any]:
    """Trains and measures one model, or measures a method that is fitted to the rows shown."""
    if "fitted" in config["arms"][arm]:
        fit = FITTED[config["arms"][arm]["fitted"]]
        by_table = measure(config, lambda parts: [fit(part) for part in parts])
        return {
            "validation": by_table["made up"][str(config["rows"])]["loss"],
            "by_table": by_table,
        }
    model = train(config, arm, rate, seed)
    return {
        "parameters": model.count_params(),
        "tables": config["epochs"] * config["steps_per_epoch"] * config["batch_size"],
        "learned_scales": {k: v for k, v in learned_scales(model).items() if k.endswith("/s")},
        "validation": validate(config, model),
        "by_table": measure(config, lambda parts: classify(model, parts)),
    }


if __name__ == "__main__":
    main(run_one, __doc__)
