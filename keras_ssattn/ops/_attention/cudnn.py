"""Softmax attention by cuDNN's flash attention, on JAX with a GPU."""

from keras import ops

from keras_ssattn._frameworks import cudnn_attention, has_cudnn_attention
from keras_ssattn._keras.heads_layout import heads_layout
from keras_ssattn._tensors import cast, dtype_of, is_known, widen
from keras_ssattn._typing import Number, Tensor
from keras_ssattn.ops._attention.tiled import gradient as tiled
from keras_ssattn.ops.kernels import Kernel, SinkSoftmax, Softmax
from keras_ssattn.ops.sizes import steps
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

    It rounds the query times a factor of its own to half precision, which bfloat16 alone has the
    range for; and it hides what is causal, or beyond a window of that, or behind lengths.
    """
    if not isinstance(kernel, Softmax) or isinstance(kernel, SinkSoftmax):
        return False
    dtypes = {"bfloat16", "float16"} if isinstance(factor, (int, float)) else {"bfloat16"}
    if len({dtype_of(x) for x in (query, key, value)}) > 1 or dtype_of(query) not in dtypes:
        return False
    causal, window, key_mask = visibility.causal, visibility.window, visibility.key_mask
    others = (visibility.mask, visibility.segments)
    shifted = not (isinstance(visibility.query_offset, int) and visibility.query_offset == 0)
    if any(x is not None for x in others) or (causal and shifted):
        return False
    if window is not None and (shifted or not causal or key_mask is not None):
        return False  # beside lengths, a window may leave a query without a key
    shapes = tuple(tuple(x.shape) for x in (query, key, value))
    if not all(is_known(size) for shape in shapes for size in shape):
        return False
    if (causal and shapes[0][1] != shapes[1][1]) or heads_layout() is not None:
        return False
    return has_cudnn_attention(shapes, dtype_of(query), causal, window, key_mask is not None)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    factor: Number | Tensor,
    visibility: Visibility,
) -> Tensor:
    """Softmax attention by cuDNN, where it `is_available`.

    Padding at the end of each row is given to it as lengths. Whether padding lies there is seen
    when the model runs: of any other, the same call computes tiles.
    """
    given, scale = query, factor
    if not isinstance(factor, (int, float)) or factor <= 0:  # 0 or less is no scale of cuDNN's
        query, scale = cast(widen(query) * factor, dtype_of(query)), 1.0
    causal, window = visibility.causal, visibility.window
    if visibility.key_mask is None:
        return cudnn_attention(query, key, value, scale, causal, window)
    lengths = cast(ops.sum(ops.cast(visibility.key_mask, "int32"), axis=1), "int32")
    leading = steps(visibility.key_length) < ops.expand_dims(lengths, 1)
    at_end = ops.all(ops.equal(visibility.key_mask, leading))
    return ops.cond(
        ops.logical_and(at_end, ops.all(lengths > 0)),
        lambda: cudnn_attention(query, key, value, scale, causal, window, lengths),
        lambda: tiled.attention(given, key, value, kernel, factor, visibility),
    )
