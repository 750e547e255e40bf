"""Tiled attention: every normalizer in memory linear in the number of keys."""

import functools
from typing import Any

import keras
from keras import ops

from keras_ssattn.ops import kernels, tiled_passes, tiles
from keras_ssattn.ops._arguments import dtype_of, widen
from keras_ssattn.ops.band import Band

# positions, at most; measured on two CPU cores
QUERY_TILE, KEY_TILE = 512, 512 if tiles.runs_eagerly() else 256


def attention(
    query: Any,
    key: Any,
    value: Any,
    normalizer: str,
    scale: Any,
    visibility: dict[str, Any],
    epsilon: float,
) -> Any:
    """`keras_ssattn.ops.attention` without a `T x S` tensor, forward or backward.

    Of the forward pass only the output and two numbers per row are kept. The backward pass is
    written by hand; to differentiate it again raises, except on JAX.
    """
    kernel = kernels.get(normalizer, epsilon)
    groups = query.shape[2] // key.shape[2]
    key_mask = visibility["key_mask"]
    if key_mask is not None and kernel.absent == 0:
        # a key of zeros has the logit 0, which such a kernel ignores
        key, key_mask = ops.where(key_mask[:, :, None, None], key, ops.zeros_like(key)), None
    arrays = (widen(query) * scale * kernel.query_scale, key, value)
    if "float64" in (dtype_of(x) for x in arrays):
        arrays = tuple(ops.cast(x, "float64") for x in arrays)
    make_band = functools.partial(
        _make_band, kernel, groups, causal=visibility["causal"], window=visibility["window"]
    )
    query_size, key_size = _tile_sizes(query, key, groups)
    tensors = {
        "query_offset": ops.convert_to_tensor(visibility["query_offset"], "int32"),
        "mask": _mask_by_group(visibility["mask"], query, key, query_size, key_size),
        "key_mask": None if key_mask is None else _split_vector(key_mask, key_size),
        "query_segments": None,
        "key_segments": None,
    }
    if visibility["segment_ids"] is not None:
        queries, keys = visibility["segment_ids"]
        rows = ops.swapaxes(_split_vector(queries, query_size), -1, -2)
        tensors["query_segments"] = ops.tile(rows, (1, 1, 1, groups, 1))
        tensors["key_segments"] = _split_vector(keys, key_size)
    if isinstance(visibility["query_offset"], int):
        del tensors["query_offset"]
        make_band = functools.partial(make_band, query_offset=visibility["query_offset"])
    tensors = {name: x for name, x in tensors.items() if x is not None}
    attend = _with_gradient(kernel, make_band, tuple(tensors), groups)
    return ops.cast(attend(*arrays, *tensors.values()), dtype_of(value))


def _with_gradient(kernel: Any, make_band: Any, names: tuple[str, ...], groups: int) -> Any:
    """The function of query, key, value, and of the named tensors of a band.

    JAX wants every tensor to be an argument: it may not be closed over. Cutting into tiles is
    inside, and the backward pass makes the band anew, because under XLA TensorFlow knows sizes
    that are unknown until the graph runs from the shapes of what a function is given alone.
    """

    @ops.custom_gradient
    def attend(query: Any, key: Any, value: Any, *tensors: Any) -> tuple[Any, Any]:
        of_band = dict(zip(names, tensors, strict=True))
        band = make_band(query, key, **of_band)
        stacks = (
            tiles.split(query, band.query_size, groups),
            tiles.split(key, band.key_size),
            tiles.split(value, band.key_size),
        )
        out, *sums = tiled_passes.forward(*stacks, kernel, band)
        kept = (*stacks, out, *sums)

        def gradient(*args: Any, upstream: Any = None) -> tuple[Any, ...]:
            upstream = args[0] if upstream is None else upstream
            if tiles.runs_eagerly():  # what follows is never differentiated: keep nothing for it
                upstream = ops.stop_gradient(upstream)
            band = make_band(query, key, **of_band)
            upstream = tiles.split(upstream, band.query_size, groups)
            dq, dk, dv = tiled_passes.backward(kept, upstream, kernel, band)
            length, key_length = ops.shape(query)[1], ops.shape(key)[1]
            return (
                _final(tiles.merge(dq, length, groups), query, band),
                _final(tiles.merge(dk, key_length), key, band),
                _final(tiles.merge(dv, key_length), value, band),
                *(None for _ in names),
            )

        return tiles.merge(out, ops.shape(query)[1], groups), gradient

    return attend


def _make_band(kernel: Any, groups: int, query: Any, key: Any, **options: Any) -> Band:
    """The band of a query and a key; see there for its options."""
    query_size, key_size = _tile_sizes(query, key, groups)
    length = ops.shape(key)[1]
    count = tiles.count_of(length, key_size)
    exact = isinstance(length, int) and length == count * key_size
    length = None if exact or kernel.absent == 0 else length
    return Band(query_size, key_size, count, length, groups, **options)


def _final(gradient: Any, x: Any, band: Band) -> Any:
    """The gradient of x, marked as one that cannot be differentiated again, where that is so.

    JAX differentiates through both passes, if their loops have bounds that are known. TensorFlow
    cannot, and on PyTorch what the forward pass kept is a constant, so that a second derivative
    would be wrong.
    """
    if keras.backend.backend() == "jax" and not band.causal and band.window is None:
        return gradient

    @ops.custom_gradient
    def mark(gradient: Any, _: Any) -> tuple[Any, Any]:
        def refuse(*args: Any, upstream: Any = None) -> Any:
            raise NotImplementedError(
                'implementation="tiled" of attention has no second derivative on the '
                f"{keras.backend.backend()} backend (on JAX it has one without `causal` and "
                '`window`); implementation="dense" has.'
            )

        return gradient + 0.0, refuse

    return mark(gradient, x)


def _tile_sizes(query: Any, key: Any, groups: int) -> tuple[Any, Any]:
    length, key_length = ops.shape(query)[1], ops.shape(key)[1]
    return _tile_size(length, max(QUERY_TILE // groups, 1)), _tile_size(key_length, KEY_TILE)


def _tile_size(length: Any, most: int) -> Any:
    """One tile for a short input, which is padded to a multiple of 8; a tensor if it is unknown."""
    if isinstance(length, int):
        return min(most, max(-(-length // 8), 1) * 8)
    if ops.is_tensor(length):
        return ops.minimum(ops.maximum(-(-length // 8), 1) * 8, most)
    return most  # of a symbol


def _split_vector(x: Any, size: int) -> Any:
    """Cuts `[B, T]` of integers or booleans into a stack `[n, B, 1, 1, size]`."""
    integers = ops.cast(x, "int32") if dtype_of(x) == "bool" else x
    stack = tiles.split(ops.expand_dims(integers, (2, 3)), size)
    return ops.cast(ops.swapaxes(stack, -1, -2), x.dtype)


def _mask_by_group(mask: Any, query: Any, key: Any, query_size: Any, key_size: Any) -> Any:
    """`[B|1, H|1, T|1, S|1]` as `[B|1, K|1, G|1, T|1, S|1]`, T and S padded to whole tiles."""
    if mask is None:
        return None
    num_heads, num_kv_heads = query.shape[2], key.shape[2]
    heads = (1, 1) if mask.shape[1] == 1 else (num_kv_heads, num_heads // num_kv_heads)
    if None in mask.shape[1:]:  # an axis of unknown size may be one to broadcast
        sizes = num_heads, ops.shape(query)[1], ops.shape(key)[1]
        pairs = zip(mask.shape[1:], sizes, strict=True)
        mask = ops.broadcast_to(
            mask, (ops.shape(mask)[0], *(n if size is None else size for size, n in pairs))
        )
    batch, _, length, key_length = ops.shape(mask)
    mask = ops.reshape(mask, (batch, *heads, length, key_length))
    for axis, size in ((3, query_size), (4, key_size)):
        if mask.shape[axis] == 1:
            continue
        shape = list(ops.shape(mask))
        shape[axis] = -shape[axis] % size
        if not isinstance(shape[axis], int) or shape[axis]:
            mask = ops.concatenate([mask, ops.zeros(shape, "bool")], axis=axis)
    return mask
