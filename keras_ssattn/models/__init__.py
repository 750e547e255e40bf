"""Whole models."""

from keras_ssattn.models.sequence import SequenceModel, build, output_size

__all__ = ["SequenceModel", "build", "output_size"]
