"""The normalizations that a block or a model may have."""

import keras

from keras_ssattn._typing import NormName, Option, Shape

NORM_EPSILON = 1e-5  # Edifice's
NORMS = {"layer_norm": keras.layers.LayerNormalization, "rms_norm": keras.layers.RMSNormalization}


def make_norm(kind: NormName, shape: Shape, **options: Option) -> keras.Layer:
    """A built normalization that passes masks on."""
    norm = NORMS[kind](epsilon=NORM_EPSILON, **options)
    norm.supports_masking = True
    norm.build(shape)
    return norm
