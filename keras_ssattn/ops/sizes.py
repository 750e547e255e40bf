"""The sizes of attention, and the masks that must fit them."""

import dataclasses
import numbers
from collections.abc import Sequence

import numpy as np
from keras import ops

from keras_ssattn._checks import (
    check_broadcastable,
    check_fits_int32,
    check_integer,
    check_last_position,
    check_mask,
)
from keras_ssattn._tensors import cast, dtype_of, is_known, may_be_equal, to_tensor, zero_if_equal
from keras_ssattn._typing import ArrayLike, Size, Tensor


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
        pair = segment_ids if is_pair else (segment_ids, segment_ids)
        if len(pair) != 2:
            raise ValueError(
                f"`segment_ids` must be [B, T] or a pair of tensors. Received: {len(pair)} of them"
            )
        queries, keys = (to_tensor(x) for x in compress_ids(*pair))
        for x, length in ((queries, self.queries), (keys, self.keys)):
            if len(x.shape) != 2 or not self.match(ops.shape(x)[1], length):
                raise ValueError(
                    f"`segment_ids` must have shape [B, T], with T = S = {length}, or be a pair of "
                    f"[B, T] and [B, S]. Received: shape {tuple(x.shape)}"
                )
            if "int" not in dtype_of(x):
                raise TypeError(
                    "`segment_ids` must be integers. Received: segment_ids with dtype "
                    f"{dtype_of(x)}"
                )
            check_broadcastable("segment_ids", tuple(x.shape[:1]), (self.batch,), "[B]")
        wide = any(dtype_of(x) in ("int64", "uint64", "uint32") for x in (queries, keys))
        dtype = "int64" if wide else "int32"
        return cast(queries, dtype), cast(keys, dtype)

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


def compress_ids(queries: ArrayLike, keys: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    """Numbers ids anew that int32 cannot hold, such as hashes, so that every backend can.

    Ids that are tensors of the backend already are left as they are.
    """
    if any(hasattr(x, "dtype") and not isinstance(x, np.ndarray) for x in (queries, keys)):
        return queries, keys
    arrays = [np.asarray(x) for x in (queries, keys)]
    if any(x.dtype.kind not in "iu" for x in arrays) or not any(map(_is_wide, arrays)):
        return queries, keys
    joined = np.concatenate([x.ravel() for x in arrays])
    ids = np.unique(joined, return_inverse=True)[1].astype("int32")
    ends = np.cumsum([x.size for x in arrays])
    return ids[: ends[0]].reshape(arrays[0].shape), ids[ends[0] :].reshape(arrays[1].shape)


def _is_wide(x: np.ndarray) -> bool:
    limits = np.iinfo("int32")
    return x.size > 0 and (x.min() < limits.min or x.max() > limits.max)
