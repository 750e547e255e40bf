"""Attention with any normalizer, any visibility and any length scale."""

import math
import numbers
from typing import Any

import keras
from keras import ops

from keras_ssattn.ops import dense, fused, tiled
from keras_ssattn.ops._arguments import (
    cast,
    check_broadcastable,
    check_floating,
    check_rank,
    dtype_of,
    to_tensor,
    widen,
)
from keras_ssattn.ops.length_scale import log_length_scale
from keras_ssattn.ops.normalizers import check_epsilon
from keras_ssattn.ops.visibility import check_segments, check_visibility, key_count

NORMALIZERS = ("softmax", "ssmax", "softpick", "rectified_softpick")
COMPUTE = {"dense": dense.attention, "tiled": tiled.attention, "fused": fused.attention}
# T * S beyond which tiles are faster than all weights, measured on two CPU cores; and the most
# entries of a mask for the fused kernel, 16 MiB in float32.
DENSE_UP_TO, MASKED_UP_TO = 2**19, 2**22


def attention(
    query: Any,
    key: Any,
    value: Any,
    normalizer: str = "softmax",
    scale: float | None = None,
    mask: Any = None,
    key_mask: Any = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: Any = 0,
    *,
    segment_ids: Any = None,
    length_scale: Any = None,
    epsilon: float = 1e-6,
    implementation: str = "auto",
) -> Any:
    r"""Scaled dot-product attention, :math:`o_i = \sum_j w_{ij} v_j`.

    The weights are `normalizer(x)` of the logits
    :math:`x_{ij} = a_i \, (q_i \cdot k_j) \cdot scale` over the keys that query i sees. The
    length scale a multiplies the query, so it costs nothing and cannot meet a mask.

    Args:
        query: floating-point `[B, T, H, D]`.
        key: `[B, S, K, D]`. K divides H; `H / K` query heads in a row share a key head.
        value: `[B, S, K, Dv]`.
        normalizer: `"softmax"`, `"ssmax"`, `"softpick"` or `"rectified_softpick"`. `"ssmax"` is
            softmax whose length scale is, unless given, `log n` (`s = 1`).
        scale: number that multiplies the logits. Defaults to `1 / sqrt(D)`.
        mask: boolean `[T, S]`, or broadcastable to `[B, H, T, S]`; True = attend.
        key_mask: boolean `[B, S]`, False at padded keys.
        causal: whether a query sees no later position.
        window: a query sees keys less than `window` positions away. `None` for all.
        query_offset: position of the first query, an integer or an integer tensor `[B]`.
        segment_ids: integers `[B, T]`, where T = S, of sequences packed into one, which do not
            see each other; or a pair of those of the queries, `[B, T]`, and the keys, `[B, S]`.
        length_scale: the factor a, a number or a tensor broadcastable to `[B, H, T]`, such as
            `log_length_scale(key_count(...), s)`. Defaults to 1.
        epsilon: of `rectified_softpick`; the others do not use it.
        implementation: `"dense"` computes all `T x S` weights, in float32 for half inputs.
            `"tiled"` computes them a tile at a time, in memory linear in T and S, and again in
            the backward pass; it skips tiles that `causal` and `window` hide. It has a second
            derivative on JAX only, without these two. `"fused"` calls
            `keras.ops.dot_product_attention`, for softmax and ssmax, where that is a fused kernel:
            on PyTorch, and without masks beyond causality on JAX with a GPU, in half precision,
            where cuDNN has one; elsewhere, in float64, and masked on Keras before 3.14, it raises.
            `"auto"` takes `"fused"` on PyTorch, if it needs no mask beyond causality, or one of at
            most 2^22 entries; else `"tiled"` where `T * S` passes 2^19 (724 x 724), or is unknown
            until a TensorFlow graph runs (a short input is then one tile); else `"dense"`.

    Returns:
        `[B, T, H, Dv]` in the dtype of `value`. A query that sees no key gets zeros.

    Raises:
        TypeError: for inputs that are not floating-point, or a float mask.
        ValueError: for any other argument that does not fit.
        NotImplementedError: where the gradient of tiled attention is differentiated and has no
            derivative.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> q = keras.random.normal((2, 7, 4, 16))
    >>> kv = keras.random.normal((2, 7, 1, 16))  # four query heads share one of keys
    >>> ops.attention(q, kv, kv, normalizer="ssmax", causal=True).shape
    (2, 7, 4, 16)

    References: arXiv 2501.19399 (SSMax), arXiv 2504.20966 (rectified softpick).
    """
    segments = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,)
    inputs = query, key, value, mask, key_mask, query_offset, length_scale, *segments
    if any(isinstance(x, keras.KerasTensor) for x in inputs):
        options = normalizer, scale, causal, window, epsilon, implementation
        if segment_ids is not None and len(segments) == 1:
            segment_ids = segment_ids, segment_ids
        return Attention(*options)(
            query,
            key,
            value,
            mask=mask,
            key_mask=key_mask,
            query_offset=query_offset,
            segment_ids=segment_ids,
            length_scale=length_scale,
        )
    query, key, value = _check_tensors(query, key, value)
    visibility = _visibility(query, key, mask, key_mask, causal, window, query_offset, segment_ids)
    if normalizer == "rectified_softpick":
        check_epsilon(epsilon)
    kernel, factor = _query_factor(normalizer, scale, length_scale, query, key, visibility)
    if implementation not in ("auto", *COMPUTE):
        raise ValueError(
            f"`implementation` must be one of {('auto', *COMPUTE)}. Received: "
            f"implementation={implementation!r}"
        )
    dtypes = sorted({dtype_of(x) for x in (query, key, value)})
    can_fuse = fused.is_available(kernel, dtypes, visibility)
    if implementation == "fused" and not can_fuse:
        raise ValueError(
            'implementation="fused" serves softmax and ssmax up to float32: on torch, with masks '
            "from Keras 3.14 on; on JAX with a GPU, without masks beyond causality. Received: "
            f"{normalizer}, {dtypes}, on {keras.backend.backend()}, Keras {keras.version()}"
        )
    arguments = (query, key, value, kernel, factor, visibility, epsilon)
    if query.shape[0] == 0:  # nothing to compute, and PyTorch has no maximum of nothing
        return dense.attention(*arguments)
    if implementation != "auto":
        return COMPUTE[implementation](*arguments)
    size = ops.shape(query)[1] * ops.shape(key)[1]
    can_fuse = can_fuse and keras.backend.backend() == "torch"
    if can_fuse and (not fused.needs_mask(visibility) or size <= MASKED_UP_TO):
        return fused.attention(*arguments)
    # Under XLA, TensorFlow has no gradient of a choice made when the graph runs.
    is_long = size > DENSE_UP_TO if isinstance(size, int) else ops.is_tensor(size)
    return (tiled if is_long else dense).attention(*arguments)


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Attention(keras.Operation):
    """`attention` as a step of a functional model, which runs it whole.

    Without it the model would be made of the operations of the dense implementation.
    """

    def __init__(
        self,
        normalizer: str,
        scale: float | None,
        causal: bool,
        window: int | None,
        epsilon: float,
        implementation: str,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.options: dict[str, Any] = {
            "normalizer": normalizer,
            "scale": scale,
            "causal": causal,
            "window": window,
            "epsilon": epsilon,
            "implementation": implementation,
        }

    def call(
        self, query: Any, key: Any, value: Any, segment_ids: Any = None, **tensors: Any
    ) -> Any:
        if segment_ids is not None:
            segment_ids = tuple(segment_ids)  # a pair, which is a list once it is loaded
        tensors["segment_ids"] = segment_ids
        return attention(query, key, value, **tensors, **self.options)

    def get_config(self) -> dict[str, Any]:
        return {**self.options, "name": self.name}


def attention_weights(
    query: Any,
    key: Any,
    normalizer: str = "softmax",
    scale: float | None = None,
    mask: Any = None,
    key_mask: Any = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: Any = 0,
    *,
    segment_ids: Any = None,
    length_scale: Any = None,
    epsilon: float = 1e-6,
) -> Any:
    """The weights `[B, H, T, S]` that `attention` with these arguments gives the values.

    They are float32 (float64 for float64 inputs). Arguments and errors are `attention`'s.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> q = keras.random.normal((2, 7, 4, 16))
    >>> ops.attention_weights(q, q, normalizer="softpick", causal=True).shape
    (2, 4, 7, 7)
    """
    query, key, _ = _check_tensors(query, key, key)
    visibility = _visibility(query, key, mask, key_mask, causal, window, query_offset, segment_ids)
    kernel, factor = _query_factor(normalizer, scale, length_scale, query, key, visibility)
    return dense.weights(query, key, kernel, factor, visibility, epsilon)


def _visibility(
    query: Any,
    key: Any,
    mask: Any,
    key_mask: Any,
    causal: bool,
    window: Any,
    query_offset: Any,
    segment_ids: Any,
) -> dict[str, Any]:
    """The arguments of `visible_keys`, checked against the tensors."""
    (batch, length, num_heads, _), key_length = query.shape, key.shape[1]
    mask, key_mask, window, query_offset = check_visibility(
        length, key_length, mask, key_mask, window, query_offset
    )
    if mask is not None:
        sizes = (batch, num_heads, length, key_length)
        check_broadcastable("mask", tuple(mask.shape), sizes, "[B, H, T, S]")
    if key_mask is not None:
        check_broadcastable("key_mask", tuple(key_mask.shape), (batch, key_length), "[B, S]")
    segments = check_segments(segment_ids, length, key_length)
    for x in segments or ():
        check_broadcastable("segment_ids", tuple(x.shape[:1]), (batch,), "[B]")
    if hasattr(query_offset, "shape"):
        check_broadcastable("query_offset", tuple(query_offset.shape), (batch,), "[B]")
    if None in (ops.shape(query)[1], ops.shape(key)[1]) and (causal or window is not None):
        raise ValueError(
            "symbolic `query` and `key` must have a known length with `causal` or `window`. "
            f"Received: query with shape {tuple(query.shape)}, key with shape {tuple(key.shape)}"
        )
    return {
        "mask": mask,
        "key_mask": key_mask,
        "causal": bool(causal),
        "window": window,
        "query_offset": query_offset,
        "segment_ids": segments,
    }


def _query_factor(
    normalizer: str, scale: Any, length_scale: Any, query: Any, key: Any, visibility: dict
) -> tuple[str, Any]:
    """The kernel's name, and what to multiply the query by: a number or `[B|1, T|1, H|1, 1]`."""
    if normalizer not in NORMALIZERS:
        raise ValueError(
            f"`normalizer` must be one of {NORMALIZERS}. Received: normalizer={normalizer!r}"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    elif not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"`scale` must be a finite number or None. Received: scale={scale!r}")
    if normalizer == "ssmax":
        normalizer = "softmax"
        if length_scale is None:
            count = key_count(ops.shape(query)[1], ops.shape(key)[1], **visibility)
            length_scale = log_length_scale(ops.cast(count, dtype_of(widen(query))))
    if length_scale is None:
        return normalizer, scale
    length_scale = cast(to_tensor(length_scale), dtype_of(widen(query)))
    batch, length, num_heads, _ = query.shape
    check_broadcastable(
        "length_scale", tuple(length_scale.shape), (batch, num_heads, length), "[B, H, T]"
    )
    while len(length_scale.shape) < 3:
        length_scale = ops.expand_dims(length_scale, 0)
    return normalizer, ops.expand_dims(ops.transpose(length_scale * scale, (0, 2, 1)), -1)


def _check_tensors(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    query, key, value = to_tensor(query), to_tensor(key), to_tensor(value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(name, x)
        check_rank(name, x, 4)
    (_, _, num_heads, size), (_, length, num_kv_heads, key_size) = query.shape, key.shape
    batches = {x.shape[0] for x in (query, key, value)} - {None}
    if len(batches) > 1:
        raise ValueError(
            "`query`, `key` and `value` must have the same batch size. Received: shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if size != key_size:
        raise ValueError(
            "`query` and `key` must have the same last dimension. Received: query with shape "
            f"{tuple(query.shape)}, key with shape {tuple(key.shape)}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            "the number of heads of `query` must be a multiple of that of `key`. Received: query "
            f"with shape {tuple(query.shape)}, key with shape {tuple(key.shape)}"
        )
    if value.shape[2] != num_kv_heads or (
        None not in (length, value.shape[1]) and value.shape[1] != length
    ):
        raise ValueError(
            "`key` and `value` must have the same length and number of heads. Received: key with "
            f"shape {tuple(key.shape)}, value with shape {tuple(value.shape)}"
        )
    return query, key, value
