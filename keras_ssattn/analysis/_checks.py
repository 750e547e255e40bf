"""Checks of what is measured."""

import numbers
from typing import Any

import numpy as np
from keras import ops

from keras_ssattn.ops._arguments import (
    check_broadcastable,
    check_floating,
    check_mask,
    check_rank,
    to_tensor,
    widen,
)


def check_index(name: str, index: Any) -> np.ndarray:
    """Returns an index, or one for each of the batch, as an array, or raises."""
    index = np.asarray(ops.convert_to_numpy(index) if ops.is_tensor(index) else index)
    if index.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be integers. Received: dtype {index.dtype}")
    if index.ndim > 1:
        raise ValueError(f"`{name}` must have shape [] or [B]. Received: shape {index.shape}")
    return index


def check_threshold(name: str, threshold: Any) -> Any:
    """Returns a number, 0 or more, as it is, or raises."""
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, numbers.Real)
        or not float(threshold) >= 0
    ):
        raise ValueError(f"`{name}` must be a number, 0 or more. Received: {name}={threshold!r}")
    return threshold


def check_weights(weights: Any, mask: Any) -> tuple[Any, Any]:
    """Wide weights, 0 where the key is not seen, and the mask `[B, H, T, S]`."""
    weights = to_tensor(weights)
    check_floating("weights", weights)
    check_rank("weights", weights, 4)
    mask = _to_shape("mask", mask, tuple(weights.shape), "[B, H, T, S]")
    return ops.where(mask, widen(weights), 0.0), mask


def check_values(values: Any, mask: Any) -> tuple[Any, Any]:
    """Wide values, 0 where masked, and the mask of their shape."""
    values = to_tensor(values)
    check_floating("values", values)
    shape = tuple(values.shape)
    mask = _to_shape("mask", mask, shape[:-1], "the shape of `values` without its last axis")
    mask = ops.broadcast_to(ops.expand_dims(mask, -1), shape)
    return ops.where(mask, widen(values), 0.0), mask


def _to_shape(name: str, mask: Any, shape: tuple, shape_name: str) -> Any:
    if mask is None:
        return ops.ones(shape, dtype="bool")
    mask = check_mask(name, mask)
    check_broadcastable(name, tuple(mask.shape), shape, shape_name)
    return ops.broadcast_to(mask, shape)
