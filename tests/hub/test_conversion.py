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
LLAMA = {"num_layers": 1, "num_query_heads": 6, "num_key_value_heads": 2, "hidden_dim": 24,
         "intermediate_dim": 17}  # fmt: skip


def gpt2(**options):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY, num_layers=2, num_heads=3, hidden_dim=12, intermediate_dim=17,
        dropout=0.0, max_sequence_length=20, **options,
    )  # fmt: skip
    return randomize(keras_hub.models.GPT2CausalLM(backbone))


def llama(**options):
    return causal_lm("Llama", **LLAMA, rope_max_wavelength=500, **options)


def llama_3(**options):
    return causal_lm(
        "Llama3", **LLAMA, rope_frequency_adjustment_factor=8.0, rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0, rope_pretraining_sequence_length=6, **options,
    )  # fmt: skip


def causal_lm(family, **options):
    """A model of a family of KerasHub's, by the name of its classes."""
    names = f"{family}Backbone", f"{family}CausalLM"
    backbone, task = (getattr(keras_hub.models, name) for name in names)
    return randomize(task(backbone(vocabulary_size=VOCABULARY, **options)))


def mistral(**options):
    options = {"sliding_window": 4, "rope_scaling_factor": 2.0, "head_dim": 6, **options}
    return causal_lm("Mistral", **LLAMA, **options)


def phi_3_su(**options):
    """The long factors apply from a length of 7 on."""
    return causal_lm(
        "Phi3", **LLAMA, rope_scaling_type="su", rope_scaling_short_factor=[1.1, 1.2],
        rope_scaling_long_factor=[2.0, 3.0], pretraining_sequence_length=6,
        max_sequence_length=16, **options,
    )  # fmt: skip


def qwen_3(**options):
    options = {"sliding_window_size": 3, "layer_norm_epsilon": 0.01, "head_dim": 6, **options}
    return causal_lm("Qwen3", **LLAMA, **options)


def gemma(**options):
    """With windows, and the norms of Gemma 2; the dropout is of weights."""
    options = {"use_sliding_window_attention": True, "sliding_window_size": 3, **options}
    sizes = {**LLAMA, "num_layers": 2, "intermediate_dim": 16, "head_dim": 6, "dropout": 0.1}
    return causal_lm("Gemma", **sizes, use_post_attention_norm=True, **options)


def gpt_oss(**options):
    return causal_lm(
        "GptOss", **{**LLAMA, **options}, num_experts=2, top_k=1, sliding_window=3, head_dim=8,
        rope_scaling_factor=2.0,
    )  # fmt: skip


MODELS = {
    "gpt2": gpt2,
    "opt": lambda: causal_lm(
        "OPT", num_layers=1, num_heads=3, hidden_dim=12, intermediate_dim=17,
        max_sequence_length=20,
    ),
    "llama": llama,
    "llama_3": llama_3,
    "mistral": mistral,
    "phi_3": lambda: causal_lm("Phi3", **LLAMA),
    "phi_3_su": phi_3_su,
    "qwen": lambda: causal_lm("Qwen", **LLAMA, rope_scaling_factor=2.0),
    "qwen_3": qwen_3,
    "gemma": gemma,
}  # fmt: skip
NEW = [name for name in MODELS if name not in ("gpt2", "llama", "llama_3")]


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
    # one by one: what XLA joins of two models it rounds in two ways
    assert_close(predict(converted, text(), eager=True), predict(model, text(), eager=True))
    assert len(converted.weights) == len(model.weights)


@pytest.mark.parametrize("name", NEW)
def test_softmax_generates_the_tokens_of_before(name):
    model = MODELS[name]()
    prompts = text((4, 3), time=12)
    expected = generate(model, prompts)
    np.testing.assert_array_equal(generate(convert_attention(model, "softmax"), prompts), expected)
    assert len(np.unique(expected)) > 8


@pytest.mark.parametrize(("name", "window"), [("gpt2", 9), ("llama", 9), ("mistral", 4)])
def test_n_is_the_number_of_keys_that_a_query_sees(name, window, monkeypatch):
    """KerasHub's own attention, given queries that are scaled by s log n, does the same."""
    model, padding = MODELS[name](), text()["padding_mask"]
    converted = with_scales(model)
    n = np.cumsum(padding, axis=1)  # causal, and the padding comes last
    n[:, window:] -= n[:, :-window].copy()
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


# Phi-3's long factors turn all positions otherwise once the sequence is long
@pytest.mark.parametrize("name", [x for x in MODELS if x not in ("llama_3", "phi_3_su")])
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


@pytest.mark.parametrize("name", ["gpt2", "llama_3", "phi_3_su", "qwen", "qwen_3", "gemma"])
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


@pytest.mark.parametrize(
    ("name", "windows"),
    [("llama", [9]), ("mistral", [4]), ("qwen", [9]), ("gemma", [3, 9])],
)
def test_the_model_given_is_left_alone_and_the_new_one_trains(name, windows):
    model = MODELS[name]()
    expected = predict(model, text())
    converted = convert_attention(model, train_length=9)
    before = [keras.ops.convert_to_numpy(a.normalizer.s) for a in converted_below(converted)]
    n = [np.minimum(np.arange(1, 10), window) for window in windows]
    np.testing.assert_allclose(before, [np.full(6, 1 / np.log(x).mean()) for x in n], 1e-6)
    converted.compile(optimizer=keras.optimizers.SGD(1.0), loss=converted.loss)
    converted.fit(text(), text()["token_ids"], verbose=0, shuffle=False)
    for attention, old in zip(converted_below(converted), before, strict=True):
        assert np.abs(keras.ops.convert_to_numpy(attention.normalizer.s) - old).min() > 0
    np.testing.assert_array_equal(predict(model, text()), expected)


def test_learned_sinks_become_those_of_sink_softmax(tmp_path):
    model = gpt_oss(num_layers=2)  # the second with a window
    model.backbone.transformer_layers[1].self_attention_layer.sinks.trainable = False
    converted = convert_attention(model, "sink_softmax")
    assert foreign_below(converted) == []
    sinks = [a.normalizer.sink for a in converted_below(converted)]
    assert [x.trainable for x in sinks] == [True, False]
    expected = predict(model, text())
    assert_close(predict(converted, text()), expected)
    prompts = text((4, 3), time=12)
    np.testing.assert_array_equal(generate(converted, prompts), generate(model, prompts))
    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert_close(predict(loaded, text()), expected)
    sinks[0].assign(sinks[0] + 1.0)
    assert np.abs(predict(converted, text()) - expected).max() > 0.01
    with pytest.raises(ValueError, match=r'learned sinks, which only normalizer="sink_softmax"'):
        convert_attention(model, "ssmax", train_length=9)


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


def test_self_attention_of_kerashub_in_a_model_of_ones_own(tmp_path):
    theirs = phi_3_su().backbone.transformer_layers[0].attention
    x, mask = keras.Input((7, 24)), keras.Input((7, 7), dtype="int32")
    layer = type(theirs).from_config(theirs.get_config())
    model = randomize(keras.Model([x, mask], layer(x, attention_mask=mask)))
    rng = np.random.default_rng(3)
    data = [
        rng.normal(size=(2, 7, 24)).astype("float32"),
        np.tri(7, dtype="int32")[None].repeat(2, 0),
    ]
    converted = convert_attention(model, "softmax")
    assert_close(predict(converted, data), predict(model, data))
    converted = with_scales(model)
    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(predict(loaded, data), predict(converted, data))


def gemma_3(**options):
    sizes = {**LLAMA, "intermediate_dim": 16, "head_dim": 6, "image_size": 4, **options}
    return keras_hub.models.Gemma3Backbone(vocabulary_size=VOCABULARY, **sizes)


def scaled_otherwise():
    x, mask = keras.Input((7, 24)), keras.Input((7, 7), dtype="int32")
    cls = type(gemma().backbone.transformer_layers[0].attention)
    return keras.Model([x, mask], cls(6, 3, 1, query_head_dim_normalize=False)(x, mask))


BLOOM = {"vocabulary_size": VOCABULARY, "num_layers": 1, "hidden_dim": 12, "intermediate_dim": 16}
REFUSED = {
    "`BloomAttention` has a way of its own to compute attention: ALiBi": lambda: (
        keras_hub.models.BloomBackbone(**BLOOM, num_heads=2)
    ),
    "`FalconAttention` has a way of its own to compute attention: ALiBi": lambda: (
        keras_hub.models.FalconBackbone(**BLOOM, num_attention_heads=2)
    ),
    "`CachedGemma3Attention` has a way of its own to compute attention$": gemma_3,
    "attention: logit_soft_cap=50.0, a soft cap on the logits": lambda: gemma(
        attention_logit_soft_cap=50.0
    ),
    "of its own to compute attention: logit_soft_cap=50.0": lambda: gemma_3(
        attention_logit_soft_cap=50.0
    ),
    "query_head_dim_normalize=False": scaled_otherwise,
    "self_attention: dropout=0.1, of the heads' outputs": lambda: llama(dropout=0.1),
    'learned sinks, which only normalizer="sink_softmax" has': gpt_oss,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_converted_is_refused_with_the_reason(reason):
    with pytest.raises(ValueError, match=reason):
        convert_attention(REFUSED[reason](), "softmax")


def test_cross_attention_is_refused():
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
