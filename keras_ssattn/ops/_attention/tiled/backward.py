"""The backward pass of tiled attention, which computes the logits again; see `forward.py`.

It is one loop over the tiles of queries, as the forward pass. What is summed over queries, dk and
dv, is kept transposed: a product with the transpose of a tile is a slow one.
"""

from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_ssattn._tensors import widen
from keras_ssattn._typing import Size, Tensor
from keras_ssattn.ops import in_place, stacks
from keras_ssattn.ops._attention.tiled.forward import Residuals, Tiles


class Gradients(NamedTuple):
    """Of queries, keys and values, as stacks, and of the kernel's tensors, one per row."""

    query: Tensor
    key: Tensor
    value: Tensor
    constants: tuple[Tensor, ...]


class Sums(NamedTuple):
    """What is summed over the tiles of queries, one entry for each tile of keys.

    `states` is dN^T q, of which the linear form makes its part of dk and dv.
    """

    keys: Tensor  # [m, B, K, D, C]
    values: Tensor  # [m, B, K, Dv, C]
    states: Tensor  # [m, B, K, D, Dv]


class QueryTile(NamedTuple):
    """What the gradient needs of a tile of queries."""

    q: Tensor
    q_transposed: Tensor
    maximum: Tensor
    dn: Tensor
    dn_transposed: Tensor
    delta: Tensor


def run(residuals: Residuals, upstream: Tensor, tiles: Tiles) -> Gradients:
    """The gradients, from what the forward pass kept and the gradient of its outputs."""
    dqs, sums = add(tiles, residuals, upstream, *start(tiles))
    return finish(tiles, residuals, upstream, dqs, sums)


def start(tiles: Tiles) -> tuple[Tensor, Sums]:
    """Tiles of dq and sums to add to."""
    *heads, width, size = ops.shape(tiles.keys)[1:]
    count, *row = ops.shape(tiles.queries)
    keys, dtype = ops.shape(tiles.keys)[0], tiles.dtype
    dks = ops.zeros((keys, *heads, size, width), dtype)
    dvs = ops.zeros((keys, *heads, tiles.values.shape[-1], width), dtype)
    states = ops.zeros((keys if tiles.kernel.linear else 0, *tiles.state_shape), dtype)
    return stacks.empty(count, row, dtype), Sums(dks, dvs, states)


def add(
    tiles: Tiles, residuals: Residuals, upstream: Tensor, dqs: Tensor, sums: Sums
) -> tuple[Tensor, Sums]:
    """Adds what the keys of `tiles` give to the gradients of the queries, and to their own."""
    kernel, (keys, values) = tiles.kernel, tiles.pairs
    parts = tiles.queries, residuals.outputs, residuals.maxima, residuals.totals, upstream
    queries, outputs, maxima, totals, upstreams = (stacks.unstack(x) for x in parts)

    def over_queries(i: Size, stores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dqs, sums = stores[0], Sums(*stores[1:])
        parts = (stacks.read_once(queries, i), stacks.read_once(upstreams, i), outputs[i])
        q, dn, output, maximum, total = map(in_place.fold, (*parts, maxima[i], totals[i]))
        q, dn = q * tiles.scale, dn / total
        tile = QueryTile(
            q,
            in_place.transpose(q),
            maximum,
            dn,
            in_place.transpose(dn),
            delta=in_place.row_sum(dn * output),
        )
        dq = ops.zeros(ops.shape(q), tiles.dtype)
        part = tiles.way_of(residuals, i)
        for start, stop, cut in tiles.band.ranges(i):
            if kernel.linear and not cut:
                dq, sums = _add_linear(tiles, tile, keys, (start, stop), dq, sums)
            else:
                step = _adder(part, tile, keys, values, i, cut)
                carry = (dq, sums.keys, sums.values)
                dq, dks, dvs = stacks.loop(start, stop, step, carry)
                sums = sums._replace(keys=dks, values=dvs)
        return stacks.add(dqs, i, in_place.unfold(dq * tiles.scale, outputs[i])), *sums

    dqs, *found = stacks.loop(0, ops.shape(tiles.queries)[0], over_queries, (dqs, *sums))
    return dqs, Sums(*found)


def finish(
    tiles: Tiles, residuals: Residuals, upstream: Tensor, dqs: Tensor, sums: Sums
) -> Gradients:
    """The gradients, from the sums over all queries and keys."""
    kernel, dk, dv = tiles.kernel, sums.keys, sums.values
    if kernel.linear:
        dk = in_place.add_product(dk, sums.states, in_place.transpose(widen(tiles.values)))
        states = in_place.transpose(sums.states)
        dv = in_place.add_product(dv, states, in_place.transpose(widen(tiles.keys)))
    constants = ()
    if kernel.tensors:
        delta = in_place.row_sum(upstream * residuals.outputs) / residuals.totals
        constants = kernel.constant_gradient(residuals.maxima, delta)
    return Gradients(dqs, in_place.transpose(dk), in_place.transpose(dv), constants)


def _adder(
    tiles: Tiles, tile: QueryTile, keys: Tensor, values: Tensor, i: Size, cut: bool
) -> Callable[[Size, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The step that adds the gradients of tile i of the queries and tile j of the keys."""
    kernel = tiles.kernel

    def add(j: Size, carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dq, dks, dvs = carry
        k, v = stacks.read(keys, j), stacks.read(values, j)
        visible = tiles.band.visible(i, j) if cut else None
        x = tiles.logits(tile.q, k, j, visible)
        upstream = in_place.product(tile.dn, in_place.transpose(v), tiles.rooms[1])
        f, dx = kernel.gradient(x, tile.maximum, upstream, tile.delta)
        if visible is not None and kernel.linear:
            dx = in_place.hide(dx, visible, 0.0)
        dks = in_place.add_product_to(dks, j, tile.q_transposed, dx)
        dvs = in_place.add_product_to(dvs, j, tile.dn_transposed, f)
        return in_place.add_product(dq, dx, k), dks, dvs

    return add


def _add_linear(
    tiles: Tiles,
    tile: QueryTile,
    keys: Tensor,
    stretch: tuple[Size, Size],
    dq: Tensor,
    sums: Sums,
) -> tuple[Tensor, Sums]:
    """The same for a stretch of tiles that are seen whole, of a kernel with f(x) = x.

    dx = dn . v - sign(x) delta, and only its second half needs x.
    """
    towards_keys = in_place.transpose(-tile.delta * tile.q)

    def add(j: Size, carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        signed, dks = carry
        k = stacks.read(keys, j)
        sign = in_place.sign(tiles.logits(tile.q, k, j))
        dks = in_place.add_product_to(dks, j, towards_keys, sign)
        return in_place.add_product(signed, sign, k), dks

    signed, dks = stacks.loop(*stretch, add, (ops.zeros_like(dq), sums.keys))
    product = tile.q_transposed @ tile.dn
    states = stacks.add_between(sums.states, *stretch, in_place.unfold(product, sums.states[0]))
    state = in_place.fold(stacks.sum_between(tiles.products, *stretch))
    dq = dq + tile.dn @ in_place.transpose(state) - tile.delta * signed
    return dq, sums._replace(keys=dks, states=states)
