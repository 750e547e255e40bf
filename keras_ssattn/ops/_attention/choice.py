"""Attention of checked arguments, by the implementation asked for or the fastest."""

import functools
from collections.abc import Callable

import keras
from keras import ops

from keras_ssattn._keras.exporting import is_exporting
from keras_ssattn._tensors import cast, dtype_of, is_known, to_tensor, widen
from keras_ssattn._typing import Number, Tensor
from keras_ssattn.ops import kernels, stacks
from keras_ssattn.ops._attention import cudnn, dense, fused
from keras_ssattn.ops._attention.tiled import gradient as tiled
from keras_ssattn.ops.kernels import Kernel
from keras_ssattn.ops.visibility import Visibility

ON_JAX = keras.backend.backend() == "jax"
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "dense": dense.attention,
    "tiled": tiled.attention,
    "fused": cudnn.attention if ON_JAX else fused.attention,
    "flash": cudnn.attention if ON_JAX else functools.partial(fused.attention, flash=True),
}  # layers ask for the last
# T * S beyond which tiles are faster than all weights, measured on two CPU cores, and on PyTorch
# also B * H * T * S, of weights of so many keys at least; and the most entries of a mask for the
# fused kernel, 16 MiB in float32.
DENSE_UP_TO, WEIGHTS_UP_TO, LEAST_KEYS, MASKED_UP_TO = 2**19, 2**21, 256, 2**22


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    factor: Number | Tensor,
    visibility: Visibility,
    implementation: str = "auto",
) -> Tensor:
    """`attention` of arguments that have been checked; layers call it.

    Args:
        query: as in `attention`.
        key: likewise.
        value: likewise.
        kernel: a `Kernel`, whose own tensors have one value per query head.
        factor: what the query is multiplied by, with the scale in it: a number, or a tensor
            broadcastable to `[B, T, H, 1]`.
        visibility: a `Visibility` of these lengths.
        implementation: as in `attention`.

    Returns:
        As `attention`.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> q = keras.random.normal((2, 7, 4, 16))
    >>> seen = ops.Visibility.of(7, 7, causal=True)
    >>> ops.attend(q, q, q, ops.kernels.Softpick(), 0.25, seen).shape
    (2, 7, 4, 16)
    """
    if implementation in ("fused", "flash"):
        asked = "flash_attention=True" if implementation == "flash" else 'implementation="fused"'
        if not _has_fused(query, key, value, kernel, factor, visibility):
            dtypes = sorted({dtype_of(x) for x in (query, key, value)})
            hidden = ("mask", "key_mask", "segments", "window")
            masks = [x for x in hidden if getattr(visibility, x) is not None]
            raise ValueError(
                f"{asked} serves softmax, ssmax and sink_softmax up to float32 on torch. On JAX "
                "with a GPU it serves what cuDNN does: softmax, and in bfloat16 ssmax, in half "
                "precision, without masks but causality and windows of it. Received: "
                f"{kernels.name_of(kernel)}, {dtypes}, masks {masks}, head sizes "
                f"{query.shape[-1]} and {value.shape[-1]}, on {keras.backend.backend()}"
            )
    factor = _factor_like(query, factor, visibility)
    if any(is_known(size) and size == 0 for x in (query, key) for size in x.shape[:2]):
        implementation = "dense"  # nothing to compute, and PyTorch has no maximum of nothing
    if implementation == "auto":
        implementation = _fastest(query, key, value, kernel, visibility)
    return IMPLEMENTATIONS[implementation](query, key, value, kernel, factor, visibility)


def attend_weights(
    query: Tensor, key: Tensor, kernel: Kernel, factor: Number | Tensor, visibility: Visibility
) -> Tensor:
    """`attention_weights` of arguments that have been checked, as `attend` takes them.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> q = keras.random.normal((2, 7, 4, 16))
    >>> seen = ops.Visibility.of(7, 7, causal=True)
    >>> ops.attend_weights(q, q, ops.kernels.Softmax(), 0.25, seen).shape
    (2, 4, 7, 7)
    """
    factor = _factor_like(query, factor, visibility)
    return dense.weights(query, key, kernel, factor, visibility)


def _factor_like(query: Tensor, factor: Number | Tensor, visibility: Visibility) -> Number | Tensor:
    """The factor in the precision of the arithmetic, with the guard of sizes that were unknown."""
    if visibility.guard is None and isinstance(factor, (int, float)):
        return factor
    return visibility.guarded(cast(to_tensor(factor), dtype_of(widen(query))))


def _fastest(
    query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, visibility: Visibility
) -> str:
    """The implementation that `"auto"` takes; see `attention`."""
    size = ops.shape(query)[1] * ops.shape(key)[1]
    fits = not visibility.needs_mask or (is_known(size) and size <= MASKED_UP_TO)
    dtypes = [dtype_of(x) for x in (query, key, value)]
    # cuDNN's on JAX only where it is asked for: it has no `vmap` and no second derivative
    if fits and keras.backend.backend() == "torch" and fused.is_available(kernel, dtypes):
        return "fused"
    if is_exporting():  # formats that other runtimes read have no loops over tiles
        return "dense"
    if is_known(size):
        return "tiled" if size > DENSE_UP_TO or _are_many(query, key) else "dense"
    # Under XLA, TensorFlow has no gradient of a choice made when the graph runs.
    return "tiled" if keras.backend.backend() == "tensorflow" else "dense"


def _are_many(query: Tensor, key: Tensor) -> bool:
    """Whether weights of all heads no longer fit where PyTorch, on a CPU, works them over."""
    if not stacks.can_be_read(query):
        return False
    batch, length, num_heads = query.shape[:3]
    weights = batch * num_heads * length * key.shape[1]
    return (
        is_known(weights) and weights >= WEIGHTS_UP_TO and min(length, key.shape[1]) >= LEAST_KEYS
    )


def _has_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    factor: Number | Tensor,
    visibility: Visibility,
) -> bool:
    """Whether the backend has a fused kernel of this attention."""
    if keras.backend.backend() == "torch":
        return fused.is_available(kernel, [dtype_of(x) for x in (query, key, value)])
    return cudnn.is_available(query, key, value, kernel, factor, visibility)
