"""Softmax attention by a fused kernel of PyTorch's."""

from keras import ops

from keras_ssattn._frameworks import fused_attention, is_compiling
from keras_ssattn._tensors import cast, dtype_of, is_known, widen
from keras_ssattn._typing import DType, Number, Tensor
from keras_ssattn.ops import stacks
from keras_ssattn.ops.kernels import Kernel, SinkSoftmax, Softmax
from keras_ssattn.ops.sizes import steps
from keras_ssattn.ops.visibility import Visibility, as_bias

# Copies of keys and values pay from so many queries on, and features of a position in all heads:
# measured on two CPU cores.
LONG, WIDE = 2**11, 2**9


def is_available(kernel: Kernel, dtypes: list[DType]) -> bool:
    """Whether a fused kernel serves these arguments, exactly."""
    return isinstance(kernel, Softmax) and "float64" not in dtypes


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    factor: Number | Tensor,
    visibility: Visibility,
    flash: bool = False,
) -> Tensor:
    """Softmax attention by the kernel that PyTorch chooses; with `flash`, by flash attention.

    Where that cannot be had, Keras raises.
    """
    dtype = dtype_of(value)
    is_number = isinstance(factor, (int, float))
    has_sink = isinstance(kernel, SinkSoftmax)
    mixed = len({dtype_of(x) for x in (query, key, value)}) > 1
    if mixed or (dtype_of(query) == "float16" and (has_sink or not is_number)):
        # s log n times the query, or a sink, may pass the largest float16
        query, key, value = widen(query), widen(key), widen(value)
    if not is_number or has_sink or factor <= 0:  # which would multiply PyTorch's own mask
        query, factor = cast(widen(query) * factor, dtype_of(query)), 1.0
    num_heads, num_kv_heads = query.shape[2], key.shape[2]
    one_row = not has_sink and num_heads > num_kv_heads and _is_one_row(query, visibility)
    if one_row:  # of a group each head becomes a row: in decoding no cache is repeated
        query = _regroup(query, num_kv_heads, num_heads // num_kv_heads)
    elif num_heads > num_kv_heads:  # one key head, or an old Keras, is not repeated inside
        key, value = (ops.repeat(x, num_heads // num_kv_heads, axis=2) for x in (key, value))
    if has_sink:
        query, key, value = _with_sink(query, key, value, *kernel.tensors)
    if not visibility.needs_mask:
        out = _fused(query, key, value, None, factor, visibility.causal, flash)
    else:
        bias, some = _with_first(visibility) if has_sink else visibility.bias
        out = _fused(query, key, value, cast(bias, dtype_of(query)), factor, False, flash)
        out = ops.where(ops.transpose(some, (0, 2, 1, 3)), out, 0.0)
    if one_row:
        out = _regroup(out, num_heads, 1)
    return cast(out[:, 1:] if has_sink else out, dtype)


def _is_one_row(query: Tensor, visibility: Visibility) -> bool:
    """Whether there is one query, of which all heads see the same, by a mask."""
    rows = query.shape[1]
    heads = 1 if visibility.mask is None else visibility.mask.shape[1]
    if not (is_known(rows) and is_known(heads)):
        return False
    return visibility.needs_mask and rows == heads == 1


def _regroup(x: Tensor, num_groups: int, size: int) -> Tensor:
    """`[B, T, H, D]` as `[B, size, num_groups, D]`: of T * H heads each group's become rows."""
    batch, width = ops.shape(x)[0], x.shape[3]
    x = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (batch, num_groups, size, width))
    return ops.transpose(x, (0, 2, 1, 3))


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    flash: bool,
) -> Tensor:
    if not flash:
        if _are_read_often(query):
            key, value = _by_head(key), _by_head(value)
        return fused_attention(query, key, value, bias, scale, causal)
    return ops.dot_product_attention(
        query, key, value, bias=bias, scale=scale, is_causal=causal, flash_attention=True
    )


def _are_read_often(query: Tensor) -> bool:
    """Whether so many queries read keys and values on a CPU that it pays to copy these by head.

    Never in a trace: in some, sizes are symbols, and others would hold for some sizes alone.
    """
    _, length, num_heads, size = query.shape
    if is_compiling() or not (is_known(length) and stacks.runs_on_cpu_eagerly(query)):
        return False
    return length >= LONG and num_heads * size >= WIDE


def _by_head(x: Tensor) -> Tensor:
    """`[B, T, H, D]`, of which each head lies in one piece."""
    return ops.swapaxes(ops.swapaxes(x, 1, 2).contiguous(), 1, 2)


def _with_first(visibility: Visibility) -> tuple[Tensor, Tensor]:
    """The bias with a first key and a first query more; the key is seen by all, and it sees all."""
    visible = visibility.dense_mask
    sizes = (*ops.shape(visible)[:2], visibility.query_length, visibility.key_length)
    visible = ops.broadcast_to(visible, sizes)
    visible = ops.pad(ops.cast(visible, "int32"), ((0, 0), (0, 0), (1, 0), (1, 0)), "constant")
    first = steps(ops.shape(visible)[-1]) == 0
    return as_bias(ops.logical_or(ops.cast(visible, "bool"), first))


def _with_sink(
    query: Tensor, key: Tensor, value: Tensor, sink: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One key more, in front, whose logit is the sink by two features more, and one query for it.

    Of the two, one has the sink in the dtype of the query, and the other what that rounds off. The
    query, which is dropped, keeps the diagonal of a causal mask in its place.
    """
    batch, length, num_heads, size = ops.shape(query)
    rounded = cast(cast(sink, dtype_of(query)), dtype_of(sink))
    sinks = cast(ops.stack([rounded, sink - rounded], axis=-1), dtype_of(query))
    sinks = ops.broadcast_to(sinks, (batch, length, num_heads, 2))
    query = ops.concatenate([query, sinks], axis=-1)
    key = ops.pad(key, ((0, 0), (1, 0), (0, 0), (0, 2)))  # [B, S + 1, H, D + 2]
    first = ops.equal(steps(ops.shape(key)[1]), 0)[:, None, None]
    last = steps(key.shape[-1]) >= size
    key = ops.where(ops.logical_and(first, last), ops.ones_like(key), key)
    query = ops.pad(query, ((0, 0), (1, 0), (0, 0), (0, 0)))
    return query, key, ops.pad(value, ((0, 0), (1, 0), (0, 0), (0, 0)))
