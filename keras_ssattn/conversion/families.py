"""The table of KerasHub's self-attention classes: what their options are in this package's layer.

Each class is called like `LlamaAttention`. The table says how they differ.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable

from keras_ssattn._typing import Config, Identifier
from keras_ssattn.conversion.attention import converted_options
from keras_ssattn.layers import normalizers

MODELS = "keras_hub.src.models"
ROTARY = {  # KerasHub's rotary embeddings: module and class
    "plain": ("keras_hub.src.layers.modeling.rotary_embedding", "RotaryEmbedding"),
    "llama": (f"{MODELS}.llama.llama_rotary_embedding", "LlamaRotaryEmbedding"),
    "su": (f"{MODELS}.phi3.phi3_rotary_embedding", "Phi3SuScaledRotaryEmbedding"),
}
SAME = (  # options that mean the same to Keras's attention
    "num_query_heads",
    "num_key_value_heads",
    "head_dim",
    "kernel_initializer",
    "bias_initializer",
)
# For their query and key norms, the names of those of `MultiHeadAttention`
HEAD_NORMS = {"query_dense_layernorm": "query_norm", "key_dense_layernorm": "key_norm"}


def _plain_rotary(options: Config) -> Config:
    return {
        "embedding": "plain",
        "max_wavelength": options.get("rope_max_wavelength", 10000),  # Gemma has no option
        "scaling_factor": options.get("rope_scaling_factor", 1.0),
    }


def _llama_rotary(options: Config) -> Config:
    same = {name[5:]: x for name, x in options.items() if name.startswith("rope_")}
    return {"embedding": "llama", **same}


def _phi_rotary(options: Config) -> Config:
    if options["rope_scaling_type"] is None:
        return _plain_rotary(options)
    return {
        "embedding": "su",
        "max_wavelength": options["rope_max_wavelength"],
        "inverese_freq_short_factor": options["rope_scaling_short_factor"],  # KerasHub's spelling
        "inverese_freq_long_factor": options["rope_scaling_long_factor"],
        "max_sequence_length": options["max_sequence_length"],
        "pretraining_sequence_length": options["pretraining_sequence_length"],
    }


def _yarn_rotary(options: Config) -> Config:
    return {**_plain_rotary(options), "rope_type": "yarn", "truncate": False}


def _mistral_window(options: Config) -> int | None:
    return options["sliding_window"]  # which the decoder's masks have as well


def _gemma_window(options: Config) -> int | None:
    return options["sliding_window_size"] if options["use_sliding_window_attention"] else None


def _qwen_window(options: Config) -> int | None:
    if not options.get("use_sliding_window_attention", True):  # no option of Qwen 3
        return None
    # KerasHub passes a fused kernel the mask without the window, on JAX and PyTorch
    utils = importlib.import_module("keras_hub.src.utils.keras_utils")
    return None if utils.fused_attention_op_available() else options["sliding_window_size"] or None


def _gpt_oss_window(options: Config) -> int | None:
    size = options["sliding_window"]
    return size + 1 if size is not None and size > 0 else None  # a key at that distance is seen


@dataclasses.dataclass(frozen=True)
class Family:
    """How the options of one class of KerasHub's map to those of `MultiHeadAttention`.

    Attributes:
        module: that defines the class, below KerasHub's models.
        rotary: gives the options of `KerasHubRotary`.
        window: gives `sliding_window`; `None` for none.
        use_bias, qk_norm: of `MultiHeadAttention`.
        drops_weights: whether `dropout` is of the weights, and not of the heads' outputs.
        has_sinks: whether each head has a learned sink, as in `SinkSoftmax`.
    """

    module: str
    rotary: Callable[[Config], Config] = _plain_rotary
    window: Callable[[Config], int | None] | None = None
    use_bias: bool | tuple[str, ...] = False
    qk_norm: bool = False
    drops_weights: bool = False
    has_sinks: bool = False

    def convert(self, options: Config, normalizer: Identifier) -> Config:
        """The options of `MultiHeadAttention`; `key_dim` may follow from the input."""
        same = {name: options[name] for name in SAME if name in options}
        return {
            **converted_options(same, normalizer),
            "use_bias": self.use_bias,
            "qk_norm": self.qk_norm,
            "norm_epsilon": options["layer_norm_epsilon"] if self.qk_norm else None,
            "sliding_window": self.window_of(options),
            "dropout": options["dropout"] if self.drops_weights else 0.0,
        }

    def window_of(self, options: Config) -> int | None:
        """The sliding window."""
        return None if self.window is None else self.window(options)

    def refusal(self, options: Config, normalizer: Identifier) -> str | None:
        """Names what cannot be converted, or returns `None`."""
        if options.get("logit_soft_cap") is not None:
            return _soft_cap(options)
        if not options.get("query_head_dim_normalize", True):
            return "query_head_dim_normalize=False, which scales queries by another size"
        if options["dropout"] > 0 and not self.drops_weights:
            return f"dropout={options['dropout']}, of the heads' outputs, not of the weights"
        if self.has_sinks and not _has_sinks(normalizer):
            return 'learned sinks, which only normalizer="sink_softmax" has'
        return None


FAMILIES = {
    "LlamaAttention": Family("llama.llama_attention", _llama_rotary),
    "CachedMistralAttention": Family("mistral.mistral_attention", window=_mistral_window),
    "Phi3Attention": Family("phi3.phi3_attention", _phi_rotary),
    "QwenAttention": Family(
        "qwen.qwen_attention", window=_qwen_window, use_bias=("query", "key", "value")
    ),
    "Qwen3Attention": Family("qwen3.qwen3_attention", window=_qwen_window, qk_norm=True),
    "CachedGemmaAttention": Family(
        "gemma.gemma_attention", window=_gemma_window, drops_weights=True
    ),
    "GptOssAttention": Family(
        "gpt_oss.gpt_oss_attention", _yarn_rotary, _gpt_oss_window, use_bias=True, has_sinks=True
    ),
}

# What other classes do that `MultiHeadAttention` does not
OWN_WAYS = {
    "BloomAttention": "ALiBi, which lowers logits by distance",
    "FalconAttention": "ALiBi, which lowers logits by distance",
    "T5MultiHeadAttention": "learned biases of the logits by distance",
    "DisentangledSelfAttention": "logits of contents and of distances",
    "TwoStreamRelativeAttention": "logits of contents and of distances",
}


def families() -> dict[type, Family]:
    """The rows of the table by class, of the classes that are imported."""
    places = {(f"{MODELS}.{family.module}", name): family for name, family in FAMILIES.items()}
    return {
        getattr(sys.modules[module], name): family
        for (module, name), family in places.items()
        if module in sys.modules
    }


def own_way(name: str, options: Config) -> str | None:
    """What a class outside of the table does, as far as it is known."""
    if options.get("logit_soft_cap") is not None:
        return _soft_cap(options)
    return OWN_WAYS.get(name)


def _soft_cap(options: Config) -> str:
    return f"logit_soft_cap={options['logit_soft_cap']}, a soft cap on the logits"


def _has_sinks(normalizer: Identifier) -> bool:
    cls = normalizers.get_for_attention(normalizer).cls
    return issubclass(cls, normalizers.SinkSoftmax)
