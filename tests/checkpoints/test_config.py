"""Fields of a config.json: what is read, what must be as it is, what is refused by its name."""

import dataclasses
import json
import math

import pytest

from keras_ssattn.checkpoints.architecture import Rotary, Temperature
from keras_ssattn.checkpoints.families import FAMILIES
from keras_ssattn.models import CausalLM

SIZES = {
    "vocab_size": 11, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
ROPE = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8}
TEMPERED = {**ROPE, "llama_4_scaling_beta": 0.1}
YARN = {**ROPE, "factor": None}
HUGE = 10**400  # beyond all floats


def read(name, **fields):
    return FAMILIES[name].read({"model_type": name, **SIZES, **fields})


REFUSED = [
    ("llama", {"hidden_size": None}, "'hidden_size' must be a positive integer.*None"),
    ("llama", {"hidden_size": "12"}, "'hidden_size' must be a positive integer.*'12'"),
    ("llama", {"num_hidden_layers": -1}, "'num_hidden_layers' must be a positive integer.*-1"),
    ("llama", {"num_hidden_layers": True}, "'num_hidden_layers' must be a positive integer.*True"),
    ("llama", {"rms_norm_eps": math.nan}, "'rms_norm_eps' must be a positive number.*nan"),
    ("llama", {"logit_scale": 2.0}, "has the field 'logit_scale', which this.*logit_scale=2.0"),
    ("llama", {"attention_biases": True}, "'attention_biases'.*Did you mean 'attention_bias'"),
    ("llama", {"head_dim": 5}, "'head_dim' must be a size of which pairs.*5"),
    ("llama", {"hidden_act": "relu2"}, "'hidden_act' must be one of.*'relu2'"),
    ("llama", {"attention_dropout": 0.1}, "'attention_dropout' must be 0, the only value.*0.1"),
    ("llama", {"is_encoder_decoder": True}, "'is_encoder_decoder' must be False"),
    ("llama", {"attention_bias": 1}, "'attention_bias' must be true or false.*1"),
    ("llama", {"sliding_window": 4}, "'sliding_window' must be None, the only value.*4"),
    ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' must be 1.*0.5"),
    ("llama", {"layer_types": ["full_attention"] * 4}, "has the field 'layer_types'"),
    ("llama", {"per_layer_config": {"1": {}}}, "has the field 'per_layer_config'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "'rope_type' must be.*dynamic"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "must have the field 'factor'"),
    ("llama", {"rope_scaling": {"factor": 2}}, "has the field 'factor'"),
    ("llama", {"rope_scaling": ROPE, "rope_parameters": {"rope_theta": 2}}, "'rope_scaling' must"),
    ("llama", {"rope_theta": 9.0, "rope_parameters": {"rope_theta": 8.0}}, "'rope_theta' must be"),
    ("llama", {"rope_parameters": 5}, "'rope_parameters' must be an object or null.*5"),
    ("llama", {"rope_parameters": {"type": "yarn", "rope_type": "linear"}}, "'rope_type' must be"),
    ("llama", {"rope_parameters": {**ROPE, "finetuned": True}}, "has the field 'finetuned'"),
    ("llama", {"rope_parameters": TEMPERED}, "has the field 'llama_4_scaling_beta'"),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "llama3"}}, "the field 'low_freq_factor'"),
    ("llama", {"original_max_position_embeddings": 4}, "'original_max_position_embeddings'"),
    ("mistral", {"attention_bias": True}, "'attention_bias' must be False, the only value.*True"),
    ("mistral", {"sliding_window": 0}, "'sliding_window' must be a positive integer or null.*0"),
    ("mistral", {"rope_parameters": TEMPERED}, "has the field 'llama_4_scaling_beta'"),
    ("ministral", {"layer_types": ["full_attention"]}, "'layer_types' must be a list of 4 of"),
    ("ministral", {"layer_types": ["chunked_attention"] * 4}, "'layer_types' must be a list of 4"),
    ("ministral", {"layer_types": ["sliding_attention"] * 4, "sliding_window": None},
     "'layer_types' must be without sliding attention"),
    ("ministral3", {"rope_parameters": TEMPERED, "sliding_window": 4}, "'sliding_window' must be"),
    ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "a positive integer.*None"),
    ("ministral3", {"rope_parameters": {**ROPE, "llama_4_scaling_beta": "x"}}, "a finite number"),
    ("ministral3", {"rope_parameters": ROPE}, "'llama_4_scaling_beta' must be a finite .*None"),
    ("ministral3", {"rope_parameters": {}}, "'llama_4_scaling_beta' must be a finite.*None"),
    ("ministral3", {"rope_scaling": {**TEMPERED, "llama_4_scaling_beta": HUGE}}, "a finite number"),
    ("ministral3", {"rope_theta": 5.0}, "'rope_theta' must be 1000000.0, as in .* by default.*5.0"),
    ("llama", {"is_causal": None}, "'is_causal' must be true, or left out.*None"),
    ("llama", {"is_causal": False}, "'is_causal' must be true, or left out.*False"),
    ("llama", {"hidden_act": ["silu"]}, "'hidden_act' must be one of.*.'silu'."),
    ("gemma", {"hidden_activation": []}, "'hidden_activation' must be one of"),
    ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, "'rope_type' must be one of"),
    ("llama", {"rope_parameters": {"type": {}}}, "'rope_type' must be one of"),
    ("llama", {"rms_norm_eps": HUGE}, "'rms_norm_eps' must be a positive number"),
    ("llama", {"head_dim": HUGE}, "'head_dim' must be a positive integer"),
    ("llama", {"rope_theta": HUGE}, "'rope_theta' must be a positive number"),
    ("llama", {"rope_scaling": {**YARN, "original_max_position_embeddings": "8"},
               "max_position_embeddings": 16}, "'original_max_.*' must be a positive number.*'8'"),
    ("llama", {"rope_scaling": YARN, "max_position_embeddings": "x"},
     "'max_position_embeddings' must be a positive number.*'x'"),
    ("llama", {"rope_scaling": YARN, "max_position_embeddings": HUGE},
     "'max_position_embeddings' must be a positive number"),
    ("llama", {"rope_parameters": []}, "'rope_parameters' must be an object or null"),
    ("llama", {"rope_parameters": False}, "'rope_parameters' must be an object or null"),
    ("llama", {"rope_scaling": ""}, "'rope_scaling' must be an object or null"),
    ("llama", {"rope_interleaved": True}, "'rope_interleaved' must be False"),
    ("qwen2", {"use_mrope": True}, "'use_mrope' must be False"),
    ("qwen2", {"max_window_layers": -1}, "'max_window_layers' must be"),
    ("phi3", {"head_dim": 12, "partial_rotary_factor": 0.75}, "'head_dim' must be a size of which"),
    ("qwen2", {"attention_bias": False}, "'attention_bias' must be True, the only value.*False"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "'no_rope_layers' must be a list of 4 of .0, 1."),
    ("smollm3", {"rope_interleaved": True}, "'rope_interleaved' must be False"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "'rope_type' must be one of .'default',."),
    ("phi3", {"resid_pdrop": 0.1}, "'resid_pdrop' must be 0, the only value.*0.1"),
    ("gemma", {"hidden_activation": "silu"}, "'hidden_activation' must be one of.*'silu'"),
    ("gemma", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' must be False"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        read(name, **fields)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size", "num_attention_heads"])
def test_fields_that_must_be_there(name, field):
    fields = {k: v for k, v in {"model_type": name, **SIZES}.items() if k != field}
    with pytest.raises(ValueError, match=f"must have the field '{field}'"):
        FAMILIES[name].read(fields)


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_without_effect_or_null_change_nothing(name):
    more = {"architectures": ["X"], "use_cache": True, "auto_map": {"AutoConfig": "x"},
            "temperature": 0.7, "unknown": None, "torch_dtype": "bfloat16"}  # fmt: skip
    assert read(name, **more) == read(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read_as_the_same(name):
    rope = {"rope_theta": 77.0}
    if name == "ministral3":
        rope |= {**ROPE, "llama_4_scaling_beta": 0}
    model = read(name, tie_word_embeddings=True, rms_norm_eps=0.25, rope_parameters=rope)
    written = FAMILIES[name].write(model)
    assert FAMILIES[name].read(written) == model
    assert written["rope_parameters"].get("llama_4_scaling_beta", 0) == 0


@pytest.mark.parametrize("size", [12, 44, 46, 52, 94, 96])
def test_the_share_that_is_written_rounds_down_to_the_same_pairs(size):
    """44 features times 30 / 44 is a little less than 30."""
    for pairs in range(1, size // 2):
        rotary = Rotary(1e4, 2 * pairs / size)
        model = dataclasses.replace(read("phi3", head_dim=size), rotary=rotary)
        written = FAMILIES["phi3"].write(model)
        assert int(size * written["rope_parameters"]["partial_rotary_factor"]) == 2 * pairs
        assert FAMILIES["phi3"].read(written) == model


def test_ministral3_without_positions_has_those_of_its_release():
    expected = {
        "type": "yarn", "factor": 16.0, "original_length": 16384, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1, "mscale_all_dim": 1, "truncate": True,
    }  # fmt: skip
    for fields in ({}, {"rope_parameters": None}, {"rope_scaling": {}}, {"rope_theta": 1e6}):
        found = read("ministral3", **fields)
        assert dict(found.rotary.scaling) == expected
        assert (found.rotary.theta, found.temperature) == (1e6, Temperature(0.1, 16384))


def test_fields_that_change_nothing_at_these_values():
    fields = {"is_causal": True, "rope_interleaved": False, "is_llama_config": True}
    assert read("llama", **fields) == read("llama")
    assert read("qwen2", use_mrope=False) == read("qwen2")
    windows = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
    assert read("qwen2", **windows).windows == (7,) * 4


def test_defaults_of_families():
    assert read("mistral").windows == (4096,) * 4
    assert read("mistral", sliding_window=None).windows == (None,) * 4
    assert read("qwen2").windows == (None,) * 4
    window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}
    assert read("qwen3", **window).windows == (None, None, None, 7)
    assert read("qwen3").key_dim == 128
    assert read("qwen2").key_dim == 6
    assert read("gemma", head_dim=None).key_dim == 6
    assert read("gemma").key_dim == 256
    assert read("gemma").embedding_scale == math.sqrt(12)
    assert read("gemma", hidden_act="gelu").activation == "gelu_tanh"
    assert read("llama", hidden_act="gelu").activation == "gelu"
    assert read("gemma").tied
    assert not read("llama").tied
    assert read("smollm3").rotary.theta == 2e6
    assert read("smollm3").has_positions == (True, True, True, False)
    assert read("mistral", num_key_value_heads=None).num_kv_heads == 2
    heads = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    assert FAMILIES["llama"].read(heads).num_kv_heads == 2
    assert (
        FAMILIES["mistral"]
        .read({**heads, "hidden_size": 64, "num_attention_heads": 16})
        .num_kv_heads
        == 8
    )


def test_older_and_newer_ways_to_write_positions():
    new = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    expected = Rotary(5e5, 1.0, (("factor", 2.0), ("type", "linear")))
    assert read("llama", rope_parameters=new).rotary == expected
    assert read("llama", **old).rotary == expected
    assert read("phi3", partial_rotary_factor=0.75).rotary.fraction == 4 / 6  # 4 of 6 features


def test_yarn_as_released():
    """A factor that is null, ends that are null, slopes of which one is 0, and `truncate`."""
    fields = {"factor": None, "beta_fast": None, "mscale": 1.0, "mscale_all_dim": 0,
              "truncate": False, "max_position_embeddings": 99}  # fmt: skip
    found = read("ministral3", rope_parameters={**TEMPERED, **fields}, max_position_embeddings=32)
    assert dict(found.rotary.scaling) == {
        "type": "yarn", "factor": 4.0, "original_length": 8, "beta_fast": 32, "beta_slow": 1,
        "truncate": False,
    }  # fmt: skip
    assert found.temperature == Temperature(0.1, 8)


# The file


def folder_with(tmp_path, config):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json must be valid JSON"),
        ("[1]", "config.json must be a JSON object. Received: a list"),
        ('{"a": 1, "a": 2}', "the name 'a' occurs twice"),
        ("[" * 100_000, "config.json must be valid JSON"),
        ({}, "'model_type' must be one of.*'mistral3'.*Received: None"),
        ({"model_type": "gpt2"}, "'model_type' must be one of.*'gpt2'"),
        ({"model_type": "mistral3"}, "'text_config' must be an object.*None"),
        ({"model_type": "mistral3", "text_config": {}, "x": 1}, "has the field 'x'"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            "'quant_method' must be \"fp8\".*gptq",
        ),
        (
            {"model_type": "llama", "quantization_config": {
                "quant_method": "fp8", "weight_block_size": [128, 128]}},
            "'weight_block_size' must be",
        ),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "x": 1}},
            "`quantization_config` has the field 'x'",
        ),
    ],
)  # fmt: skip
def test_files_that_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CausalLM.from_huggingface(folder_with(tmp_path, config))
