"""Trained Keras and KerasHub models, their attention replaced by this package's."""

from keras_ssattn.conversion.convert import convert_attention

__all__ = ["convert_attention"]
