"""Folders of released families: what `transformers` computes of them, and back.

The folders and the logits are `transformers`' own; see support/scripts/write_released.py.
"""

import json
import shutil

import keras
import ml_dtypes
import numpy as np
import pytest
from support import TESTS
from support.helpers import predict, to_numpy

from keras_ssattn.checkpoints.architecture import architecture_of
from keras_ssattn.checkpoints.safetensors import ToStore, read_header, write_file
from keras_ssattn.layers import PositionTemperature, RotaryEmbedding, Softmax, SSMax
from keras_ssattn.models import CausalLM

DATA = TESTS / "data" / "huggingface"
NAMES = sorted(path.name for path in DATA.iterdir())
GENERATED = ("gemma", "llama3", "ministral3", "phi3_partial", "smollm3_windows")  # each compiles
QUANTIZED = [(x, mode) for x in ("gemma", "ministral3") for mode in ("int8", "int4")]
if keras.backend.backend() != "torch":  # the others compile each of them four times
    QUANTIZED = QUANTIZED[-1:]
INSIDE = ("mistral3", "float8")  # of a model that sees images, too
TOLERANCE = 5e-5  # of the deviation of the logits: `transformers` itself rounds by that much


def silu(x):
    return 2.0 * x  # as no family does


def load(name, **options):
    return CausalLM.from_huggingface(DATA / name, **options)


def copy(name, folder, **fields):
    """A copy of a folder with some fields of its config.json changed."""
    shutil.copytree(DATA / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def tensors(folder):
    return {k: v.read() for k, v in read_header(folder / "model.safetensors").items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    """Beyond the length that positions were made for, one row padded on the left."""
    expected = np.load(DATA / name / "logits.npz")
    model = load(name, dtype="float32")
    tokens, mask = expected["tokens"], expected["mask"]
    error = np.abs(to_numpy(model(tokens, mask=mask)) - expected["logits"])[mask].max()
    assert error < TOLERANCE * expected["logits"][mask].std()
    if name in GENERATED:
        found = model.generate(tokens[:1], len(expected["new"]))[0]
        np.testing.assert_array_equal(found, expected["new"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(name, tmp_path):
    """Byte by byte, in the dtype of the folder, and the config.json as good as the first."""
    model = load(name)
    assert {w.dtype for w in model.weights} == {"bfloat16"}
    model.to_huggingface(tmp_path)
    if name not in INSIDE:
        files = (folder / "model.safetensors" for folder in (DATA / name, tmp_path))
        assert next(files).read_bytes() == next(files).read_bytes()
    again = CausalLM.from_huggingface(tmp_path)
    for old, new in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(old), to_numpy(new))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (None, 2)
    assert architecture_of(again) == architecture_of(model)


def test_text_inside_of_a_model_with_images_keeps_its_numbers(tmp_path):
    load("mistral3").to_huggingface(tmp_path)
    old = tensors(DATA / "mistral3")
    for name, array in tensors(tmp_path).items():
        np.testing.assert_array_equal(array, old[f"language_model.{name}"])


def test_8_bit_floats_are_multiplied_by_their_scale(tmp_path):
    load("float8").to_huggingface(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    old, new = tensors(DATA / "float8"), tensors(tmp_path)[name]
    scale = old[f"language_model.{name}_scale_inv"].astype("float64")
    expected = old[f"language_model.{name}"].astype("float64") * scale
    assert new.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(new, expected.astype(ml_dtypes.bfloat16))


def assert_same_model(loaded, model, x):
    """Equal weights; what was read from files lies otherwise in memory, and sums are rounded so."""
    for new, old in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(new), to_numpy(old))
    np.testing.assert_allclose(predict(loaded, x), predict(model, x), rtol=0, atol=1e-6)


def test_a_loaded_model_is_saved_and_goes_back(tmp_path):
    model = load("qwen3_biases")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_model(loaded, model, np.arange(3, 20)[None])
    loaded.to_huggingface(tmp_path / "back", eos_token_id=[2, 3])
    expected = (DATA / "qwen3_biases" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == expected
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["eos_token_id"] == [2, 3]
    assert config["model_type"] == "qwen3"


def test_weights_that_training_has_changed_are_written(tmp_path):
    model = load("phi3", dtype="float32")
    for weight in model.weights:
        weight.assign(2.0 * to_numpy(weight))
    model.to_huggingface(tmp_path)
    old, new = tensors(DATA / "phi3"), tensors(tmp_path)
    assert old.keys() == new.keys()
    for name, array in new.items():
        np.testing.assert_array_equal(array, 2.0 * old[name].astype("float32"))


def test_8_bit_floats_in_wider_dtypes_are_not_rounded_on_the_way(tmp_path):
    load("float8", dtype="float32").to_huggingface(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    old, new = tensors(DATA / "float8"), tensors(tmp_path)[name]
    scale = old[f"language_model.{name}_scale_inv"].astype("float32")
    expected = old[f"language_model.{name}"].astype("float32") * scale
    np.testing.assert_array_equal(new, expected)


# Options in place of those of the folder


def test_another_normalizer_has_fresh_parameters_and_no_place_in_a_folder(tmp_path):
    model = load("llama3", normalizer=SSMax(init_s="auto", train_length=16), dtype="float32")
    scale = model.blocks[0].attention.normalizer
    np.testing.assert_allclose(to_numpy(scale.s), 16 / np.log(np.arange(1, 17)).sum(), rtol=1e-6)
    assert type(model.blocks[0].attention.query_dense.kernel_initializer).__name__ == "FromSource"
    with pytest.raises(ValueError, match="no place for this normalizer.*SSMax with LogLengthScale"):
        model.to_huggingface(tmp_path)


def test_a_temperature_makes_another_family(tmp_path):
    scale = PositionTemperature(beta=0.1, original_length=16)
    model = load("llama3", normalizer=Softmax(length_scale=scale))
    with pytest.raises(ValueError, match=r"no family of \('llama',\) can express this model"):
        model.to_huggingface(tmp_path)
    model.huggingface_config = None
    model.to_huggingface(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "ministral3"
    assert config["rope_parameters"]["llama_4_scaling_beta"] == 0.1


def test_a_model_that_came_from_no_folder_is_written(tmp_path):
    options = {"normalizer": "softmax", "key_dim": 6, "sliding_window": 5, "num_kv_heads": 1}
    model = CausalLM(13, 12, 2, 2, **options)
    model.to_huggingface(tmp_path, max_position_embeddings=99)
    loaded = CausalLM.from_huggingface(tmp_path)
    assert_same_model(loaded, model, np.arange(12)[None])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("mistral", 99)


def test_a_scaling_without_what_has_defaults_is_written(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_length": 8}
    model = CausalLM(13, 12, 1, 2, normalizer="softmax", rotary=RotaryEmbedding(scaling=scaling))
    model.to_huggingface(tmp_path)
    assert_same_model(CausalLM.from_huggingface(tmp_path), model, np.arange(12)[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn_type": "standard"}, "no Hugging Face family.*ffn_type=standard"),
        ({"use_gate": True}, "no Hugging Face family.*use_gate=True"),
        ({"norm": "layer_norm"}, "no Hugging Face family.*norm=layer_norm"),
        ({"rotary": ["default", RotaryEmbedding(9.0)]}, "no Hugging Face family.*rotary="),
        ({"activation": silu}, "function of one's own.*activation=<function silu"),
        ({"normalizer": ["softmax", "ssmax"]}, "no place for this normalizer"),
        ({"use_bias": ["key"]}, "no family of .* can express this model.*biases=.'key',."),
    ],
)
def test_models_that_no_family_has_are_not_written(options, message, tmp_path):
    model = CausalLM(13, 12, 2, 2, **{"normalizer": "softmax", **options})
    with pytest.raises(ValueError, match=message):
        model.to_huggingface(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": 0.5}, "`fields` must not change the model.*rms_norm_eps"),
        ({"model_type": "gemma"}, "`fields` must not have 'model_type'"),
        ({"torch_dtype": "float16"}, "`fields` must not have 'torch_dtype'"),
        ({"dtype": "float16"}, "`fields` must not have 'dtype'"),
        ({"architectures": ["X"]}, "`fields` must not have 'architectures'"),
        ({"is_causal": None}, "`fields` must not have 'is_causal'"),
        ({"eos_token_id": {1}}, "`fields` must be values of JSON"),
        ({"max_shard_size": "5GB"}, "`max_shard_size` must be a positive number.*'5GB'"),
        ({"max_shard_size": 0}, "`max_shard_size` must be a positive number.*0"),
    ],
)
def test_what_is_refused_before_anything_is_written(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load("llama2").to_huggingface(tmp_path / "model", **fields)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["call", "_embed"])
def test_a_class_that_computes_something_else_is_not_written(name, tmp_path):
    other = type("Other", (CausalLM,), {name: lambda *_: None})
    same = type("Same", (CausalLM,), {})
    with pytest.raises(ValueError, match=f"a class of one's own.*Other, with another `{name}`"):
        other(13, 12, 1, 2, normalizer="softmax").to_huggingface(tmp_path)
    same(13, 12, 1, 2, normalizer="softmax").to_huggingface(tmp_path)


def written(folder):
    return json.loads((folder / "config.json").read_text())


def test_tokens_that_nobody_gave_are_null_and_padding_is_written(tmp_path):
    options = {"normalizer": "softmax", "rotary": None}
    CausalLM(13, 12, 1, 2, **options).to_huggingface(tmp_path)
    config = written(tmp_path)
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    assert [config[name] for name in names] == [None] * 3
    assert (config["model_type"], config["no_rope_layers"]) == ("smollm3", [0])
    CausalLM(13, 12, 1, 2, padding_id=5, **options).to_huggingface(tmp_path, eos_token_id=2)
    config = written(tmp_path)
    assert [config[name] for name in names] == [5, None, 2]


def test_a_hidden_size_that_heads_do_not_divide_is_no_llama(tmp_path):
    CausalLM(13, 11, 1, 2, key_dim=6, normalizer="softmax").to_huggingface(tmp_path)
    assert written(tmp_path)["model_type"] == "mistral"


def test_files_of_an_earlier_model_are_removed(tmp_path):
    model, other = load("llama2"), tmp_path / "model-00001.safetensors"
    other.touch()
    for size in (5e9, 9000, 20000, 5e9):
        model.to_huggingface(tmp_path, max_shard_size=size)
        again = CausalLM.from_huggingface(tmp_path)
        for old, new in zip(model.weights, again.weights, strict=True):
            np.testing.assert_array_equal(to_numpy(old), to_numpy(new))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model-00001.safetensors", "model.safetensors"]  # fmt: skip


def test_a_model_made_in_the_scope_of_other_names(tmp_path):
    with keras.name_scope("outer"):
        model = load("llama2")
    x = np.arange(3, 20)[None]
    np.testing.assert_array_equal(predict(model, x), predict(load("llama2"), x))
    model.to_huggingface(tmp_path)
    expected = (DATA / "llama2" / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("outer", [None, True, False])
def test_text_of_mistral3_is_mistral_and_tied_as_the_outer_field_says(outer, tmp_path):
    folder = copy("mistral3", tmp_path)
    config = written(folder)
    config["text_config"] |= {"tie_word_embeddings": False}
    del config["text_config"]["model_type"], config["tie_word_embeddings"]
    config |= {} if outer is None else {"tie_word_embeddings": outer}
    (folder / "config.json").write_text(json.dumps(config))
    if outer is False:
        with pytest.raises(ValueError, match="must have the tensor '.*lm_head.weight'"):
            CausalLM.from_huggingface(folder)
        return
    assert CausalLM.from_huggingface(folder).tie_embeddings


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_a_quantized_model_is_not_written(tmp_path):
    model = load("llama2", dtype="float32")
    model.quantize("int8")
    with pytest.raises(ValueError, match="no place for a model that is quantized"):
        model.to_huggingface(tmp_path)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize(("name", "mode"), QUANTIZED)
def test_a_loaded_model_with_integer_weights(name, mode, tmp_path):
    """Its logits correlate with those before; it generates, and is the same when saved and read."""
    model, x = load(name, dtype="float32"), np.arange(3, 40)[None]
    for block in model.blocks:  # whose weights would turn on the smallest error
        kernel = block.attention.query_dense.kernel
        kernel.assign(0.1 * to_numpy(kernel))
    expected = predict(model, x)
    quantize(model, mode)
    found = predict(model, x)
    least = {"int8": 0.999, "int4": 0.9}[mode]
    assert least < np.corrcoef(found.ravel(), expected.ravel())[0, 1] < 1.0
    layers = [layer for block in model.blocks for layer in block.projections()]
    assert {layer.quantization_mode for layer in layers} == {mode}
    new = model.generate(x, 4)
    np.testing.assert_array_equal(new[0][0], found[0, -1].argmax())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(predict(loaded, x), found, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(loaded.generate(x, 4), new)


def quantize(model, mode):
    try:
        model.quantize(mode)
    except (ValueError, NotImplementedError):
        pytest.skip(f"this Keras has no {mode}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_gate": True}, "options must not add weights.*gate/kernel"),
        ({"num_kv_heads": 4}, "options must leave .*k_proj.weight' its place and size"),
        ({"qk_norm": True}, "options must not add weights.*query_norm/scale"),
        ({"num_layers": 1}, "options must leave 'model.layers.1"),
        ({"hidden_size": 48}, "options must leave 'model.embed_tokens.weight' its place"),
    ],
)
def test_options_that_do_not_fit_the_weights(options, message):
    with pytest.raises(ValueError, match=message):
        load("llama_epsilon", **options)


# The head


def test_a_tied_model_may_be_untied():
    model, tied = load("gemma", tie_embeddings=False), load("gemma")
    x = np.arange(3, 20)[None]
    np.testing.assert_allclose(predict(model, x), predict(tied, x), rtol=2e-2, atol=2e-2)
    kernel = to_numpy(model.head.projection.kernel)
    np.testing.assert_array_equal(kernel.T, to_numpy(model.token_embedding.embeddings))


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_tied_embeddings(equal, tmp_path):
    """Old files have both; if they differ, the user must say which one is meant."""
    folder = copy("llama2", tmp_path, tie_word_embeddings=True)
    if equal:
        save_with(folder, {"lm_head.weight": tensors(folder)["model.embed_tokens.weight"]})
        assert CausalLM.from_huggingface(folder).tie_embeddings
        return
    with pytest.raises(ValueError, match="'tie_word_embeddings' is true, but 'lm_head.weight'"):
        CausalLM.from_huggingface(folder)
    x = np.arange(3, 20)[None]
    untied = CausalLM.from_huggingface(folder, tie_embeddings=False)
    np.testing.assert_array_equal(predict(untied, x), predict(load("llama2"), x))
    assert CausalLM.from_huggingface(folder, tie_embeddings=True).tie_embeddings


def save_with(folder, arrays):
    """Writes the tensors of a folder again, with these in place of some or beside them."""
    found = {**tensors(folder), **arrays}
    stored = {
        k: ToStore(v.dtype, v.shape, lambda v=v: v) for k, v in found.items() if v is not None
    }
    write_file(folder / "model.safetensors", stored)
    return folder


# Tensors


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({NORM: None}, f"must have the tensor '{NORM}' of shape .24,."),
        ({NORM: np.ones(23, "float32")}, f"'{NORM}' must have shape .24,., by config.*.23,."),
        ({NORM: np.ones(24, "int32")}, f"'{NORM}' must have one of the dtypes.*int32"),
        ({NORM: np.ones(24, ml_dtypes.float8_e4m3fn)}, f"'{NORM}' must have one of the dtypes"),
        ({"model.layers.2.x": np.ones(2, "int8")}, "has the tensor 'model.layers.2.x'.*no place"),
        ({"vision_tower.x": np.ones(2, "int8")}, "has the tensor 'vision_tower.x'.*no place"),
        ({"model.embed_tokens.weight": None}, "must have a tensor named one of.*embed_tokens"),
    ],
)
def test_tensors_too_many_too_few_or_of_another_kind(arrays, message, tmp_path):
    folder = save_with(copy("llama2", tmp_path), arrays)
    with pytest.raises(ValueError, match=message):
        CausalLM.from_huggingface(folder)


def test_tensors_that_follow_from_the_config_are_passed_over(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = save_with(copy("llama2", tmp_path), {name: np.ones(3, "float32")})
    assert CausalLM.from_huggingface(folder).num_layers == 2


KERNEL = "language_model.model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "scale", [None, np.float32("nan"), np.float32(0), np.float32(-1), np.ones(40, "float32")]
)
def test_scales_that_are_missing_or_no_positive_number(scale, tmp_path):
    scale = None if scale is None else np.asarray(scale)
    folder = save_with(copy("float8", tmp_path), {f"{KERNEL}_scale_inv": scale})
    with pytest.raises(ValueError, match=f"'{KERNEL}', of 8-bit floats, must have one positive"):
        CausalLM.from_huggingface(folder)


def test_weights_in_several_files(tmp_path):
    model = load("qwen2")
    model.to_huggingface(tmp_path, max_shard_size=5000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    again = CausalLM.from_huggingface(tmp_path)
    for old, new in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(old), to_numpy(new))


def test_a_progress_bar_after_some_seconds(monkeypatch, capsys):
    monkeypatch.setattr("keras_ssattn.checkpoints.checkpoint.PATIENCE", -1.0)
    load("llama2")
    assert "21/21" in capsys.readouterr().out
