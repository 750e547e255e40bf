"""Dense attention: the reference implementation, which holds all T x S weights."""

from typing import Any

from keras import ops

from keras_ssattn.ops import normalizers
from keras_ssattn.ops._arguments import dtype_of
from keras_ssattn.ops.visibility import visible_keys

KERNELS = {
    "softmax": normalizers.softmax,
    "softpick": normalizers.softpick,
    "rectified_softpick": normalizers.rectified_softpick,
}


def weights(
    query: Any,
    key: Any,
    normalizer: str,
    scale: Any,
    visibility: dict[str, Any],
    epsilon: float = 1e-6,
) -> Any:
    """Attention weights `[B, H, T, S]` in float32 or wider.

    The products are widened first: half logits would keep three digits, or overflow.
    """
    dtype = "float64" if "float64" in (dtype_of(query), dtype_of(key)) else "float32"
    query, key = ops.cast(query, dtype), ops.cast(key, dtype)
    query_length, key_length = ops.shape(query)[1], ops.shape(key)[1]
    query = ops.transpose(query * scale, (0, 2, 1, 3))  # [B, H, T, D]
    key = ops.transpose(key, (0, 2, 3, 1))  # [B, K, D, S]
    logits = _matmul_by_group(query, key)  # [B, H, T, S]
    visible = visible_keys(query_length, key_length, **visibility)
    options = {"epsilon": epsilon} if normalizer == "rectified_softpick" else {}
    return KERNELS[normalizer](logits, mask=visible, **options)


def attention(
    query: Any, key: Any, value: Any, normalizer: str, scale: Any, visibility: dict, epsilon: float
) -> Any:
    """`keras_ssattn.ops.attention` by way of all the weights."""
    return combine(weights(query, key, normalizer, scale, visibility, epsilon), value)


def combine(weights: Any, value: Any) -> Any:
    """Sums values `[B, S, K, Dv]` by weights `[B, H, T, S]` to `[B, T, H, Dv]`."""
    dtype = dtype_of(value)
    value = ops.transpose(ops.cast(value, dtype_of(weights)), (0, 2, 1, 3))  # [B, K, S, Dv]
    out = _matmul_by_group(weights, value)  # [B, H, T, Dv]
    return ops.cast(ops.transpose(out, (0, 2, 1, 3)), dtype)


def _matmul_by_group(x: Any, y: Any) -> Any:
    """`[B, H, T, M] @ [B, K, M, N]` where H / K heads of x share one of y, not repeated."""
    num_heads, num_kv_heads = x.shape[1], y.shape[1]
    if num_heads == num_kv_heads:
        return _matmul(x, y)
    batch, _, length, inner = ops.shape(x)
    rows = num_heads // num_kv_heads * length
    x = ops.reshape(x, (batch, num_kv_heads, rows, inner))  # [B, K, H/K * T, M]
    out = _matmul(x, y)  # [B, K, H/K * T, N]
    return ops.reshape(out, (batch, num_heads, length, ops.shape(y)[3]))


def _matmul(x: Any, y: Any) -> Any:
    """`ops.matmul`, which on PyTorch computes float64 in float32."""
    return x @ y if dtype_of(x) == "float64" else ops.matmul(x, y)
