"""Masks as Keras gives them to layers, checked and brought into the shapes of `ops`."""

import inspect
import numbers
from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_ssattn._checks import check_broadcastable, check_mask
from keras_ssattn._tensors import is_known
from keras_ssattn._typing import ArrayLike, Option, Size, Tensor
from keras_ssattn.ops import Cache, Visibility
from keras_ssattn.ops.cache import check_index, write_at
from keras_ssattn.ops.sizes import Sizes, compress_ids


def align_left(mask: ArrayLike | None, logits: Tensor) -> Tensor | None:
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


def padding_mask(
    name: str, mask: ArrayLike | None, sizes: Sizes, axes: str, length: Size
) -> Tensor | None:
    """A mask of batch and time, checked against the batch and a length."""
    mask = check_mask(name, mask, rank=2)
    if mask is None:
        return None
    check_broadcastable(name, tuple(mask.shape), (sizes.batch, length), axes)
    is_one = is_known(mask.shape[1]) and mask.shape[1] == 1
    if not is_one:
        sizes.match(ops.shape(mask)[1], length)
    return mask


def both_masks(
    value_mask: ArrayLike | None, key_mask: ArrayLike | None, sizes: Sizes, length: Size
) -> Tensor | None:
    """The keys that neither mask calls padding, `[B, S]`."""
    if key_mask is value_mask:
        key_mask = None
    value_mask = padding_mask("value_mask", value_mask, sizes, "[B, S]", length)
    key_mask = padding_mask("key_mask", key_mask, sizes, "[B, S]", length)
    if value_mask is None or key_mask is None:
        return value_mask if key_mask is None else key_mask
    return ops.logical_and(value_mask, key_mask)


class PacksSegments:
    """A base class of layers whose call takes `segment_ids`: what they do before Keras does.

    Keras makes tensors of arrays. JAX would cut NumPy's 64-bit ids to 32 bits, and merge those that
    differ above.
    """

    def __call__(self, *args: Option, **kwargs: Option) -> Tensor:
        if len(args) > 2:  # no `:=`, of which TensorFlow's AutoGraph would warn
            place = _place_of_segments(self.call)  # type: ignore[attr-defined]
            if len(args) > place:
                args = (*args[:place], *compress_ids(args[place]), *args[place + 1 :])
        if kwargs.get("segment_ids") is not None:
            (kwargs["segment_ids"],) = compress_ids(kwargs["segment_ids"])
        index = kwargs.get("cache_index")
        if isinstance(index, numbers.Integral):  # Keras makes a tensor of NumPy's, too
            kwargs["cache_index"] = int(index)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


def _place_of_segments(call: Callable) -> int:
    """The position of `segment_ids` among the arguments of a layer's call."""
    return list(inspect.signature(call).parameters).index("segment_ids")


class CallMasks(NamedTuple):
    """The masks of a call of attention, as its caller gave them."""

    query: ArrayLike | None
    value: ArrayLike | None
    key: ArrayLike | None = None
    attention: Tensor | None = None  # [B|1, H|1, T|1, S|1]


def see(
    inputs: tuple[Tensor, Tensor, Tensor],
    masks: CallMasks,
    causal: bool,
    segment_ids: ArrayLike | None = None,
    cache: Cache | None = None,
    cache_index: int | ArrayLike = 0,
) -> tuple[Visibility, Tensor | None]:
    """The visibility that a call of attention asks for, and the mask of its queries.

    `inputs` are query, value and key, `[B, T, E]`, `[B, S, Ev]` and `[B, S, Ek]`; the other
    arguments are those of `MultiHeadAttention`.
    """
    query, value, key = inputs
    batch, length = ops.shape(query)[:2]
    value_batch, value_length = ops.shape(value)[:2]
    sizes = Sizes(batch, None, length, value_length if cache is None else cache[0].shape[1])
    if value is not query and not sizes.match(value_batch, batch):
        raise ValueError(
            "`query` and `value` must have the same batch size. Received: query with shape "
            f"{tuple(query.shape)}, value with shape {tuple(value.shape)}"
        )
    if key is not value and not (
        sizes.match(ops.shape(key)[1], value_length) and sizes.match(ops.shape(key)[0], batch)
    ):
        raise ValueError(
            "`value` and `key` must be equal in all sizes but the features. Received: value "
            f"with shape {tuple(value.shape)}, key with shape {tuple(key.shape)}"
        )
    query_mask = padding_mask("query_mask", masks.query, sizes, "[B, T]", length)
    if value is query and masks.value is masks.query and masks.key is None:
        key_mask = query_mask
    else:
        key_mask = both_masks(masks.value, masks.key, sizes, value_length)
    segments = sizes.check_segments(segment_ids)
    if cache is None:
        seen = Visibility(
            length, value_length, causal, mask=masks.attention, key_mask=key_mask,
            segments=segments, guard=sizes.guard,
        )  # fmt: skip
    else:
        seen = see_cache(cache, cache_index, value, key_mask, masks.attention, sizes.guard)
    return seen, query_mask


def see_cache(
    cache: Cache,
    index: int | ArrayLike,
    tokens: Tensor,
    key_mask: Tensor | None,
    mask: Tensor | None = None,
    guard: Tensor | None = None,
) -> Visibility:
    """What `tokens`, `[B, T, ...]`, see that are written to a cache from `index` on."""
    batch, length = ops.shape(tokens)[:2]
    index = check_index(cache, index, length)
    if not isinstance(index, int):
        check_broadcastable("cache_index", tuple(index.shape), (batch,), "[B]")
    if key_mask is None:
        key_mask = ops.ones((batch, length), "bool")
    else:
        key_mask = ops.broadcast_to(key_mask, (batch, length))
    key_mask = write_at(cache[2], index, key_mask)
    return Visibility(
        length, ops.shape(cache[0])[1], True, None, index, mask, key_mask, None, guard
    )


def check_cache_arguments(
    cache: Cache | None,
    index: int | ArrayLike,
    causal: bool,
    segment_ids: ArrayLike | None,
) -> None:
    """Raises unless what a call says of a cache goes together."""
    if cache is not None and (not causal or segment_ids is not None):
        raise ValueError("`cache` goes with `use_causal_mask=True`, without `segment_ids`.")
    if cache is None and not (isinstance(index, int) and index == 0):
        raise ValueError("`cache_index` goes with `cache`. Received: cache=None")


def check_visibility(
    visibility: Visibility,
    inputs: tuple[Tensor, Tensor, Tensor],
    cache: Cache | None,
    causal: bool,
    others: dict[str, ArrayLike | None],
) -> None:
    """Raises unless a given `Visibility` fits the inputs, and nothing else says what is seen."""
    if not isinstance(visibility, Visibility):
        raise TypeError(
            f"`visibility` must be a `keras_ssattn.ops.Visibility`. Received: {visibility!r}"
        )
    given = [name for name, x in others.items() if x is not None]
    if given or (causal and not visibility.causal):
        given = given or ["use_causal_mask=True, with causal=False in `visibility`"]
        raise ValueError(
            "`visibility` takes the place of other masks: make it with what they say. Received as "
            f"well: {', '.join(given)}"
        )
    held = inputs[1] if cache is None else cache.key
    visibility.check_lengths(ops.shape(inputs[0])[1], ops.shape(held)[1])


def hide_rows(x: Tensor, query_mask: Tensor | None, axes: tuple[int, ...]) -> Tensor:
    """Zeros where a query is padding; the mask `[B, T]` lacks these axes of `x`."""
    if query_mask is None:
        return x
    return ops.where(ops.expand_dims(query_mask, axes), x, ops.zeros_like(x))


def visible_in(weights: Tensor, visibility: Visibility, query_mask: Tensor | None) -> Tensor:
    """The keys that each query sees, in the shape of the weights; a query at padding sees none."""
    visible = ops.ones(ops.shape(weights), "bool")
    if visibility.dense_mask is not None:
        visible = ops.logical_and(visible, visibility.dense_mask)
    if query_mask is not None:
        visible = ops.logical_and(visible, ops.expand_dims(query_mask, (1, 3)))
    return visible
