"""The sizes of attention, and the masks that must fit them."""

import dataclasses
import numbers
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_ssattn._checks import (
    check_broadcastable,
    check_fits_int32,
    check_integer,
    check_integers,
    check_last_position,
    check_mask,
)
from keras_ssattn._keras.exporting import is_exporting
from keras_ssattn._tensors import cast, dtype_of, is_known, may_be_equal, zero_if_equal
from keras_ssattn._typing import ArrayLike, Size, Tensor

WIDE = ("int64", "uint64", "uint32")


@dataclasses.dataclass
class Sizes:
    """B, H, T and S, against which masks are checked; sizes may be unknown."""

    batch: Size
    heads: int | None
    queries: Size
    keys: Size
    guard: Tensor | None = None

    def match(self, size: Size, other: Size) -> bool:
        """False if two sizes differ; if that is unknown, finding out is left to the guard."""
        if not may_be_equal(size, other):
            return False
        if None not in (size, other) and not (is_known(size) and is_known(other)):
            zero = zero_if_equal(size, other)
            self.guard = zero if self.guard is None else self.guard + zero
        return True

    def check_mask(self, mask: ArrayLike | None) -> Tensor | None:
        """Returns the mask as `[B|1, H|1, T|1, S|1]`, or raises."""
        mask = check_mask("mask", mask, rank=(2, 4))
        if mask is None:
            return None
        mask = ops.expand_dims(mask, (0, 1)) if len(mask.shape) == 2 else mask
        sizes = (self.batch, self.heads, self.queries, self.keys)
        if self.batch is None and self.heads is None:
            check_broadcastable("mask", tuple(mask.shape[2:]), sizes[2:], "[T, S]")
        else:
            check_broadcastable("mask", tuple(mask.shape), sizes, "[B, H, T, S]")
        return mask

    def check_key_mask(self, key_mask: ArrayLike | None) -> Tensor | None:
        key_mask = check_mask("key_mask", key_mask, rank=2)
        if key_mask is None:
            return None
        if not self.match(ops.shape(key_mask)[1], self.keys):
            raise ValueError(
                f"`key_mask` must have shape [B, S] with S = {self.keys}. Received: key_mask with "
                f"shape {tuple(key_mask.shape)}"
            )
        sizes = (self.batch, self.keys)
        check_broadcastable("key_mask", tuple(key_mask.shape), sizes, "[B, S]")
        return key_mask

    def check_segments(
        self, segment_ids: ArrayLike | Sequence[ArrayLike] | None
    ) -> tuple[Tensor, Tensor] | None:
        """Returns the segments of queries and keys, integers `[B, T]` and `[B, S]`, or raises."""
        if segment_ids is None:
            return None
        is_pair = isinstance(segment_ids, tuple)
        given = segment_ids if is_pair else (segment_ids,)
        if is_pair and len(given) != 2:
            raise ValueError(
                f"`segment_ids` must be [B, T] or a pair of tensors. Received: {len(given)} of them"
            )
        ids = [_to_ids(x) for x in compress_ids(*given)]
        lengths = ((self.queries,), (self.keys,)) if is_pair else ((self.queries, self.keys),)
        for x, own in zip(ids, lengths, strict=True):
            if len(x.shape) != 2 or not all(self.match(ops.shape(x)[1], size) for size in own):
                raise ValueError(
                    f"`segment_ids` must have shape [B, T], with T = S = {own[0]}, or be a pair of "
                    f"[B, T] and [B, S]. Received: shape {tuple(x.shape)}"
                )
            check_broadcastable("segment_ids", tuple(x.shape[:1]), (self.batch,), "[B]")
        dtype = "int64" if any(dtype_of(x) in WIDE for x in ids) else "int32"
        ids = [cast(x, dtype) for x in ids]
        return ids[0], ids[-1]

    def check_offset(self, query_offset: int | ArrayLike) -> int | Tensor:
        if isinstance(query_offset, numbers.Integral):
            query_offset = check_integer("query_offset", query_offset, least=0)
            length = self.queries if is_known(self.queries) else 1
            check_last_position("query_offset", query_offset, length)
            return query_offset
        length = self.queries if is_known(self.queries) else 1
        query_offset = check_fits_int32("query_offset", query_offset, room=length - 1)
        if "int" not in dtype_of(query_offset) or len(query_offset.shape) > 1:
            raise ValueError(
                "`query_offset` must be an integer or an integer tensor of shape [B]. Received: "
                f"shape {tuple(query_offset.shape)}, dtype {dtype_of(query_offset)}"
            )
        check_broadcastable("query_offset", tuple(query_offset.shape), (self.batch,), "[B]")
        return cast(query_offset, "int32")


def steps(length: Size) -> Tensor:
    """0, 1, ... below `length`, int32."""
    unknown = is_exporting() and not is_known(length)
    if unknown and keras.backend.backend() == "jax":  # whose converter has no range up to it
        return ops.cumsum(ops.ones((length,), "int32"), axis=0) - 1
    return ops.arange(0, length, dtype="int32")


def compress_ids(*ids: ArrayLike) -> tuple[ArrayLike, ...]:
    """Numbers ids anew that int32 cannot hold, such as hashes, so that every backend can.

    Ids that are tensors of the backend already are left as they are.
    """
    if any(x is None or _is_tensor(x) for x in ids):
        return ids
    arrays = [np.asarray(x) for x in ids]
    if any(x.dtype.kind not in "iu" for x in arrays) or not any(map(_is_wide, arrays)):
        return ids
    flat = [x.ravel() for x in arrays]
    if len({x.dtype.kind for x in arrays}) > 1:  # NumPy would join them as rounded floats
        flat = [x.astype(object) for x in flat]
    numbers_anew = np.unique(np.concatenate(flat), return_inverse=True)[1].astype("int32")
    parts = np.split(numbers_anew, np.cumsum([x.size for x in arrays])[:-1])
    return tuple(part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True))


def _to_ids(x: ArrayLike) -> Tensor:
    """Ids as a tensor of integers, or raises if it is none, or cannot hold them."""
    ids = check_integers("segment_ids", x)
    if not _is_tensor(x) and dtype_of(ids) not in WIDE and _is_wide(np.asarray(x)):
        raise ValueError(
            "`segment_ids` must fit in 32 bits on this backend, unless both of a pair are arrays. "
            f"Received: ids from {np.min(x)} to {np.max(x)}"
        )
    return ids


def _is_tensor(x: ArrayLike) -> bool:
    return hasattr(x, "dtype") and not isinstance(x, (np.ndarray, np.generic))


def _is_wide(x: np.ndarray) -> bool:
    limits = np.iinfo("int32")
    return x.size > 0 and (x.min() < limits.min or x.max() > limits.max)
