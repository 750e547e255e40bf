"""A transformer block around attention with a choice of normalizer."""

import functools
import math
from collections.abc import Callable, Collection
from typing import ClassVar

import keras

from keras_ssattn._checks import (
    check_choice,
    check_flag,
    check_heads,
    check_integer,
    check_number,
    check_rate,
)
from keras_ssattn._keras.calling import call_inside
from keras_ssattn._keras.loading import NoWeights, freeze_sublayers
from keras_ssattn._keras.observing import observer
from keras_ssattn._keras.serialization import (
    Specification,
    check_options,
    own_config,
    policy_for,
)
from keras_ssattn._typing import (
    ArrayLike,
    Config,
    FeedForwardType,
    Identifier,
    Implementation,
    Layer,
    NormName,
    NormPosition,
    Shape,
    Tensor,
)
from keras_ssattn.layers import normalizers
from keras_ssattn.layers.attention import MultiHeadAttention
from keras_ssattn.layers.feed_forward import FeedForward, get_activation
from keras_ssattn.layers.masks import PacksSegments
from keras_ssattn.layers.norms import check_epsilon, make_norm
from keras_ssattn.layers.projection import PROJECTIONS, check_biases, has_bias
from keras_ssattn.layers.rotary import serialize_rotary, specify
from keras_ssattn.ops import Cache, Visibility
from keras_ssattn.ops.rotary import Rotation


@keras.saving.register_keras_serializable(package="keras_ssattn")
class TransformerBlock(PacksSegments, keras.layers.Layer):
    """Attention and feed-forward, each with normalization, dropout and a residual.

    With `norm_position="pre"`, each part is `x + dropout(part(norm(x)))`; with `"post"`,
    `norm(x + dropout(part(x)))`. The parts are self-attention, cross-attention (if any) and
    the feed-forward network. Dropout is on the output of each part and nowhere else.

    Args:
        num_heads: number of query heads.
        key_dim: size of each head. Defaults to the inputs' size divided by `num_heads`.
        num_kv_heads: number of key and value heads. Defaults to `num_heads`.
        normalizer: as in `MultiHeadAttention`.
        causal: whether self-attention sees no later position.
        cross_attention: whether the block also attends to a `context`.
        sliding_window: of self-attention, as in `MultiHeadAttention`.
        rotary: of self-attention, as in `MultiHeadAttention`.
        qk_norm, use_gate, implementation: of all attention, as in `MultiHeadAttention`.
        ffn_type: `"standard"` or `"gated"`.
        ffn_expansion: size of the feed-forward network's inner layer as a multiple of the
            inputs'. Defaults to 4; gated, to 8/3 rounded up to a multiple of 8.
        activation: of the feed-forward network, as in `FeedForward`. Defaults to GELU; gated, to
            SiLU.
        norm: `"layer_norm"`, `"rms_norm"` or `"offset_rms_norm"`, whose weights are added to 1.
        norm_epsilon: of all normalizations. Defaults to 1e-5, and for queries and keys to 1e-6.
        norm_position: `"pre"` or `"post"`.
        dropout: rate of dropout on the output of each part.
        use_bias: whether attention's and the feed-forward network's layers have biases; or the
            names of those that have, as in `MultiHeadAttention`, and `"feed_forward"`.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        inputs: `[B, T, E]`.
        context: `[B, S, Ec]`, with `cross_attention=True`.
        mask: boolean `[B, T]`, False at padding. Defaults to the mask attached to `inputs`.
        inputs_mask: the same; Keras fills one or the other.
        context_mask: boolean `[B, S]`. Defaults to the mask attached to `context`.
        attention_mask: of self-attention, as in `MultiHeadAttention`.
        training: whether dropout applies.
        segment_ids: of self-attention, as in `MultiHeadAttention`.
        cache: of self-attention, from `make_cache`, in a causal block; see `MultiHeadAttention`.
        cache_index: position of the first step, as in `MultiHeadAttention`.
        visibility, rotation: of self-attention, as in `MultiHeadAttention`.

    Returns:
        `[B, T, E]`, with the mask of `inputs`; with a `cache`, a pair of it and the new cache.

    Raises:
        ValueError: for sizes that do not fit, unknown choices, a `context` without
            `cross_attention=True`, or the reverse.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import TransformerBlock
    >>> block = TransformerBlock(num_heads=4, causal=True, norm="rms_norm", ffn_type="gated")
    >>> block(np.ones((2, 10, 64), "float32")).shape
    (2, 10, 64)

    Reference: block structure of Edifice's `Blocks.TransformerBlock`; arXiv 2002.04745 on
    the position of the normalization.
    """

    hints: ClassVar[dict[str, str]] = {"use_causal_mask": "Did you mean 'causal'?"}

    def __init__(
        self,
        num_heads: int,
        key_dim: int | None = None,
        num_kv_heads: int | None = None,
        normalizer: Identifier = "ssmax",
        *,
        causal: bool = False,
        cross_attention: bool = False,
        sliding_window: int | None = None,
        rotary: Identifier = None,
        qk_norm: bool = False,
        use_gate: bool = False,
        ffn_type: FeedForwardType = "standard",
        ffn_expansion: float | None = None,
        activation: Identifier = None,
        norm: NormName = "layer_norm",
        norm_epsilon: float | None = None,
        norm_position: NormPosition = "pre",
        dropout: float = 0.0,
        use_bias: bool | Collection[str] = True,
        implementation: Implementation = "auto",
        **kwargs: object,
    ) -> None:
        num_heads, num_kv_heads = check_heads(num_heads, num_kv_heads)
        key_dim = check_integer("key_dim", key_dim, optional=True)
        sliding_window = check_integer("sliding_window", sliding_window, optional=True)
        check_options(self, kwargs, self.hints)
        check_choice("ffn_type", ffn_type, FeedForwardType)
        check_choice("norm", norm, NormName)
        check_choice("norm_position", norm_position, NormPosition)
        check_rate("dropout", dropout)
        check_choice("implementation", implementation, Implementation)
        ffn_expansion = check_expansion(ffn_expansion)
        normalizer, rotary = normalizers.get_for_attention(normalizer), specify(rotary)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.num_kv_heads = num_kv_heads
        self._normalizer: Specification = normalizer
        self.causal = check_flag("causal", causal)
        self.cross_attention = check_flag("cross_attention", cross_attention)
        self.sliding_window = sliding_window
        self._rotary: Specification | None = rotary
        self.qk_norm = check_flag("qk_norm", qk_norm)
        self.use_gate = check_flag("use_gate", use_gate)
        self.implementation = implementation
        self.ffn_type = ffn_type
        self.ffn_expansion = ffn_expansion
        self.activation = None if activation is None else get_activation(activation)
        self.norm = norm
        self.norm_epsilon = check_epsilon(norm_epsilon)
        self.norm_position = norm_position
        self.dropout = dropout
        self.use_bias = check_biases(use_bias, (*PROJECTIONS, "feed_forward"))

    def build(self, inputs_shape: Shape, context_shape: Shape | None = None) -> None:
        size = inputs_shape[-1]
        if self.key_dim is None and size % self.num_heads:
            raise ValueError(
                "`num_heads` must divide the last dimension of the inputs, or `key_dim` be "
                f"given. Received: num_heads={self.num_heads}, inputs with shape "
                f"{tuple(inputs_shape)}"
            )
        if self.cross_attention != (context_shape is not None):
            raise ValueError(
                "`context` goes with `cross_attention=True`. Received: "
                f"cross_attention={self.cross_attention}, context with shape {context_shape}"
            )
        self.attention = self._attention("attention", size, self.sliding_window, self._rotary)
        self.attention.build(inputs_shape, inputs_shape)
        self.attention_norm = self._norm("attention_norm", inputs_shape)
        self.attention_dropout = self._dropout("attention_dropout")
        if self.cross_attention:
            self.context_attention = self._attention("context_attention", size)
            self.context_attention.build(inputs_shape, context_shape or ())
            self.context_attention_norm = self._norm("context_attention_norm", inputs_shape)
            self.context_attention_dropout = self._dropout("context_attention_dropout")
        else:
            self.context_attention_norm = NoWeights(name="context_attention_norm")
        self.feed_forward = FeedForward(
            self._inner_size(size),
            gated=self.ffn_type == "gated",
            activation=self.activation,
            use_bias=has_bias(self.use_bias, "feed_forward"),
            dtype=self.dtype_policy,
            name="feed_forward",
        )
        self.feed_forward.build(inputs_shape)
        self.feed_forward_norm = self._norm("feed_forward_norm", inputs_shape)
        self.feed_forward_dropout = self._dropout("feed_forward_dropout")
        freeze_sublayers(self)

    def _attention(
        self,
        name: str,
        size: int,
        sliding_window: int | None = None,
        rotary: Specification | None = None,
    ) -> MultiHeadAttention:
        biases = self.use_bias
        if not isinstance(biases, bool):
            biases = tuple(name for name in biases if name in PROJECTIONS)
        return MultiHeadAttention(
            self.num_heads,
            self.key_dim or size // self.num_heads,
            num_kv_heads=self.num_kv_heads,
            normalizer=self._normalizer,
            use_bias=biases,
            sliding_window=sliding_window,
            rotary=rotary,
            qk_norm=self.qk_norm,
            norm_epsilon=self.norm_epsilon,
            use_gate=self.use_gate,
            implementation=self.implementation,
            dtype=self.dtype_policy,
            name=name,
        )

    def _norm(self, name: str, shape: Shape) -> Layer:
        policy = policy_for(self, name)
        return make_norm(self.norm, shape, self.norm_epsilon, dtype=policy, name=name)

    def _dropout(self, name: str) -> Layer:
        return keras.layers.Dropout(self.dropout, dtype=policy_for(self, name), name=name)

    def _inner_size(self, size: int) -> int:
        if self.ffn_expansion is None and self.ffn_type == "gated":
            return -(-round(size * 8 / 3) // 8) * 8
        inner_size = round(size * (4 if self.ffn_expansion is None else self.ffn_expansion))
        if inner_size < 1:
            raise ValueError(
                "`ffn_expansion` times the last dimension of the inputs must be 1 or more. "
                f"Received: ffn_expansion={self.ffn_expansion}, inputs of size {size}"
            )
        return inner_size

    def projections(self) -> list[Layer]:
        """The dense layers inside, on which `quantize` and `enable_lora` work."""
        parts: list[Layer] = [self.attention, self.feed_forward]
        if self.cross_attention:
            parts.insert(1, self.context_attention)
        return [projection for part in parts for projection in part.projections()]

    def call(
        self,
        inputs: Tensor,
        context: Tensor | None = None,
        mask: ArrayLike | None = None,
        inputs_mask: ArrayLike | None = None,
        context_mask: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        training: bool | None = None,
        segment_ids: ArrayLike | None = None,
        cache: Cache | None = None,
        cache_index: int | ArrayLike = 0,
        visibility: Visibility | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        mask = inputs_mask if mask is None else mask
        caches = []

        def attend(x: Tensor) -> Tensor:
            result = call_inside(
                self,
                self.attention,
                x,
                x,
                query_mask=mask,
                value_mask=mask,
                attention_mask=attention_mask,
                use_causal_mask=self.causal,
                training=training,
                segment_ids=segment_ids,
                cache=cache,
                cache_index=cache_index,
                visibility=visibility,
                rotation=rotation,
            )
            if cache is None:
                return result
            caches.append(result[1])
            return result[0]

        def attend_to_context(x: Tensor) -> Tensor:
            masks = {"query_mask": mask, "value_mask": context_mask}
            return call_inside(self, self.context_attention, x, context, **masks, training=training)

        x = self._residual(inputs, self.attention_norm, self.attention_dropout, attend, training)
        if self.cross_attention:
            norm, dropout = self.context_attention_norm, self.context_attention_dropout
            x = self._residual(x, norm, dropout, attend_to_context, training)
        norm, dropout = self.feed_forward_norm, self.feed_forward_dropout
        part = functools.partial(call_inside, self, self.feed_forward)
        x = self._residual(x, norm, dropout, part, training)
        watching = observer()
        if watching is not None:
            watching.transformed(self, x, mask)
        return (x, *caches) if caches else x

    def make_cache(self, batch_size: int, length: int) -> Cache:
        """An empty `Cache` for `length` positions; the block must be built."""
        return self.attention.make_cache(batch_size, length)

    def _residual(
        self,
        x: Tensor,
        norm: Layer,
        dropout: Layer,
        part: Callable[[Tensor], Tensor],
        training: bool | None,
    ) -> Tensor:
        y = part(call_inside(self, norm, x) if self.norm_position == "pre" else x)
        y = x + (dropout(y, training=training) if self.dropout > 0 else y)
        return y if self.norm_position == "pre" else call_inside(self, norm, y)

    def compute_output_shape(
        self, inputs_shape: Shape, context_shape: Shape | None = None
    ) -> Shape:
        return inputs_shape

    def compute_output_spec(
        self, inputs: Tensor, *args: object, cache: Cache | None = None, **kwargs: object
    ) -> keras.KerasTensor | tuple[keras.KerasTensor, Cache]:
        output = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if cache is None:
            return output
        return output, Cache(*(keras.KerasTensor(x.shape, dtype=x.dtype) for x in cache))

    def get_config(self) -> Config:
        rotary = serialize_rotary(self._rotary, [self.attention.rotary] if self.built else [])
        own = own_config(
            self,
            TransformerBlock,
            normalizer=self._normalizer.serialize(),
            rotary=rotary,
            activation=self.activation and keras.activations.serialize(self.activation),
        )
        return {**super().get_config(), **own}


def check_expansion(value: float | None) -> float | None:
    """Returns `ffn_expansion`, a positive number, as a `float`, or `None`, or raises."""
    if value is None:
        return None
    return check_number(
        "ffn_expansion", value, "a positive number or None", lambda x: 0 < x < math.inf
    )
