"""Visibility: which keys each query sees, and how many.

Query i stands at position `i + query_offset`, key j at position j. Query i sees key j unless

- `causal`, and j lies after i's position;
- `window`, and j is `window` or more positions away from i's (on either side);
- `key_mask[b, j]` is False (padding);
- the two lie in different segments, `segment_ids[b, i] != segment_ids[b, j]`; or
- `mask[b, h, i, j]` is False (anything else).
"""

import dataclasses
import functools
import numbers
from collections.abc import Sequence

from keras import ops

from keras_ssattn._checks import LARGEST_INT32, check_flag, check_integer
from keras_ssattn._frameworks import is_compiling
from keras_ssattn._keras.exporting import is_exporting
from keras_ssattn._tensors import (
    KeptProperty,
    cast,
    dtype_of,
    is_known,
    may_be_equal,
    size_tensor,
    to_tensor,
)
from keras_ssattn._typing import ArrayLike, Option, Size, Tensor
from keras_ssattn.ops import stacks
from keras_ssattn.ops.sizes import Sizes, steps

ROWS = 64  # counted at a time where there are segments


@dataclasses.dataclass(frozen=True, eq=False)
class Visibility:
    """Which of S keys each of T queries sees; made by `Visibility.of`, which checks it, once.

    Layers take it as `visibility=` in place of masks. The count and the mask, which several layers
    need, are computed once. In a function that is traced, make it inside of that function.

    Attributes:
        query_length: T, an integer or, where it is unknown until a graph runs, a tensor.
        key_length: S, likewise.
        causal: whether a query sees no later position.
        window: a query sees keys less than `window` positions away; `None` for all.
        query_offset: position of the first query, an integer or an int32 tensor, `[]` or `[B]`.
        mask: boolean `[B|1, H|1, T|1, S|1]`, or `None`.
        key_mask: boolean `[B, S]`, or `None`.
        segments: integers `[B, T]` of the queries and `[B, S]` of the keys, or `None`.
        guard: 0.0, which fails to compute if sizes unknown so far do not fit; `None` if all are
            known.

    Example:

    >>> from keras_ssattn.ops import Visibility
    >>> seen = Visibility.of(2, 3, causal=True)
    >>> seen.count  # [[[1, 2]]]
    >>> seen.dense_mask  # [[[[True, False, False], [True, True, False]]]]
    """

    query_length: Size
    key_length: Size
    causal: bool = False
    window: int | None = None
    query_offset: int | Tensor = 0
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    segments: tuple[Tensor, Tensor] | None = None
    guard: Tensor | None = None

    @classmethod
    def of(
        cls,
        query_length: Size,
        key_length: Size,
        mask: ArrayLike | None = None,
        key_mask: ArrayLike | None = None,
        causal: bool = False,
        window: int | None = None,
        query_offset: int | ArrayLike = 0,
        segment_ids: ArrayLike | Sequence[ArrayLike] | None = None,
        *,
        batch_size: Size = None,
        num_heads: int | None = None,
        guard: Tensor | None = None,
    ) -> "Visibility":
        """Checks the arguments, which are those of `visible_keys`, and keeps them.

        `batch_size` and `num_heads` are B and H, if the masks are to be checked against them, and
        `guard` is that of checks made before.
        """
        query_length, key_length = _length(query_length), _length(key_length)
        sizes = Sizes(batch_size, num_heads, query_length, key_length, guard)
        if None in (query_length, key_length) and (causal or window is not None):
            raise ValueError(
                "symbolic `query` and `key` must have a known length with `causal` or `window`. "
                f"Received: lengths {query_length} and {key_length}"
            )
        window = check_integer("window", window, optional=True)
        mask, key_mask = sizes.check_mask(mask), sizes.check_key_mask(key_mask)
        segments = sizes.check_segments(segment_ids)
        return cls(
            query_length,
            key_length,
            check_flag("causal", causal),
            None if window is None or window >= LARGEST_INT32 else window,
            sizes.check_offset(query_offset),
            mask,
            key_mask,
            segments,
            sizes.guard,
        )

    def within(self, window: int | None) -> "Visibility":
        """The same inside another window as well, which has been checked."""
        if window is None or window >= (self.window or LARGEST_INT32):
            return self
        return dataclasses.replace(self, window=window)

    def check_lengths(self, query_length: Size, key_length: Size) -> None:
        """Raises if these known lengths are not its own."""
        own = (self.query_length, self.key_length)
        pairs = zip(own, (query_length, key_length), strict=True)
        if not all(may_be_equal(size, other) for size, other in pairs):
            raise ValueError(
                f"`visibility` must be of {query_length} queries and {key_length} keys. Received: "
                f"a `Visibility` of {own[0]} queries and {own[1]} keys"
            )

    def guarded(self, x: Tensor) -> Tensor:
        """`x`, which fails to compute if sizes that were unknown do not fit."""
        return x if self.guard is None else x + cast(self.guard, dtype_of(x))

    @property
    def needs_mask(self) -> bool:
        """Whether more is hidden than what comes after the query's own position."""
        others = (self.mask, self.key_mask, self.window, self.segments)
        shifted = not (isinstance(self.query_offset, int) and self.query_offset == 0)
        return any(x is not None for x in others) or (self.causal and shifted)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it holds, for functions that must be given them as arguments."""
        offset = None if isinstance(self.query_offset, int) else self.query_offset
        held = (self.mask, self.key_mask, *(self.segments or ()), offset)
        return tuple(x for x in held if x is not None)

    def with_tensors(
        self, tensors: Sequence[Tensor], query_length: Size, key_length: Size
    ) -> "Visibility":
        """The same, with these tensors and lengths in place of its own."""
        given = iter(tensors)
        return Visibility(
            query_length,
            key_length,
            self.causal,
            self.window,
            mask=None if self.mask is None else next(given),
            key_mask=None if self.key_mask is None else next(given),
            segments=None if self.segments is None else (next(given), next(given)),
            query_offset=self.query_offset if isinstance(self.query_offset, int) else next(given),
        )

    @KeptProperty
    def positions(self) -> Tensor:
        """Positions of the queries, int32 `[B|1, T]`."""
        if isinstance(self.query_offset, int) and is_known(self.query_length):
            rows = ops.expand_dims(steps(self.query_length), 0)
            return rows + self.query_offset if self.query_offset else rows
        offset = ops.reshape(cast(to_tensor(self.query_offset), "int32"), (-1, 1))
        if is_known(self.query_length) and self.query_length == 1:
            return offset
        return offset + steps(self.query_length)

    @KeptProperty
    def dense_mask(self) -> Tensor:
        """Boolean, broadcastable to `[B, H, T, S]`; `None` if every query sees every key."""
        parts = []
        if self.causal or self.window is not None:
            queries = ops.expand_dims(self.positions, (1, 3))  # [B|1, 1, T, 1]
            keys = steps(self.key_length)
            if self.causal:
                parts.append(keys <= queries)
            if self.window is not None:
                parts.append(keys > queries - self.window)
                if not self.causal:
                    parts.append(keys - self.window < queries)
        if self.segments is not None:
            queries, keys = self.segments
            same = ops.expand_dims(queries, 2) == ops.expand_dims(keys, 1)
            parts.append(ops.expand_dims(same, 1))  # [B, 1, T, S]
        if self.key_mask is not None:
            parts.append(ops.expand_dims(self.key_mask, (1, 2)))  # [B, 1, 1, S]
        if self.mask is not None:
            parts.append(self.mask)
        return functools.reduce(ops.logical_and, parts) if parts else None

    @KeptProperty
    def bias(self) -> tuple[Tensor, Tensor]:
        """`as_bias` of the mask."""
        return as_bias(self.dense_mask)

    @KeptProperty
    def count(self) -> Tensor:
        """The number n of keys that each query sees, int32, broadcastable to `[B, H, T]`.

        Without `mask` it is found from the padding's running count, or with segments from a few
        rows at a time, and no `T x S` mask is built.
        """
        one_row = is_known(self.query_length) and self.query_length == 1
        by_mask = one_row or is_exporting()  # which other runtimes can sum, if not much else
        if self.mask is not None or (by_mask and self.needs_mask and self.segments is None):
            return self._count_of_mask()
        first, end = self._stretch()  # the visible keys are [first, end), less its padding
        if self.segments is not None:
            return self._count_in_segments(first, end)
        if self.key_mask is None:
            if end is None:
                return ops.reshape(size_tensor(self.key_length), (1, 1, 1))
            return ops.expand_dims(end if first is None else end - first, 1)  # [B|1, 1, T]
        kept = ops.cast(self.key_mask, "int32")
        if end is None:
            return ops.reshape(cast(ops.sum(kept, axis=1), "int32"), (-1, 1, 1))  # [B, 1, 1]
        running = cast(ops.cumsum(kept, axis=1), "int32")  # [B, S], kept keys up to each
        n = _count_before(running, end)
        return ops.expand_dims(n if first is None else n - _count_before(running, first), 1)

    def _stretch(self) -> tuple[Tensor | None, Tensor | None]:
        """The first key that causality and window leave, and the one after the last, `[B|1, T]`."""
        if not self.causal and self.window is None:
            return None, None
        position, length = self.positions, self.key_length
        length = length if is_known(length) and not is_compiling() else size_tensor(length)
        if self.causal:
            end = ops.clip(position, -1, length - 1) + 1  # free of overflow
        else:
            end = end_of_window(position, self.window or 1, length)
        end = ops.clip(end, 0, length)
        if self.window is None:
            return None, end
        return ops.clip(position - self.window + 1, 0, end), end

    def _count_of_mask(self) -> Tensor:
        visible = self.dense_mask
        if not is_known(self.key_length) or visible.shape[-1] != self.key_length:
            # a last axis of one stands for S equal entries
            visible = ops.logical_and(visible, ops.ones((self.key_length,), dtype="bool"))
        return _sum(visible)

    def _count_in_segments(self, first: Tensor | None, end: Tensor | None) -> Tensor:
        """Keys of each query's segment in the stretch [first, end), `[B, 1, T]`."""
        queries, keys = self.segments or (None, None)
        length = ops.shape(queries)[1]
        for x in (keys, self.key_mask, first, end):  # any may have the batch size others lack
            if x is not None:
                queries = queries + ops.zeros((ops.shape(x)[0], 1), dtype_of(queries))
        keys = ops.expand_dims(keys, (1, 2))  # [B, 1, 1, S]
        index = steps(ops.shape(keys)[3])
        tiles = [_stack_rows(x) for x in (queries, first, end)]

        def count(i: Size) -> Tensor:
            ids, low, high = (None if x is None else x[i] for x in tiles)  # [B|1, 1, rows, 1]
            parts = [ids == keys]
            if low is not None:
                parts.append(index >= low)
            if high is not None:
                parts.append(index < high)
            if self.key_mask is not None:
                parts.append(ops.expand_dims(self.key_mask, (1, 2)))
            seen = functools.reduce(ops.logical_and, parts)
            return _sum(seen, keepdims=True)

        tile_count, *tile = ops.shape(tiles[0])
        counts = stacks.collect(count, tile_count, tile, "int32")
        counts = stacks.merge(counts, length)  # [B, T, 1, 1]
        return ops.reshape(counts, (ops.shape(counts)[0], 1, length))


def as_bias(visible: Tensor) -> tuple[Tensor, Tensor]:
    """What to add to logits for a mask `[B|1, H|1, T|1, S|1]`, and which rows see any key.

    An additive -inf, unlike the finite number that Keras makes of a mask, is exact for all logits.
    A row of nothing but -inf would be NaN: such rows are opened; they are to be zeroed.

    Example:

    >>> import keras
    >>> from keras_ssattn.ops.visibility import as_bias
    >>> as_bias(keras.ops.array([[[[True, False]]]]))[1]  # [[[[True]]]]
    """
    some = ops.any(visible, axis=-1, keepdims=True)
    closed = ops.where(some, -float("inf"), 0.0)
    return ops.where(visible, 0.0, closed), some


def visible_keys(
    query_length: Size,
    key_length: Size,
    mask: ArrayLike | None = None,
    key_mask: ArrayLike | None = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: int | ArrayLike = 0,
    segment_ids: ArrayLike | Sequence[ArrayLike] | None = None,
) -> Tensor | None:
    """Which keys each query sees, as one boolean mask.

    Args:
        query_length: T, an integer (or a scalar integer tensor, where it is dynamic).
        key_length: S, likewise.
        mask: boolean `[T, S]`, or broadcastable to `[B, H, T, S]`; True = attend.
        key_mask: boolean `[B, S]`, False at padded keys.
        causal: whether a query sees no later position.
        window: a query sees keys less than `window` positions away. `None`, or any number that
            is no smaller than the positions, for all.
        query_offset: position of the first query, an integer or an integer tensor `[B]`.
        segment_ids: integers `[B, T]`, where T = S, of sequences packed into one; or a pair of
            those of the queries, `[B, T]`, and of the keys, `[B, S]`.

    Returns:
        A boolean tensor broadcastable to `[B, H, T, S]`, or `None` if every query sees
        every key.

    Raises:
        TypeError: for a float mask.
        ValueError: for a mask of the wrong shape, `window < 1`, or positions beyond 2^31.

    Example:

    >>> from keras_ssattn import ops
    >>> ops.visible_keys(2, 3, causal=True)  # [[[[True, False, False], [True, True, False]]]]
    """
    seen = Visibility.of(
        query_length, key_length, mask, key_mask, causal, window, query_offset, segment_ids
    )
    if seen.dense_mask is None or seen.guard is None:
        return seen.dense_mask
    return ops.logical_and(seen.dense_mask, seen.guard == 0)


def key_count(query_length: Size, key_length: Size, *args: Option, **options: Option) -> Tensor:
    """The number n of keys that each query sees.

    Without `mask` no `T x S` mask is built. Arguments and errors are those of `visible_keys`.

    Returns:
        An int32 tensor broadcastable to `[B, H, T]`.

    Example:

    >>> from keras_ssattn import ops
    >>> ops.key_count(4, 4, causal=True)  # [[[1, 2, 3, 4]]]
    >>> ops.key_count(4, 4, causal=True, window=2)  # [[[1, 2, 2, 2]]]
    >>> ops.key_count(4, 4, causal=True, key_mask=[[False, True, True, True]])
    ... # [[[0, 1, 2, 3]]]
    """
    seen = Visibility.of(query_length, key_length, *args, **options)
    return seen.guarded(seen.count)


def end_of_window(position: Size, window: int, length: Size) -> Size:
    """`position + window`, or `length` if that is less; free of overflow in int32."""
    if is_known(position) and is_known(length):
        return min(position + window, length)
    return ops.where(position >= length - window, length, position + window)


def _length(length: Size) -> Size:
    is_integer = isinstance(length, numbers.Integral)
    return check_integer("a length", length, least=0) if is_integer else length


def _sum(seen: Tensor, keepdims: bool = False) -> Tensor:
    """The number of True, int32 whatever a backend makes of such sums."""
    return cast(ops.sum(ops.cast(seen, "int32"), axis=-1, keepdims=keepdims), "int32")


def _stack_rows(x: Tensor | None) -> Tensor | None:
    """`[B|1, T]` as a stack of tiles `[n, B|1, 1, rows, 1]`; `None` as it is."""
    return None if x is None else stacks.split(ops.expand_dims(x, (2, 3)), ROWS)


def _count_before(running: Tensor, end: Tensor) -> Tensor:
    """Entries of a running count `[B, S]` up to, not including, positions `[B|1, T]`."""
    none = ops.zeros((ops.shape(running)[0], 1), dtype_of(running))
    running = ops.concatenate([none, running], axis=1)  # [B, S + 1]
    if end.shape[0] == 1:
        return ops.take(running, end[0], axis=1)  # [B, T]
    return ops.take_along_axis(running, end, axis=1)  # [B, T]
