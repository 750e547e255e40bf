"""Families of models: which fields of a config.json they have, read and written.

Each was read in the published implementation of the family and is tested against it.
"""

import dataclasses
import math

from keras_ssattn._typing import Config, Option
from keras_ssattn.checkpoints.architecture import Architecture
from keras_ssattn.checkpoints.fields import MUST_EQUAL, WITHOUT_EFFECT, Fields
from keras_ssattn.checkpoints.positions import read_positions, write_positions

ATTENTION = ("query", "key", "value", "attention_output")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
TYPES = ("full_attention", "sliding_attention")
# `rope_parameters` of Ministral 3 where a file has none.
MINISTRAL3: Config = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0,
    "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """The fields of a family beside those that all have.

    Attributes:
        name: its `model_type`.
        model_class: of transformers.
        defaults: of fields that a file may lack; `rope_parameters` stands for all of them.
        biases: names of the parts that always have biases.
        bias_fields: fields that say whether other parts have them.
        windows: `"one"` for all layers, `"typed"` by `layer_types`, or `"switched"`: typed, and
            only with `use_sliding_window`.
        rope_types: the scalings that it has.
        rope_extras: what else its `rope_parameters` may have.
        fused: whether q, k and v, and gate and up, are one tensor each.
        must_equal: fields that would change the model with other values.
        without_effect: further fields that change nothing.
    """

    name: str
    model_class: str
    defaults: Config
    biases: tuple[str, ...] = ()
    bias_fields: tuple[str, ...] = ()
    windows: str = "one"
    qk_norm: bool = False
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    rope_extras: tuple[str, ...] = ()
    fused: bool = False
    must_equal: Config = dataclasses.field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()

    def default(self, name: str, common: Option = None) -> Option:
        return self.defaults.get(name, common)

    def read(self, config: Config, where: str = "config.json") -> Architecture:
        """The architecture that a config.json describes.

        Raises:
            ValueError: for a field that is missing, unknown, or of a value that is not supported.
        """
        if config.get("num_key_value_heads", 0) is None:  # as many as query heads
            config = {**config, "num_key_value_heads": config.get("num_attention_heads")}
        fields = Fields(config, where)
        fields.require({**MUST_EQUAL, **self.must_equal})
        if fields.take("is_causal", True) is not True:  # null, too, would see the future
            fields.refuse("is_causal", config["is_causal"], "true, or left out")
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        layers = fields.integer("num_hidden_layers")
        if "head_dim" not in config and "head_dim" in self.defaults:
            fields.left["head_dim"] = self.defaults["head_dim"]
        key_dim = fields.integer("head_dim", hidden // heads)
        rotary, temperature = read_positions(
            fields, key_dim, self.defaults, self.rope_types, self.rope_extras
        )
        has_positions = self._read_positioned(fields, layers)
        read = Architecture(
            vocabulary_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            inner_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.integer(
                "num_key_value_heads", self.default("num_key_value_heads", heads)
            ),
            key_dim=key_dim,
            norm_epsilon=fields.number("rms_norm_eps", self.default("rms_norm_eps", 1e-6)),
            rotary=rotary,
            has_positions=has_positions,
            windows=self._read_windows(fields, layers, has_positions),
            activation=self._read_activation(fields),
            norm="rms_norm",
            biases=self._read_biases(fields),
            qk_norm=self.qk_norm,
            tied=fields.flag("tie_word_embeddings", self.default("tied", False)),
            temperature=temperature,
        )
        fields.finish(WITHOUT_EFFECT | self.without_effect)
        return self._adjust(read, where)

    def _adjust(self, read: Architecture, where: str) -> Architecture:
        """What the family does without a field that says so."""
        if self.name == "gemma":
            scale = math.sqrt(read.hidden_size)
            return dataclasses.replace(read, norm="offset_rms_norm", embedding_scale=scale)
        if read.temperature is not None and any(read.windows):
            raise ValueError(
                f"{where}: 'sliding_window' must be null with 'llama_4_scaling_beta', which goes "
                f"by position and not by the keys seen. Received: {read.windows}"
            )
        return read

    def _read_activation(self, fields: Fields) -> str:
        names = dict(ACTIVATIONS)
        if self.name == "gemma":  # whose first files say "gelu" and mean the other
            names["gelu"] = "gelu_tanh"
        found = fields.take("hidden_act", self.default("hidden_act", "silu"))
        other = fields.take("hidden_activation") if self.name == "gemma" else None
        other = found if other is None else other
        for name, value in (("hidden_act", found), ("hidden_activation", other)):
            known = isinstance(value, str) and value in names
            if not known or names[value] != names[found]:
                fields.refuse(name, value, f"one of {tuple(names)}")
        return names[found]

    def _read_biases(self, fields: Fields) -> tuple[str, ...]:
        found = set(self.biases)
        if "attention_bias" in self.bias_fields and fields.flag("attention_bias", False):
            found.update(ATTENTION)
        if "mlp_bias" in self.bias_fields and fields.flag("mlp_bias", False):
            found.add("feed_forward")
        return tuple(name for name in (*ATTENTION, "feed_forward") if name in found)

    def _read_positioned(self, fields: Fields, layers: int) -> tuple[bool, ...]:
        """Which layers have positions."""
        if self.name != "smollm3":
            return (True,) * layers
        every = fields.integer("no_rope_layer_interval", 4)
        listed = fields.each("no_rope_layers", layers, (0, 1))
        if listed is None:
            return tuple((i + 1) % every != 0 for i in range(layers))
        return tuple(bool(x) for x in listed)

    def _read_windows(
        self, fields: Fields, layers: int, has_positions: tuple[bool, ...]
    ) -> tuple[int | None, ...]:
        switched = self.windows == "switched"
        used = fields.flag("use_sliding_window", False) if switched else True
        window = fields.window("sliding_window", self.default("sliding_window"))
        window = window if used else None
        if self.windows == "one":
            return (window,) * layers
        first = fields.count("max_window_layers", 28) if self.name.startswith("qwen") else 0
        types = fields.each("layer_types", layers, TYPES)
        if types is None:
            local = [i >= first for i in range(layers)]
            if self.name == "smollm3":
                local = [not x for x in has_positions]
            return tuple(window if x else None for x in local)
        if window is None and "sliding_attention" in types:
            fields.refuse("layer_types", types, "without sliding attention, which has no window")
        return tuple(window if x == "sliding_attention" else None for x in types)

    def write(self, model: Architecture) -> Config:
        """The config.json of a model, as far as it can be one of this family."""
        config: Config = {
            "architectures": [self.model_class],
            "model_type": self.name,
            "vocab_size": model.vocabulary_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.inner_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.key_dim,
            "hidden_act": next((x for x, y in ACTIVATIONS.items() if y == model.activation), None),
            "rms_norm_eps": model.norm_epsilon,
            "tie_word_embeddings": model.tied,
            "rope_parameters": write_positions(model, self.rope_extras),
        }
        if "attention_bias" in self.bias_fields:
            config["attention_bias"] = "attention_output" in model.biases
        if "mlp_bias" in self.bias_fields:
            config["mlp_bias"] = "feed_forward" in model.biases
        window = next((x for x in model.windows if x is not None), None)
        if self.windows != "one":
            config["layer_types"] = [TYPES[x is not None] for x in model.windows]
        if self.windows == "switched":
            config["use_sliding_window"] = window is not None
        if self.name != "llama" and self.name != "gemma":
            config["sliding_window"] = window
        if self.name == "smollm3":
            config["no_rope_layers"] = [int(x) for x in model.has_positions]
        return config


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama", "LlamaForCausalLM", {}, bias_fields=("attention_bias", "mlp_bias"),
            must_equal={"sliding_window": None, "rope_interleaved": False},
            without_effect=frozenset({"is_llama_config"}),
        ),
        Family(
            "mistral", "MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096},
            must_equal={"attention_bias": False, "mlp_bias": False},
        ),
        Family(
            "ministral", "MinistralForCausalLM",
            {"num_key_value_heads": 8, "sliding_window": 4096}, windows="typed",
            must_equal={"attention_bias": False, "mlp_bias": False},
        ),
        Family(
            "qwen2", "Qwen2ForCausalLM", {"num_key_value_heads": 32, "sliding_window": 4096},
            biases=("query", "key", "value"), windows="switched",
            must_equal={"attention_bias": True, "mlp_bias": False, "use_mrope": False},
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM",
            {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
            bias_fields=("attention_bias",), windows="switched", qk_norm=True,
            must_equal={"mlp_bias": False},
        ),
        Family(
            "smollm3", "SmolLM3ForCausalLM",
            {"num_key_value_heads": 4, "rope_theta": 2e6, "tied": True},
            bias_fields=("attention_bias", "mlp_bias"), windows="switched",
            must_equal={"rope_interleaved": False}, without_effect=frozenset({"max_window_layers"}),
        ),
        Family(
            "ministral3", "Ministral3ForCausalLM",
            {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
             "rope_parameters": MINISTRAL3},
            rope_extras=("llama_4_scaling_beta",),
            must_equal={"attention_bias": False, "mlp_bias": False},
        ),
        Family(
            "phi3", "Phi3ForCausalLM", {"rms_norm_eps": 1e-5},
            rope_types=("default",), rope_extras=("partial_rotary_factor",), fused=True,
            must_equal={"attention_bias": False, "mlp_bias": False},
            without_effect=frozenset({"original_max_position_embeddings"}),
        ),
        Family(
            "gemma", "GemmaForCausalLM",
            {"num_key_value_heads": 16, "head_dim": 256, "tied": True,
             "hidden_act": "gelu_pytorch_tanh"},
            bias_fields=("attention_bias",),
            must_equal={"use_bidirectional_attention": False, "sliding_window": None},
        ),
    )
}  # fmt: skip


def family_of(config: Config, where: str) -> Family:
    """The family of a config.json, by its `model_type`."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{where}: 'model_type' must be one of {(*FAMILIES, 'mistral3')}. Received: {name!r}"
        )
    return FAMILIES[name]
