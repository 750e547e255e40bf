"""Which tiles of keys a tile of queries sees: whole, in part, or not at all."""

import dataclasses
import functools
from typing import NamedTuple

from keras import ops

from keras_ssattn._tensors import KeptProperty, cast, is_known
from keras_ssattn._typing import Size, Tensor
from keras_ssattn.ops import stacks
from keras_ssattn.ops.kernels import Kernel
from keras_ssattn.ops.visibility import Visibility, end_of_window

# Positions in a tile, at most, measured on two CPU cores; and the logits of the tiles side by side.
# PyTorch writes and reads them once for each operation, on a CPU best in a cache.
QUERY_TILE, KEY_TILE, IN_CACHE = 512, 256, 2**18


class TileSizes(NamedTuple):
    """Positions in a tile of queries and in one of keys."""

    query: Size
    key: Size

    @classmethod
    def of(cls, visibility: Visibility, query: Tensor, num_kv_heads: int) -> "TileSizes":
        """The sizes for these lengths and for queries `[B, T, H, D]`.

        G = H / K query heads fill a tile together, and B K tiles lie side by side.
        """
        group_size, rows, columns = query.shape[2] // num_kv_heads, QUERY_TILE, KEY_TILE
        if stacks.runs_on_cpu_eagerly(query):
            count = query.shape[0] * num_kv_heads
            rows = min(rows, group_size * _tile_size(visibility.query_length, rows))
            while rows * columns * count > IN_CACHE and max(rows, columns) > 128:
                rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
        elif stacks.runs_eagerly():
            columns *= 2
        return cls(
            _tile_size(visibility.query_length, max(rows // group_size, 1)),
            _tile_size(visibility.key_length, columns),
        )


class Band:
    """A `Visibility`, for tile i of queries and tile j of keys.

    Args:
        visibility: of all queries and keys.
        sizes: of the tiles.
        group_size: G, query heads that share a key head; they are rows of one tile.
        num_kv_heads: K.
        kernel: of the normalizer. One that ignores keys of zeros needs no mask for padding, for
            which zeros are put first.
    """

    def __init__(
        self,
        visibility: Visibility,
        sizes: TileSizes,
        group_size: int,
        num_kv_heads: int,
        kernel: Kernel,
    ) -> None:
        self.visibility, self.sizes, self.group_size = visibility, sizes, group_size
        self._heads_and_kernel = num_kv_heads, kernel
        self.causal, self.window = visibility.causal, visibility.window
        length = visibility.key_length
        self.key_tiles = stacks.count_of(length, sizes.key)
        fills = is_known(length) and length == self.key_tiles * sizes.key
        # S, beyond which the last tile is padding; `None` if padding needs no mask
        self.key_length = None if fills or kernel.absent == 0 else length
        self.mask: Tensor = _mask_by_group(visibility, sizes, group_size, num_kv_heads)
        self.key_mask = self.segments = None
        if visibility.key_mask is not None and kernel.absent != 0:
            self.key_mask = stacks.unstack(stacks.split_vector(visibility.key_mask, sizes.key))
        if visibility.segments is not None:
            rows = stacks.split_vector(visibility.segments[0], sizes.query)
            rows = ops.tile(ops.swapaxes(rows, -1, -2), (1, 1, 1, group_size, 1))
            keys = stacks.split_vector(visibility.segments[1], sizes.key)
            self.segments = stacks.unstack(rows), stacks.unstack(keys)
        self.offset = self.first_offset = self.last_offset = visibility.query_offset
        if not isinstance(self.offset, int):
            self.offset = ops.reshape(cast(self.offset, "int32"), (-1, 1, 1, 1))
            self.first_offset, self.last_offset = ops.min(self.offset), ops.max(self.offset)
            if stacks.runs_eagerly():
                self.first_offset, self.last_offset = int(self.first_offset), int(self.last_offset)

        self.columns = ops.arange(sizes.key, dtype="int32")
        rows = ops.tile(ops.arange(sizes.query, dtype="int32"), (group_size,))
        self.rows = ops.expand_dims(rows, -1)

    def seeing(self, visibility: Visibility) -> "Band":
        """The same tiles, of which something else is seen."""
        return Band(visibility, self.sizes, self.group_size, *self._heads_and_kernel)

    def ranges(self, i: Size) -> list[tuple[Size, Size, bool]]:
        """Stretches `[start, stop)` of tiles of keys, and whether the mask cuts them."""
        count = self.key_tiles
        cutting = (self.window, self.key_length, self.mask, self.segments)
        if not self.causal and all(x is None for x in cutting):
            return [(0, count, False)]
        first = i * self.sizes.query + self.first_offset  # positions of the tile's queries
        last = i * self.sizes.query + self.sizes.query - 1 + self.last_offset
        start, stop = self._seen(first, last)
        if self.mask is not None or self.segments is not None:
            return [(start, stop, True)]
        whole, end = self._seen_whole(first, last, start, stop)
        stretches = [(start, whole, True), (whole, end, False), (end, stop, True)]
        return [x for x in stretches if not _is_empty(*x[:2])]

    @KeptProperty
    def counts(self) -> Tensor | list[Tensor]:
        """How many keys each row of a tile of queries sees, at most, `[B|1, 1, rows, 1]` each.

        Keys that `mask` hides are counted, too: to leave them out takes long. Rows of padding see
        none.
        """
        seen = dataclasses.replace(self.visibility, mask=None)
        count = ops.swapaxes(seen.count, 1, 2)  # [B|1, T|1, 1]
        count = ops.broadcast_to(count, (ops.shape(count)[0], seen.query_length, 1))
        stack = stacks.split(ops.expand_dims(count, 3), self.sizes.query)
        return stacks.unstack(ops.tile(stack, (1, 1, 1, self.group_size, 1)))

    def _seen(self, first: Size, last: Size) -> tuple[Size, Size]:
        """The tiles of which anything is seen."""
        size, count, start, stop = self.sizes.key, self.key_tiles, 0, self.key_tiles
        if self.window is not None:
            start = _between((first - self.window + 1) // size, 0, count)
        if self.causal:
            stop = _between(last // size + 1, start, count)
        elif self.window is not None:
            end = end_of_window(last, self.window, count * size)
            stop = _between((end - 1) // size + 1, start, count)
        return start, stop

    def _seen_whole(self, first: Size, last: Size, start: Size, stop: Size) -> tuple[Size, Size]:
        """The tiles of which all is seen."""
        size, whole, end = self.sizes.key, start, stop
        if self.window is not None:
            whole = _between((last - self.window + size) // size, start, stop)
        if self.causal:
            end = _between((first + 1) // size, whole, stop)
        elif self.window is not None:
            reach = end_of_window(first, self.window, self.key_tiles * size)
            end = _between(reach // size, whole, stop)
        if self.key_length is not None:
            end = _between(self.key_length // size, whole, end)
        return whole, end

    def visible(self, i: Size, j: Size) -> Tensor:
        """Boolean, broadcastable to `[B, K, rows, keys]`, for a tile that the mask cuts."""
        columns = self.columns + j * self.sizes.key
        parts = []
        if self.causal or self.window is not None:
            rows = self.rows + (i * self.sizes.query + self.offset)  # [.., rows, 1]
            if self.causal:
                parts.append(columns <= rows)
            if self.window is not None:
                parts.append(columns > rows - self.window)
                if not self.causal:
                    parts.append(columns - self.window < rows)
        if self.key_length is not None:
            parts.append(columns < self.key_length)
        if self.segments is not None:
            queries, keys = self.segments
            parts.append(queries[i] == keys[j])
        if self.mask is not None:
            parts.append(self._mask_tile(i, j))
        return functools.reduce(ops.logical_and, parts)

    def _mask_tile(self, i: Size, j: Size) -> Tensor:
        batch, num_kv_heads = ops.shape(self.mask)[:2]
        heads, length, key_length = self.mask.shape[2:]
        rows, row = (1, 0) if length == 1 else (self.sizes.query, i * self.sizes.query)
        columns, column = (1, 0) if key_length == 1 else (self.sizes.key, j * self.sizes.key)
        sizes = batch, num_kv_heads, heads, rows, columns
        tile = ops.slice(self.mask, stacks.place(0, 0, 0, row, column), sizes)
        if self.group_size == 1 or length == 1 == heads:
            return ops.reshape(tile, (batch, num_kv_heads, rows, columns))
        sizes = batch, num_kv_heads, self.group_size, self.sizes.query, columns
        tile = ops.broadcast_to(tile, sizes)
        return ops.reshape(tile, (batch, num_kv_heads, -1, columns))


def _tile_size(length: Size, most: int) -> Size:
    """One tile for a short input, which is padded to a multiple of 8; a tensor if it is unknown."""
    if is_known(length):
        return min(most, max(-(-length // 8), 1) * 8)
    if ops.is_tensor(length):
        return ops.minimum(ops.maximum(-(-length // 8), 1) * 8, most)
    return most  # where a tracer has a symbol for the length


def _mask_by_group(
    visibility: Visibility, tile_sizes: TileSizes, group_size: int, num_kv_heads: int
) -> Tensor | None:
    """`[B|1, H|1, T|1, S|1]` as `[B|1, K|1, G|1, T|1, S|1]`, T and S padded to whole tiles."""
    mask = visibility.mask
    if mask is None:
        return None
    heads = (1, 1) if mask.shape[1] == 1 else (num_kv_heads, group_size)
    if not all(map(is_known, mask.shape[1:])):  # an axis of unknown size may be one to broadcast
        sizes = num_kv_heads * group_size, visibility.query_length, visibility.key_length
        pairs = zip(mask.shape[1:], sizes, strict=True)
        full = [size if is_known(size) else n for size, n in pairs]
        mask = ops.broadcast_to(mask, (ops.shape(mask)[0], *full))
    batch, _, length, key_length = ops.shape(mask)
    mask = ops.reshape(mask, (batch, *heads, length, key_length))
    for axis, size in ((3, tile_sizes.query), (4, tile_sizes.key)):
        if mask.shape[axis] == 1:
            continue
        shape = list(ops.shape(mask))
        shape[axis] = -shape[axis] % size
        if not is_known(shape[axis]) or shape[axis]:
            mask = ops.concatenate([mask, ops.zeros(shape, "bool")], axis=axis)
    return mask


def _between(x: Size, low: Size, high: Size) -> Size:
    if all(map(is_known, (x, low, high))):
        return min(max(x, low), high)
    return ops.minimum(ops.maximum(x, low), high)


def _is_empty(start: Size, stop: Size) -> bool:
    return is_known(start) and is_known(stop) and start >= stop
