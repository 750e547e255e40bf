"""Visibility: which keys each query sees, and how many.

Query i stands at position `i + query_offset`, key j at position j. Query i sees key j unless

- `causal`, and j lies after i's position;
- `window`, and j is `window` or more positions away from i's (on either side);
- `key_mask[b, j]` is False (padding);
- the two lie in different segments, `segment_ids[b, i] != segment_ids[b, j]`; or
- `mask[b, h, i, j]` is False (anything else).
"""

import numbers
from typing import Any

from keras import ops

from keras_ssattn.ops import tiles
from keras_ssattn.ops._arguments import cast, check_broadcastable, check_mask, dtype_of, to_tensor

ROWS = 64  # counted at a time where there are segments


def visible_keys(
    query_length: Any,
    key_length: Any,
    mask: Any = None,
    key_mask: Any = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: Any = 0,
    segment_ids: Any = None,
) -> Any:
    """Which keys each query sees, as one boolean mask.

    Args:
        query_length: T, an integer (or a scalar integer tensor, where it is dynamic).
        key_length: S, likewise.
        mask: boolean `[T, S]`, or broadcastable to `[B, H, T, S]`; True = attend.
        key_mask: boolean `[B, S]`, False at padded keys.
        causal: whether a query sees no later position.
        window: a query sees keys less than `window` positions away. `None` for all.
        query_offset: position of the first query, an integer or an integer tensor `[B]`.
        segment_ids: integers `[B, T]`, where T = S, of sequences packed into one; or a pair of
            those of the queries, `[B, T]`, and of the keys, `[B, S]`.

    Returns:
        A boolean tensor broadcastable to `[B, H, T, S]`, or `None` if every query sees
        every key.

    Raises:
        TypeError: for a float mask.
        ValueError: for a mask of the wrong shape, or `window < 1`.

    Example:

    >>> from keras_ssattn import ops
    >>> ops.visible_keys(2, 3, causal=True)  # [[[[True, False, False], [True, True, False]]]]
    """
    mask, key_mask, window, query_offset = check_visibility(
        query_length, key_length, mask, key_mask, window, query_offset
    )
    segments = check_segments(segment_ids, query_length, key_length)
    parts = []
    if causal or window is not None:
        distance = ops.expand_dims(_positions(query_length, query_offset), -1)  # [B|1, T, 1]
        distance = distance - ops.arange(key_length, dtype="int32")  # [B|1, T, S]
        if causal:
            parts.append(distance >= 0)
        if window is not None:
            parts.append(distance < window)
            if not causal:
                parts.append(distance > -window)
        parts = [ops.expand_dims(part, 1) for part in parts]  # [B|1, 1, T, S]
    if segments is not None:
        queries, keys = segments
        same = ops.expand_dims(queries, 2) == ops.expand_dims(keys, 1)
        parts.append(ops.expand_dims(same, 1))  # [B, 1, T, S]
    if key_mask is not None:
        parts.append(ops.expand_dims(key_mask, (1, 2)))  # [B, 1, 1, S]
    if mask is not None:
        parts.append(mask)
    visible = None
    for part in parts:
        visible = part if visible is None else ops.logical_and(visible, part)
    return visible


def key_count(
    query_length: Any,
    key_length: Any,
    mask: Any = None,
    key_mask: Any = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: Any = 0,
    segment_ids: Any = None,
) -> Any:
    """The number n of keys that each query sees.

    Without `mask` it is found from the padding's running count, or with `segment_ids` from a few
    rows at a time, and no `T x S` mask is built.

    Args:
        query_length: T, an integer (or a scalar integer tensor, where it is dynamic).
        key_length: S, likewise.
        mask: boolean `[T, S]`, or broadcastable to `[B, H, T, S]`; True = attend.
        key_mask: boolean `[B, S]`, False at padded keys.
        causal: whether a query sees no later position.
        window: a query sees keys less than `window` positions away. `None` for all.
        query_offset: position of the first query, an integer or an integer tensor `[B]`.
        segment_ids: integers `[B, T]`, where T = S, of sequences packed into one; or a pair of
            those of the queries, `[B, T]`, and of the keys, `[B, S]`.

    Returns:
        An int32 tensor broadcastable to `[B, H, T]`.

    Raises:
        TypeError: for a float mask.
        ValueError: for a mask of the wrong rank, or `window < 1`.

    Example:

    >>> from keras_ssattn import ops
    >>> ops.key_count(4, 4, causal=True)  # [[[1, 2, 3, 4]]]
    >>> ops.key_count(4, 4, causal=True, window=2)  # [[[1, 2, 2, 2]]]
    >>> ops.key_count(4, 4, causal=True, key_mask=[[False, True, True, True]])
    ... # [[[0, 1, 2, 3]]]
    """
    mask, key_mask, window, query_offset = check_visibility(
        query_length, key_length, mask, key_mask, window, query_offset
    )
    segments = check_segments(segment_ids, query_length, key_length)
    if mask is not None:
        visible = visible_keys(
            query_length, key_length, mask, key_mask, causal, window, query_offset, segments
        )
        if visible.shape[-1] != key_length:  # a last axis of one stands for S equal entries
            visible = ops.logical_and(visible, ops.ones((key_length,), dtype="bool"))
        return _sum(visible)
    # The visible keys are the stretch [first, end), less its padding.
    first, end = None, None
    if causal or window is not None:
        position = _positions(query_length, query_offset)  # [B|1, T]
        end = ops.clip(position + (1 if causal else window), 0, key_length)
        if window is not None:
            first = ops.clip(position - window + 1, 0, end)
    if segments is not None:
        return _count_in_segments(segments, key_mask, first, end)
    if key_mask is None:
        if end is None:
            return ops.reshape(ops.cast(key_length, "int32"), (1, 1, 1))
        return ops.expand_dims(end if first is None else end - first, 1)  # [B|1, 1, T]
    before = ops.cumsum(ops.cast(key_mask, "int32"), axis=1)  # [B, S], count of keys <= j
    before = ops.cast(before, "int32")
    if end is None:
        return ops.expand_dims(before[:, -1:], 1)  # [B, 1, 1]
    n = _count_before(before, end)
    return ops.expand_dims(n if first is None else n - _count_before(before, first), 1)


def _count_in_segments(segments: Any, key_mask: Any, first: Any, end: Any) -> Any:
    """Keys of each query's segment in the stretch [first, end), `[B, 1, T]`."""
    queries, keys = segments
    length = ops.shape(queries)[1]
    for x in (keys, key_mask, first, end):  # any of them may have the batch size that others lack
        if x is not None:
            queries = queries + ops.zeros((ops.shape(x)[0], 1), dtype_of(queries))
    keys = ops.expand_dims(keys, (1, 2))  # [B, 1, 1, S]
    index = ops.arange(ops.shape(keys)[3], dtype="int32")
    stacks = [_stack_rows(x) for x in (queries, first, end)]

    def count(i: Any, counts: Any) -> Any:
        ids, low, high = (None if x is None else x[i] for x in stacks)  # [B|1, 1, rows, 1]
        seen = ids == keys
        for part in (
            None if low is None else index >= low,
            None if high is None else index < high,
            None if key_mask is None else ops.expand_dims(key_mask, (1, 2)),
        ):
            seen = seen if part is None else ops.logical_and(seen, part)
        return tiles.write(counts, i, _sum(seen, keepdims=True))

    tile_count, *tile = ops.shape(stacks[0])
    counts = tiles.empty(tile_count, tile, "int32")
    counts = ops.fori_loop(0, tile_count, count, counts)
    counts = tiles.merge(tiles.stack(counts, tile, "int32"), length)  # [B, T, 1, 1]
    return ops.reshape(counts, (-1, 1, length))


def _sum(seen: Any, keepdims: bool = False) -> Any:
    """The number of True, int32 whatever a backend makes of such sums."""
    return cast(ops.sum(ops.cast(seen, "int32"), axis=-1, keepdims=keepdims), "int32")


def _stack_rows(x: Any) -> Any:
    """`[B|1, T]` as a stack of tiles `[n, B|1, 1, rows, 1]`; `None` as it is."""
    return None if x is None else tiles.split(ops.expand_dims(x, (2, 3)), ROWS)


def _count_before(running: Any, end: Any) -> Any:
    """Entries of a running count `[B, S]` up to, not including, positions `[B|1, T]`."""
    running = ops.pad(running, ((0, 0), (1, 0)))  # [B, S + 1]
    if end.shape[0] == 1:
        return ops.take(running, end[0], axis=1)  # [B, T]
    return ops.take_along_axis(running, end, axis=1)  # [B, T]


def _positions(query_length: Any, query_offset: Any) -> Any:
    """Positions of the queries, int32 `[B|1, T]`."""
    offset = cast(to_tensor(query_offset), "int32")
    return ops.reshape(offset, (-1, 1)) + ops.arange(query_length, dtype="int32")


def check_segments(segment_ids: Any, query_length: Any, key_length: Any) -> Any:
    """Returns the segments of queries and keys, integers `[B, T]` and `[B, S]`, or raises."""
    if segment_ids is None:
        return None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise ValueError(
            f"`segment_ids` must be [B, T] or a pair of tensors. Received: {len(pair)} of them"
        )
    pair = tuple(to_tensor(x) for x in pair)
    for x, length in zip(pair, (query_length, key_length), strict=True):
        known = None not in (x.shape[-1], length) and isinstance(length, int)
        if len(x.shape) != 2 or (known and x.shape[1] != length):
            raise ValueError(
                f"`segment_ids` must have shape [B, T], with T = S = {length}, or be a pair of "
                f"[B, T] and [B, S]. Received: shape {tuple(x.shape)}"
            )
        if "int" not in dtype_of(x):
            raise TypeError(
                f"`segment_ids` must be integers. Received: segment_ids with dtype {dtype_of(x)}"
            )
    wide = any(dtype_of(x) in ("int64", "uint64") for x in pair)  # such as hashes
    return tuple(ops.cast(x, "int64" if wide else "int32") for x in pair)


def check_visibility(
    query_length: Any, key_length: Any, mask: Any, key_mask: Any, window: Any, query_offset: Any
) -> tuple[Any, Any, Any, Any]:
    """Raises for arguments that do not fit.

    Returns the masks as `[B, H, T, S]` and `[B, S]`, the window, and the offset, an `int` or a
    tensor.
    """
    lengths = tuple(x if isinstance(x, int) else None for x in (query_length, key_length))
    mask = check_mask("mask", mask, rank=(2, 4))
    if mask is not None:
        check_broadcastable("mask", tuple(mask.shape[-2:]), lengths, "[T, S]")
        mask = ops.expand_dims(mask, (0, 1)) if len(mask.shape) == 2 else mask
    key_mask = check_mask("key_mask", key_mask, rank=2)
    if key_mask is not None and lengths[1] not in (None, key_mask.shape[1] or lengths[1]):
        raise ValueError(
            f"`key_mask` must have shape [B, S] with S = {lengths[1]}. Received: key_mask with "
            f"shape {tuple(key_mask.shape)}"
        )
    if window is not None and (
        isinstance(window, bool) or not isinstance(window, numbers.Integral) or window < 1
    ):
        raise ValueError(
            f"`window` must be a positive integer or None. Received: window={window!r}"
        )
    if isinstance(query_offset, numbers.Integral):
        if isinstance(query_offset, bool) or query_offset < 0:
            raise ValueError(
                f"`query_offset` must be 0 or a positive integer. Received: "
                f"query_offset={query_offset!r}"
            )
        query_offset = int(query_offset)
    else:
        query_offset = to_tensor(query_offset)
        if "int" not in dtype_of(query_offset) or len(query_offset.shape) > 1:
            raise ValueError(
                "`query_offset` must be an integer or an integer tensor of shape [B]. Received: "
                f"shape {tuple(query_offset.shape)}, dtype {dtype_of(query_offset)}"
            )
    return mask, key_mask, None if window is None else int(window), query_offset
