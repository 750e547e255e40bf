"""A transformer block around attention with a choice of normalizer."""

from typing import Any

import keras

from keras_ssattn.layers import normalizers
from keras_ssattn.layers._config import (
    NoWeights,
    check_choice,
    check_expansion,
    check_groups,
    check_positive,
    check_rate,
    freeze_sublayers,
    serialize_options,
    serialize_policy,
)
from keras_ssattn.layers._norms import NORMS, make_norm
from keras_ssattn.layers.attention import MultiHeadAttention
from keras_ssattn.layers.feed_forward import FeedForward
from keras_ssattn.layers.rotary import get_rotary, serialize_rotary
from keras_ssattn.ops import Cache


@keras.saving.register_keras_serializable(package="keras_ssattn")
class TransformerBlock(keras.layers.Layer):
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
        qk_norm: as in `MultiHeadAttention`.
        ffn_type: `"standard"` or `"gated"`.
        ffn_expansion: size of the feed-forward network's inner layer as a multiple of the
            inputs'. Defaults to 4; gated, to 8/3 rounded up to a multiple of 8.
        activation: of the feed-forward network. Defaults to GELU; gated, to SiLU.
        norm: `"layer_norm"` or `"rms_norm"`.
        norm_position: `"pre"` or `"post"`.
        dropout: rate of dropout on the output of each part.
        use_bias: whether attention's and the feed-forward network's layers have biases.
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

    def __init__(
        self,
        num_heads: int,
        key_dim: int | None = None,
        num_kv_heads: int | None = None,
        normalizer: Any = "ssmax",
        *,
        causal: bool = False,
        cross_attention: bool = False,
        sliding_window: int | None = None,
        rotary: Any = None,
        qk_norm: bool = False,
        ffn_type: str = "standard",
        ffn_expansion: float | None = None,
        activation: Any = None,
        norm: str = "layer_norm",
        norm_position: str = "pre",
        dropout: float = 0.0,
        use_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        num_heads, num_kv_heads = check_groups(num_heads, num_kv_heads)
        key_dim = check_positive("key_dim", key_dim, optional=True)
        sliding_window = check_positive("sliding_window", sliding_window, optional=True)
        check_choice("ffn_type", ffn_type, ("standard", "gated"))
        check_choice("norm", norm, tuple(NORMS))
        check_choice("norm_position", norm_position, ("pre", "post"))
        check_rate("dropout", dropout)
        ffn_expansion = check_expansion(ffn_expansion)
        normalizer = normalizers.get_for_attention(normalizer)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.num_kv_heads = num_kv_heads
        self._normalizer = lambda: normalizer  # a specification, no layer of this one
        self.causal = causal
        self.cross_attention = cross_attention
        self.sliding_window = sliding_window
        rotary = get_rotary(rotary)
        self._rotary = lambda: rotary
        self.qk_norm = qk_norm
        self.ffn_type = ffn_type
        self.ffn_expansion = ffn_expansion
        self.activation = None if activation is None else keras.activations.get(activation)
        self.norm = norm
        self.norm_position = norm_position
        self.dropout = dropout
        self.use_bias = use_bias

    def build(self, inputs_shape: Any, context_shape: Any = None) -> None:
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
        self.attention = self._attention("attention", size, self.sliding_window, self._rotary())
        self.attention.build(inputs_shape, inputs_shape)
        self.attention_norm = self._norm("attention_norm", inputs_shape)
        self.attention_dropout = self._dropout("attention_dropout")
        if self.cross_attention:
            self.context_attention = self._attention("context_attention", size)
            self.context_attention.build(inputs_shape, context_shape)
            self.context_attention_norm = self._norm("context_attention_norm", inputs_shape)
            self.context_attention_dropout = self._dropout("context_attention_dropout")
        else:
            self.context_attention_norm = NoWeights(name="context_attention_norm")
        self.feed_forward = FeedForward(
            self._inner_size(size),
            gated=self.ffn_type == "gated",
            activation=self.activation,
            use_bias=self.use_bias,
            dtype=self.dtype_policy,
            name="feed_forward",
        )
        self.feed_forward.build(inputs_shape)
        self.feed_forward_norm = self._norm("feed_forward_norm", inputs_shape)
        self.feed_forward_dropout = self._dropout("feed_forward_dropout")
        freeze_sublayers(self)

    def _attention(
        self, name: str, size: int, sliding_window: int | None = None, rotary: Any = None
    ) -> Any:
        return MultiHeadAttention(
            self.num_heads,
            self.key_dim or size // self.num_heads,
            num_kv_heads=self.num_kv_heads,
            normalizer=self._normalizer(),
            use_bias=self.use_bias,
            sliding_window=sliding_window,
            rotary=rotary,
            qk_norm=self.qk_norm,
            dtype=self.dtype_policy,
            name=name,
        )

    def _norm(self, name: str, shape: Any) -> Any:
        return make_norm(self.norm, shape, dtype=self.dtype_policy, name=name)

    def _dropout(self, name: str) -> Any:
        return keras.layers.Dropout(self.dropout, dtype=self.dtype_policy, name=name)

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

    def projections(self) -> list[Any]:
        """The dense layers inside, on which `quantize` and `enable_lora` work."""
        parts = [self.attention, self.feed_forward]
        if self.cross_attention:
            parts.insert(1, self.context_attention)
        return [projection for part in parts for projection in part.projections()]

    def call(
        self,
        inputs: Any,
        context: Any = None,
        mask: Any = None,
        inputs_mask: Any = None,
        context_mask: Any = None,
        attention_mask: Any = None,
        training: bool | None = None,
        segment_ids: Any = None,
        cache: Any = None,
        cache_index: Any = 0,
    ) -> Any:
        mask = inputs_mask if mask is None else mask
        caches = []

        def attend(x: Any) -> Any:
            result = self.attention(
                x,
                x,
                query_mask=mask,
                value_mask=mask,
                attention_mask=attention_mask,
                use_causal_mask=self.causal,
                training=training,
                segment_ids=segment_ids,
                **({} if cache is None else {"cache": cache, "cache_index": cache_index}),
            )
            if cache is None:
                return result
            caches.append(result[1])
            return result[0]

        x = self._residual(inputs, self.attention_norm, self.attention_dropout, attend, training)
        if self.cross_attention:
            x = self._residual(
                x,
                self.context_attention_norm,
                self.context_attention_dropout,
                lambda x: self.context_attention(
                    x, context, query_mask=mask, value_mask=context_mask, training=training
                ),
                training,
            )
        x = self._residual(
            x, self.feed_forward_norm, self.feed_forward_dropout, self.feed_forward, training
        )
        return (x, *caches) if caches else x

    def make_cache(self, batch_size: int, length: int) -> Any:
        """An empty `Cache` for `length` positions; the block must be built."""
        return self.attention.make_cache(batch_size, length)

    def _residual(self, x: Any, norm: Any, dropout: Any, part: Any, training: Any) -> Any:
        y = part(norm(x) if self.norm_position == "pre" else x)
        y = x + (dropout(y, training=training) if self.dropout > 0 else y)
        return y if self.norm_position == "pre" else norm(y)

    def compute_output_shape(self, inputs_shape: Any, context_shape: Any = None) -> Any:
        return inputs_shape

    def compute_output_spec(self, inputs: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        output = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if cache is None:
            return output
        return output, Cache(*(keras.KerasTensor(x.shape, dtype=x.dtype) for x in cache))

    def get_config(self) -> dict[str, Any]:
        config = {
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "num_kv_heads": self.num_kv_heads,
            "normalizer": serialize_options(self._normalizer()),
            "causal": self.causal,
            "cross_attention": self.cross_attention,
            "sliding_window": self.sliding_window,
            "rotary": serialize_rotary(
                self._rotary(), [self.attention.rotary] if self.built else []
            ),
            "qk_norm": self.qk_norm,
            "ffn_type": self.ffn_type,
            "ffn_expansion": self.ffn_expansion,
            "activation": self.activation and keras.activations.serialize(self.activation),
            "norm": self.norm,
            "norm_position": self.norm_position,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
        }
        return {**super().get_config(), **serialize_policy(self), **config}
