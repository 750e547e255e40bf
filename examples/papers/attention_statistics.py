"""What the attention of a trained model does: measures of `keras_ssattn.analysis`, as numbers."""

from typing import Any

import numpy as np
from keras import ops

from keras_ssattn import analysis
from keras_ssattn.models import CausalLM


def attention_statistics(model: CausalLM, tokens: np.ndarray) -> dict[str, float]:
    """Means over layers and heads, and the extremes of the blocks' outputs."""
    maps, states = analysis.record(model, tokens)

    def mean(measure: Any) -> float:
        return float(np.mean([ops.convert_to_numpy(measure(*x)).mean() for x in maps.values()]))

    def highest(measure: Any) -> float:
        return max(float(measure(*x)) for x in states.values())

    return {
        "entropy": mean(analysis.attention_entropy),
        "sink_rate": mean(analysis.sink_rate),
        "sparsity": mean(analysis.sparsity),
        "kurtosis": highest(analysis.kurtosis),
        "max_activation": highest(analysis.max_activation),
    }


def weight_on_needle(model: CausalLM, tokens: np.ndarray, places: np.ndarray) -> list[list[float]]:
    """Mean weight of the last queries on their needles, by layer and head.

    Args:
        model: the model.
        tokens: `[B, T]`.
        places: position of the needle of each of the last queries, `[B, queries]`.
    """
    maps = analysis.record(model, tokens).attention.values()
    first = tokens.shape[1] - places.shape[1]
    rows = np.arange(len(tokens))[:, None, None], np.arange(model.num_heads)[:, None]
    queries, needles = np.arange(first, tokens.shape[1]), places[:, None]  # [Q], [B, 1, Q]
    return [x.weights[(*rows, queries, needles)].mean((0, 2)).tolist() for x in maps]


def learned_scales(model: CausalLM) -> dict[str, Any]:
    """Every parameter of a length scale, by layer."""
    return {
        "/".join(x.path.split("/")[1:]): ops.convert_to_numpy(x).tolist()
        for x in model.weights
        if "/length_scale/" in x.path
    }
