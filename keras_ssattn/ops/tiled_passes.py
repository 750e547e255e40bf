"""The forward and the backward pass of tiled attention.

The logits are computed a tile at a time, in the forward pass and again in the backward pass;
`kernels.py` has the formulas. In both, one loop over the tiles of queries has another over the
tiles of keys that they see. Tensors are stacks of tiles: queries `[n, B, K, R, D]`, n tiles of R
rows, with every scale multiplied in; keys `[m, B, K, C, D]`, m tiles of C keys; values
`[m, B, K, C, Dv]`. Arithmetic is float32 or wider. Sums are augmented assignments, which PyTorch
does in place.

References: Milakov and Gimelshein, arXiv 1805.02867 (the running maximum); Dao et al.,
arXiv 2205.14135 (tiles, and a backward pass that computes them again); Katharopoulos et al.,
arXiv 2006.16236 (the state of linear attention).
"""

from typing import Any

from keras import ops

from keras_ssattn.ops import tiles
from keras_ssattn.ops._arguments import dtype_of, widen
from keras_ssattn.ops.band import Band


def forward(query: Any, key: Any, value: Any, kernel: Any, band: Band) -> tuple[Any, ...]:
    """The output, m and Z, as stacks of tiles."""
    queries, keys, values = (tiles.unstack(x) for x in (query, key, value))
    dtype = dtype_of(widen(query))
    shape = tuple(ops.shape(query))
    out_shape, row_shape = (*shape[1:-1], value.shape[-1]), (*shape[1:-1], 1)
    state_shape = (*shape[1:3], shape[-1], value.shape[-1])
    products: Any = _products(key, value) if kernel.linear else None

    def over_queries(i: Any, stores: Any) -> Any:
        q = widen(queries[i])

        def tile_of_keys(cut: bool) -> Any:
            def add(j: Any, carry: Any) -> Any:
                m, total, out = carry
                x = _logits(q, keys[j], kernel, band, i, j, cut)
                if not kernel.linear:
                    peak = kernel.peak(x)
                    higher = ops.where(peak > m, peak, m)  # Keras's maximum may round float64
                    shrink = ops.exp(m - higher)
                    m = higher
                    total *= shrink
                    out *= shrink
                f, g = kernel.values(x, m)
                total += _row_sum(g)
                out += f @ widen(values[j])
                return m, total, out

            return add

        def whole_linear_tile(j: Any, carry: Any) -> Any:
            total, state = carry
            x = _logits(q, keys[j], kernel, band, i, j, cut=False)
            total += _row_sum(abs(x))
            state += products[j]
            return total, state

        m = ops.full(row_shape, kernel.first_max, dtype)
        total, out = ops.zeros(row_shape, dtype), ops.zeros(out_shape, dtype)
        for start, stop, cut in band.ranges(i):
            if kernel.linear and not cut:
                carry = (total, ops.zeros(state_shape, dtype))
                total, state = ops.fori_loop(start, stop, whole_linear_tile, carry)
                out = out + q @ state
            else:
                m, total, out = ops.fori_loop(start, stop, tile_of_keys(cut), (m, total, out))
        total = total + kernel.constant(m)
        total = ops.where(total > 0, total, 1.0)
        results = (out / total, m, total)
        return tuple(tiles.write(s, i, x) for s, x in zip(stores, results, strict=True))

    shapes = (out_shape, row_shape, row_shape)
    stores = tuple(tiles.empty(shape[0], x, dtype) for x in shapes)
    stores = ops.fori_loop(0, shape[0], over_queries, stores)
    return tuple(tiles.stack(s, x, dtype) for s, x in zip(stores, shapes, strict=True))


def backward(kept: tuple[Any, ...], upstream: Any, kernel: Any, band: Band) -> tuple[Any, ...]:
    """The gradients of query, key and value, from these and what `forward` returned."""
    query, key, value, out, largest, totals = kept
    queries, keys, values, outs, maxima, sums, upstreams = (
        tiles.unstack(x) for x in (query, key, value, out, largest, totals, upstream)
    )
    dtype = dtype_of(out)
    shape, key_shape = tuple(ops.shape(query)), tuple(ops.shape(key))
    state_shape = (*shape[1:3], shape[-1], value.shape[-1])
    products: Any = _products(key, value) if kernel.linear else None

    def over_queries(i: Any, stores: Any) -> Any:
        dqs, dks, dvs, states = stores
        q, m = widen(queries[i]), maxima[i]
        dn = upstreams[i] / sums[i]
        delta = _row_sum(dn * outs[i])
        q_transposed, dn_transposed = _transpose(q), _transpose(dn)

        def tile_of_keys(cut: bool) -> Any:
            def add(j: Any, carry: Any) -> Any:
                dq, dks, dvs = carry
                x = _logits(q, keys[j], kernel, band, i, j, cut)
                weighted = dn @ _transpose(widen(values[j]))
                f, dx = kernel.gradient(x, m, weighted, delta)
                if cut and kernel.linear:
                    dx = dx * ops.cast(band.visible(i, j), dtype)
                dks = tiles.add(dks, j, q_transposed @ dx)
                dvs = tiles.add(dvs, j, dn_transposed @ f)
                dq += dx @ widen(keys[j])
                return dq, dks, dvs

            return add

        scaled, outer = _transpose(-delta * q), q_transposed @ dn if kernel.linear else None

        def whole_linear_tile(j: Any, carry: Any) -> Any:
            # dx = dn . v - sign(x) delta, and only its second half needs x
            signed, state, dks, states = carry
            sign = ops.sign(_logits(q, keys[j], kernel, band, i, j, cut=False))
            dks = tiles.add(dks, j, scaled @ sign)
            states = tiles.add(states, j, outer)
            signed += sign @ widen(keys[j])
            state += products[j]
            return signed, state, dks, states

        dq = ops.zeros(shape[1:], dtype)
        for start, stop, cut in band.ranges(i):
            if kernel.linear and not cut:
                carry = (ops.zeros_like(dq), ops.zeros(state_shape, dtype), dks, states)
                signed, state, dks, states = ops.fori_loop(start, stop, whole_linear_tile, carry)
                dq = dq + dn @ _transpose(state) - delta * signed
            else:
                dq, dks, dvs = ops.fori_loop(start, stop, tile_of_keys(cut), (dq, dks, dvs))
        return tiles.write(dqs, i, dq), dks, dvs, states

    # sums over queries are kept transposed: a product with the transpose of a tile is a slow one
    count, *heads, keys_in_tile, width = key_shape
    shapes = (
        shape[1:],
        (*heads, width, keys_in_tile),
        (*heads, value.shape[-1], keys_in_tile),
        state_shape,
    )
    counts = (shape[0], count, count, count if kernel.linear else 0)
    empty = tuple(tiles.empty(n, x, dtype) for n, x in zip(counts, shapes, strict=True))
    *stores, states = ops.fori_loop(0, shape[0], over_queries, empty)
    dq, dk, dv = (tiles.stack(s, x, dtype) for s, x in zip(stores, shapes[:3], strict=True))
    dk, dv = _transpose(dk), _transpose(dv)
    if kernel.linear:
        states = tiles.stack(states, state_shape, dtype)
        dk = dk + widen(value) @ _transpose(states)
        dv = dv + widen(key) @ states
    gradients = zip((dq, dk, dv), (query, key, value), strict=True)
    return tuple(ops.cast(gradient, x.dtype) for gradient, x in gradients)


def _logits(q: Any, k: Any, kernel: Any, band: Band, i: Any, j: Any, cut: bool) -> Any:
    """A tile of logits; those of keys that are not seen are what the kernel ignores."""
    x = q @ _transpose(widen(k))
    if band.key_mask is not None:
        x = ops.where(band.key_mask[j], x, kernel.absent)
    if cut:
        x = ops.where(band.visible(i, j), x, kernel.absent)
    return x


def _products(key: Any, value: Any) -> Any:
    """The sum of k v^T over each tile: what the linear form keeps of it."""
    return tiles.unstack(_transpose(widen(key)) @ widen(value))


def _row_sum(x: Any) -> Any:
    return ops.sum(x, axis=-1, keepdims=True)


def _transpose(x: Any) -> Any:
    return ops.swapaxes(x, -1, -2)
