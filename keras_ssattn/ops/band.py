"""Which tiles of keys a tile of queries sees: whole, in part, or not at all."""

from typing import Any

from keras import ops

from keras_ssattn.ops.tiles import place, runs_eagerly, unstack


class Band:
    """The visibility of `keras_ssattn.ops.visibility`, for tile i of queries and tile j of keys.

    Args:
        query_size, key_size: positions in a tile.
        key_count: number of tiles of keys.
        key_length: S, beyond which the last tile is padding; `None` if padding needs no mask.
        groups: query heads that share a key head; they are rows of one tile.
        causal, window, query_offset: as in `visible_keys`.
        mask: boolean `[B|1, K|1, G|1, n * query_size | 1, m * key_size | 1]`, or `None`.
        key_mask: a stack `[m, B, 1, 1, key_size]`, or `None`.
        query_segments, key_segments: the segments' ids, stacks `[n, B, 1, rows, 1]` and
            `[m, B, 1, 1, key_size]`, or `None`.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        key_count: Any,
        key_length: Any,
        groups: int = 1,
        causal: bool = False,
        window: int | None = None,
        query_offset: Any = 0,
        mask: Any = None,
        key_mask: Any = None,
        query_segments: Any = None,
        key_segments: Any = None,
    ) -> None:
        self.query_size, self.key_size, self.key_count = query_size, key_size, key_count
        self.key_length, self.groups = key_length, groups
        self.causal, self.window = causal, window
        self.mask, self.segments = mask, None
        if query_segments is not None:
            self.segments = unstack(query_segments), unstack(key_segments)
        self.key_mask = None if key_mask is None else unstack(key_mask)
        self.offset = query_offset
        self.first_offset = self.last_offset = query_offset
        if not isinstance(query_offset, int):
            self.offset = ops.reshape(ops.cast(query_offset, "int32"), (-1, 1, 1, 1))
            self.first_offset, self.last_offset = ops.min(self.offset), ops.max(self.offset)
            if runs_eagerly():
                self.first_offset, self.last_offset = int(self.first_offset), int(self.last_offset)

    def ranges(self, i: Any) -> list[tuple[Any, Any, bool]]:
        """Stretches `[start, stop)` of tiles of keys, and whether the mask cuts them."""
        size, count, window = self.key_size, self.key_count, self.window
        cutting = (window, self.key_length, self.mask, self.segments)
        if not self.causal and all(x is None for x in cutting):
            return [(0, count, False)]
        first = i * self.query_size + self.first_offset  # positions of the tile's queries
        last = i * self.query_size + self.query_size - 1 + self.last_offset
        start, stop = 0, count  # tiles of which anything is seen
        if window is not None:
            start = _between((first - window + 1) // size, 0, count)
        if self.causal:
            stop = _between(last // size + 1, start, count)
        elif window is not None:
            stop = _between((last + window - 1) // size + 1, start, count)
        if self.mask is not None or self.segments is not None:
            return [(start, stop, True)]
        whole, end = start, stop  # tiles of which all is seen
        if window is not None:
            whole = _between((last - window + size) // size, start, stop)
        if self.causal:
            end = _between((first + 1) // size, whole, stop)
        elif window is not None:
            end = _between((first + window) // size, whole, stop)
        if self.key_length is not None:
            end = _between(self.key_length // size, whole, end)
        stretches = [(start, whole, True), (whole, end, False), (end, stop, True)]
        return [x for x in stretches if not _is_empty(*x[:2])]

    def visible(self, i: Any, j: Any) -> Any:
        """Boolean, broadcastable to `[B, K, rows, key_size]`, for a tile that the mask cuts."""
        rows = ops.tile(ops.arange(self.query_size, dtype="int32"), (self.groups,))
        columns = ops.arange(self.key_size, dtype="int32") + j * self.key_size
        parts = []
        if self.causal or self.window is not None:
            rows = ops.expand_dims(rows + i * self.query_size, -1) + self.offset  # [.., rows, 1]
            distance = rows - columns
            if self.causal:
                parts.append(distance >= 0)
            if self.window is not None:
                parts.append(distance < self.window)
                if not self.causal:
                    parts.append(distance > -self.window)
        if self.key_length is not None:
            parts.append(columns < self.key_length)
        if self.segments is not None:
            queries, keys = self.segments
            parts.append(queries[i] == keys[j])
        if self.mask is not None:
            parts.append(self._mask_tile(i, j))
        visible = parts[0]
        for part in parts[1:]:
            visible = ops.logical_and(visible, part)
        return visible

    def _mask_tile(self, i: Any, j: Any) -> Any:
        batch, num_heads = ops.shape(self.mask)[:2]
        groups, length, key_length = self.mask.shape[2:]
        rows, row = (1, 0) if length == 1 else (self.query_size, i * self.query_size)
        columns, column = (1, 0) if key_length == 1 else (self.key_size, j * self.key_size)
        sizes = batch, num_heads, groups, rows, columns
        tile = ops.slice(self.mask, place(0, 0, 0, row, column), sizes)
        if self.groups == 1 or length == 1 == groups:
            return ops.reshape(tile, (batch, num_heads, rows, columns))
        tile = ops.broadcast_to(tile, (batch, num_heads, self.groups, self.query_size, columns))
        return ops.reshape(tile, (batch, num_heads, -1, columns))


def _between(x: Any, low: Any, high: Any) -> Any:
    if all(isinstance(y, int) for y in (x, low, high)):
        return min(max(x, low), high)
    return ops.minimum(ops.maximum(x, low), high)


def _is_empty(start: Any, stop: Any) -> bool:
    return isinstance(start, int) and isinstance(stop, int) and start >= stop
