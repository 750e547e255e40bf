"""Multi-head attention with a choice of normalizer."""

from typing import Any

import keras
from keras import ops

from keras_ssattn.layers import normalizers
from keras_ssattn.layers._config import (
    NoWeights,
    check_groups,
    check_positive,
    check_rate,
    freeze_sublayers,
    serialize_options,
    serialize_policy,
)
from keras_ssattn.layers._masks import (
    attention_mask_by_head,
    both_masks,
    hide_rows,
    padding_mask,
)
from keras_ssattn.layers.projection import check_output_shape, projection
from keras_ssattn.layers.rotary import get_rotary, rotate
from keras_ssattn.ops import (
    Cache,
    attention,
    attention_weights,
    dense,
    key_count,
    make_cache,
    update_cache,
    visible_keys,
)
from keras_ssattn.ops._arguments import dtype_of, scaled


@keras.saving.register_keras_serializable(package="keras_ssattn")
class MultiHeadAttention(keras.layers.Layer):
    """Multi-head attention whose normalizer is SSMax, softpick, rectified softpick or softmax.

    The call is that of `keras.layers.MultiHeadAttention`, and so are the projections `query`,
    `key`, `value` and `attention_output` and their weights: with `normalizer="softmax"` the
    layer loads that layer's weights and gives its outputs. It differs in three points: a query
    that sees no key gets zeros (before the output projection), whatever the backend; an
    explicit `query_mask` is honored; the normalizer computes in float32 under mixed precision.

    Args:
        num_heads: H, number of query heads.
        key_dim: size of each query and key head.
        value_dim: size of each value head. Defaults to `key_dim`.
        num_kv_heads: number of key and value heads, a divisor of `num_heads`; each serves
            `num_heads / num_kv_heads` query heads. Defaults to `num_heads`.
        normalizer: `"ssmax"`, `"softpick"`, `"rectified_softpick"`, `"softmax"`, a layer such
            as `SSMax(use_bias=True)`, or its config. A layer is a specification: its options
            are copied, its weights are not shared. SSMax has one s per query head.
        dropout: rate of dropout on the attention weights.
        use_bias: whether the projections have biases.
        output_shape: an integer or tuple, the output's shape beyond batch and time. Defaults
            to the query's last dimension.
        sliding_window: a query sees keys less than `sliding_window` positions away, on either
            side unless `use_causal_mask`. `None` for all.
        rotary: a `RotaryEmbedding` layer for queries and keys, or its config; `None` for none.
        qk_norm: whether to apply RMS normalization to each query and key head, before the
            length scale (after it, it would undo it).
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer,
        kernel_constraint, bias_constraint: of the projections.
        seed: integer, of the dropout.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        query: `[B, T, E]`.
        value: `[B, S, Ev]`.
        key: `[B, S, Ek]`. Defaults to `value`.
        query_mask: boolean `[B, T]`; rows where it is False get zero weights. Defaults to the
            mask attached to `query`; so do `value_mask` and `key_mask`.
        value_mask, key_mask: boolean `[B, S]`, False at padded keys.
        attention_mask: boolean `[B, T, S]`, `[B, 1 or H, T, S]` or `[T, S]`, True = attend.
        return_attention_scores: whether to return the weights as well.
        training: whether dropout applies.
        use_causal_mask: whether a query sees no later position.
        segment_ids: integers `[B, T]` of sequences packed into one, which do not see each other.
        cache: a `Cache` of earlier positions, from `make_cache`. The keys and values of these T
            are written to it from `cache_index` on, with their mask, and the queries see all
            that it holds up to their own positions; `use_causal_mask=True` is required.
        cache_index: position of the first of these T: an integer, or an integer tensor, scalar
            or `[B]`, one for each row. `cache_index + T` must not pass the cache's length.

    All masks are combined by "and". n, the count that SSMax scales by, is the number of keys
    that each query then sees.

    Returns:
        `[B, T, E]` or `[B, T, *output_shape]`, with the query's mask; with
        `return_attention_scores=True` a pair of it and the weights, `[B, H, T, S]`, to which
        dropout is not applied. With a `cache`, a tuple that ends with the new one.

    Raises:
        ValueError: for sizes, rates, windows and shapes that do not fit.
        TypeError: for a float mask.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import MultiHeadAttention
    >>> layer = MultiHeadAttention(num_heads=4, key_dim=16, normalizer="ssmax")
    >>> x = np.random.normal(size=(2, 10, 64)).astype("float32")
    >>> layer(x, x, use_causal_mask=True).shape
    (2, 10, 64)

    References: arXiv 1706.03762, 2501.19399 (SSMax), 2504.20966 (softpick), 2305.13245 (groups).
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        normalizer: Any = "ssmax",
        *,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: Any = None,
        sliding_window: int | None = None,
        rotary: Any = None,
        qk_norm: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        num_heads, num_kv_heads = check_groups(num_heads, num_kv_heads)
        key_dim = check_positive("key_dim", key_dim)
        value_dim = check_positive("value_dim", value_dim, optional=True)
        sliding_window = check_positive("sliding_window", sliding_window, optional=True)
        check_rate("dropout", dropout)
        normalizer = normalizers.get_for_attention(normalizer)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim or key_dim
        self.num_kv_heads = num_kv_heads
        self.normalizer = normalizer.copy_for(num_heads, name="normalizer", dtype=self.dtype_policy)
        self.normalizer.length_scale.query_size = key_dim
        self.dropout = dropout
        self.use_bias = use_bias
        self._output_shape = check_output_shape(output_shape)
        self.sliding_window = sliding_window
        self.rotary: Any = get_rotary(rotary, self.dtype_policy)
        self.qk_norm = qk_norm
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.seed = seed

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        key_shape = value_shape if key_shape is None else key_shape
        shapes = {"query": query_shape, "key": key_shape, "value": value_shape}
        for name, shape in shapes.items():
            if len(shape) != 3:
                raise ValueError(
                    f"`{name}` must have shape [batch, time, features]. Received: {name} with "
                    f"shape {tuple(shape)}"
                )
        # Names and attributes are those of Keras's layer, so that its files of weights load.
        heads, groups = self.num_heads, self.num_kv_heads
        self.query_dense = projection(self, "query", query_shape, (heads, self.key_dim))
        self.key_dense = projection(self, "key", key_shape, (groups, self.key_dim))
        self.value_dense = projection(self, "value", value_shape, (groups, self.value_dim))
        shape = (*query_shape[:-1], heads, self.value_dim)
        features = self._output_shape or (query_shape[-1],)
        self.output_dense = projection(self, "attention_output", shape, features)
        self.normalizer.build((None, self.num_heads, None, None))
        self.attention_dropout = keras.layers.Dropout(
            self.dropout, seed=self.seed, dtype=self.dtype_policy, name="attention_dropout"
        )
        self.query_norm = self._head_norm("query_norm", self.num_heads)
        self.key_norm = self._head_norm("key_norm", self.num_kv_heads)
        if self.rotary is not None:
            self.rotary.build((None, None, self.num_heads, self.key_dim))
        freeze_sublayers(self)

    def _head_norm(self, name: str, num_heads: int) -> Any:
        if not self.qk_norm:
            return NoWeights(name=name, dtype=self.dtype_policy)
        norm = keras.layers.RMSNormalization(dtype=self.dtype_policy, name=name)
        norm.supports_masking = True
        norm.build((None, None, num_heads, self.key_dim))
        return norm

    def projections(self) -> list[Any]:
        """The four `EinsumDense` layers, on which `quantize` and `enable_lora` work."""
        return [self.query_dense, self.key_dense, self.value_dense, self.output_dense]

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        segment_ids: Any = None,
        cache: Any = None,
        cache_index: Any = 0,
    ) -> Any:
        if cache is not None and (not use_causal_mask or segment_ids is not None):
            raise ValueError("`cache` goes with `use_causal_mask=True`, without `segment_ids`.")
        if cache is None and not (isinstance(cache_index, int) and cache_index == 0):
            raise ValueError("`cache_index` goes with `cache`. Received: cache=None")
        batch, length = query.shape[:2]
        sizes = (batch, self.num_heads, length, (value if cache is None else cache[0]).shape[1])
        query_mask = padding_mask("query_mask", query_mask, (batch, length), "[B, T]")
        visibility = {
            "mask": attention_mask_by_head(attention_mask, sizes),
            "key_mask": both_masks(value_mask, key_mask, (batch, value.shape[1])),
            "causal": use_causal_mask,
            "window": self.sliding_window,
            "query_offset": cache_index,
            "segment_ids": segment_ids,
        }
        key = self.key_norm(self.key_dense(value if key is None else key))  # [B, S, K, D]
        query, value = self.query_norm(self.query_dense(query)), self.value_dense(value)
        uses_query = self.normalizer.length_scale.uses_query  # which is before rotation
        if uses_query:
            [key] = rotate(self.rotary, cache_index, key)
        else:
            query, key = rotate(self.rotary, cache_index, query, key)
        if cache is not None:
            cache = update_cache(cache, cache_index, key, value, visibility["key_mask"])
            key, value, visibility["key_mask"] = cache
            if length == 1:  # one row of a mask, for the count and for the attention
                visibility = {"mask": visible_keys(1, ops.shape(key)[1], **visibility)}
        options = {"normalizer": self.normalizer.kernel, **self.normalizer.kernel_options()}
        if self.normalizer.uses_count:
            n = key_count(ops.shape(query)[1], ops.shape(key)[1], **visibility)
            if uses_query:
                factor = self.normalizer.length_scale(n, query)
                query = ops.cast(scaled(query, factor), dtype_of(query))
            else:
                options["length_scale"] = self.normalizer.length_scale(n)
        if uses_query:
            [query] = rotate(self.rotary, cache_index, query)
        weights = None
        if return_attention_scores or (self.dropout > 0 and training):
            weights = attention_weights(query, key, **visibility, **options)
            weights = ops.cast(weights, self.compute_dtype)
            weights = hide_rows(weights, query_mask, (1, 3))
            output = dense.combine(self.attention_dropout(weights, training=training), value)
        else:
            output = attention(query, key, value, **visibility, **options)
            output = hide_rows(output, query_mask, (2, 3))
        extra = (weights if return_attention_scores else None, cache)
        results = [self.output_dense(output), *(x for x in extra if x is not None)]
        return results[0] if len(results) == 1 else tuple(results)

    def make_cache(self, batch_size: int, length: int) -> Any:
        """An empty `Cache` for `length` positions, in the layer's compute dtype."""
        sizes = (self.num_kv_heads, self.key_dim, self.value_dim)
        return make_cache(batch_size, length, *sizes, dtype=self.compute_dtype)

    def compute_output_shape(
        self, query_shape: Any, value_shape: Any, key_shape: Any = None
    ) -> tuple:
        return (*query_shape[:2], *(self._output_shape or (query_shape[-1],)))

    def compute_output_spec(
        self,
        query: Any,
        value: Any,
        *args: Any,
        return_attention_scores: bool = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        shape = self.compute_output_shape(query.shape, value.shape)
        results: list[Any] = [keras.KerasTensor(shape, dtype=self.compute_dtype)]
        if return_attention_scores:
            key_length = value.shape[1] if cache is None else cache[0].shape[1]
            shape = (query.shape[0], self.num_heads, query.shape[1], key_length)
            results.append(keras.KerasTensor(shape, dtype=self.compute_dtype))
        if cache is not None:
            results.append(Cache(*(keras.KerasTensor(x.shape, dtype=x.dtype) for x in cache)))
        return results[0] if len(results) == 1 else tuple(results)

    def get_config(self) -> dict[str, Any]:
        config = {
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "num_kv_heads": self.num_kv_heads,
            "normalizer": serialize_options(self.normalizer),
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "output_shape": self._output_shape,
            "sliding_window": self.sliding_window,
            "rotary": self.rotary and serialize_options(self.rotary),
            "qk_norm": self.qk_norm,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "seed": self.seed,
        }
        return {**super().get_config(), **serialize_policy(self), **config}
