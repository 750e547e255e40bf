"""Quantized, cloned and adapted models in files; float64; seeds; legacy files."""

import keras
import numpy as np
import pytest
from support.cases import (
    FEATURES,
    TIME,
    language_model,
    randomize,
    sequence_model,
    sequences,
    tokens,
)
from support.helpers import predict, relative_error
from support.language import PROMPTS

from keras_ssattn.layers import MultiHeadAttention
from keras_ssattn.models import CausalLM

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")

X = sequences(3)


def has_int4():
    try:
        keras.dtype_policies.get("int4_from_float32")
    except ValueError:
        return False
    return True


def gated_attention():
    x = keras.Input((TIME, FEATURES))
    return keras.Model(x, MultiHeadAttention(2, 4, use_gate=True, qk_norm=True)(x, x))


MODELS = {
    "gated": (gated_attention, X),
    "sequence": (lambda: sequence_model("softpick_scaled"), X),
    "language": (lambda: language_model(num_layers=1), tokens()),
    "untied": (lambda: language_model(num_layers=1, tie_embeddings=False), tokens()),
}
# JAX compiles each of them for seconds; what is saved does not depend on the backend.
KINDS = ("gated",) if keras.backend.backend() == "jax" else tuple(MODELS)
MODES = [
    "int8",
    pytest.param("int4", marks=pytest.mark.skipif(not has_int4(), reason="this Keras has no int4")),
]


def projections(model):
    """The dense layers of attention, feed-forward networks and heads."""
    dense = keras.layers.Dense, keras.layers.EinsumDense
    return [layer for layer in model._flatten_layers() if isinstance(layer, dense)]


def saved_and_loaded(model, path):
    model.save(path)
    return keras.saving.load_model(path)


def quantized(kind, mode):
    make, x = MODELS[kind]
    model = randomize(make())
    expected = predict(model, x)
    model.quantize(mode)
    assert {p.quantization_mode for p in projections(model)} == {mode}
    error = relative_error(predict(model, x), expected)
    assert error > 0
    assert error < 0.1 or mode == "int4"
    return model, x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_quantized_model_can_be_saved_again(kind, mode, tmp_path):
    model, x = quantized(kind, mode)
    expected = predict(model, x)
    for i in range(2):
        model = saved_and_loaded(model, tmp_path / f"{i}.keras")
        assert {p.quantization_mode for p in projections(model)} == {mode}
        np.testing.assert_allclose(predict(model, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("when", ["new", "loaded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_clone_of_a_quantized_model_can_be_saved(kind, when, tmp_path):
    model, x = quantized(kind, "int8")
    expected = predict(model, x)
    if when == "loaded":
        model = saved_and_loaded(model, tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    assert [p.quantization_mode for p in projections(clone)] == ["int8"] * len(projections(model))
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(predict(clone, x), expected, rtol=1e-6, atol=1e-6)
    loaded = saved_and_loaded(clone, tmp_path / "clone.keras")
    np.testing.assert_allclose(predict(loaded, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_a_loaded_quantized_model_is_merged_in_the_file(kind, tmp_path):
    model, x = quantized(kind, "int8")
    before = predict(model, x)
    model = saved_and_loaded(model, tmp_path / "model.keras")
    for projection in projections(model):
        projection.enable_lora(2)
    np.testing.assert_allclose(predict(model, x), before, rtol=1e-6, atol=1e-6)  # start at 0
    rng = np.random.default_rng(5)
    for projection in projections(model):
        b = projection.lora_kernel_b
        b.assign(rng.normal(0, 0.1, b.shape))
    expected = predict(model, x)
    assert relative_error(expected, before) > 1e-2
    loaded = saved_and_loaded(model, tmp_path / "adapted.keras")
    # the merged kernels are quantized anew
    assert relative_error(predict(loaded, x), expected) < 0.1
    assert relative_error(predict(loaded, x), expected) < relative_error(before, expected)
    again = saved_and_loaded(loaded, tmp_path / "again.keras")
    np.testing.assert_allclose(predict(again, x), predict(loaded, x), rtol=1e-6, atol=1e-6)


@pytest.mark.backend("torch", reason="the others compile it for seconds")
def test_a_loaded_quantized_language_model_generates_the_same(tmp_path):
    model, _ = quantized("untied", "int8")
    loaded = saved_and_loaded(model, tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.generate(PROMPTS, 4), model.generate(PROMPTS, 4))


# Legacy files


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_legacy_file_of_a_model_of_windows(tmp_path):
    model = randomize(sequence_model("ssmax_bias"))
    loaded = saved_and_loaded(model, tmp_path / "model.h5")
    assert type(loaded) is type(model)
    np.testing.assert_allclose(predict(loaded, X), predict(model, X), rtol=1e-6, atol=1e-6)


# float64


@pytest.mark.backend("tensorflow", "torch", reason="JAX has float64 only where it is enabled")
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_of_float64(tied):
    options = {"tie_embeddings": tied, "padding_id": 0, "normalizer": "ssmax"}
    model = randomize(CausalLM(13, 8, 1, 2, dtype="float64", **options))
    logits = model(tokens())
    assert keras.utils.standardize_dtype(logits.dtype) == "float64"
    narrow = CausalLM(13, 8, 1, 2, **options)
    narrow.set_weights(model.get_weights())
    error = relative_error(predict(narrow, tokens()), keras.ops.convert_to_numpy(logits))
    assert 0 < error < 1e-5
    drawn = model.generate(PROMPTS, 3, temperature=1.0, top_k=5, top_p=0.9, seed=1)
    assert [x.shape for x in drawn] == [(3,)] * 3


# Seeds


def test_draws_follow_from_the_seed_of_keras():
    model = language_model(num_layers=1)

    def draw(seed):
        keras.utils.set_random_seed(seed)
        return model.generate(PROMPTS, 12, temperature=2.0)

    first, same, other = draw(1), draw(1), draw(2)
    np.testing.assert_array_equal(first, same)
    assert (np.array(first) != np.array(other)).any()
    further = model.generate(PROMPTS, 12, temperature=2.0)
    assert (np.array(further) != np.array(other)).any()
