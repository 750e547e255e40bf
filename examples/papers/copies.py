"""A passage of a text that occurs twice: in training, and to measure the loss by distance.

A tiny model does not learn from plain text to look a passage up. So a share of the training
sequences has one twice, and the test asks at which distances the model still finds the first copy.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from attention_statistics import weight_on_needle

FACTORS = (0.5, 1, 2, 4, 8, 20)  # of the training length: the distances of the test
SKIP = 4  # bytes at the start of a copy, too few to tell which passage it is
RECORDED = 2  # sequences whose attention is looked at


def repeat_passages(
    rng: np.random.Generator, windows: np.ndarray, share: float, lengths: list[int]
) -> np.ndarray:
    """The windows, `[B, T]`; a share of them, drawn at random, now has a passage twice.

    Args:
        rng: draws the windows, and where the passage and its copy are.
        windows: bytes.
        share: of the windows that get a copy, from 0 to 1.
        lengths: the shortest and the longest passage. Copies do not overlap.
    """
    windows, size = windows.copy(), windows.shape[1]
    for row in np.flatnonzero(rng.random(len(windows)) < share):
        length = rng.integers(lengths[0], lengths[1] + 1)
        distance = rng.integers(length, size - length + 1)
        start = rng.integers(0, size - length - distance + 1)
        windows[row, start + distance :][:length] = windows[row, start:][:length]
    return windows


def texts_with_copies(
    text: np.ndarray, starts: np.ndarray, length: int, distance: int
) -> np.ndarray:
    """Texts that begin with a passage, go on, and end with it, `[number, distance + length]`.

    Args:
        text: bytes.
        starts: places of the passages in the text.
        length: of the passages.
        distance: from the first byte of one copy to the first of the other.
    """
    windows = text[starts[:, None] + np.arange(distance)].astype("int32")
    return np.concatenate([windows, windows[:, :length]], axis=1)


def copy_losses(
    losses: Callable, model: keras.Model, texts: np.ndarray, length: int
) -> dict[str, float]:
    """Mean loss on the bytes of the first copy and of the second, but for the first few of each.

    Args:
        losses: of the model, tokens, targets and a batch size; it gives that of every target.
        model: the model.
        texts: those of `texts_with_copies`.
        length: of the passage.
    """
    found = losses(model, texts[:, :-1], texts[:, 1:], batch=2)  # the target at t is byte t + 1
    first, second = found[:, SKIP - 1 : length - 1], found[:, SKIP - length :]
    return {"first": float(first.mean()), "second": float(second.mean())}


def weight_on_copied(model: keras.Model, texts: np.ndarray, length: int) -> list[list[float]]:
    """Mean weight on the byte to copy, by layer and head, of the queries that predict a copy."""
    queries = length - SKIP
    places = np.broadcast_to(np.arange(SKIP, length), (len(texts), queries))
    return weight_on_needle(model, texts[:, :-1], places)


def measure_copies(
    config: dict[str, Any], losses: Callable, model: keras.Model, text: np.ndarray
) -> dict[str, dict[str, Any]]:
    """By distance: the loss on both copies, and the weight of each head on the byte to copy.

    The passages are the same at every distance.
    """
    length = config["copies"]["lengths"][1]
    furthest = config["test_factor"] * config["length"]
    places = np.random.default_rng(0).integers(
        0, len(text) - furthest, config["copies"]["test_sequences"]
    )
    found = {}
    for distance in (int(factor * config["length"]) for factor in FACTORS):
        if distance <= furthest:
            texts = texts_with_copies(text, places, length, distance)
            found[str(distance)] = {
                **copy_losses(losses, model, texts, length),
                "weight": weight_on_copied(model, texts[:RECORDED], length),
            }
    return found
