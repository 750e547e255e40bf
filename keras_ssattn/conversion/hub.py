"""Replaces attention in KerasHub's models; takes KerasHub's call arguments and caches.

KerasHub is imported only once a model or a file has one of its layers.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ssattn._keras.loading import freeze_sublayers
from keras_ssattn._keras.tree import held_layers
from keras_ssattn._typing import Config, DType, Identifier, Option, Shape, Size, Tensor
from keras_ssattn.conversion.attention import converted_options
from keras_ssattn.layers import MultiHeadAttention, RotaryEmbedding
from keras_ssattn.ops import Cache

CACHED = ("keras_hub.src.layers.modeling.cached_multi_head_attention", "CachedMultiHeadAttention")
LLAMA = ("keras_hub.src.models.llama.llama_attention", "LlamaAttention")
LLAMA_ROTARY = ("keras_hub.src.models.llama.llama_rotary_embedding", "LlamaRotaryEmbedding")


@keras.saving.register_keras_serializable(package="keras_ssattn")
class KerasHubMultiHeadAttention(keras.layers.Layer):
    """Replaces `keras_hub.layers.CachedMultiHeadAttention`, and is called like it.

    It holds a `MultiHeadAttention`. KerasHub's cache is one tensor `[B, 2, S, K, D]`, with a mask
    `[B, T, S]`. n is the number of keys that this mask shows to a query, including those of
    earlier calls.

    Args:
        options: of `MultiHeadAttention`.
    """

    def __init__(self, options: Config, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.options: Config = keras.saving.serialize_keras_object(options)
        self.supports_masking = True  # passes masks on, as KerasHub's does

    def build(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> None:
        self._build_attention(query_shape, value_shape, key_shape)

    def _build_attention(self, *shapes: Shape | None, **options: Option) -> None:
        options = {**self.options, **options, "name": "attention", "dtype": self.dtype_policy}
        self.attention = MultiHeadAttention.from_config(options)
        self.attention.build(*shapes)
        freeze_sublayers(self)

    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor = None,
        attention_mask: Tensor = None,
        cache: Tensor = None,
        cache_update_index: Size = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        options: Config = {"return_attention_scores": return_attention_scores, "training": training}
        if attention_mask is not None:
            options["attention_mask"] = ops.cast(attention_mask, "bool")
        # `__call__` would add the masks attached to the tensors. KerasHub's attention has no
        # arguments for them: it only sees `attention_mask`.
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
        options["cache"] = Cache(cache[:, 0], cache[:, 1], unpadded)
        options["cache_index"] = cache_update_index
        *results, new = attend(query, value, key, use_causal_mask=True, **options)
        return *results, ops.stack((new[0], new[1]), axis=1)

    def get_config(self) -> Config:
        return {**super().get_config(), "options": {**self.options}}


@keras.saving.register_keras_serializable(package="keras_ssattn")
class KerasHubRotary(RotaryEmbedding):
    """KerasHub's `LlamaRotaryEmbedding` as a rotary embedding of this package.

    Args:
        options: of `LlamaRotaryEmbedding`.
    """

    def __init__(self, options: Config, **kwargs: Any) -> None:
        super().__init__(theta=options["max_wavelength"], **kwargs)
        self.options = options
        module, name = LLAMA_ROTARY
        cls = getattr(importlib.import_module(module), name)
        self.embedding = cls(**options, dtype=self.dtype_policy, name="embedding")

    def call(self, x: Tensor, positions: Tensor = None, offset: Size = 0) -> Tensor:
        return self.embedding(x, start_index=offset, positions=positions)

    def rotation(  # type: ignore[override]
        self, positions: Tensor, size: int, dtype: DType = "float32"
    ) -> "KerasHubRotation":
        return KerasHubRotation(self.embedding, positions)

    def get_config(self) -> Config:
        config = super().get_config()
        same = {name: config[name] for name in ("name", "trainable", "dtype")}
        return {**same, "options": {**self.options}}


@dataclasses.dataclass(frozen=True, eq=False)
class KerasHubRotation:
    """What KerasHub's embedding does to queries and keys at some positions, as a `Rotation`."""

    embedding: keras.Layer
    positions: Tensor  # [B|1, T]

    def turn(self, x: Tensor) -> Tensor:
        one = self.positions.shape[0] == 1
        return self.embedding(x, positions=self.positions[0] if one else self.positions)


@keras.saving.register_keras_serializable(package="keras_ssattn")
class KerasHubLlamaAttention(KerasHubMultiHeadAttention):
    """Replaces KerasHub's `LlamaAttention`, is called like it, and keeps its rotary embedding.

    Args:
        options: of `MultiHeadAttention`; `key_dim` follows from the input.
        rotary_options: of KerasHub's `LlamaRotaryEmbedding`.
    """

    def __init__(self, options: Config, rotary_options: Config, **kwargs: object) -> None:
        super().__init__(options, **kwargs)
        self.rotary_options = rotary_options
        self.supports_masking = False

    def build(self, inputs_shape: Shape) -> None:  # type: ignore[override]
        size = inputs_shape[-1] // self.options["num_heads"]
        rotary = KerasHubRotary({**self.rotary_options})
        self._build_attention(inputs_shape, inputs_shape, key_dim=size, rotary=rotary)

    def call(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor = None,
        cache: Tensor = None,
        cache_update_index: Size = None,
        training: bool | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        options = (attention_mask, cache, cache_update_index)
        return super().call(hidden_states, hidden_states, None, *options, training=training)

    def get_config(self) -> Config:
        return {**super().get_config(), "rotary_options": {**self.rotary_options}}


def _make_cached(options: Config, normalizer: Identifier) -> KerasHubMultiHeadAttention:
    own, options = _own_options(options)
    return KerasHubMultiHeadAttention(converted_options(options, normalizer), **own)


def _make_llama(options: Config, normalizer: Identifier) -> KerasHubMultiHeadAttention:
    own, options = _own_options(options)
    names = ("num_query_heads", "num_key_value_heads", "kernel_initializer")
    attention = converted_options({name: options[name] for name in names}, normalizer)
    rotary = {name[5:]: x for name, x in options.items() if name.startswith("rope_")}
    return KerasHubLlamaAttention({**attention, "use_bias": False}, rotary, **own)


def _own_options(options: Config) -> tuple[Config, Config]:
    """Divides options into those of the layer that holds the attention, and the others."""
    own = {name: x for name, x in options.items() if name in ("name", "trainable", "dtype")}
    return own, {name: x for name, x in options.items() if name not in own}


def substitutes() -> dict[type, Callable[[Config, Identifier], keras.Layer]]:
    """For each attention class of KerasHub, the function that makes its replacement."""
    makers = {CACHED: _make_cached, LLAMA: _make_llama}
    return {
        getattr(sys.modules[module], name): make
        for (module, name), make in makers.items()
        if module in sys.modules
    }


def is_of_kerashub(module: str) -> bool:
    """Whether a module with this full name belongs to KerasHub."""
    return module.split(".")[0] == "keras_hub"


def is_attention(layer: keras.Layer) -> bool:
    """Whether a layer is KerasHub's own attention, and not one that holds Keras's layer."""
    cls = type(layer)
    if not is_of_kerashub(cls.__module__) or "Attention" not in cls.__name__:
        return False
    doers = (keras.layers.MultiHeadAttention, MultiHeadAttention)
    return not any(isinstance(held, doers) for held in held_layers(layer).values())


def refusal_of_options(cls: type, options: Config) -> str | None:
    """Names an option of a layer of KerasHub that cannot be converted, or returns `None`."""
    make = substitutes().get(cls)
    if make is _make_llama and options["dropout"] > 0:
        return f"dropout={options['dropout']}, of the heads' outputs, not of the weights"
    if make is _make_cached and options["name"] == "cross_attention":
        return "cross-attention, which caches projected keys and values alone"
    return None


def remake_task(task: keras.Layer) -> keras.Layer | None:
    """Makes a `keras_hub.models.Task` again; returns `None` for any other layer.

    Both tasks share the preprocessor. It has no weights, and its configuration may lack its
    vocabulary.
    """
    models = sys.modules.get("keras_hub.models")
    if models is None or not isinstance(task, models.Task):
        return None
    config = {**task.get_config(), "preprocessor": task.preprocessor}
    new = type(task).from_config(config)
    if isinstance(task, models.CausalLM) and task.compiled:
        new.compile(sampler=type(task.sampler).from_config(task.sampler.get_config()))
    return new


def refuse_preset(task: keras.Layer, *_: object, **__: object) -> None:
    """The `save_to_preset` of a converted model."""
    raise ValueError(
        "A converted model must be saved with `.save()`, as KerasHub loads presets of its own "
        f"attention only. Received: `save_to_preset` of a converted `{type(task).__name__}`"
    )
