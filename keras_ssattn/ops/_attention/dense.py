"""Dense attention: the reference implementation, which holds all T x S weights."""

from keras import ops

from keras_ssattn._frameworks import in_full_precision
from keras_ssattn._keras.exporting import is_exporting
from keras_ssattn._tensors import dtype_of, is_known, matmul
from keras_ssattn._typing import Number, Tensor
from keras_ssattn.ops import kernels
from keras_ssattn.ops.cache import by_head, may_be_carried
from keras_ssattn.ops.kernels import Kernel
from keras_ssattn.ops.visibility import Visibility


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    factor: Number | Tensor,
    visibility: Visibility,
) -> Tensor:
    """`keras_ssattn.ops.attention` by way of all the weights."""
    return combine(weights(query, key, kernel, factor, visibility), value)


@in_full_precision
def weights(
    query: Tensor, key: Tensor, kernel: Kernel, factor: Number | Tensor, visibility: Visibility
) -> Tensor:
    """Attention weights `[B, H, T, S]` in float32 or wider.

    The products are widened first: half logits would keep three digits, or overflow.
    """
    dtype = "float64" if "float64" in (dtype_of(query), dtype_of(key)) else "float32"
    query, key = ops.cast(query, dtype), ops.cast(key, dtype)
    if kernel.prescale != 1.0:  # in the query it costs no pass; entries below 2^-102 are lost
        factor = factor * kernel.prescale
    query = ops.transpose(query * factor, (0, 2, 1, 3))  # [B, H, T, D]
    if _is_one_row(query, key):
        logits = _logits_of_row(query, key)
    else:
        key = ops.transpose(key, (0, 2, 3, 1))  # [B, K, D, S]
        logits = _matmul_by_group(query, key)  # [B, H, T, S]
    by_row = tuple(ops.reshape(x, (-1, 1, 1)) for x in kernel.tensors)  # [H, 1, 1]
    return kernels.normalize(kernel.with_tensors(by_row), logits, (-1,), visibility.dense_mask)


@in_full_precision
def combine(weights: Tensor, value: Tensor) -> Tensor:
    """Sums values `[B, S, K, Dv]` by weights `[B, H, T, S]` to `[B, T, H, Dv]`.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> weights, value = keras.ops.ones((2, 4, 5, 7)), keras.ops.ones((2, 7, 1, 16))
    >>> ops.combine(weights, value).shape
    (2, 5, 4, 16)
    """
    dtype, value = dtype_of(value), ops.cast(value, dtype_of(weights))
    if _is_one_row(weights, value):
        return ops.cast(_combine_row(weights, value), dtype)
    value = ops.transpose(value, (0, 2, 1, 3))  # [B, K, S, Dv]
    out = _matmul_by_group(weights, value)  # [B, H, T, Dv]
    return ops.cast(ops.transpose(out, (0, 2, 1, 3)), dtype)


def _is_one_row(x: Tensor, y: Tensor) -> bool:
    """Whether there is one query for a compiler, of `[B, H, T, M]`: as in a step of decoding.

    Then the products, with `[B, S, K, N]`, are of stacks of matrices as they lie in a
    `CarriedCache`, in an order of factors in which XLA turns none of them over.
    """
    if not may_be_carried() or is_exporting():
        return False
    known = all(is_known(size) for size in (*x.shape, *y.shape))
    return known and x.shape[2] == 1 and x.shape[0] == y.shape[0]


def _logits_of_row(query: Tensor, key: Tensor) -> Tensor:
    """`[B, H, 1, D]` times `[B, S, K, D]`, `[B, H, 1, S]`."""
    batch, num_heads, _, size = ops.shape(query)
    length, num_kv_heads = ops.shape(key)[1], key.shape[2]
    rows = (batch * num_kv_heads, num_heads // num_kv_heads, size)
    logits = matmul(by_head(key), ops.swapaxes(ops.reshape(query, rows), 1, 2))  # [B * K, S, G]
    return ops.reshape(ops.swapaxes(logits, 1, 2), (batch, num_heads, 1, length))


def _combine_row(weights: Tensor, value: Tensor) -> Tensor:
    """`[B, H, 1, S]` times `[B, S, K, Dv]`, `[B, 1, H, Dv]`."""
    batch, num_heads, _, length = ops.shape(weights)
    num_kv_heads, size = value.shape[2:]
    rows = (batch * num_kv_heads, num_heads // num_kv_heads, length)
    out = matmul(ops.reshape(weights, rows), by_head(value))  # [B * K, G, Dv]
    return ops.reshape(out, (batch, 1, num_heads, size))


def _matmul_by_group(x: Tensor, y: Tensor) -> Tensor:
    """`[B, H, T, M] @ [B, K, M, N]` where H / K heads of x share one of y, not repeated."""
    num_heads, num_kv_heads = x.shape[1], y.shape[1]
    if num_heads == num_kv_heads:
        return matmul(x, y)
    batch, _, length, inner = ops.shape(x)
    if is_exporting():  # PyTorch cannot tell which lengths the rows of groups may have
        x = ops.reshape(x, (batch, num_kv_heads, -1, length, inner))  # [B, K, H/K, T, M]
        out = matmul(x, ops.expand_dims(y, 2))  # [B, K, H/K, T, N]
        return ops.reshape(out, (batch, num_heads, length, ops.shape(y)[3]))
    rows = num_heads // num_kv_heads * length
    x = ops.reshape(x, (batch, num_kv_heads, rows, inner))  # [B, K, H/K * T, M]
    out = matmul(x, y)  # [B, K, H/K * T, N]
    return ops.reshape(out, (batch, num_heads, length, ops.shape(y)[3]))
