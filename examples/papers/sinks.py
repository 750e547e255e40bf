"""Attention sinks in a tiny model: bigrams, and copies of a token after a trigger.

A first token carries nothing. Most tokens are followed by the draw of a fixed table of bigrams.
After a trigger comes the token before it. So attention has something to do at triggers alone, and
elsewhere softmax, whose weights sum to 1, needs a place to put them.

    KERAS_BACKEND=jax python examples/papers/sinks.py study/sinks.json

Reference: the bigram-backcopy task of Guo et al., arXiv 2410.13835.
"""

import functools
import os
import pathlib
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from attention_statistics import learned_scales
from keras import ops
from runs import main
from training import count_tokens, train

from keras_ssattn import analysis
from keras_ssattn.models import CausalLM

FIRST, TRIGGERS = 0, 3  # the first token; the triggers are the tokens 1 to 3
TRIGGER_SHARE = 0.1  # of the tokens that follow one that is no trigger


@functools.cache
def bigrams(vocabulary: int) -> np.ndarray:
    """The probability of each token after each, `[V, V]`; none after a trigger."""
    table = np.zeros((vocabulary, vocabulary))
    words = slice(1 + TRIGGERS, None)
    rng = np.random.default_rng(0)
    number = vocabulary - 1 - TRIGGERS
    table[:, words] = (1 - TRIGGER_SHARE) * rng.dirichlet(np.full(number, 0.1), vocabulary)
    table[:, 1 : 1 + TRIGGERS] = TRIGGER_SHARE / TRIGGERS
    table[FIRST, 1 : 1 + TRIGGERS] = 0  # what comes before a trigger can be copied
    table[FIRST] /= table[FIRST].sum()
    table[1 : 1 + TRIGGERS] = 0
    return table


def is_trigger(tokens: np.ndarray) -> np.ndarray:
    """Where a token is a trigger."""
    return (tokens > FIRST) & (tokens <= TRIGGERS)


def draw_sequences(
    rng: np.random.Generator, vocabulary: int, number: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their successors, `[number, length]`."""
    limits = bigrams(vocabulary).cumsum(1)
    limits[:, -1] = 1
    tokens = np.full((number, length + 1), FIRST, "int32")
    for i in range(1, length + 1):
        last = tokens[:, i - 1]
        drawn = (rng.random((number, 1)) >= limits[last]).sum(1)
        tokens[:, i] = np.where(is_trigger(last), tokens[:, i - 2], drawn)
    return tokens[:, :-1], tokens[:, 1:]


def measure(model: CausalLM, tokens: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Losses, and what attention does where it has nothing to do.

    The loss of bigrams is what it is above their entropy: 0 is the best possible, as for copies.
    """
    copies = is_trigger(tokens)
    logits = ops.convert_to_numpy(model.predict_on_batch(tokens)).astype("float64")
    log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    loss = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    p = bigrams(model.vocabulary_size)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)[tokens]
    maps, states = analysis.record(model, tokens)
    dormant = ~copies & (np.arange(tokens.shape[1]) > 0)  # [B, T]
    rows, places = np.nonzero(copies)
    by_layer: dict[str, list] = {
        "weight_on_first": [
            weights[..., 0].swapaxes(1, 2)[dormant].mean(0) for weights, _ in maps.values()
        ],
        "weight_on_copied": [
            weights[rows, :, places, places - 1].mean(0) for weights, _ in maps.values()
        ],
        "sum_of_weights": [
            weights.sum(-1).swapaxes(1, 2)[dormant].mean(0) for weights, _ in maps.values()
        ],
        "sink_rate": [analysis.sink_rate(*x) for x in maps.values()],
        "kurtosis": [analysis.kurtosis(*x) for x in states.values()],
        "max_activation": [analysis.max_activation(*x) for x in states.values()],
        "value_norm_of_first": value_norms(model, tokens, [x.values for x in states.values()]),
    }
    return {
        "loss": float(loss.mean()),
        "bigram_loss": float((loss - entropy)[~copies].mean()),
        "copy_loss": float(loss[copies].mean()),
        "copy_accuracy": float((logits.argmax(-1) == targets)[copies].mean()),
        **{k: [ops.convert_to_numpy(x).tolist() for x in v] for k, v in by_layer.items()},
    }


def value_norms(model: CausalLM, tokens: np.ndarray, outputs: list[np.ndarray]) -> list[np.ndarray]:
    """The norm of the first token's value, relative to the mean of others, by layer and head."""
    found = []
    inputs = [model.token_embedding(tokens), *outputs[:-1]]
    for block, x in zip(model.blocks, inputs, strict=True):
        values = block.attention.value_dense(block.attention_norm(x))
        norms = np.linalg.norm(ops.convert_to_numpy(values), axis=-1)  # [B, T, H]
        found.append(norms[:, 0].mean(0) / norms[:, 1:].mean((0, 1)))
    return found


def run_one(
    config: dict[str, Any], arm: str, rate: float, seed: int, folder: pathlib.Path
) -> dict[str, Any]:
    """Trains and measures one model."""
    config = {**config, **config["arms"][arm]}
    vocabulary, length = config["model"]["vocabulary_size"], config["length"]

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return draw_sequences(rng, vocabulary, config["batch_size"], length)

    model = train(config, arm, rate, seed, draw, folder)
    held_out, test = (
        draw_sequences(np.random.default_rng(i), vocabulary, config["test_sequences"], length)
        for i in (10**6, 10**6 + 1)
    )
    return {
        "parameters": model.count_params(),
        "tokens": count_tokens(config, length),
        "validation": measure(model, *held_out)["loss"],
        "learned_scales": learned_scales(model),
        **measure(model, *test),
    }


if __name__ == "__main__":
    main(run_one, __doc__)
