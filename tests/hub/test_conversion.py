"""`convert_attention` on KerasHub's models: outputs, n, caches, files."""

import string
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from support.helpers import predict

from keras_ssattn.conversion.holders import converted_below, foreign_below
from keras_ssattn.layers import SSMax
from keras_ssattn.models import convert_attention

pytest.importorskip("keras_hub.models", reason="KerasHub is not installed")

import keras_hub

VOCABULARY = 31
LLAMA = {"vocabulary_size": VOCABULARY, "num_layers": 1, "num_query_heads": 6,
         "num_key_value_heads": 2, "hidden_dim": 24, "intermediate_dim": 17}  # fmt: skip


def gpt2(**options):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY, num_layers=2, num_heads=3, hidden_dim=12, intermediate_dim=17,
        dropout=0.0, max_sequence_length=20, **options,
    )  # fmt: skip
    return randomize(keras_hub.models.GPT2CausalLM(backbone))


def llama(**options):
    backbone = keras_hub.models.LlamaBackbone(**LLAMA, rope_max_wavelength=500, **options)
    return randomize(keras_hub.models.LlamaCausalLM(backbone))


def llama_3(**options):
    backbone = keras_hub.models.Llama3Backbone(
        **LLAMA, rope_frequency_adjustment_factor=8.0, rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0, rope_pretraining_sequence_length=6, **options,
    )  # fmt: skip
    return randomize(keras_hub.models.Llama3CausalLM(backbone))


MODELS = {"gpt2": gpt2, "llama": llama, "llama_3": llama_3}


def randomize(model):
    """The same weights on every backend, with which generated tokens vary."""
    rng = np.random.default_rng(5)
    for weight in model.weights:
        noise = rng.normal(0.0, 0.2 if "embedding" in weight.path else 0.7, weight.shape)
        weight.assign(noise + (1.0 if weight.name in ("gamma", "scale") else 0.0))
    return model


def with_scales(model, **options):
    """Converted, with an s of its own for every head."""
    converted = convert_attention(model, SSMax(init_s=1.0))
    rng = np.random.default_rng(11)
    for attention in converted_below(converted):
        attention.normalizer.s.assign(rng.uniform(1.0, 3.0, attention.normalizer.s.shape))
    return converted


def text(lengths=(9, 6), time=9):
    rng = np.random.default_rng(3)
    mask = np.arange(time) < np.array(lengths)[:, None]
    ids = rng.integers(1, VOCABULARY, (len(lengths), time)) * mask
    return {"token_ids": ids.astype("int32"), "padding_mask": mask.astype("int32")}


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def generate(model, x):
    model.compile(sampler="greedy")
    return np.asarray(model.generate(x, stop_token_ids=None)["token_ids"])


@pytest.mark.parametrize("name", MODELS)
def test_softmax_gives_the_outputs_of_before(name):
    model = MODELS[name]()
    converted = convert_attention(model, "softmax")
    assert foreign_below(converted) == []
    assert len(converted_below(converted)) == model.backbone.num_layers
    assert isinstance(converted, type(model))
    assert_close(predict(converted, text()), predict(model, text()))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_n_is_the_number_of_keys_that_a_query_sees(name, monkeypatch):
    """KerasHub's own attention, given queries that are scaled by s log n, does the same."""
    model, padding = MODELS[name](), text()["padding_mask"]
    converted = with_scales(model)
    n = np.cumsum(padding, axis=1)  # causal, and the padding comes last
    scales = iter([keras.ops.convert_to_numpy(a.normalizer.s) for a in converted_below(converted)])
    layers = [x._self_attention_layer for x in model.backbone.transformer_layers]
    original = type(layers[0])._compute_attention

    def scaled(self, query, *args, **kwargs):
        factor = next(scales) * np.log(n)[..., None]  # [B, T, H]
        factor = keras.ops.convert_to_tensor(factor[..., None], "float32")
        return original(self, query * factor, *args, **kwargs)

    monkeypatch.setattr(type(layers[0]), "_compute_attention", scaled)
    expected = predict(model, text())
    assert_close(predict(converted, text()), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cached_pass_gives_the_outputs_of_a_whole_one(name):
    converted = with_scales(MODELS[name]())
    ids = text((9, 9))["token_ids"]
    whole = predict(converted, {"token_ids": ids, "padding_mask": np.ones_like(ids)})
    _, cache = converted._build_cache(np.where(np.arange(9) < 4, ids, 0))
    for i in range(4, 9):
        logits, _, cache = converted.call_with_cache(ids[:, i : i + 1], cache, i)
        assert_close(keras.ops.convert_to_numpy(logits)[:, 0], whole[:, i])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_is_greedy_decoding_without_a_cache(name):
    model = MODELS[name]()
    converted = with_scales(model)
    prompts = text((4, 3), time=12)
    ids = generate(converted, prompts)
    likeliest = predict(converted, {"token_ids": ids, "padding_mask": np.ones_like(ids)}).argmax(-1)
    for row, length in zip(range(2), (4, 3), strict=True):
        np.testing.assert_array_equal(ids[row, :length], prompts["token_ids"][row, :length])
        np.testing.assert_array_equal(ids[row, length:], likeliest[row, length - 1 : -1])
    before = predict(model, {"token_ids": ids, "padding_mask": np.ones_like(ids)}).argmax(-1)
    assert (before != likeliest)[:, 3:].any()


@pytest.mark.parametrize("name", ["gpt2", "llama_3"])
def test_a_trained_s_is_saved_and_loaded(name, tmp_path):
    model = MODELS[name]()
    converted = with_scales(model)
    expected = predict(converted, text())
    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert_close(predict(loaded, text()), expected)
    assert isinstance(loaded, type(model))
    # ... of the backbone alone
    converted.backbone.save(tmp_path / "backbone.keras")
    backbone = keras.saving.load_model(tmp_path / "backbone.keras")
    hidden = predict(converted.backbone, text())
    assert_close(predict(backbone, text()), hidden)


def test_weights_are_loaded_into_converted_models_only(tmp_path):
    model = gpt2()
    converted = with_scales(model)
    converted.save_weights(tmp_path / "model.weights.h5")
    fresh = convert_attention(model, "ssmax", train_length=20)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert_close(predict(fresh, text()), predict(converted, text()))
    with pytest.raises(ValueError, match="length_scale"):
        convert_attention(model, "softmax").load_weights(tmp_path / "model.weights.h5")


def test_a_preset_of_a_converted_model_is_refused(tmp_path):
    converted = with_scales(gpt2())
    for model in (converted, converted.backbone):
        with pytest.raises(ValueError, match=r"`\.save\(\)`.*of a converted `GPT2"):
            model.save_to_preset(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_model_given_is_left_alone_and_the_new_one_trains():
    model = llama()
    expected = predict(model, text())
    converted = convert_attention(model, train_length=9)
    before = [keras.ops.convert_to_numpy(a.normalizer.s) for a in converted_below(converted)]
    np.testing.assert_allclose(before, np.full((1, 6), 9 / np.log(np.arange(1, 10)).sum()), 1e-6)
    converted.compile(optimizer=keras.optimizers.SGD(1.0), loss=converted.loss)
    converted.fit(text(), text()["token_ids"], verbose=0)
    for attention, old in zip(converted_below(converted), before, strict=True):
        assert np.abs(keras.ops.convert_to_numpy(attention.normalizer.s) - old).min() > 0
    np.testing.assert_array_equal(predict(model, text()), expected)


def test_sampler_and_preprocessor_stay():
    model = gpt2()
    model.preprocessor = keras.layers.Identity()
    model.compile(sampler=keras_hub.samplers.TopKSampler(k=3, seed=1))
    converted = convert_attention(model, "softmax")
    assert converted.preprocessor is model.preprocessor
    assert converted.sampler is not model.sampler
    assert converted.sampler.get_config() == model.sampler.get_config()


def preprocessor():
    letters = ["<|endoftext|>", *string.ascii_lowercase, "Ġ", "Ġa", "Ġb", "ab"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, merges=["Ġ a", "Ġ b", "a b"])
    return keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=13)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("later", [False, True])
def test_a_task_with_a_preprocessor_is_converted(name, later, tmp_path):
    given = preprocessor()
    model = MODELS[name]()
    if later:
        model.preprocessor = given
    else:
        model = randomize(type(model)(model.backbone, preprocessor=given))
    same, converted = convert_attention(model, "softmax"), with_scales(model)
    assert same.preprocessor is given
    assert_close(predict(same, text()), predict(model, text()))
    prompts = ["ab a", "b"]
    for task in (model, same, converted):
        task.compile(sampler="greedy")
    options = {"max_length": 9, "stop_token_ids": None}
    assert same.generate(prompts, **options) == model.generate(prompts, **options)
    expected = converted.generate(prompts, **options)
    assert any(len(x) > len(prompt) for x, prompt in zip(expected, prompts, strict=True))
    if name == "gpt2":
        converted.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
        loaded.compile(sampler="greedy")
        assert loaded.generate(prompts, **options) == expected


def masking_warnings(recwarn):
    messages = [str(warning.message).split("(of")[0] for warning in recwarn]
    recwarn.clear()
    return {message for message in messages if message.startswith("Layer")}


def attend_alone(x):
    return keras_hub.layers.CachedMultiHeadAttention(2, 5)(x, x)


def decode(x):
    x = keras_hub.layers.TransformerDecoder(15, 2)(x)
    return keras_hub.layers.TransformerDecoder(15, 3)(x)


@pytest.mark.parametrize("layers", [attend_alone, decode])
@pytest.mark.parametrize("causal_padding", [True, False])
def test_masks_attached_to_tensors_count_as_in_kerashub(layers, causal_padding, recwarn):
    tokens = keras.Input((7,), dtype="int32")
    embedding = keras_hub.layers.TokenAndPositionEmbedding(9, 7, 12, mask_zero=True)
    model = randomize(keras.Model(tokens, layers(embedding(tokens))))
    row = [3, 1, 4, 2, 0, 0, 0] if causal_padding else [3, 0, 4, 2, 0, 5, 1]
    ids = np.array([row, [1, 2, 3, 4, 5, 6, 7]], "int32")
    expected = predict(model, ids)
    warned = masking_warnings(recwarn)
    converted = convert_attention(model, "softmax")
    assert_close(predict(converted, ids), expected)
    assert masking_warnings(recwarn) <= warned
    masks = [getattr(m(ids), "_keras_mask", None) for m in (converted, model)]
    np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(mask) for mask in masks))


def test_dtypes_survive():
    model = llama(dtype="mixed_bfloat16")
    converted = convert_attention(model, "softmax")
    for attention in converted_below(converted):
        assert attention.dtype_policy.name == "mixed_bfloat16"
    expected = predict(model, text())
    np.testing.assert_allclose(
        predict(converted, text()), expected, atol=0.05 * np.abs(expected).max()
    )


def test_layers_of_kerashub_in_models_of_ones_own(tmp_path):
    inputs = keras.Input((7, 12))
    mask = keras.Input((7,), dtype="int32")
    x = keras_hub.layers.TransformerEncoder(15, 3, name="encoder")(inputs, padding_mask=mask)
    x = keras_hub.layers.TransformerDecoder(15, 2, name="decoder")(x, decoder_padding_mask=mask)
    attention = keras_hub.layers.CachedMultiHeadAttention(2, 5, name="attention")
    model = randomize(keras.Model([inputs, mask], attention(x, x)))
    rng = np.random.default_rng(3)
    data = [rng.normal(size=(2, 7, 12)).astype("float32"), np.array([[1] * 7, [1] * 4 + [0] * 3])]
    converted = convert_attention(model, "softmax")
    assert len(converted_below(converted)) == 3
    assert_close(predict(converted, data), predict(model, data))
    converted = with_scales(model)
    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(predict(loaded, data), predict(converted, data))


def test_what_cannot_be_converted_is_named():
    gemma = keras_hub.models.GemmaBackbone(VOCABULARY, 1, 2, 1, 12, 16, 6)
    with pytest.raises(ValueError, match="attention: `CachedGemmaAttention` has a way of its own"):
        convert_attention(gemma, "softmax")
    with pytest.raises(ValueError, match=r"self_attention: dropout=0.1, of the heads' outputs"):
        convert_attention(llama(dropout=0.1), "softmax")
    inputs = keras.Input((7, 12))
    decoder = keras_hub.layers.TransformerDecoder(15, 2, name="decoder")
    model = keras.Model(inputs, decoder(inputs, inputs))
    with pytest.raises(ValueError, match="decoder/cross_attention: cross-attention"):
        convert_attention(model, "softmax")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_files_of_0_1_0_predict_the_same(name, tmp_path):
    folder = Path(__file__).parents[1] / "data" / "0.1.0"
    expected = np.load(folder / "converted-hub.npz")[f"hub-{name}"]
    model = keras.saving.load_model(folder / f"converted-hub-{name}.keras", compile=False)
    ids = text((9, 9))["token_ids"]
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    close = {"rtol": 1e-6, "atol": 1e-6 * np.abs(expected).max()}
    np.testing.assert_allclose(predict(model, x), expected, **close)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(predict(again, x), expected, **close)


def test_a_file_is_loaded_without_importing_kerashub_before(tmp_path):
    converted = with_scales(gpt2())
    converted.save(tmp_path / "model.keras")
    code = (
        "import sys, keras, numpy, keras_ssattn; model = keras.saving.load_model("
        "sys.argv[1] + '/model.keras', compile=False); ids = numpy.arange(18).reshape(2, 9); "
        "y = model({'token_ids': ids, 'padding_mask': numpy.ones_like(ids)}, training=False); "
        "numpy.save(sys.argv[1] + '/y.npy', keras.ops.convert_to_numpy(y))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    ids = np.arange(18).reshape(2, 9)
    expected = predict(converted, {"token_ids": ids, "padding_mask": np.ones_like(ids)})
    assert_close(np.load(tmp_path / "y.npy"), expected)


def test_layers_of_a_converted_model_are_saved_by_themselves(tmp_path):
    model = with_scales(gpt2())
    decoder = model.backbone.transformer_layers[0]
    inputs = keras.Input((7, 12))
    alone = keras.Model(inputs, decoder(inputs))
    alone.save(tmp_path / "decoder.keras")
    x = np.random.default_rng(3).normal(size=(2, 7, 12)).astype("float32")
    loaded = keras.saving.load_model(tmp_path / "decoder.keras")
    assert_close(predict(loaded, x), predict(alone, x))


def test_kerashub_is_not_imported_before_it_is_needed():
    code = (
        "import sys, keras; from keras_ssattn.models import convert_attention; "
        "x = keras.Input((5, 6)); y = keras.layers.MultiHeadAttention(2, 3)(x, x); "
        "convert_attention(keras.Model(x, y), 'softmax'); print('keras_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False"
