"""Whole models."""

from keras_ssattn.models.causal_lm import CausalLM
from keras_ssattn.models.generation import generate
from keras_ssattn.models.sequence import SequenceModel, build, output_size

__all__ = ["CausalLM", "SequenceModel", "build", "generate", "output_size"]
