"""int8 and LoRA, through Keras's own API."""

import keras
import numpy as np
import pytest
from support.cases import (
    FEATURES,
    TIME,
    attention_model,
    randomize,
    sequence_model,
    sequences,
)
from support.helpers import (
    FORMATS,
    assert_survives,
    changed,
    predict,
    reload,
    to_numpy,
    train,
    values,
)

from keras_ssattn.layers import FeedForward, MultiHeadAttention, SSMax, TransformerBlock

X = sequences(3)

PARTS = {
    "attention": lambda x: MultiHeadAttention(
        4, 3, num_kv_heads=2, normalizer=SSMax(use_bias=True), name="part"
    )(x, x),
    "block": lambda x: TransformerBlock(2, ffn_type="gated", qk_norm=True, name="part")(x),
    "cross": lambda x: TransformerBlock(2, cross_attention=True, name="part")(x, x[:, :5]),
    "feed_forward": lambda x: FeedForward(5, name="part")(x),
}


def part_model(part):
    inputs = keras.Input((TIME, FEATURES))
    return randomize(keras.Model(inputs, PARTS[part](inputs)))


@pytest.mark.parametrize("part", PARTS)
def test_projections_are_all_the_dense_layers(part):
    layer = part_model(part).get_layer("part")
    dense = keras.layers.Dense, keras.layers.EinsumDense
    inside = {id(x) for x in layer._flatten_layers() if isinstance(x, dense)}
    projections = layer.projections()
    assert {id(x) for x in projections} == inside
    assert len(projections) == len(inside)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("part", ["attention", "block"])
def test_quantize_int8(part):
    model, x = part_model(part), sequences()
    expected = predict(model, x)
    scales = {w.path: to_numpy(w) for w in model.weights if w.name in ("s", "b")}
    model.quantize("int8")
    projections = model.get_layer("part").projections()
    assert {p.quantization_mode for p in projections} == {"int8"}
    assert {str(p.kernel.dtype) for p in projections} == {"int8"}
    y = predict(model, x)
    error = np.abs(y - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.1
    for weight in model.weights:
        if weight.name in ("s", "b"):
            assert weight.dtype == "float32"
            np.testing.assert_array_equal(to_numpy(weight), scales[weight.path])


@pytest.mark.parametrize("part", ["attention", "block"])
def test_lora_trains_adapters_and_keeps_kernels(part):
    model, x = part_model(part), sequences()
    expected = predict(model, x)
    projections = model.get_layer("part").projections()
    kernels = [to_numpy(p.kernel) for p in projections]
    for projection in projections:
        projection.enable_lora(rank=2)
    np.testing.assert_allclose(predict(model, x), expected, atol=1e-6)  # adapters start at 0
    before = values(model.trainable_weights)
    train(model, x, sequences(seed=4), learning_rate=0.1, epochs=2)
    moved = changed(before, values(model.trainable_weights))
    for projection, kernel in zip(projections, kernels, strict=True):
        np.testing.assert_array_equal(to_numpy(projection._kernel), kernel)
        assert projection.lora_kernel_b.path in moved
    scales = {w.path for w in model.weights if w.name in ("s", "b")}
    assert scales <= moved


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_lora_on_a_quantized_model_trains():
    model, x = part_model("attention"), sequences()
    model.quantize("int8")
    for projection in model.get_layer("part").projections():
        projection.enable_lora(rank=2)
    before = values(model.trainable_weights)
    assert np.isfinite(train(model, x, sequences(seed=4), learning_rate=0.1)).all()
    moved = changed(before, values(model.trainable_weights))
    assert "part/normalizer/length_scale/s" in moved
    assert sum("lora_kernel_b" in path for path in moved) == 4


# Files


def gated_block():
    inputs = keras.Input((TIME, FEATURES))
    return keras.Model(inputs, TransformerBlock(2, ffn_type="gated", name="block")(inputs))


def quantized(model):
    randomize(model).quantize("int8")
    return model


def block_in_sequential():
    return keras.Sequential(
        [keras.Input((TIME, FEATURES)), TransformerBlock(2, qk_norm=True), keras.layers.Dense(3)]
    )


@keras.saving.register_keras_serializable("keras_ssattn_tests")
class AroundBlock(keras.Model):
    """A user's model that is given its layer, which keeps its policies in its config."""

    def __init__(self, block, **kwargs):
        super().__init__(**kwargs)
        self.block = block

    def call(self, inputs):
        return self.block(inputs)

    def get_config(self):
        block = keras.saving.serialize_keras_object(self.block)
        return {**super().get_config(), "block": block}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("block")), **config)


def around_block():
    model = AroundBlock(TransformerBlock(2))
    model(X)
    return model


def inside_functional():
    inputs = keras.Input((TIME, FEATURES))
    x = TransformerBlock(2, normalizer="rectified_softpick", name="block")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(sequence_model("ssmax_bias")(x)))


QUANTIZED = {
    "attention": lambda: attention_model("ssmax_bias"),
    "sequence": lambda: sequence_model("softpick_scaled"),
    "inside_functional": inside_functional,
    "block_in_sequential": block_in_sequential,
    "around_block": around_block,
}


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("model", QUANTIZED)
def test_quantized_model_survives_saving(model, tmp_path):
    make = QUANTIZED[model]
    assert_survives(make, tmp_path / "model.keras", X, change=quantized)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    kernels = [w for w in loaded.weights if w.name == "kernel"]
    assert {w.dtype for w in kernels} == {"int8"}


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_weights_of_a_quantized_model_survive_saving(tmp_path):
    model = quantized(sequence_model("ssmax_bias"))
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = sequence_model("ssmax_bias")
    fresh.quantize("int8")
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(predict(fresh, X), predict(model, X))


@pytest.mark.parametrize("ending", FORMATS)
def test_lora_is_merged_in_the_file(ending, tmp_path):
    def adapted(model):
        for projection in model.get_layer("block").projections():
            projection.enable_lora(rank=2)
        return randomize(model)

    model = adapted(gated_block())
    loaded = reload(model, tmp_path / f"model{ending}", gated_block)
    assert not [w for w in loaded.weights if "lora" in w.name]
    np.testing.assert_allclose(predict(loaded, X), predict(model, X), rtol=1e-5, atol=1e-5)
