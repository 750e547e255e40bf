"""What attention does: weights of a pass, measures of them, learned scales, logs and plots."""

from keras_ssattn.analysis.callback import AttentionStatistics
from keras_ssattn.analysis.measures import (
    attention_entropy,
    kurtosis,
    max_activation,
    sink_rate,
    sparsity,
    weight_on,
)
from keras_ssattn.analysis.plots import plot_attention, plot_scale
from keras_ssattn.analysis.recording import AttentionMap, HiddenState, Recording, record
from keras_ssattn.analysis.scale import learned_scale

__all__ = [
    "AttentionMap",
    "AttentionStatistics",
    "HiddenState",
    "Recording",
    "attention_entropy",
    "kurtosis",
    "learned_scale",
    "max_activation",
    "plot_attention",
    "plot_scale",
    "record",
    "sink_rate",
    "sparsity",
    "weight_on",
]
