"""Softmax attention by cuDNN's flash attention, on JAX with a GPU."""

from keras_ssattn._frameworks import cudnn_attention, has_cudnn_attention
from keras_ssattn._keras.heads_layout import heads_layout
from keras_ssattn._tensors import cast, dtype_of, is_known, widen
from keras_ssattn._typing import Number, Tensor
from keras_ssattn.ops.kernels import Kernel, SinkSoftmax, Softmax
from keras_ssattn.ops.visibility import Visibility


def is_available(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    factor: Number | Tensor,
    visibility: Visibility,
) -> bool:
    """Whether cuDNN has a kernel for these arguments and for their gradient.

    The query times a factor of its own is rounded to half precision, which bfloat16 alone has the
    range for. What is hidden may be what comes later, and what is beyond a window of that.
    """
    if not isinstance(kernel, Softmax) or isinstance(kernel, SinkSoftmax):
        return False
    dtypes = {"bfloat16", "float16"} if _is_scale(factor) else {"bfloat16"}
    if len({dtype_of(x) for x in (query, key, value)}) > 1 or dtype_of(query) not in dtypes:
        return False
    causal, window = visibility.causal, visibility.window
    others = (visibility.mask, visibility.key_mask, visibility.segments)
    shifted = not (isinstance(visibility.query_offset, int) and visibility.query_offset == 0)
    if any(x is not None for x in others) or (causal and shifted):
        return False
    if window is not None and (shifted or not causal):
        return False
    shapes = tuple(tuple(x.shape) for x in (query, key, value))
    if not all(is_known(size) for shape in shapes for size in shape):
        return False
    if (causal and shapes[0][1] != shapes[1][1]) or heads_layout() is not None:
        return False
    return has_cudnn_attention(shapes, dtype_of(query), causal, window)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Kernel,
    factor: Number | Tensor,
    visibility: Visibility,
) -> Tensor:
    """Softmax attention by cuDNN, where it `is_available`."""
    scale = factor
    if not _is_scale(factor):
        query, scale = cast(widen(query) * factor, dtype_of(query)), 1.0
    return cudnn_attention(query, key, value, scale, visibility.causal, visibility.window)


def _is_scale(factor: Number | Tensor) -> bool:
    """Whether cuDNN multiplies by it, in float32: by a positive number."""
    return isinstance(factor, (int, float)) and factor > 0
