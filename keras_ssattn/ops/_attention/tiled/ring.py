"""Tiled attention along a ring of devices, each of which holds a part of the sequence.

Of n devices each has T / n queries and S / n keys. In n steps every device adds the keys that it
holds to the sums of its queries, and passes them on to the next one; the backward pass does the
same, and the gradients of keys and values travel with them, and then home. No device ever holds
more than this.

Reference: Liu, Zaharia and Abbeel, arXiv 2310.01889 (ring attention).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_ssattn._frameworks import pass_on, place_along
from keras_ssattn._typing import Size, Tensor
from keras_ssattn.ops import stacks
from keras_ssattn.ops._attention.tiled import backward, forward
from keras_ssattn.ops._attention.tiled.backward import Gradients, Sums
from keras_ssattn.ops._attention.tiled.forward import Residuals, Rows, Tiles
from keras_ssattn.ops.visibility import Visibility


class Held(NamedTuple):
    """The keys that a device holds, and what is seen of them; a mask that there is not is `()`."""

    keys: Tensor
    values: Tensor
    key_mask: Tensor | tuple
    segments: Tensor | tuple


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices along an axis of a mesh; `tiles` are those of one device.

    Attributes:
        axis: its name.
        size: n, the number of devices.
    """

    axis: str
    size: int

    def forward(self, tiles: Tiles) -> Residuals:
        """`forward.run`, of queries that see the keys of all devices."""
        count = ops.shape(tiles.queries)[0]

        def add(distance: Size, held: Held, stores: tuple) -> tuple[Held, tuple]:
            add_keys = forward.adder(self._part(tiles, held, distance))

            def over_queries(i: Size, stores: tuple) -> tuple:
                rows = add_keys(i, Rows(*(x[i] for x in stores)))
                return tuple(stacks.write(s, i, x) for s, x in zip(stores, rows, strict=True))

            return held, stacks.loop(0, count, over_queries, stores)

        start = tuple(ops.broadcast_to(x, (count, *x.shape)) for x in tiles.start())
        _, stores = self._go_round(tiles.band.visibility, add, _hold(tiles), start)
        return Residuals.of(tiles, forward.finish(Rows(*stores), tiles.kernel), {})

    def backward(self, residuals: Residuals, upstream: Tensor, tiles: Tiles) -> Gradients:
        """`backward.run`; the gradients of keys and values are those of the device's own."""

        def add(distance: Size, held: tuple[Held, Sums], dqs: Tensor) -> tuple[tuple, Tensor]:
            keys, sums = held
            part = self._part(tiles, keys, distance)
            dqs, sums = backward.add(part, residuals, upstream, dqs, sums)
            return (keys, sums), dqs

        dqs, sums = backward.start(tiles)
        held = (_hold(tiles), sums)
        (_, sums), dqs = self._go_round(tiles.band.visibility, add, held, dqs)
        sums = pass_on(sums, self.axis, self.size, -self._distances(tiles.band.visibility)[-1])
        return backward.finish(tiles, residuals, upstream, dqs, sums)

    def _go_round(
        self, visibility: Visibility, add: Callable, held: tuple, carry: tuple | Tensor
    ) -> tuple:
        """Calls `add(distance, held, carry)` with what each device holds whose keys may be seen.

        What is held ends where it was last asked for.
        """
        distances = self._distances(visibility)
        first, last = distances[0], distances[-1]

        def step(distance: Size, state: tuple) -> tuple:
            held, carry = add(distance, *state)
            return pass_on(held, self.axis, self.size, 1), carry

        state = pass_on(held, self.axis, self.size, first), carry
        if first < last:
            state = ops.fori_loop(first, last, step, state)
        return add(last, *state)

    def _distances(self, visibility: Visibility) -> range:
        """How many places back those devices are whose keys may be seen."""
        length, window, offset = (
            visibility.key_length,
            visibility.window,
            visibility.query_offset,
        )
        aligned = visibility.query_length == length and isinstance(offset, int) and offset == 0
        if window is None or not aligned:
            return range(self.size)
        reach = (window - 2) // length + 1
        near = range(0 if visibility.causal else -reach, reach + 1)
        return near if len(near) < self.size else range(self.size)

    def _part(self, tiles: Tiles, held: Held, distance: Size) -> Tiles:
        """The device's queries with the keys of the one `distance` places back."""
        seen, here = tiles.band.visibility, place_along(self.axis)
        there = (here - distance) % self.size
        key_start = there * seen.key_length
        mask = seen.mask  # of these queries, and of the keys of all devices
        if mask is not None and mask.shape[3] != 1:
            sizes = (*mask.shape[:3], seen.key_length)
            mask = ops.slice(mask, stacks.place(0, 0, 0, key_start), sizes)
        seen = dataclasses.replace(
            seen,
            query_offset=seen.query_offset + here * seen.query_length - key_start,
            mask=mask,
            key_mask=None if seen.key_mask is None else held.key_mask,
            segments=seen.segments and (seen.segments[0], held.segments),
        )
        return dataclasses.replace(
            tiles, keys=held.keys, values=held.values, band=tiles.band.seeing(seen)
        )


def _hold(tiles: Tiles) -> Held:
    seen = tiles.band.visibility
    key_mask = () if seen.key_mask is None else seen.key_mask
    return Held(tiles.keys, tiles.values, key_mask, seen.segments[1] if seen.segments else ())
