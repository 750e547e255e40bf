"""Sizes of language models by name."""

from keras_ssattn._typing import Config

CONFIGURATIONS: dict[str, Config] = {
    # of arXiv 2501.19399: GPT-2's vocabulary, a gated feed-forward network of 2048
    "ssmax_162m": {
        "vocabulary_size": 50257,
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "tie_embeddings": False,
    },
    # tokens are bytes
    "bytes_11m": {"vocabulary_size": 256, "hidden_size": 384, "num_layers": 6, "num_heads": 6},
    "bytes_1m": {"vocabulary_size": 256, "hidden_size": 128, "num_layers": 4, "num_heads": 4},
}
