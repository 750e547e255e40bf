"""Checks of what is measured."""

import numpy as np
from keras import ops

from keras_ssattn._checks import (
    check_broadcastable,
    check_floating,
    check_mask,
    check_number,
    check_rank,
)
from keras_ssattn._tensors import to_tensor, widen
from keras_ssattn._typing import ArrayLike, Shape, Tensor


def check_index(name: str, index: ArrayLike) -> np.ndarray:
    """Returns an index, or one for each of the batch, as an array, or raises."""
    index = np.asarray(ops.convert_to_numpy(index) if ops.is_tensor(index) else index)
    if index.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be integers. Received: dtype {index.dtype}")
    if index.ndim > 1:
        raise ValueError(f"`{name}` must have shape [] or [B]. Received: shape {index.shape}")
    return index


def check_threshold(name: str, threshold: float) -> float:
    """Returns a number, 0 or more, or raises."""
    return check_number(name, threshold, "a number, 0 or more", lambda x: x >= 0)


def check_weights(weights: ArrayLike, mask: ArrayLike | None) -> tuple[Tensor, Tensor]:
    """Wide weights, 0 where the key is not seen, and the mask `[B, H, T, S]`."""
    weights = to_tensor(weights)
    check_floating("weights", weights)
    check_rank("weights", weights, 4)
    mask = _to_shape("mask", mask, tuple(weights.shape), "[B, H, T, S]")
    return ops.where(mask, widen(weights), 0.0), mask


def check_values(values: ArrayLike, mask: ArrayLike | None) -> tuple[Tensor, Tensor]:
    """Wide values, 0 where masked, and the mask of their shape."""
    values = to_tensor(values)
    check_floating("values", values)
    shape = tuple(values.shape)
    mask = _to_shape("mask", mask, shape[:-1], "the shape of `values` without its last axis")
    mask = ops.broadcast_to(ops.expand_dims(mask, -1), shape)
    return ops.where(mask, widen(values), 0.0), mask


def _to_shape(name: str, mask: ArrayLike | None, shape: Shape, shape_name: str) -> Tensor:
    if mask is None:
        return ops.ones(shape, dtype="bool")
    mask = check_mask(name, mask)
    check_broadcastable(name, tuple(mask.shape), shape, shape_name)
    return ops.broadcast_to(mask, shape)
