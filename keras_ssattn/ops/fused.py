"""Softmax attention by Keras's own function, where that runs a fused kernel."""

from typing import Any

import keras
from keras import ops

from keras_ssattn.ops._arguments import cast, dtype_of, widen
from keras_ssattn.ops.visibility import visible_keys

TORCH_TAKES_BIAS = tuple(int(x) for x in keras.version().split(".")[:2]) >= (3, 14)


def is_available(kernel: str, dtypes: list[str], visibility: dict) -> bool:
    """Whether a fused kernel serves these arguments, exactly; Keras narrows float64 on PyTorch."""
    if kernel != "softmax" or "float64" in dtypes:
        return False
    if keras.backend.backend() == "torch":
        return TORCH_TAKES_BIAS or not needs_mask(visibility)
    return flash_only() and not needs_mask(visibility)


def flash_only() -> bool:
    """Whether to ask for flash attention: on JAX with a GPU, where else all weights are computed.

    Not on a TPU: there Keras makes a `T x S` mask, and takes that of one row for the whole batch.
    """
    if keras.backend.backend() != "jax":
        return False
    return keras.distribution.list_devices()[0].split(":")[0] in ("gpu", "cuda", "rocm")


def needs_mask(visibility: dict) -> bool:
    """Whether more is hidden than what comes after the query's own position."""
    masks = ("mask", "key_mask", "window", "segment_ids")
    offset = visibility["query_offset"]
    shifted = not (isinstance(offset, int) and offset == 0)
    return any(visibility[name] is not None for name in masks) or (visibility["causal"] and shifted)


def attention(
    query: Any, key: Any, value: Any, _kernel: str, factor: Any, visibility: dict, _epsilon: float
) -> Any:
    """Softmax attention by `keras.ops.dot_product_attention`, which runs a fused kernel."""
    dtype = dtype_of(value)
    if dtype_of(query) == "float16" and not isinstance(factor, (int, float)):
        # s log n times the query may pass the largest float16
        query, key, value = widen(query), widen(key), widen(value)
    num_heads, num_kv_heads = query.shape[2], key.shape[2]
    if num_kv_heads < num_heads:  # one key head, or an old Keras, is not repeated inside
        key, value = (ops.repeat(x, num_heads // num_kv_heads, axis=2) for x in (key, value))
    if isinstance(factor, (int, float)):
        scale = factor
    else:
        query, scale = cast(widen(query) * factor, dtype_of(query)), 1.0
    query_length, key_length = ops.shape(query)[1], ops.shape(key)[1]
    if not needs_mask(visibility):
        out = ops.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=visibility["causal"],
            flash_attention=flash_only() or None,  # it raises if the kernel cannot serve them
        )
        return cast(out, dtype)
    visible = visible_keys(query_length, key_length, **visibility)
    # An additive -inf, unlike the finite number that `mask=` becomes there, is exact for all
    # logits. A row of nothing but -inf would be NaN: such rows are opened, then zeroed.
    some = ops.any(visible, axis=-1, keepdims=True)  # [B|1, H|1, T|1, 1]
    closed = ops.where(some, -float("inf"), 0.0)
    bias = cast(ops.where(visible, 0.0, closed), dtype_of(query))
    out = ops.dot_product_attention(query, key, value, bias=bias, scale=scale)
    out = ops.where(ops.transpose(some, (0, 2, 1, 3)), out, 0.0)
    return cast(out, dtype)
