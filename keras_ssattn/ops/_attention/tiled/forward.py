"""The forward pass of tiled attention.

The logits are computed a tile at a time, here and again in the backward pass; `kernels.py` has the
formulas. In both, one loop over the tiles of queries has another over the tiles of keys that they
see. Tensors are stacks of tiles: queries `[n, B, K, R, D]`, n tiles of R rows; keys
`[m, B, K, C, D]`, m tiles of C keys; values `[m, B, K, C, Dv]`. Inside the loops PyTorch has one
axis in place of B and K (`in_place.fold`). Arithmetic is float32 or wider. Sums are augmented
assignments, which PyTorch does in place.

References: Milakov and Gimelshein, arXiv 1805.02867 (the running maximum); Dao et al.,
arXiv 2205.14135 (tiles, and a backward pass that computes them again); Katharopoulos et al.,
arXiv 2006.16236 (the state of linear attention).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from keras import ops

from keras_ssattn._tensors import KeptProperty, dtype_of, widen
from keras_ssattn._typing import DType, Number, Shape, Size, Tensor
from keras_ssattn.ops import in_place, stacks
from keras_ssattn.ops._attention.tiled.band import Band
from keras_ssattn.ops._attention.tiled.quick import Unshifted
from keras_ssattn.ops.kernels import Kernel


class Residuals(NamedTuple):
    """What the backward pass needs of the forward pass, as stacks."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor
    maxima: Tensor
    totals: Tensor
    ways: Mapping[int, int]

    @classmethod
    def of(cls, tiles: "Tiles", rows: "Rows", ways: Mapping[int, int]) -> "Residuals":
        """Of the sums of all tiles of queries, and which of `Tiles.ways` served a tile, if any."""
        inputs = tiles.queries, tiles.keys, tiles.values
        return cls(*inputs, rows.output, rows.maximum, rows.total, ways)


class Rows(NamedTuple):
    """The running sums of a tile of queries: m, Z and the numerator of the output."""

    maximum: Tensor
    total: Tensor
    output: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """Queries, keys and values as stacks, and the logits of any two tiles of them.

    Attributes:
        queries: n tiles.
        keys: m tiles.
        values: m tiles.
        kernel: of the normalizer.
        band: which tiles are visited.
        scale: what the queries are multiplied by.
        quick: quicker kernels, if there are any, the quickest first.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    kernel: Kernel
    band: Band
    scale: Number
    quick: tuple[Unshifted, ...] = ()

    @KeptProperty
    def ways(self) -> tuple["Tiles", ...]:
        """The same for each quick kernel."""
        ways = tuple(dataclasses.replace(self, kernel=x, quick=()) for x in self.quick)
        for tiles in ways:
            object.__setattr__(tiles, "pairs", self.pairs)
        return ways

    def way_of(self, residuals: Residuals, i: Size) -> "Tiles":
        """The way that served tile i of the queries.

        Where numbers can no longer be read there are none left, and the kernel itself takes the
        maxima that were kept, which are 0.
        """
        return self.ways[residuals.ways[i]] if self.ways and i in residuals.ways else self

    @property
    def dtype(self) -> DType:
        return dtype_of(widen(self.queries))

    @property
    def state_shape(self) -> Shape:
        """The shape of a sum of k v^T, `[B, K, D, Dv]`."""
        _, batch, heads, _, size = ops.shape(self.queries)
        return batch, heads, size, self.values.shape[-1]

    @property
    def row_shapes(self) -> tuple[Shape, Shape, Shape]:
        """The shapes of `Rows`."""
        _, *rows, _ = ops.shape(self.queries)
        return (*rows, 1), (*rows, 1), (*rows, self.values.shape[-1])

    @KeptProperty
    def pairs(self) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
        """Keys and values to `stacks.read`, folded."""
        return stacks.matrices(self.keys), stacks.matrices(self.values)

    @KeptProperty
    def products(self) -> Tensor:
        """The sum of k v^T over each tile, a stack: what the linear form keeps of it."""
        return in_place.transpose(widen(self.keys)) @ widen(self.values)

    @KeptProperty
    def rooms(self) -> tuple[Tensor, Tensor]:
        """Where a tile of logits is written, and one of what is multiplied with it."""
        rows, columns = in_place.fold(widen(self.queries[0])), self.keys.shape[3]
        return in_place.room(rows, columns), in_place.room(rows, columns)

    def start(self) -> Rows:
        """The sums of a tile of queries before the first key."""
        shape, _, out_shape = self.row_shapes
        start = ops.convert_to_tensor(self.kernel.start(self.dtype), self.dtype)
        zeros = (ops.zeros(x, self.dtype) for x in (shape, out_shape))
        return Rows(ops.broadcast_to(start, shape), *zeros)

    def logits(self, q: Tensor, k: Tensor, j: Size, visible: Tensor | None = None) -> Tensor:
        """A tile of logits; those of keys that are not seen are what the kernel ignores.

        It is folded, like everything that is computed of a tile.
        """
        x = in_place.product(q, in_place.transpose(k), self.rooms[0])
        if self.band.key_mask is not None:
            x = in_place.hide(x, self.band.key_mask[j], self.kernel.absent)
        if visible is not None:
            x = in_place.hide(x, visible, self.kernel.absent)
        return x


def run(tiles: Tiles) -> Residuals:
    """Attention over all tiles; the outputs are among the residuals."""
    count = ops.shape(tiles.queries)[0]
    ways: dict[int, int] = {}
    add = _quick_adder(tiles, ways) if tiles.quick else adder(tiles)

    def over_queries(i: Size, stores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = finish(add(i, tiles.start()), tiles.kernel)
        return tuple(stacks.write(s, i, x) for s, x in zip(stores, rows, strict=True))

    stores = tuple(stacks.empty(count, x, tiles.dtype) for x in tiles.row_shapes)
    rows = Rows(*stacks.loop(0, count, over_queries, stores))
    return Residuals.of(tiles, rows, ways)


def adder(tiles: Tiles) -> Callable[[Size, Rows], Rows]:
    """The function of i and `Rows` that adds all keys that tile i of the queries sees."""
    kernel, queries, (keys, values) = tiles.kernel, stacks.unstack(tiles.queries), tiles.pairs

    def add(i: Size, rows: Rows) -> Rows:
        q = in_place.fold(stacks.read_once(queries, i)) * tiles.scale
        like, rows = rows, Rows(*map(in_place.fold, rows))
        for first, stop, cut in tiles.band.ranges(i):
            if kernel.linear and not cut:
                rows = _add_linear(tiles, rows, q, keys, (first, stop))
            else:
                step = _adder(tiles, q, keys, values, i, cut)
                rows = Rows(*stacks.loop(first, stop, step, tuple(rows)))
        return Rows(*map(in_place.unfold, rows, like))

    return add


def _quick_adder(tiles: Tiles, ways: dict[int, int]) -> Callable[[Size, Rows], Rows]:
    """`adder`, by the first quick kernel that holds: failing twice in a row, it is given up.

    `ways` gets the place of the kernel that served tile i.
    """
    add_last, adders = adder(tiles), [adder(x) for x in tiles.ways]
    failures, counts = [0] * len(adders), tiles.band.counts

    def add(i: Size, rows: Rows) -> Rows:
        for way, kernel in enumerate(tiles.quick):
            if failures[way] < 2 and kernel.may_hold(counts[i]):
                found = adders[way](i, tiles.start())
                if kernel.holds(found.total, counts[i]):
                    ways[i], failures[way] = way, 0
                    return found
                failures[way] += 1
        return add_last(i, rows)

    return add


def finish(rows: Rows, kernel: Kernel) -> Rows:
    """The sums once every key is in them: Z with the constant, and the output divided by it."""
    total = rows.total + kernel.constant(rows.maximum)
    total = ops.where(total > 0, total, 1.0)
    return Rows(rows.maximum, total, rows.output / total)


def _adder(
    tiles: Tiles, q: Tensor, keys: Tensor, values: Tensor, i: Size, cut: bool
) -> Callable[[Size, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The step that adds tile j of the keys to the sums of tile i of the queries."""
    kernel = tiles.kernel

    def add(j: Size, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        m, total, out = rows
        visible = tiles.band.visible(i, j) if cut else None
        x = tiles.logits(q, stacks.read(keys, j), j, visible)
        if kernel.headroom is not None:
            peak = in_place.row_maximum(x)
            if kernel.headroom:
                peak -= kernel.headroom
            higher = in_place.maximum(peak, m)
            shrink = in_place.exp(m - higher)
            m = higher
            total *= shrink
            out *= shrink
        f, added = kernel.sums(x, m)
        total += added
        return m, total, in_place.add_product(out, f, stacks.read(values, j))

    return add


def _add_linear(
    tiles: Tiles, rows: Rows, q: Tensor, keys: Tensor, stretch: tuple[Size, Size]
) -> Rows:
    """The sums with a stretch of tiles that are seen whole, of a kernel with f(x) = x."""

    def add(j: Size, total: Tensor) -> Tensor:
        x = tiles.logits(q, stacks.read(keys, j), j)
        total += in_place.row_sum(in_place.absolute(x))
        return total

    total = stacks.loop(*stretch, add, rows.total)
    state = in_place.fold(stacks.sum_between(tiles.products, *stretch))
    return Rows(rows.maximum, total, rows.output + q @ state)
