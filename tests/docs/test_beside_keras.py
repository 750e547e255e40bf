"""What the pages say that this layer does and Keras's own does not."""

import keras
import numpy as np
import pytest
from support.helpers import predict

from keras_ssattn.layers import MultiHeadAttention

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")


def model_with(layer):
    x = keras.Input((None, 8))
    return keras.Model(x, layer(2, 4)(x, x, use_causal_mask=True))


def knows(mode):
    try:
        keras.dtype_policies.get(f"{mode}_from_float32")
    except ValueError:
        return mode == "float8"  # whose policies have other names
    return True


def saved_quantized(layer, mode, path):
    model = model_with(layer)
    model.quantize(mode)
    model.save(path)
    return predict(model, X)


MODES = [
    pytest.param(x, marks=pytest.mark.skipif(not knows(x), reason=f"this Keras has no {x}"))
    for x in ("int8", "int4", "float8")
]


@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_layer_loads(mode, tmp_path):
    expected = saved_quantized(MultiHeadAttention, mode, tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(predict(loaded, X), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_that_of_keras_does_not(mode, tmp_path):
    saved_quantized(keras.layers.MultiHeadAttention, mode, tmp_path / "model.keras")
    with pytest.raises(ValueError, match="could not be loaded"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.backend("jax", reason="the others multiply half precision on a CPU")
def test_half_precision_on_a_cpu():
    if not keras.distribution.list_devices()[0].startswith("cpu"):
        pytest.skip("JAX has another device than a CPU")
    keras.config.set_dtype_policy("mixed_float16")
    assert np.isfinite(model_with(MultiHeadAttention).predict(X, verbose=0)).all()
    with pytest.raises(ValueError, match="is not supported by dot_general on CPU"):
        model_with(keras.layers.MultiHeadAttention).predict(X, verbose=0)
