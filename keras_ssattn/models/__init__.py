"""Whole models."""

from keras_ssattn.models.sequence import build, build_attention, output_size

__all__ = ["build", "build_attention", "output_size"]
