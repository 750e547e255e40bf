"""Small language models, for the tests of them and of what they generate."""

import numpy as np

from keras_ssattn.layers import AdaptiveLogScale, QueryAwareScale, RotaryEmbedding, Softmax
from keras_ssattn.models import layer_pattern
from support import cases
from support.cases import NORMALIZERS, TRAVELERS, randomize
from support.helpers import predict

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


def language_model(**options):
    return randomize(cases.language_model(**options))


LLAMA3 = {"type": "llama3", "factor": 4.0, "original_length": 16}
OPTIONS = {
    **{name: {"normalizer": NORMALIZERS[name]} for name in TRAVELERS},
    "query_aware": {"normalizer": lambda: Softmax(length_scale=QueryAwareScale())},
    "adaptive": {"normalizer": lambda: Softmax(length_scale=AdaptiveLogScale())},
    "no_positions": {"rotary": None},
    "partial_rotary": {"rotary": lambda: RotaryEmbedding(fraction=0.5, theta=500.0)},
    "window": {"sliding_window": 3},
    "groups": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    "plain": {"ffn_type": "standard", "norm": "layer_norm", "use_bias": True},
    "untied": {"tie_embeddings": False},
    "padding": {"padding_id": 0},
    "wide_heads": {"key_dim": 10, "qk_norm": True, "norm_epsilon": 1e-2},
    "some_biases": {"use_bias": ("query", "key", "value")},
    "gemma": {"key_dim": 8, "activation": "gelu_tanh", "embedding_scale": 12**0.5,
              "norm": "offset_rms_norm", "norm_epsilon": 1e-3},
    "gates": {"use_gate": True},
    "llama3": {"rotary": lambda: RotaryEmbedding(scaling=LLAMA3)},
    **{name: {"num_layers": 5, **layer_pattern(name, 5, sliding_window=window, every=2)}
       for name, window in (("swan", 3), ("smollm3", None), ("ministral", 3))},
    "three_scales": {"num_layers": 3, "normalizer": ["ssmax", "sink_softmax", "softpick"],
                     "rotary": lambda: [RotaryEmbedding(), None, RotaryEmbedding(fraction=0.4)]},
}  # fmt: skip


def make(options):
    options = {k: v() if callable(v) else v for k, v in OPTIONS[options].items()}
    return language_model(**{"num_layers": 1, **options})


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
