"""Against `transformers` itself: tiny random models of each family, saved by it and read here."""

import json

import numpy as np
import pytest
import torch
from support import released
from support.helpers import predict, to_numpy

from keras_ssattn.layers import PositionTemperature, RotaryEmbedding, Softmax
from keras_ssattn.models import CausalLM

TOLERANCE = 5e-5  # of the deviation of the logits
# Other sizes than those of the committed folders.
SIZES = {
    "vocab_size": 61, "hidden_size": 36, "intermediate_size": 28, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3,
}  # fmt: skip


@pytest.fixture(params=released.MODELS)
def name(request):
    return request.param


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def error(found, expected, mask=...):
    return np.abs(found - expected)[mask].max() / expected[mask].std()


@pytest.mark.parametrize("length", [6, 50])
def test_logits(name, length, tmp_path, rng):
    model = released.make(name, seed=1)
    ours = CausalLM.from_huggingface(save(model, tmp_path))
    tokens = rng.integers(3, 47, (2, length))
    assert error(predict(ours, tokens), released.logits(model, tokens)) < TOLERANCE


def test_padding_on_the_left(name, tmp_path, rng):
    model = released.make(name, seed=2)
    ours = CausalLM.from_huggingface(save(model, tmp_path))
    tokens, mask = rng.integers(3, 47, (3, 30)), np.ones((3, 30), bool)
    mask[1, :7], mask[2, :20] = False, False
    expected = released.logits(model, tokens, mask)
    assert error(to_numpy(ours(tokens, mask=mask)), expected, mask) < TOLERANCE


def test_greedy_tokens(name, tmp_path, rng):
    """Of prompts of three lengths, below and beyond the length of positions."""
    model = released.make(name, seed=3)
    ours = CausalLM.from_huggingface(save(model, tmp_path))
    prompts = [rng.integers(3, 47, length) for length in (3, 9, 21)]
    for prompt, found in zip(prompts, ours.generate(prompts, 8), strict=True):
        row = prompt[None]
        for _ in range(8):
            row = np.append(row, released.logits(model, row)[:, -1:].argmax(-1), axis=1)
        np.testing.assert_array_equal(found, row[0, len(prompt) :])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back(name, dtype, tmp_path):
    model = released.make(name, seed=4).to(getattr(torch, dtype))
    ours = CausalLM.from_huggingface(save(model, tmp_path))
    ours.to_huggingface(tmp_path / "back")
    expected = (tmp_path / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == expected
    back = released.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(model)
    assert back.dtype == model.dtype
    old, new = ({**x.config.to_dict()} for x in (model, back))
    for config in (old, new):
        for field in ("transformers_version", "_name_or_path", "dtype", "architectures"):
            config.pop(field, None)
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    assert changed <= {"rope_parameters", "head_dim", "layer_types", "no_rope_layer_interval",
                       "hidden_act", "max_window_layers", "sliding_window"}  # fmt: skip
    tokens = np.arange(3, 40)[None]
    x, y = (released.logits(m.float(), tokens) for m in (model, back))
    if dtype == "float32":  # in half precision `float()` does not give back the frequencies
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["llama2", "mistral_window", "qwen2", "qwen3", "smollm3", "phi3"])
def test_other_sizes(name, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(released, "SIZES", {**released.SIZES, **SIZES})
    model_type, fields = released.MODELS[name]
    fields = {k: v for k, v in fields.items() if k not in SIZES}
    fields["tie_word_embeddings"] = name in ("llama2", "qwen2")
    monkeypatch.setitem(released.MODELS, name, (model_type, fields))
    model = released.make(name, seed=5)
    ours = CausalLM.from_huggingface(save(model, tmp_path))
    tokens = rng.integers(3, 61, (2, 20))
    assert error(predict(ours, tokens), released.logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("source", ["ministral3", "mistral_nemo"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("newer", [True, False])
def test_text_inside_of_mistral3(source, tied, newer, tmp_path, rng):
    """Under the names that released files have, and those of the module itself."""
    model = released.make_vision(source, tied=tied)
    model.save_pretrained(tmp_path, save_original_format=not newer)
    ours = CausalLM.from_huggingface(tmp_path)
    tokens = rng.integers(11, 47, (2, 40))
    assert error(predict(ours, tokens), released.logits(model, tokens)) < TOLERANCE


def edit(folder, **fields):
    """Changes fields of the config.json, or removes those that are `...`."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def check(folder, ours=None):
    """Raises unless the logits of a folder are those of transformers."""
    auto = released.transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = np.arange(3, 43)[None]
    ours = ours or CausalLM.from_huggingface(folder)
    assert error(predict(ours, tokens), released.logits(auto, tokens)) < TOLERANCE


@pytest.mark.parametrize("rope", [None, ...])
def test_ministral3_without_positions(rope, tmp_path):
    save(released.make("ministral3", seed=7), tmp_path)
    edit(tmp_path, rope_parameters=rope)
    check(tmp_path)


def test_text_of_mistral3_is_tied_as_the_outer_field_says(tmp_path):
    model = released.make_vision("mistral_nemo", tied=True)
    model.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    del text["model_type"]
    edit(tmp_path, tie_word_embeddings=..., text_config={**text, "tie_word_embeddings": False})
    ours, tokens = CausalLM.from_huggingface(tmp_path), np.arange(11, 40)[None]
    model = type(model).from_pretrained(tmp_path).eval()
    assert error(predict(ours, tokens), released.logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("phi3", {"key_dim": 44, "rotary": RotaryEmbedding(1e4, 30 / 44)}),
        ("mistral", {"hidden_size": 20, "num_heads": 3, "key_dim": 8}),
        ("smollm3", {"rotary": None, "padding_id": 2}),
        ("ministral3", {"normalizer": Softmax(length_scale=PositionTemperature(0.2, 8))}),
        ("llama", {"activation": "relu"}),
    ],
)
def test_models_that_came_from_no_folder(model_type, options, tmp_path):
    options = {"hidden_size": 32, "num_heads": 2, "normalizer": "softmax", **options}
    model = CausalLM(53, num_layers=2, **options)
    model.to_huggingface(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    check(tmp_path, model)


def test_ministral3_without_a_temperature(tmp_path):
    ours = CausalLM.from_huggingface(
        save(released.make("ministral3", seed=8), tmp_path), normalizer="softmax"
    )
    ours.to_huggingface(tmp_path)
    check(tmp_path, ours)


def test_files_of_several_shards(tmp_path, rng):
    model = released.make("llama3", seed=6)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"])
    ours = CausalLM.from_huggingface(tmp_path)
    tokens = rng.integers(3, 47, (2, 40))
    assert error(predict(ours, tokens), released.logits(model, tokens)) < TOLERANCE
    ours.to_huggingface(tmp_path / "back", max_shard_size=8000)
    back = released.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    np.testing.assert_array_equal(released.logits(back, tokens), released.logits(model, tokens))
