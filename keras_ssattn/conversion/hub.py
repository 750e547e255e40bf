"""Attention of KerasHub's models, with the calls and the caches that KerasHub gives it.

KerasHub is not imported before there is one of its layers to convert.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ssattn._keras.loading import freeze_sublayers
from keras_ssattn._keras.tree import held_layers
from keras_ssattn.conversion.retrofit import Retrofit, multi_head_options
from keras_ssattn.layers import MultiHeadAttention, normalizers
from keras_ssattn.ops import Cache

CACHED = ("keras_hub.src.layers.modeling.cached_multi_head_attention", "CachedMultiHeadAttention")
LLAMA = ("keras_hub.src.models.llama.llama_attention", "LlamaAttention")
LLAMA_ROTARY = ("keras_hub.src.models.llama.llama_rotary_embedding", "LlamaRotaryEmbedding")


class KerasHubAttention(keras.layers.Layer):
    """Holds a `MultiHeadAttention`, and has KerasHub cache its keys and values.

    KerasHub's cache is one tensor `[B, 2, S, K, D]`, and the mask that comes with it is
    `[B, T, S]`. n is the number of keys that this mask leaves: all that a query sees, with those
    of earlier passes.

    Args:
        options: of `MultiHeadAttention`.
    """

    def __init__(self, options: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = options

    def make_attention(self, **options: Any) -> MultiHeadAttention:
        options = {**self.options, **options, "name": "attention", "dtype": self.dtype_policy}
        return MultiHeadAttention.from_config(options)

    def attend(
        self,
        query: Any,
        value: Any,
        key: Any,
        attention_mask: Any,
        cache: Any,
        cache_update_index: Any,
        **options: Any,
    ) -> Any:
        if attention_mask is not None:
            options["attention_mask"] = ops.cast(attention_mask, "bool")
        # Not through `__call__`, which would add the masks attached to the tensors: KerasHub's
        # attention has no arguments for them, and sees what `attention_mask` says
        attend = self.attention.call
        if cache is None:
            return attend(query, value, key, **options)
        if cache_update_index is None:
            raise ValueError(
                "`cache_update_index` must be given with `cache`: one of projected keys and "
                "values alone is not supported. Received: cache_update_index=None"
            )
        batch_size, _, length = ops.shape(cache)[:3]
        unpadded = ops.ones((batch_size, length), "bool")  # `attention_mask` has the padding
        *results, new = attend(
            query,
            value,
            key,
            use_causal_mask=True,
            cache=Cache(cache[:, 0], cache[:, 1], unpadded),
            cache_index=cache_update_index,
            **options,
        )
        return *results, ops.stack((new[0], new[1]), axis=1)

    def get_config(self) -> dict[str, Any]:
        options = {**self.options}
        if not isinstance(options["normalizer"], (str, dict)):
            options["normalizer"] = normalizers.get_for_attention(options["normalizer"]).serialize()
        return {**super().get_config(), "options": options}


@keras.saving.register_keras_serializable(package="keras_ssattn")
class KerasHubMultiHeadAttention(KerasHubAttention):
    """What `keras_hub.layers.CachedMultiHeadAttention` becomes, with its call."""

    def __init__(self, options: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(options, **kwargs)
        self.supports_masking = True  # passes masks on, as KerasHub's does

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        self.attention = self.make_attention()
        self.attention.build(query_shape, value_shape, key_shape)
        freeze_sublayers(self)

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        attention_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
    ) -> Any:
        options = {"return_attention_scores": return_attention_scores, "training": training}
        return self.attend(query, value, key, attention_mask, cache, cache_update_index, **options)


@keras.saving.register_keras_serializable(package="keras_ssattn")
class KerasHubLlamaAttention(KerasHubAttention):
    """What KerasHub's `LlamaAttention` becomes, with its call; its rotary embedding stays.

    Args:
        options: of `MultiHeadAttention`; `key_dim` follows from the input.
        rotary_options: of KerasHub's `LlamaRotaryEmbedding`.
    """

    def __init__(
        self, options: dict[str, Any], rotary_options: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(options, **kwargs)
        self.rotary_options = rotary_options

    def build(self, inputs_shape: Any) -> None:
        size = inputs_shape[-1] // self.options["num_heads"]
        self.attention = self.make_attention(key_dim=size)
        self.attention.rotary = KerasHubRotary(
            self.rotary_options, dtype=self.dtype_policy, name="rotary"
        )
        self.attention.build(inputs_shape, inputs_shape)
        freeze_sublayers(self)

    def call(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        training: bool | None = None,
    ) -> Any:
        return self.attend(
            hidden_states,
            hidden_states,
            None,
            attention_mask,
            cache,
            cache_update_index,
            training=training,
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rotary_options": self.rotary_options}


class KerasHubRotary(keras.layers.Layer):
    """KerasHub's `LlamaRotaryEmbedding`, called as this package's rotary embeddings are."""

    def __init__(self, options: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        module, name = LLAMA_ROTARY
        cls = getattr(importlib.import_module(module), name)
        self.embedding = cls(**options, dtype=self.dtype_policy, name="embedding")

    def call(self, x: Any, offset: Any = 0) -> Any:
        return self.embedding(x, start_index=offset)


def _from_cached(layer: Any, wanted: Retrofit) -> KerasHubAttention:
    options = multi_head_options(layer, wanted)
    own = {name: options.pop(name) for name in ("name", "trainable", "dtype")}
    return KerasHubMultiHeadAttention.from_config({**own, "options": options})


def _from_llama(layer: Any, wanted: Retrofit) -> KerasHubAttention:
    # Its `get_config` asks for an attribute that it does not have
    initializer = keras.initializers.serialize(layer.kernel_initializer)
    options = {
        "num_heads": layer.num_query_heads,
        "num_kv_heads": layer.num_key_value_heads,
        "use_bias": False,
        "kernel_initializer": initializer,
        "normalizer": wanted.normalizer_for(None),
    }
    rotary_options = {
        "max_wavelength": layer.rope_max_wavelength,
        "position_scaling_factor": layer.rope_position_scaling_factor,
        "frequency_adjustment_factor": layer.rope_frequency_adjustment_factor,
        "low_freq_factor": layer.rope_low_freq_factor,
        "high_freq_factor": layer.rope_high_freq_factor,
        "pretraining_sequence_length": layer.rope_pretraining_sequence_length,
    }
    own = {"name": layer.name, "trainable": layer.trainable, "dtype": layer.dtype_policy}
    return KerasHubLlamaAttention(options, rotary_options, **own)


def substitutes() -> dict[type, Callable]:
    """By class of KerasHub's, the function of a layer and a `Retrofit` that makes its successor."""
    makers = {CACHED: _from_cached, LLAMA: _from_llama}
    return {
        getattr(sys.modules[module], name): make
        for (module, name), make in makers.items()
        if module in sys.modules
    }


def is_attention(layer: Any) -> bool:
    """Whether a layer of KerasHub's is attention that holds no Keras layer to do it."""
    cls = type(layer)
    if cls.__module__.split(".")[0] != "keras_hub" or "Attention" not in cls.__name__:
        return False
    doers = (keras.layers.MultiHeadAttention, MultiHeadAttention)
    return not any(isinstance(held, doers) for held in held_layers(layer).values())


def refusal_of_options(layer: Any) -> str | None:
    """Which option of a layer of KerasHub's the ones above lack, or `None`."""
    known = substitutes()
    if known.get(type(layer)) is _from_llama and layer.dropout > 0:
        return f"dropout={layer.dropout}, of the heads' outputs, not of the weights"
    if known.get(type(layer)) is _from_cached and layer.name == "cross_attention":
        return "cross-attention, which caches projected keys and values alone"
    return None


def remake_task(task: Any) -> Any | None:
    """A new `keras_hub.models.Task` of the same configuration; `None` for any other layer.

    The preprocessor is shared: it learns nothing, and its vocabulary may be in no configuration.
    """
    models = sys.modules.get("keras_hub.models")
    if models is None or not isinstance(task, models.Task):
        return None
    config = {**task.get_config(), "preprocessor": task.preprocessor}
    new = type(task).from_config(config)
    if isinstance(task, models.CausalLM) and task.compiled:
        new.compile(sampler=type(task.sampler).from_config(task.sampler.get_config()))
    return new
