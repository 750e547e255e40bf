"""Key-value retrieval beyond the training length, by depth.

A context of items, each one token that stands for a key and a value; then some queries, each one
token that stands for a key, to which the model answers the value. The key of a query is in the
context once; the other items have keys that nobody asks for, so that at 16 times the training
length there are 16 times as many to be passed over, from a vocabulary that is known.

    KERAS_BACKEND=jax python examples/papers/retrieval.py ssmax/retrieval.json

A run that was stopped goes on where it was; one that is stored is not run again.
"""

import os
import pathlib
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from attention_statistics import learned_scales, weight_on_needle
from runs import main
from training import count_tokens, train

LENGTH_FACTORS = (1, 2, 4, 8, 16, 32)
DEPTHS = 8  # parts of the context


def draw_task(
    rng: np.random.Generator, config: dict[str, Any], number: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of `length` items and the queries after them.

    Returns:
        Tokens `[number, length + queries]`; the right answers, tokens `[number, queries]`; the
        positions of the items that hold them, of that shape, too.
    """
    keys, values, queries = config["keys"], config["values"], config["queries"]
    order = rng.permuted(np.tile(np.arange(keys), (number, 1)), axis=1)
    asked, others = order[:, :queries], order[:, queries:]
    item_keys = np.take_along_axis(others, rng.integers(0, keys - queries, (number, length)), 1)
    places = rng.permuted(np.tile(np.arange(length), (number, 1)), axis=1)[:, :queries]
    np.put_along_axis(item_keys, places, asked, 1)
    item_values = rng.integers(0, values, (number, length))
    tokens = np.concatenate([item_keys * values + item_values, keys * values + asked], 1)
    answers = keys * values + keys + np.take_along_axis(item_values, places, 1)
    return tokens.astype("int32"), answers.astype("int32"), places


def make_batch(
    rng: np.random.Generator, config: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets and weights of the targets, of mean 1: only queries have a target."""
    tokens, answers, _ = draw_task(rng, config, config["batch_size"], config["length"])
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, "float32")
    targets[:, -config["queries"] :] = answers
    weights[:, -config["queries"] :] = tokens.shape[1] / config["queries"]
    return tokens, targets, weights


def answer(config: dict[str, Any], model: keras.Model, tokens: np.ndarray) -> np.ndarray:
    """Logits of the answers to the queries, `[B, queries, V]`."""
    rows = [
        keras.ops.convert_to_numpy(model.predict_on_batch(tokens[i : i + 8]))
        for i in range(0, len(tokens), 8)
    ]
    return np.concatenate([x[:, -config["queries"] :] for x in rows]).astype("float64")


def measure(config: dict[str, Any], model: keras.Model, length: int, seed: int) -> dict[str, Any]:
    """Loss and accuracy, and accuracy by depth: from the first part of the context to the last."""
    rng = np.random.default_rng((seed, length))
    tokens, answers, places = draw_task(rng, config, config["test_sequences"], length)
    logits = answer(config, model, tokens)
    right = logits.argmax(-1) == answers
    logits -= np.logaddexp.reduce(logits, -1, keepdims=True)
    part = places * DEPTHS // length
    return {
        "loss": float(-np.take_along_axis(logits, answers[..., None], -1).mean()),
        "accuracy": float(right.mean()),
        "weight_on_needle": weight_on_needle(model, tokens[:2], places[:2]),
        "accuracy_by_depth": [float(right[part == depth].mean()) for depth in range(DEPTHS)],
    }


def run_one(
    config: dict[str, Any], arm: str, rate: float, seed: int, folder: pathlib.Path
) -> dict[str, Any]:
    """Trains and measures one model."""
    model = train(config, arm, rate, seed, lambda rng: make_batch(rng, config), folder)
    length = config["length"]
    return {
        "parameters": model.count_params(),
        "tokens": count_tokens(config, length + config["queries"]),
        "learned_scales": learned_scales(model),
        "validation": measure(config, model, length, seed=1)["loss"],
        "by_length": {
            str(factor * length): measure(config, model, factor * length, seed=2)
            for factor in LENGTH_FACTORS
        },
    }


if __name__ == "__main__":
    main(run_one, __doc__)
