"""Replaces attention in KerasHub's models; takes KerasHub's call arguments and caches.

KerasHub is imported only once a model or a file has one of its layers.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ssattn._keras.loading import freeze_sublayers
from keras_ssattn._keras.tree import held_layers, walk
from keras_ssattn._typing import Config, DType, Identifier, Option, Shape, Size, Tensor
from keras_ssattn.conversion.attention import converted_options
from keras_ssattn.conversion.families import HEAD_NORMS, ROTARY, Family, families, own_way
from keras_ssattn.layers import MultiHeadAttention, RotaryEmbedding
from keras_ssattn.ops import Cache

CACHED = ("keras_hub.src.layers.modeling.cached_multi_head_attention", "CachedMultiHeadAttention")


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
    """A rotary embedding of KerasHub as one of this package.

    Args:
        options: of KerasHub's class.
        embedding: which one, a name in `ROTARY`.
    """

    def __init__(self, options: Config, embedding: str = "llama", **kwargs: Any) -> None:
        super().__init__(theta=options["max_wavelength"], **kwargs)
        self.options = options
        self.kind = embedding
        module, name = ROTARY[embedding]
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
        return {**same, "options": {**self.options}, "embedding": self.kind}


@dataclasses.dataclass(frozen=True, eq=False)
class KerasHubRotation:
    """What KerasHub's embedding does to queries and keys at some positions, as a `Rotation`."""

    embedding: keras.Layer
    positions: Tensor  # [B|1, T], consecutive

    def turn(self, x: Tensor) -> Tensor:
        if self.positions.shape[0] == 1:  # as KerasHub does it; Phi-3's takes no positions
            return self.embedding(x, start_index=self.positions[0, 0])
        return self.embedding(x, positions=self.positions)


@keras.saving.register_keras_serializable(package="keras_ssattn")
class KerasHubSelfAttention(KerasHubMultiHeadAttention):
    """Replaces the self-attention of KerasHub's `families`, and keeps its rotary embedding.

    It is called like `LlamaAttention`.

    Args:
        options: of `MultiHeadAttention`; without `key_dim`, it follows from the input.
        rotary_options: of `KerasHubRotary`'s embedding, and which one.
    """

    def __init__(self, options: Config, rotary_options: Config, **kwargs: object) -> None:
        super().__init__(options, **kwargs)
        self.rotary_options = rotary_options
        self.supports_masking = False

    def build(self, inputs_shape: Shape) -> None:  # type: ignore[override]
        size = self.options.get("key_dim") or inputs_shape[-1] // self.options["num_heads"]
        rotary = {**self.rotary_options}
        rotary = KerasHubRotary(embedding=rotary.pop("embedding"), options=rotary)
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

    def compute_output_shape(self, inputs_shape: Shape) -> Shape:
        return tuple(inputs_shape)

    def get_config(self) -> Config:
        return {**super().get_config(), "rotary_options": {**self.rotary_options}}


def _make_cached(options: Config, normalizer: Identifier) -> KerasHubMultiHeadAttention:
    own, options = _own_options(options)
    return KerasHubMultiHeadAttention(converted_options(options, normalizer), **own)


def _make_self_attention(
    family: Family, options: Config, normalizer: Identifier
) -> KerasHubMultiHeadAttention:
    own, options = _own_options(options)
    converted = family.convert(options, normalizer)
    return KerasHubSelfAttention(converted, family.rotary(options), **own)


def _own_options(options: Config) -> tuple[Config, Config]:
    """Divides options into those of the layer that holds the attention, and the others."""
    own = {name: x for name, x in options.items() if name in ("name", "trainable", "dtype")}
    return own, {name: x for name, x in options.items() if name not in own}


def substitutes() -> dict[type, Callable[[Config, Identifier], keras.Layer]]:
    """For each attention class of KerasHub, the function that makes its replacement."""
    found: dict[type, Callable[[Config, Identifier], keras.Layer]] = {
        cls: functools.partial(_make_self_attention, family) for cls, family in families().items()
    }
    module, name = CACHED
    if module in sys.modules:
        found[getattr(sys.modules[module], name)] = _make_cached
    return found


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


def refusal_of_class(layer: keras.Layer, options: Config) -> str:
    """Says what an attention layer does whose class cannot be converted."""
    name = type(layer).__name__
    reason = own_way(name, options) if is_of_kerashub(type(layer).__module__) else None
    reason = "" if reason is None else f": {reason}"
    return f"`{name}` has a way of its own to compute attention{reason}"


def refusal_of_options(cls: type, options: Config, normalizer: Identifier) -> str | None:
    """Names an option of a layer of KerasHub that cannot be converted, or returns `None`."""
    family = families().get(cls)
    if family is not None:
        return family.refusal(options, normalizer)
    if substitutes().get(cls) is _make_cached and options["name"] == "cross_attention":
        return "cross-attention, which caches projected keys and values alone"
    return None


def window_of(cls: type, options: Config) -> int | None:
    """The sliding window of an attention layer of Keras or KerasHub, from its options."""
    family = families().get(cls)
    return options.get("sliding_window") if family is None else family.window_of(options)


def parts(layer: keras.Layer) -> dict[str, keras.Layer]:
    """The layers with weights below an attention layer, by their names in this package's."""
    return {
        HEAD_NORMS.get(x.name, x.name): x
        for _, x in walk(layer)
        if isinstance(x, keras.layers.EinsumDense) or is_head_norm(x)
    }


def is_head_norm(layer: keras.Layer) -> bool:
    """Whether a layer is the norm of KerasHub's query or key heads."""
    return layer.name in HEAD_NORMS and is_of_kerashub(type(layer).__module__)


def copy_sinks(layer: keras.Layer, attention: MultiHeadAttention) -> None:
    """Copies the learned sinks of an attention layer of KerasHub, if it has any."""
    family = families().get(type(layer))
    if family is not None and family.has_sinks:
        sink = attention.normalizer.sink
        sink.assign(layer.sinks)
        sink.trainable = layer.sinks.trainable


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
