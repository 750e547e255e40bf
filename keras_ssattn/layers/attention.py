"""Multi-head attention with a choice of normalizer."""

import math
from collections.abc import Collection
from typing import ClassVar, NamedTuple

import keras
from keras import ops

from keras_ssattn._checks import check_choice, check_flag, check_heads, check_integer, check_rate
from keras_ssattn._keras.calling import call_inside
from keras_ssattn._keras.loading import NoWeights, freeze_sublayers
from keras_ssattn._keras.observing import observer
from keras_ssattn._keras.serialization import (
    check_options,
    own_config,
    policy_for,
    serialize_options,
)
from keras_ssattn._tensors import cast, dtype_of, multiply_wide
from keras_ssattn._typing import (
    ArrayLike,
    Axis,
    Config,
    DType,
    Identifier,
    Implementation,
    Layer,
    Number,
    Shape,
    Tensor,
)
from keras_ssattn.layers import normalizers
from keras_ssattn.layers.axes import AttentionAxes, check_axes
from keras_ssattn.layers.masks import (
    CallMasks,
    PacksSegments,
    check_cache_arguments,
    check_visibility,
    hide_rows,
    see,
    visible_in,
)
from keras_ssattn.layers.norms import check_epsilon, head_norm
from keras_ssattn.layers.projection import check_biases, check_output_shape, project, projection
from keras_ssattn.layers.rotary import specify, turn
from keras_ssattn.ops import (
    Cache,
    Visibility,
    attend,
    attend_weights,
    combine,
    factor_of_query,
    make_cache,
)
from keras_ssattn.ops.cache import CarriedCache, write_cache
from keras_ssattn.ops.rotary import Rotation


class Heads(NamedTuple):
    """Queries, keys and values divided into heads, and what multiplies the queries."""

    query: Tensor
    key: Tensor
    value: Tensor
    factor: Number | Tensor

    def cached(self, cache: Cache, visibility: Visibility) -> tuple["Heads", Cache]:
        """The same with the keys and values of a cache, into which these are written."""
        key, value = write_cache(cache, visibility.query_offset, self.key, self.value)
        kind = CarriedCache if isinstance(cache, CarriedCache) else Cache
        return self._replace(key=key, value=value), kind(key, value, visibility.key_mask)


@keras.saving.register_keras_serializable(package="keras_ssattn")
class MultiHeadAttention(PacksSegments, keras.layers.Layer):
    """Multi-head attention whose normalizer is SSMax, softpick, softmax or another.

    It is call- and weight-compatible with `keras.layers.MultiHeadAttention`: with
    `normalizer="softmax"` it takes that layer's config, loads its weights and gives its outputs.
    Arguments after the fifth are keyword-only. It differs in three points: a query that sees no
    key gets zeros (before the output projection), whatever the backend; an explicit `query_mask`
    is honored; the normalizer computes in float32 under mixed precision.

    Args:
        num_heads: H, number of query heads.
        key_dim: size of each query and key head.
        value_dim: size of each value head. Defaults to `key_dim`.
        num_kv_heads: number of key and value heads, a divisor of `num_heads`; each serves
            `num_heads / num_kv_heads` query heads. Defaults to `num_heads`.
        normalizer: `"ssmax"`, `"softpick"`, `"rectified_softpick"`, `"sink_softmax"`,
            `"softmax"`, a layer such as `SSMax(use_bias=True)`, or its config. A layer is a
            specification: its options are copied, its weights are not shared. SSMax has one s per
            query head.
        dropout: rate of dropout on the attention weights.
        use_bias: whether the projections have biases; or the names of those that have, of
            `"query"`, `"key"`, `"value"`, `"gate"` and `"attention_output"`.
        output_shape: an integer or tuple, the output's shape beyond batch and time. Defaults
            to the query's last dimension.
        attention_axes: axes of the inputs to attend over, an integer or several. Defaults to all
            but the first, the batch, and the last, the features.
        sliding_window: a query sees keys less than `sliding_window` positions away, on either
            side unless `use_causal_mask`. `None` for all.
        flash_attention: `True` asks for flash attention, and raises where it cannot be had;
            `None` and `False` ask for nothing.
        use_gate: whether to multiply each head's output by a sigmoid of a projection of the
            query, before the output projection.
        rotary: a `RotaryEmbedding` layer for queries and keys, or its config; `None` for none.
        qk_norm: whether to apply RMS normalization to each query and key head, before the
            length scale (after it, it would undo it).
        norm_epsilon: of these normalizations. Defaults to 1e-6.
        implementation: `"auto"`, `"dense"`, `"tiled"` or `"fused"`, as in
            `keras_ssattn.ops.attention`. Take `"dense"` to differentiate twice.
        kernel_initializer, bias_initializer: of the projections.
        kernel_regularizer, bias_regularizer, activity_regularizer: likewise.
        kernel_constraint, bias_constraint: likewise.
        seed: integer, of the dropout.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        query: `[B, T, E]`, or of any rank from 3 on, `[B, ..., E]`.
        value: `[B, S, Ev]`, of the query's rank.
        key: `[B, S, Ek]`. Defaults to `value`.
        query_mask: boolean `[B, T]`, or `[B, ...]`; rows where it is False get zero weights.
            Defaults to the mask attached to `query`; so do `value_mask` and `key_mask`.
        value_mask, key_mask: boolean `[B, S]`, or `[B, ...]`, False at padded keys.
        attention_mask: boolean `[B, T, S]`, `[B, 1 or H, T, S]` or `[T, S]`, True = attend. With
            several attended axes T and S stand for those of the query and those of the keys.
        return_attention_scores: whether to return the weights as well.
        training: whether dropout applies.
        use_causal_mask: whether a query sees no later position.
        segment_ids: integers `[B, T]`, or `[B, ...]`, of sequences packed into one, which do not
            see each other.
        cache: a `Cache` of earlier positions, from `make_cache`. The keys and values of these T
            are written to it from `cache_index` on, with their mask, and the queries see all
            that it holds up to their own positions; `use_causal_mask=True` is required.
        cache_index: position of the first of these T: an integer, or an integer tensor, scalar
            or `[B]`, one for each row. `cache_index + T` must not pass the cache's length.
        visibility: a `Visibility`, made once for several layers, which takes the place of the masks
            of values and keys, of causality and of `cache_index`; the layer's own window is added.
            With a cache it is that of the whole cache, with these T in it. It comes without
            `attention_mask` and `segment_ids`.
        rotation: a `Rotation` of the queries' positions, made once for several layers.

    All masks are combined by "and". n, the count that SSMax scales by, is the number of keys
    that each query then sees.

    Returns:
        `[B, T, E]` or `[B, T, *output_shape]`, with the query's mask; with
        `return_attention_scores=True` a pair of it and the weights, `[B, H, T, S]`, to which
        dropout is not applied. With a `cache`, a tuple that ends with the new one.

    Raises:
        ValueError: for sizes, rates, windows and shapes that do not fit.
        TypeError: for a float mask, or an unknown option.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import MultiHeadAttention
    >>> layer = MultiHeadAttention(num_heads=4, key_dim=16, normalizer="ssmax")
    >>> x = np.random.normal(size=(2, 10, 64)).astype("float32")
    >>> layer(x, x, use_causal_mask=True).shape
    (2, 10, 64)

    References: arXiv 1706.03762, 2501.19399 (SSMax), 2504.20966 (softpick), 2305.13245 (groups),
    2505.06708 (gates).
    """

    hints: ClassVar[dict[str, str]] = {
        "causal": "Causality is an argument of the call: `use_causal_mask=True`",
        "use_causal_mask": "It is an argument of the call",
        "num_query_heads": "Did you mean 'num_heads'?",
        "num_key_value_heads": "Did you mean 'num_kv_heads'?",
        "head_dim": "Did you mean 'key_dim'?",
    }

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        normalizer: Identifier = "ssmax",
        *,
        dropout: float = 0.0,
        use_bias: bool | Collection[str] = True,
        output_shape: int | Shape | None = None,
        attention_axes: Axis | None = None,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        use_gate: bool = False,
        rotary: Identifier = None,
        qk_norm: bool = False,
        norm_epsilon: float | None = None,
        implementation: Implementation = "auto",
        kernel_initializer: Identifier = "glorot_uniform",
        bias_initializer: Identifier = "zeros",
        kernel_regularizer: Identifier = None,
        bias_regularizer: Identifier = None,
        activity_regularizer: Identifier = None,
        kernel_constraint: Identifier = None,
        bias_constraint: Identifier = None,
        seed: int | None = None,
        **kwargs: object,
    ) -> None:
        if isinstance(num_kv_heads, float):
            raise ValueError(
                "`num_kv_heads`, the fourth argument, must be a positive integer or None; pass "
                f"`dropout`, Keras's fourth, by name. Received: num_kv_heads={num_kv_heads}"
            )
        num_heads, num_kv_heads = check_heads(num_heads, num_kv_heads)
        key_dim = check_integer("key_dim", key_dim)
        value_dim = check_integer("value_dim", value_dim, optional=True)
        sliding_window = check_integer("sliding_window", sliding_window, optional=True)
        check_rate("dropout", dropout)
        if flash_attention and dropout > 0:
            raise ValueError(
                "Dropout is not supported when flash attention is enabled. Received: "
                f"flash_attention={flash_attention}, dropout={dropout}"
            )
        check_choice("implementation", implementation, Implementation)
        check_options(self, kwargs, self.hints)
        specification, rotary = normalizers.get_for_attention(normalizer), specify(rotary)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim or key_dim
        self.num_kv_heads = num_kv_heads
        self.normalizer = specification.make(
            num_heads=num_heads, name="normalizer", dtype=policy_for(self, "normalizer")
        )
        self.dropout = dropout
        self.use_bias = check_biases(use_bias)
        self._output_shape = check_output_shape(output_shape)
        self.attention_axes = check_axes(attention_axes)
        self.sliding_window = sliding_window
        self.flash_attention = flash_attention
        self.use_gate = check_flag("use_gate", use_gate)
        self.rotary: Layer = rotary and rotary.make(dtype=policy_for(self, "rotary"))
        self.qk_norm = check_flag("qk_norm", qk_norm)
        self.norm_epsilon = check_epsilon(norm_epsilon)
        self.implementation = implementation
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.projection_regularizer = keras.regularizers.get(activity_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.seed = seed

    def build(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> None:
        key_shape = value_shape if key_shape is None else key_shape
        axes = self._axes(query_shape, value_shape, key_shape)
        query_shape, value_shape, key_shape = (
            axes.fold_shape(x) for x in (query_shape, value_shape, key_shape)
        )
        # Names and attributes are those of Keras's layer, so that its files of weights load.
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        self.query_dense = projection(self, "query", query_shape, (num_heads, self.key_dim))
        self.key_dense = projection(self, "key", key_shape, (num_kv_heads, self.key_dim))
        if self.use_gate:  # a private name, which is Keras's in files
            shape = (num_heads, self.value_dim)
            self._gate_dense = projection(self, "gate", query_shape, shape, "sigmoid")
        else:
            self._gate_dense = NoWeights(name="gate", dtype=policy_for(self, "gate"))
        self.value_dense = projection(self, "value", value_shape, (num_kv_heads, self.value_dim))
        shape = (*query_shape[:-1], num_heads, self.value_dim)
        features = self._output_shape or (query_shape[-1],)
        self.output_dense = projection(self, "attention_output", shape, features)
        self.normalizer.build_for_attention((None, None, num_heads, self.key_dim))
        name = "attention_dropout"
        self.attention_dropout = keras.layers.Dropout(
            self.dropout, seed=self.seed, dtype=policy_for(self, name), name=name
        )
        self.query_norm = head_norm(self, "query_norm", num_heads)
        self.key_norm = head_norm(self, "key_norm", num_kv_heads)
        if self.rotary is not None:
            self.rotary.build((None, None, num_heads, self.key_dim))
        freeze_sublayers(self)

    def _axes(self, query_shape: Shape, value_shape: Shape, key_shape: Shape) -> AttentionAxes:
        axes = AttentionAxes.of_shapes(query_shape, value_shape, key_shape, self.attention_axes)
        for name in ("sliding_window", "rotary"):
            if getattr(self, name) is not None:
                axes.require_one(name)
        return axes

    def projections(self) -> list[Layer]:
        """The `EinsumDense` layers, on which `quantize` and `enable_lora` work."""
        gate = [self._gate_dense] if self.use_gate else []
        return [self.query_dense, self.key_dense, *gate, self.value_dense, self.output_dense]

    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        query_mask: ArrayLike | None = None,
        value_mask: ArrayLike | None = None,
        key_mask: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        segment_ids: ArrayLike | None = None,
        cache: Cache | None = None,
        cache_index: int | ArrayLike = 0,
        visibility: Visibility | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        if self.flash_attention and return_attention_scores:
            raise ValueError(
                "Returning attention scores is not supported when flash attention is enabled. "
                "Please disable flash attention to access attention scores. Received: "
                "return_attention_scores=True, flash_attention=True"
            )
        if not (cache is None or isinstance(cache, Cache)):
            cache = Cache(*cache)
        key = value if key is None else key
        axes = AttentionAxes(len(query.shape), self.attention_axes)
        if use_causal_mask:
            axes.require_one("use_causal_mask")
        check_cache_arguments(cache, cache_index, use_causal_mask, segment_ids)
        inputs = axes.fold(query), axes.fold(value), axes.fold(key)
        if visibility is not None:
            others = {"attention_mask": attention_mask, "segment_ids": segment_ids}
            check_visibility(visibility, inputs, cache, use_causal_mask, others)
        else:
            keys = axes.pick(ops.shape(value))[1] if cache is None else (cache.key.shape[1],)
            masks = CallMasks(
                axes.fold_padding(query_mask, query),
                axes.fold_padding(value_mask, value),
                axes.fold_padding(key_mask, key),
                axes.fold_mask(attention_mask, self.num_heads, query, keys),
            )
            segments = axes.fold_padding(segment_ids, query)
            visibility, query_mask = see(
                inputs, masks, use_causal_mask, segments, cache, cache_index
            )
        visibility = visibility.within(self.sliding_window)
        heads = self._project(inputs, visibility, rotation, has_cache=cache is not None)
        if cache is not None:
            heads, cache = heads.cached(cache, visibility)
        output, weights = self._attend(
            heads, visibility, query_mask, return_attention_scores, training
        )
        if self.use_gate:
            output = output * project(self, self._gate_dense, inputs[0])
        results = [axes.unfold(project(self, self.output_dense, output), query)]
        if return_attention_scores:
            results.append(axes.unfold_scores(weights, query, value))
        if cache is not None:
            results.append(cache)
        return results[0] if len(results) == 1 else tuple(results)

    def _project(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        visibility: Visibility,
        rotation: Rotation | None,
        has_cache: bool,
    ) -> Heads:
        """Queries, keys and values by head, normalized and turned, and the factor of the query."""
        query, value, key = inputs
        is_self = has_cache or value is query
        key = project(self, self.key_dense, key)  # [B, S, K, D]
        query = project(self, self.query_dense, query)
        value = project(self, self.value_dense, value)
        if self.qk_norm:
            query = call_inside(self, self.query_norm, query)
            key = call_inside(self, self.key_norm, key)
        scale, factor = self.normalizer.length_scale, 1.0 / math.sqrt(self.key_dim)
        if scale.uses_query:  # which is before rotation
            query = cast(multiply_wide(query, scale(visibility.count, query)), dtype_of(query))
        elif scale.uses_count:
            factor = factor_of_query(scale(visibility.count), factor)
        if self.rotary is not None:
            if rotation is None:
                rotation = self.rotation(visibility, dtype_of(query))
            if is_self:
                query, key = turn(rotation, query, key)
            else:
                query, key = rotation.turn(query), self.rotary(key)
        return Heads(query, key, value, factor)

    def rotation(self, visibility: Visibility, dtype: DType) -> Rotation:
        """What turns queries of that visibility and dtype, for several layers with one rotary."""
        dtype = "float64" if dtype == "float64" else "float32"
        return self.rotary.rotation(visibility.positions, self.key_dim, dtype)

    def _attend(
        self,
        heads: Heads,
        visibility: Visibility,
        query_mask: Tensor | None,
        return_scores: bool,
        training: bool | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output by head `[B, T, H, Dv]`, and the weights if they are asked for."""
        kernel, weights, watching = self.normalizer.kernel(), None, observer()
        drops = self.dropout > 0 and training
        if return_scores or drops or watching is not None:
            weights = attend_weights(heads.query, heads.key, kernel, heads.factor, visibility)
            weights = hide_rows(weights, query_mask, (1, 3))
            if watching is not None:
                watching.attended(self, weights, visible_in(weights, visibility, query_mask))
            weights = cast(weights, self.compute_dtype)
        if return_scores or drops:
            dropped = self.attention_dropout(weights, training=training)
            return combine(dropped, heads.value), weights
        implementation = "flash" if self.flash_attention else self.implementation
        output = attend(**heads._asdict(), kernel=kernel, visibility=visibility,
                        implementation=implementation)  # fmt: skip
        return hide_rows(output, query_mask, (2, 3)), weights

    def make_cache(self, batch_size: int, length: int) -> Cache:
        """An empty `Cache` for `length` positions, in the layer's compute dtype."""
        sizes = (self.num_kv_heads, self.key_dim, self.value_dim)
        return make_cache(batch_size, length, *sizes, dtype=self.compute_dtype)

    def compute_output_shape(
        self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None
    ) -> Shape:
        self._axes(query_shape, value_shape, key_shape or value_shape)
        return (*query_shape[:-1], *(self._output_shape or (query_shape[-1],)))

    def compute_output_spec(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        *args: object,
        return_attention_scores: bool = False,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> keras.KerasTensor | tuple[keras.KerasTensor, ...]:
        shape = self.compute_output_shape(
            query.shape, value.shape, None if key is None else key.shape
        )
        results = [keras.KerasTensor(shape, dtype=self.compute_dtype)]
        if return_attention_scores:
            axes = AttentionAxes(len(query.shape), self.attention_axes)
            batch, times = axes.pick(query.shape)
            keys = axes.pick(value.shape)[1] if cache is None else (cache[0].shape[1],)
            shape = (*batch, self.num_heads, *times, *keys)
            results.append(keras.KerasTensor(shape, dtype=self.compute_dtype))
        if cache is not None:
            results.append(Cache(*(keras.KerasTensor(x.shape, dtype=x.dtype) for x in cache)))
        return results[0] if len(results) == 1 else tuple(results)

    def get_config(self) -> Config:
        own = own_config(
            self,
            MultiHeadAttention,
            normalizer=serialize_options(self.normalizer),
            output_shape=self._output_shape,
            rotary=self.rotary and serialize_options(self.rotary),
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            bias_initializer=keras.initializers.serialize(self.bias_initializer),
            kernel_regularizer=keras.regularizers.serialize(self.kernel_regularizer),
            bias_regularizer=keras.regularizers.serialize(self.bias_regularizer),
            activity_regularizer=keras.regularizers.serialize(self.projection_regularizer),
            kernel_constraint=keras.constraints.serialize(self.kernel_constraint),
            bias_constraint=keras.constraints.serialize(self.bias_constraint),
        )
        return {**super().get_config(), **own}
