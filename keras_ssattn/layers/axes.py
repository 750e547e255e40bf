"""Attention over some axes of an input: the others become rows of the batch."""

import numbers
from collections.abc import Sequence

from keras import ops

from keras_ssattn._checks import check_broadcastable, check_mask
from keras_ssattn._tensors import is_known, may_be_equal
from keras_ssattn._typing import ArrayLike, Shape, Size, Tensor


class AttentionAxes:
    """Inputs `[B, ..., E]` as `[B', T, E]`: attended axes as T, the others as part of B'.

    Args:
        rank: of the inputs, 3 or more.
        axes: the attended ones, in order; `None` for all but the batch and the features.

    Raises:
        ValueError: for axes that are not distinct axes between the first and the last.
    """

    def __init__(self, rank: int, axes: Sequence[int] | None) -> None:
        self.rank = rank
        inner = range(1, rank - 1)
        self.attended = tuple(inner) if axes is None else tuple(
            axis if axis >= 0 else rank + axis for axis in axes
        )  # fmt: skip
        if (
            rank < 3
            or not self.attended
            or len(set(self.attended)) != len(self.attended)
            or not set(self.attended) <= set(inner)
        ):
            raise ValueError(
                "`attention_axes` must be distinct axes of the inputs between the first, the "
                f"batch, and the last, the features. Received: attention_axes={axes}, inputs of "
                f"rank {rank}"
            )
        self.others = tuple(axis for axis in inner if axis not in self.attended)

    @classmethod
    def of_shapes(
        cls, query_shape: Shape, value_shape: Shape, key_shape: Shape, axes: Sequence[int] | None
    ) -> "AttentionAxes":
        """Those of inputs of these shapes, or raises for shapes that do not fit."""
        shapes = {"query": query_shape, "key": key_shape, "value": value_shape}
        for name, shape in shapes.items():
            if len(shape) < 3 or len(shape) != len(query_shape):
                raise ValueError(
                    f"`{name}` must have shape [batch, time, features], or more axes of time; the "
                    f"ranks of `query`, `value` and `key` must be equal. Received: {name} with "
                    f"shape {tuple(shape)}, query with shape {tuple(query_shape)}"
                )
        found = cls(len(query_shape), axes)
        pairs = zip(value_shape[:-1], key_shape[:-1], strict=True)
        if not all(may_be_equal(size, other) for size, other in pairs):
            raise ValueError(
                "`value` and `key` must be equal in all sizes but the features. Received: value "
                f"with shape {tuple(value_shape)}, key with shape {tuple(key_shape)}"
            )
        pairs = zip(found.pick(query_shape)[0], found.pick(value_shape)[0], strict=True)
        if not all(may_be_equal(size, other) for size, other in pairs):
            raise ValueError(
                "`query` and `value` must have the same batch size, and the same of all axes that "
                f"are not attended over. Received: query with shape {tuple(query_shape)}, value "
                f"with shape {tuple(value_shape)}"
            )
        return found

    def require_one(self, option: str) -> None:
        """Raises for several attended axes, which have no order."""
        if len(self.attended) > 1:
            raise ValueError(
                f"`{option}` needs one attended axis. Received: attention_axes={self.attended}"
            )

    @property
    def scores(self) -> str:
        """The axes of the weights, in words."""
        if self.is_plain:
            return "[B, H, T, S]"
        return "[B, other axes, H, attended axes of the query, attended axes of the keys]"

    @property
    def is_plain(self) -> bool:
        """Whether inputs are `[B, T, E]` already."""
        return self.rank == 3

    def pick(self, shape: Shape) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
        """The batch with the other axes, and the attended axes, of a shape."""
        return (shape[0], *(shape[i] for i in self.others)), tuple(shape[i] for i in self.attended)

    def fold_shape(self, shape: Shape) -> tuple[Size, ...]:
        """The shape of `fold(x)`; `None` where it is unknown."""
        return (*(_product(sizes) for sizes in self.pick(shape)), shape[-1])

    def fold(self, x: Tensor) -> Tensor:
        """`[B, ..., E]`, or `[B, ...]`, as `[B', T, E]`, or `[B', T]`."""
        if self.is_plain:
            return x
        order = (0, *self.others, *self.attended, *range(self.rank - 1, len(x.shape)))
        batch, times = self.pick(ops.shape(x))
        sizes = (_size(batch), _size(times), *x.shape[self.rank - 1 :])
        return ops.reshape(ops.transpose(x, order), sizes)

    def fold_padding(self, mask: ArrayLike | None, x: Tensor) -> ArrayLike | None:
        """A mask, or segments, of all axes but the features, `[B, ...]`, as `[B', T]`.

        With one attended axis it may be `[B, T]`.
        """
        if mask is None or self.is_plain:
            return mask
        if len(mask.shape) == 2 and len(self.attended) == 1:
            batch, (time,) = self.pick(ops.shape(x))
            mask = ops.expand_dims(mask, tuple(range(1, 1 + len(self.others))))
            mask = ops.broadcast_to(mask, (*batch, time))
            return ops.reshape(mask, (_size(batch), time))
        if len(mask.shape) != self.rank - 1:
            raise ValueError(
                "masks and segments must have the axes of `query`, `value` and `key` "
                f"without the features. Received: shape {tuple(mask.shape)}, inputs of rank "
                f"{self.rank}"
            )
        return self.fold(mask)

    def unfold(self, x: Tensor, like: Tensor) -> Tensor:
        """`[B', T, ...]` with the batch and attended axes of the input `like` again."""
        if self.is_plain:
            return x
        batch, times = self.pick(ops.shape(like))
        x = ops.reshape(x, (*batch, *times, *x.shape[2:]))
        order = (0, *self.others, *self.attended)
        back = tuple(order.index(i) for i in range(self.rank - 1))
        return ops.transpose(x, (*back, *range(self.rank - 1, len(x.shape))))

    def unfold_scores(self, scores: Tensor, query: Tensor, value: Tensor) -> Tensor:
        """`[B', H, T, S]` as `[B, others, H, attended of the query, attended of the keys]`."""
        if self.is_plain:
            return scores
        (batch, times), (_, keys) = self.pick(ops.shape(query)), self.pick(ops.shape(value))
        return ops.reshape(scores, (*batch, scores.shape[1], *times, *keys))

    def fold_mask(
        self, mask: ArrayLike | None, num_heads: int, query: Tensor, keys: Shape
    ) -> Tensor | None:
        """Keras's `attention_mask` as `[B'|1, H|1, T, S]`.

        It is `[T, S]`, the attended axes of the query and then of the keys, and before them as
        many of the batch, the other axes and the heads as it has, from the left. `keys` are the
        sizes of the attended axes of the keys.
        """
        mask = check_mask("attention_mask", mask)
        if mask is None:
            return None
        attended = 2 * len(self.attended)
        lead = 2 + len(self.others)  # batch, others, heads
        missing = lead + attended - len(mask.shape)
        if not 0 <= missing <= lead:
            ranks = " or ".join(str(rank) for rank in range(attended, attended + lead + 1))
            raise ValueError(
                f"`attention_mask` must have rank {ranks}. Received: "
                f"attention_mask with shape {tuple(mask.shape)}"
            )
        if missing:
            first = len(mask.shape) - attended
            mask = ops.expand_dims(mask, tuple(range(first, first + missing)))
        batch, times = self.pick(ops.shape(query))
        target = (*batch, num_heads, *times, *keys)
        check_broadcastable("attention_mask", tuple(mask.shape), target, self.scores)
        if self.is_plain:
            return mask
        heads = mask.shape[lead - 1]
        has_rows = any(not is_known(size) or size != 1 for size in mask.shape[: lead - 1])
        rows = batch if has_rows else (1,) * len(batch)
        mask = ops.broadcast_to(mask, (*rows, heads, *times, *keys))
        return ops.reshape(mask, (_size(rows), heads, _size(times), _size(keys)))


def check_axes(axes: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Returns `attention_axes` as a tuple of integers, or raises."""
    if axes is None:
        return None
    found = tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
    if not found or any(isinstance(x, bool) or not isinstance(x, numbers.Integral) for x in found):
        raise ValueError(
            "`attention_axes` must be an integer, integers, or None. Received: "
            f"attention_axes={axes}"
        )
    return tuple(int(x) for x in found)


def _product(sizes: Sequence[Size]) -> Size:
    """The product of sizes, `None` where one is unknown."""
    return None if not all(map(is_known, sizes)) else _size(sizes)


def _size(sizes: Sequence[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = size if is_known(total) and total == 1 else total * size
    return total
