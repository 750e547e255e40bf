"""Retrieval where the margin between logits can grow, or cannot.

One attention layer, in which questions look at a set of items without positions. It is trained on
16 to 64 items and tested on up to 2048. `keys` names the task:

- learned: a question is a key, and its answer the value of the one item with that key. Keys are
  integers, for each of which the model learns a short vector.
- orthogonal: the same with exact codes for keys, of three letters.
- noisy: the same with fixed unit vectors for keys, of which a question has a noisy copy. No model
  is better than the probabilities of the keys given the copy: softmax(q k / noise^2), at any n.
- aggregate: a question is an attribute, and its answer the most frequent value of the items with
  that attribute, a quarter of all. Items have noisy copies of their attributes.
- largest: the answer is the value of the item with the largest number.

    KERAS_BACKEND=jax python examples/papers/margins.py study/margins.json
"""

import functools
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops
from runs import main

from keras_ssattn.analysis import attention_entropy
from keras_ssattn.layers import MultiHeadAttention

LETTERS = 16  # of the alphabet of exact codes, which have three
ATTRIBUTES = 4
WINNER = 0.25  # share of the items of an attribute that have one value on top of chance
CHUNK = 2**17  # items in a batch of tests


class Batch(NamedTuple):
    """Questions about sets of items.

    Attributes:
        keys: of the items, integers `[B, n]` or vectors `[B, n, K]`.
        values: integers `[B, n]`.
        mask: boolean `[B, n]`, False behind the last item.
        query: keys of the questions, `[B, Q]` or `[B, Q, K]`.
        answers: integers `[B, Q]`.
        valid: float32 `[B, Q]`, 0 for a question without an answer.
        right: boolean `[B, Q, n]`, the items that answer a question.
    """

    keys: np.ndarray
    values: np.ndarray
    mask: np.ndarray
    query: np.ndarray
    answers: np.ndarray
    valid: np.ndarray
    right: np.ndarray

    def inputs(self) -> dict[str, np.ndarray]:
        """Of the model."""
        return {name: getattr(self, name) for name in ("keys", "values", "mask", "query")}


def draw(rng: np.random.Generator, config: dict[str, Any], n: np.ndarray, questions: int) -> Batch:
    """Sets of `n[i]` items, and questions about each."""
    number, longest = len(n), int(n.max())
    mask = np.arange(longest) < n[:, None]
    values = rng.integers(0, config["values"], mask.shape)
    kind = config["keys"]
    if kind == "largest":
        numbers = np.where(mask, rng.random(mask.shape, "float32"), -1)
        right = numbers == numbers.max(1, keepdims=True)
        keys, query = numbers[..., None], np.ones((number, 1, 1), "float32")
        right = right[:, None]
    elif kind == "aggregate":
        owners = rng.integers(0, ATTRIBUTES, mask.shape)
        winners = rng.integers(0, config["values"], (number, ATTRIBUTES))
        wins = rng.random(mask.shape) < WINNER
        values = np.where(wins, np.take_along_axis(winners, owners, 1), values)
        table = unit_vectors(ATTRIBUTES, config["key_size"])
        keys = noisy(rng, table[owners], config["noise"])
        query = np.broadcast_to(table, (number, *table.shape))
        right = (owners[:, None] == np.arange(ATTRIBUTES)[:, None]) & mask[:, None]
    else:
        limit = np.full(number, config["vocabulary"])
        asked = distinct(rng, limit, questions)
        owners = rng.integers(0, config["vocabulary"] - questions, mask.shape)
        owners = skip(owners, asked[..., None])
        np.put_along_axis(owners, distinct(rng, n, questions), asked, 1)
        right = (owners[:, None] == asked[..., None]) & mask[:, None]
        keys, query = owners, asked
        if kind != "learned":
            table = key_table(config)
            keys, query = table[keys], table[query]
        if kind == "noisy":
            query = noisy(rng, query, config["noise"])
    answers, valid = most_frequent(values, right, config["values"])
    return Batch(keys, values, mask, query, answers, valid, right)


def distinct(rng: np.random.Generator, limit: np.ndarray, count: int) -> np.ndarray:
    """Different integers below `limit[i]`, in any order, `[B, count]`."""
    found = np.zeros((len(limit), 0), "int64")
    for i in range(count):
        new = skip(rng.integers(0, limit - i)[:, None], found[..., None])
        found = np.concatenate([found, new], 1)
    return found


def skip(integers: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Integers `[B, n]`, counted without those of `[B, count, 1]`."""
    left_out = np.sort(left_out, axis=1)
    for i in range(left_out.shape[1]):
        integers = integers + (integers >= left_out[:, i])
    return integers


def most_frequent(
    values: np.ndarray, right: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent value of the right items, and 1 where there is just one such value."""
    counts = right.astype("float32") @ np.eye(classes, dtype="float32")[values]  # [B, Q, classes]
    largest = counts == counts.max(-1, keepdims=True)
    return counts.argmax(-1).astype("int32"), (largest.sum(-1) == 1).astype("float32")


@functools.cache
def unit_vectors(number: int, size: int) -> np.ndarray:
    """Random directions, the same at each call."""
    x = np.random.default_rng(0).normal(size=(number, size))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("float32")


def noisy(rng: np.random.Generator, x: np.ndarray, noise: float) -> np.ndarray:
    """A copy with Gaussian noise, of that deviation in each coordinate."""
    return (x + noise * rng.normal(size=x.shape)).astype("float32")


def key_table(config: dict[str, Any]) -> np.ndarray:
    """The vector of each key that is not learned, `[vocabulary, K]`."""
    if config["keys"] == "noisy":
        return unit_vectors(config["vocabulary"], config["key_size"])
    letters = np.arange(config["vocabulary"])[:, None] // LETTERS ** np.arange(3) % LETTERS
    return np.eye(LETTERS, dtype="float32")[letters].reshape(len(letters), -1)


class Reader(keras.Model):
    """Answers questions about a set by one attention layer."""

    def __init__(self, config: dict[str, Any], normalizer: Any) -> None:
        super().__init__(name="reader")
        size, self.classes = config["hidden_size"], config["values"]
        self.embedding = None
        if config["keys"] == "learned":
            self.embedding = keras.layers.Embedding(config["vocabulary"], config["key_size"])
        self.questions = keras.layers.Dense(size)
        self.attention = MultiHeadAttention(
            config["num_heads"],
            size // config["num_heads"],
            normalizer=normalizer,
            output_shape=size,
            **config["attention"],
        )
        self.norm = keras.layers.LayerNormalization()
        self.hidden = keras.layers.Dense(2 * size, activation="gelu")
        self.answer = keras.layers.Dense(self.classes)

    def encode(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Questions and items, before attention."""
        keys, query = inputs["keys"], inputs["query"]
        if self.embedding is not None:
            keys, query = self.embedding(keys), self.embedding(query)
        values = ops.one_hot(inputs["values"], self.classes)
        return self.questions(query), ops.concatenate([keys, values], -1)

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> Any:
        questions, items = self.encode(inputs)
        x = self.attention(questions, items, value_mask=inputs["mask"], training=training)
        return self.finish(questions, x)

    def finish(self, questions: Any, x: Any) -> Any:
        """Logits of the answers."""
        return self.answer(self.hidden(self.norm(questions + x)))

    def look(self, inputs: dict[str, Any]) -> tuple[np.ndarray, ...]:
        """What a forward pass does.

        Returns:
            Logits of the answers, `[B, Q, classes]`; of attention, the weights and the logits
            before the length scale and after it, `[B, H, Q, n]`.
        """
        questions, items = self.encode(inputs)
        x, weights = self.attention(
            questions, items, value_mask=inputs["mask"], return_attention_scores=True
        )
        layer = self.attention
        query, key = layer.query_dense(questions), layer.key_dense(items)
        if layer.qk_norm:
            query, key = layer.query_norm(query), layer.key_norm(key)
        n = ops.sum(ops.cast(inputs["mask"], "int32"), -1)[:, None, None]  # [B, 1, 1]
        before = ops.einsum("bqhd,bnhd->bhqn", query, key) / math.sqrt(layer.key_dim)
        scale, after = layer.normalizer.length_scale, before
        if scale.uses_query:
            scaled = query * scale(ops.broadcast_to(n, (*n.shape[:2], query.shape[1])), query)
            after = ops.einsum("bqhd,bnhd->bhqn", scaled, key) / math.sqrt(layer.key_dim)
        elif scale.uses_count:
            after = before * scale(n)[..., None]
        arrays = self.finish(questions, x), weights, before, after
        return tuple(ops.convert_to_numpy(x) for x in arrays)


@functools.lru_cache(maxsize=1)
def prepare(config_text: str, normalizer_text: str) -> Reader:
    """A compiled model, for all the runs of an arm."""
    config = json.loads(config_text)
    model = Reader(config, json.loads(normalizer_text))
    model(draw(np.random.default_rng(0), config, np.array([config["length"]]), 1).inputs())
    optimizer = keras.optimizers.AdamW(
        weight_decay=config["weight_decay"], beta_2=0.95, clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay([x for x in model.trainable_variables if x.ndim < 2])
    optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, weighted_metrics=[])
    return model


def start(config: dict[str, Any], normalizer: Any, seed: int) -> Reader:
    """A model with new weights, and an optimizer with a new state."""
    own = {k: v for k, v in config.items() if k not in ("arms", "learning_rates", "seeds")}
    model = prepare(json.dumps(own), json.dumps(normalizer))
    keras.utils.set_random_seed(seed)
    new = Reader(config, normalizer)
    new(draw(np.random.default_rng(0), config, np.array([config["length"]]), 1).inputs())
    for variable, value in zip(model.variables, new.variables, strict=True):
        variable.assign(ops.convert_to_numpy(value))
    for variable in model.optimizer.variables:
        variable.assign(ops.zeros(variable.shape, variable.dtype))
    return model


class Batches(keras.utils.PyDataset):
    """Batches of training, which depend on the seed and on the number of the step alone."""

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.config, self.seed, self.epoch = config, seed, 0

    def __len__(self) -> int:
        return self.config["steps_per_epoch"]

    def __getitem__(self, step: int) -> tuple:
        config = self.config
        rng = np.random.default_rng((self.seed, self.epoch, step))
        n = rng.integers(config["length"] // 4, config["length"] + 1, config["batch_size"])
        n[0] = config["length"]  # so that all batches have one shape
        batch = draw(rng, config, n, config["questions"])
        return batch.inputs(), batch.answers, batch.valid

    def on_epoch_end(self) -> None:
        self.epoch += 1


def train(config: dict[str, Any], normalizer: Any, rate: float, seed: int) -> Reader:
    """A trained model; the learning rate warms up in the first epoch and then falls as a cosine."""
    model, epochs = start(config, normalizer, seed), config["epochs"]

    def schedule(epoch: int) -> float:
        decay = 0.55 + 0.45 * math.cos(math.pi * epoch / epochs)
        return rate * (0.1 if epoch == 0 else decay)

    scheduler = keras.callbacks.LearningRateScheduler(schedule)
    model.fit(Batches(config, seed), epochs=epochs, verbose=0, callbacks=[scheduler], shuffle=False)
    return model


def measure(config: dict[str, Any], model: Reader, n: int, seed: int) -> dict[str, Any]:
    """Means over the questions, and for attention by head."""
    questions = 1 if config["keys"] == "largest" else 8
    if config["keys"] == "aggregate":
        questions = ATTRIBUTES
    rng, rows = np.random.default_rng((seed, n)), config["test_questions"] // questions
    step = max(1, CHUNK // n)
    parts, sizes = [], []
    for first in range(0, rows, step):
        number = min(step, rows - first)
        batch = draw(rng, config, np.full(number, n), questions)
        parts.append(measure_batch(config, batch, *model.look(batch.inputs())))
        sizes.append(batch.valid.sum())
    return {
        name: np.average([part[name] for part in parts], axis=0, weights=sizes).tolist()
        for name in parts[0]
    }


def measure_batch(
    config: dict[str, Any],
    batch: Batch,
    answers: np.ndarray,
    weights: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
) -> dict[str, np.ndarray]:
    """Measures of a batch of sets of one size, given what `Reader.look` returns.

    The margin is the largest logit of a right item minus the largest of another item. `possible`
    is what the probabilities of the keys reach, where noise limits them.
    """
    right = batch.right[:, None]  # [B, 1, Q, n]
    margins = [
        np.where(right, x, -np.inf).max(-1) - np.where(right, -np.inf, x).max(-1)
        for x in (before, after)
    ]
    measures = {
        **score(answers, batch),
        "margin": margins[1].mean((0, 2)),
        "margin_before_scale": margins[0].mean((0, 2)),
        "margin_positive": (margins[1] > 0).mean((0, 2)),
        "margin_deviation": margins[1].std((0, 2)),
        "weight": np.where(right, weights, 0).sum(-1).mean((0, 2)),
        "entropy": ops.convert_to_numpy(attention_entropy(weights)),
    }
    if config["keys"] == "noisy":
        logits = batch.query @ batch.keys.swapaxes(1, 2) / config["noise"] ** 2
        p = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
        p = p @ np.eye(config["values"])[batch.values]
        measures["possible"] = score(np.log(np.maximum(p, 1e-30)), batch)["accuracy"]
        measures["possible_loss"] = score(np.log(np.maximum(p, 1e-30)), batch)["loss"]
    return measures


def score(logits: np.ndarray, batch: Batch) -> dict[str, float]:
    """Accuracy and cross-entropy of answers."""
    logits = logits.astype("float64")
    log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    loss = -np.take_along_axis(log_p, batch.answers[..., None], -1)[..., 0]
    correct = logits.argmax(-1) == batch.answers
    return {
        "accuracy": np.average(correct, weights=batch.valid),
        "loss": np.average(loss, weights=batch.valid),
    }


def run_one(
    config: dict[str, Any], arm: str, rate: float, seed: int, _folder: pathlib.Path
) -> dict[str, Any]:
    """Trains and measures one model."""
    config = {**config, **config["arms"][arm]}
    model = train(config, config["normalizer"], rate, seed)
    length = config["length"]
    return {
        "parameters": model.count_params(),
        "validation": measure(config, model, length, seed=1)["loss"],
        "learned_scales": {
            x.path.split("/length_scale/")[1]: ops.convert_to_numpy(x).tolist()
            for x in model.weights
            if "/length_scale/" in x.path
        },
        "by_length": {
            str(factor * length): measure(config, model, factor * length, seed=2)
            for factor in config["length_factors"]
        },
    }


if __name__ == "__main__":
    main(run_one, __doc__)
