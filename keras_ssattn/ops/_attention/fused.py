"""Softmax attention by Keras's own function, where that runs a fused kernel."""

import keras
from keras import ops

from keras_ssattn._tensors import cast, dtype_of, widen
from keras_ssattn._typing import DType, Number, Tensor
from keras_ssattn.ops.kernels import Kernel, SinkSoftmax, Softmax
from keras_ssattn.ops.sizes import steps
from keras_ssattn.ops.visibility import Visibility

TORCH_TAKES_BIAS = tuple(int(x) for x in keras.version().split(".")[:2]) >= (3, 14)


def is_available(kernel: Kernel, dtypes: list[DType], visibility: Visibility) -> bool:
    """Whether a fused kernel serves these arguments, exactly; Keras narrows float64 on PyTorch."""
    if not isinstance(kernel, Softmax) or "float64" in dtypes:
        return False
    if keras.backend.backend() == "torch":
        return TORCH_TAKES_BIAS or not visibility.needs_mask
    return flash_only() and not visibility.needs_mask and not isinstance(kernel, SinkSoftmax)


def flash_only() -> bool:
    """Whether to ask for flash attention: on JAX with a GPU, where else all weights are computed.

    Not on a TPU: there Keras makes a `T x S` mask, and takes that of one row for the whole batch.
    """
    if keras.backend.backend() != "jax":
        return False
    return keras.distribution.list_devices()[0].split(":")[0] in ("gpu", "cuda", "rocm")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    factor: Number | Tensor,
    visibility: Visibility,
    flash: bool | None = None,
) -> Tensor:
    """Softmax attention by `keras.ops.dot_product_attention`, which runs a fused kernel.

    With `flash` that kernel must be flash attention, or Keras raises.
    """
    if flash is None:
        flash = flash_only()
    dtype = dtype_of(value)
    is_number = isinstance(factor, (int, float))
    has_sink = isinstance(kernel, SinkSoftmax)
    mixed = len({dtype_of(x) for x in (query, key, value)}) > 1
    if mixed or (dtype_of(query) == "float16" and (has_sink or not is_number)):
        # s log n times the query, or a sink, may pass the largest float16
        query, key, value = widen(query), widen(key), widen(value)
    group_size = query.shape[2] // key.shape[2]
    if group_size > 1:  # one key head, or an old Keras, is not repeated inside
        key, value = (ops.repeat(x, group_size, axis=2) for x in (key, value))
    if not is_number or has_sink or factor <= 0:  # which would multiply PyTorch's own mask
        query, factor = cast(widen(query) * factor, dtype_of(query)), 1.0
    if has_sink:
        query, key, value = _with_sink(query, key, value, *kernel.tensors)
    if not visibility.needs_mask:
        out = ops.dot_product_attention(
            query, key, value, scale=factor, is_causal=visibility.causal, flash_attention=flash
        )
    else:
        out = _masked(query, key, value, factor, visibility, has_sink, flash)
    return cast(out[:, 1:] if has_sink else out, dtype)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    visibility: Visibility,
    has_sink: bool,
    flash: bool,
) -> Tensor:
    visible = visibility.dense_mask
    if has_sink:  # seen by all, as the first row sees all
        sizes = (*ops.shape(visible)[:2], visibility.query_length, visibility.key_length)
        visible = ops.broadcast_to(visible, sizes)
        visible = ops.pad(ops.cast(visible, "int32"), ((0, 0), (0, 0), (1, 0), (1, 0)), "constant")
        first = steps(ops.shape(key)[1]) == 0
        visible = ops.logical_or(ops.cast(visible, "bool"), first)
    # An additive -inf, unlike the finite number that `mask=` becomes there, is exact for all
    # logits. A row of nothing but -inf would be NaN: such rows are opened, then zeroed.
    some = ops.any(visible, axis=-1, keepdims=True)  # [B|1, H|1, T|1, 1]
    closed = ops.where(some, -float("inf"), 0.0)
    bias = cast(ops.where(visible, 0.0, closed), dtype_of(query))
    out = ops.dot_product_attention(
        query, key, value, bias=bias, scale=scale, flash_attention=flash
    )
    return ops.where(ops.transpose(some, (0, 2, 1, 3)), out, 0.0)


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
