"""What cannot be exported of Keras's own layers: why ours are written in other words in export."""

import keras
import numpy as np
import pytest
from support.exports import MARKS, export

pytestmark = MARKS


def causal_attention(x):
    return keras.layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)


FAULTS = {
    "tensorflow": [
        ("onnx", lambda: keras.layers.Dense(8, activation="gelu"), "Erfc"),
        ("litert", lambda: causal_attention, "Select TensorFlow op"),
    ],
    "torch": [
        ("onnx", keras.layers.LayerNormalization, "Failed to export a node"),
        ("onnx", keras.layers.RMSNormalization, "rms_norm"),
    ],
    "jax": [("onnx", lambda: causal_attention, "requires static")],
}[keras.backend.backend()]


@pytest.mark.parametrize(("form", "layer", "message"), FAULTS, ids=lambda x: str(x)[:20])
def test_keras_layer_fails(form, layer, message, tmp_path):
    inputs = keras.Input((None, 8), name="x")
    model = keras.Model(inputs, layer()(inputs))
    model(np.ones((1, 2, 8), "float32"))
    with pytest.raises(Exception, match=message):
        export(model, tmp_path, form, ["x"])(np.ones((1, 3, 8), "float32"))
