"""Whole models."""

from keras_ssattn.conversion.convert import convert_attention
from keras_ssattn.models.causal_lm import CausalLM
from keras_ssattn.models.decoding_step import DecodingStep
from keras_ssattn.models.generation import generate, stream
from keras_ssattn.models.presets import layer_pattern
from keras_ssattn.models.sequence import SequenceModel, build, output_size

__all__ = [
    "CausalLM",
    "DecodingStep",
    "SequenceModel",
    "build",
    "convert_attention",
    "generate",
    "layer_pattern",
    "output_size",
    "stream",
]
