"""Tiled attention over the devices of a mesh, of which each has a part of the sequence."""

import dataclasses
from collections.abc import Callable

import keras
from keras import ops

from keras_ssattn._frameworks import over_devices
from keras_ssattn._keras.heads_layout import size_of
from keras_ssattn._typing import Tensor
from keras_ssattn.ops._attention.tiled.ring import Ring
from keras_ssattn.ops.kernels import Kernel
from keras_ssattn.ops.visibility import Visibility

LARGEST_WINDOW = 2**30


def attention(
    make: Callable[[Visibility, Ring], Callable[..., Tensor]],
    arrays: tuple[Tensor, Tensor, Tensor],
    kernel: Kernel,
    visibility: Visibility,
    layout: keras.distribution.TensorLayout,
) -> Tensor:
    """Attention of query, key and value by `make(visibility, ring)`, called on every device.

    A batch or a number of heads that the mesh does not divide is not split.

    Args:
        make: what gives the function of the arrays, the kernel's and the visibility's tensors.
        arrays: query, key and value.
        kernel: a `Kernel`.
        visibility: of all queries and keys.
        layout: of `[B, T, H, D]`.
    """
    ring = Ring(layout.axes[1], size_of(layout, 1))
    query, key, value = arrays
    length = query.shape[1]
    visibility = _padded(_near(visibility), ring.size, kernel)
    query = _pad(query, visibility.query_length)
    key, value = (_pad(x, visibility.key_length) for x in (key, value))
    sizes = (*query.shape[:2], key.shape[2])
    batch, time, heads = (
        layout.axes[i] if size % size_of(layout, i) == 0 else None for i, size in enumerate(sizes)
    )
    axes = (batch, time, heads, None)
    by_visibility = [
        (visibility.mask, (batch, heads, time, None)),
        (visibility.key_mask, (batch, time)),
        *((x, (batch, time)) for x in visibility.segments or ()),
        (None if isinstance(visibility.query_offset, int) else visibility.query_offset, (batch,)),
    ]
    inputs = [
        *((x, axes) for x in (query, key, value)),
        *((x + 0.0, (heads,)) for x in kernel.tensors),
        *((x, names) for x, names in by_visibility if x is not None),
    ]
    tensors = [x for x, _ in inputs]
    specs = [_split(x, names) for x, names in inputs]
    attend = over_devices(make(visibility, ring), layout.device_mesh.backend_mesh, specs, axes)
    return attend(*tensors)[:, :length]


def _split(x: Tensor, names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The names of the axes over which `x` is split; one of size 1 is there for all."""
    return tuple(None if n == 1 else name for n, name in zip(x.shape, names, strict=False))


def _near(visibility: Visibility) -> Visibility:
    """The same in small numbers: positions of a device's own may be negative, and int32 ends."""
    window, offset = visibility.window, visibility.query_offset
    length = visibility.query_length + visibility.key_length
    if isinstance(offset, int) and window is not None and window >= length + offset:
        window = None
    if window is not None and window > LARGEST_WINDOW:
        raise ValueError(
            f"`window` must be at most {LARGEST_WINDOW}, or None, for attention that is split over "
            f"devices along time. Received: window={window}"
        )
    beyond = visibility.key_length + (window or 0)  # from here on all see the same
    offset = min(offset, beyond) if isinstance(offset, int) else ops.minimum(offset, beyond)
    return dataclasses.replace(visibility, window=window, query_offset=offset)


def _padded(visibility: Visibility, count: int, kernel: Kernel) -> Visibility:
    """The visibility of lengths that are multiples of `count`; the keys that are new are hidden."""
    rows, columns = (x + -x % count for x in (visibility.query_length, visibility.key_length))
    if (rows, columns) == (visibility.query_length, visibility.key_length):
        return visibility
    mask, key_mask, segments = visibility.mask, visibility.key_mask, visibility.segments
    if key_mask is None and columns > visibility.key_length and kernel.absent != 0:
        key_mask = ops.ones((1, visibility.key_length), "bool")
    if mask is not None:
        mask = mask if mask.shape[2] == 1 else _pad(mask, rows, 2)
        mask = mask if mask.shape[3] == 1 else _pad(mask, columns, 3)
    return dataclasses.replace(
        visibility,
        query_length=rows,
        key_length=columns,
        mask=mask,
        key_mask=None if key_mask is None else _pad(key_mask, columns),
        segments=segments and (_pad(segments[0], rows), _pad(segments[1], columns)),
    )


def _pad(x: Tensor, length: int, axis: int = 1) -> Tensor:
    """`x` with zeros behind, to that length."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    widths = [(0, missing if i == axis else 0) for i in range(len(x.shape))]
    return ops.pad(x, widths)
