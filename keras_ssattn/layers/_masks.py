"""Masks as Keras gives them to layers, checked and brought into the shapes of `ops`."""

from typing import Any

from keras import ops

from keras_ssattn.ops._arguments import check_broadcastable, check_mask


def align_left(mask: Any, logits: Any) -> Any:
    """A mask with as many axes as the logits, those it lacks last, as Keras's masks lack them."""
    if mask is None:
        return None
    mask = check_mask("mask", mask)
    rank = len(logits.shape)
    if len(mask.shape) == rank:
        return mask
    if len(mask.shape) == 2 and rank > 2:
        return ops.expand_dims(mask, tuple(range(2, rank)))
    raise ValueError(
        f"`mask` must have the rank of the logits, or be Keras's own of shape [batch, time]. "
        f"Received: mask with shape {tuple(mask.shape)}, logits with shape {tuple(logits.shape)}"
    )


def padding_mask(name: str, mask: Any, sizes: tuple, axes: str) -> Any:
    mask = check_mask(name, mask, rank=2)
    if mask is not None:
        check_broadcastable(name, tuple(mask.shape), sizes, axes)
    return mask


def both_masks(value_mask: Any, key_mask: Any, sizes: tuple) -> Any:
    value_mask = padding_mask("value_mask", value_mask, sizes, "[B, S]")
    key_mask = padding_mask("key_mask", key_mask, sizes, "[B, S]")
    if value_mask is None or key_mask is None or key_mask is value_mask:
        return value_mask if key_mask is None else key_mask
    return ops.logical_and(value_mask, key_mask)


def attention_mask_by_head(mask: Any, sizes: tuple) -> Any:
    """`[T, S]` or `[B, H, T, S]` as they are, `[B, T, S]` as `[B, 1, T, S]`."""
    mask = check_mask("attention_mask", mask, rank=(2, 3, 4))
    if mask is None:
        return None
    if len(mask.shape) == 3:
        mask = ops.expand_dims(mask, 1)
    check_broadcastable("attention_mask", tuple(mask.shape), sizes, "[B, H, T, S]")
    return mask


def hide_rows(x: Any, query_mask: Any, axes: tuple[int, ...]) -> Any:
    """Zeros where a query is padding; the mask `[B, T]` lacks these axes of `x`."""
    if query_mask is None:
        return x
    return ops.where(ops.expand_dims(query_mask, axes), x, ops.zeros_like(x))
