"""The backward pass of tiled attention, which computes the logits again; see `forward.py`.

It is one loop over the tiles of queries, as the forward pass. What is summed over queries, dk and
dv, is kept transposed: a product with the transpose of a tile is a slow one.
"""

from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_ssattn._tensors import dtype_of, widen
from keras_ssattn._typing import Shape, Size, Tensor
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
    shapes, dtype = _shapes(tiles), tiles.dtype
    count, key_tiles = ops.shape(tiles.queries)[0], ops.shape(tiles.keys)[0]
    counts = (count, key_tiles, key_tiles, key_tiles if tiles.kernel.linear else 0)
    dqs, *sums = (stacks.empty(n, x, dtype) for n, x in zip(counts, shapes, strict=True))
    return dqs, Sums(*sums)


def add(
    tiles: Tiles, residuals: Residuals, upstream: Tensor, dqs: Tensor, sums: Sums
) -> tuple[Tensor, Sums]:
    """Adds what the keys of `tiles` give to the gradients of the queries, and to their own."""
    kernel = tiles.kernel
    parts = (*residuals._replace(keys=tiles.keys, values=tiles.values), upstream)
    queries, keys, values, outputs, maxima, totals, upstreams = (stacks.unstack(x) for x in parts)
    products = tiles.products if kernel.linear else None

    def over_queries(i: Size, stores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dqs, sums = stores[0], Sums(*stores[1:])
        q, dn = widen(queries[i]), upstreams[i] / totals[i]
        tile = QueryTile(
            q,
            in_place.transpose(q),
            maxima[i],
            dn,
            in_place.transpose(dn),
            delta=in_place.row_sum(dn * outputs[i]),
        )
        dq = ops.zeros(ops.shape(q), tiles.dtype)
        for start, stop, cut in tiles.band.ranges(i):
            if kernel.linear and not cut:
                dq, sums = _add_linear(tiles, tile, keys, products, i, (start, stop), dq, sums)
            else:
                step = _adder(tiles, tile, keys, values, i, cut)
                carry = (dq, sums.keys, sums.values)
                dq, dks, dvs = stacks.loop(start, stop, step, carry)
                sums = sums._replace(keys=dks, values=dvs)
        return stacks.add(dqs, i, dq), *sums

    dqs, *found = stacks.loop(0, ops.shape(tiles.queries)[0], over_queries, (dqs, *sums))
    return dqs, Sums(*found)


def finish(
    tiles: Tiles, residuals: Residuals, upstream: Tensor, dqs: Tensor, sums: Sums
) -> Gradients:
    """The gradients, from the sums over all queries and keys."""
    kernel, shapes = tiles.kernel, _shapes(tiles)
    stores = zip((dqs, sums.keys, sums.values), shapes[:3], strict=True)
    dq, dk, dv = (stacks.stack(s, x, tiles.dtype) for s, x in stores)
    dk, dv = in_place.transpose(dk), in_place.transpose(dv)
    if kernel.linear:
        states = stacks.stack(sums.states, shapes[3], tiles.dtype)
        dk = dk + widen(tiles.values) @ in_place.transpose(states)
        dv = dv + widen(tiles.keys) @ states
    constants = ()
    if kernel.tensors:
        delta = in_place.row_sum(upstream * residuals.outputs) / residuals.totals
        constants = kernel.constant_gradient(residuals.maxima, delta)
    return Gradients(dq, dk, dv, constants)


def _shapes(tiles: Tiles) -> tuple[Shape, ...]:
    """The shapes of a tile of dq, and of each of `Sums`."""
    *heads, width, size = ops.shape(tiles.keys)[1:]
    keys, values = (*heads, size, width), (*heads, tiles.values.shape[-1], width)
    return ops.shape(tiles.queries)[1:], keys, values, tiles.state_shape


def _adder(
    tiles: Tiles, tile: QueryTile, keys: Tensor, values: Tensor, i: Size, cut: bool
) -> Callable[[Size, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The step that adds the gradients of tile i of the queries and tile j of the keys."""
    kernel = tiles.kernel

    def add(j: Size, carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dq, dks, dvs = carry
        x = tiles.logits(tile.q, keys[j], i, j, cut)
        upstream = tile.dn @ in_place.transpose(widen(values[j]))
        f, dx = kernel.gradient(x, tile.maximum, upstream, tile.delta)
        if cut and kernel.linear:
            dx = dx * ops.cast(tiles.band.visible(i, j), dtype_of(dx))
        dks = in_place.add_product_to(dks, j, tile.q_transposed, dx)
        dvs = in_place.add_product_to(dvs, j, tile.dn_transposed, f)
        return in_place.add_product(dq, dx, widen(keys[j])), dks, dvs

    return add


def _add_linear(
    tiles: Tiles,
    tile: QueryTile,
    keys: Tensor,
    products: Tensor,
    i: Size,
    stretch: tuple[Size, Size],
    dq: Tensor,
    sums: Sums,
) -> tuple[Tensor, Sums]:
    """The same for a stretch of tiles that are seen whole, of a kernel with f(x) = x.

    dx = dn . v - sign(x) delta, and only its second half needs x.
    """
    towards_keys = in_place.transpose(-tile.delta * tile.q)
    outer = tile.q_transposed @ tile.dn

    def add(j: Size, carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        signed, state, dks, states = carry
        sign = in_place.sign(tiles.logits(tile.q, keys[j], i, j, cut=False))
        dks = in_place.add_product_to(dks, j, towards_keys, sign)
        states = stacks.add(states, j, outer)
        signed = in_place.add_product(signed, sign, widen(keys[j]))
        state += products[j]
        return signed, state, dks, states

    state = ops.zeros(tiles.state_shape, dtype_of(dq))
    carry = (ops.zeros_like(dq), state, sums.keys, sums.states)
    signed, state, dks, states = stacks.loop(*stretch, add, carry)
    dq = dq + tile.dn @ in_place.transpose(state) - tile.delta * signed
    return dq, sums._replace(keys=dks, states=states)
