"""Small language models, for the tests of them and of what they generate."""

import numpy as np

from keras_ssattn.layers import QueryAwareScale, RotaryEmbedding, Softmax
from support import cases
from support.cases import NORMALIZERS, TRAVELERS, randomize
from support.helpers import predict

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


def language_model(**options):
    return randomize(cases.language_model(**options))


OPTIONS = {
    **{name: {"normalizer": NORMALIZERS[name]} for name in TRAVELERS},
    "query_aware": {"normalizer": lambda: Softmax(length_scale=QueryAwareScale())},
    "no_positions": {"rotary": None},
    "partial_rotary": {"rotary": lambda: RotaryEmbedding(fraction=0.5, theta=500.0)},
    "window": {"sliding_window": 3},
    "groups": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    "plain": {"ffn_type": "standard", "norm": "layer_norm", "use_bias": True},
    "untied": {"tie_embeddings": False},
    "padding": {"padding_id": 0},
}


def make(options):
    options = {k: v() if callable(v) else v for k, v in OPTIONS[options].items()}
    return language_model(num_layers=1, **options)


def assert_greedy(model, prompts, generated):
    """Each new token is the likeliest one after those before it, by one pass without a cache."""
    rows = [[*prompt, *new] for prompt, new in zip(prompts, generated, strict=True)]
    text = np.zeros((len(rows), max(len(row) for row in rows)), "int32")
    for i, row in enumerate(rows):
        text[i, : len(row)] = row
    likeliest = predict(model, text).argmax(-1)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        expected = likeliest[i, len(prompt) - 1 : len(row) - 1]
        assert row[len(prompt) :] == expected.tolist()
