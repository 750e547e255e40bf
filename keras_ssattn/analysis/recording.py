"""The attention weights and hidden states of one pass through a model."""

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_ssattn.analysis._names import layer_names
from keras_ssattn.layers import MultiHeadAttention, TransformerBlock
from keras_ssattn.layers._masks import attention_mask_by_head, both_masks
from keras_ssattn.models.held import walk
from keras_ssattn.models.state import sync_state
from keras_ssattn.ops import visible_keys
from keras_ssattn.ops._arguments import widen

_lock = threading.RLock()


class AttentionMap(NamedTuple):
    """The weights of an attention layer; measures take it as `measure(*map)`.

    Attributes:
        weights: float32 `[B, H, T, S]`, before dropout.
        mask: boolean `[B, H, T, S]`, True where a query sees a key. A query at padding sees none.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.analysis import AttentionMap, attention_entropy
    >>> map = AttentionMap(np.ones((1, 1, 2, 2)) / 2, np.tril(np.ones((1, 1, 2, 2), bool)))
    >>> attention_entropy(*map).shape
    (1,)
    """

    weights: np.ndarray
    mask: np.ndarray


class HiddenState(NamedTuple):
    """The output of a block; measures take it as `measure(*state)`.

    Attributes:
        values: float32 `[B, T, E]`.
        mask: boolean `[B, T]`, False at padding.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.analysis import HiddenState, max_activation
    >>> float(max_activation(*HiddenState(np.array([[[2.0]]]), np.array([[True]]))))
    2.0
    """

    values: np.ndarray
    mask: np.ndarray


class Recording(NamedTuple):
    """What `record` returns: NumPy arrays, by the name of the layer, in the order of the pass.

    Attributes:
        attention: an `AttentionMap` for each call of a `MultiHeadAttention`.
        hidden: a `HiddenState` for each call of a `TransformerBlock`.

    Example:

    >>> import numpy as np
    >>> import keras_ssattn
    >>> model = keras_ssattn.build(embed_dim=8, hidden_size=8, num_heads=2, num_layers=1)
    >>> recording = keras_ssattn.analysis.record(model, np.ones((2, 60, 8), "float32"))
    >>> recording.hidden["ssmax_block_1"].values.shape
    (2, 60, 8)
    """

    attention: dict[str, AttentionMap]
    hidden: dict[str, HiddenState]


def record(model: Any, inputs: Any, **options: Any) -> Recording:
    """Runs a model once, in inference mode, and returns what its attention layers did.

    Every `MultiHeadAttention` and `TransformerBlock` that runs is recorded, at any depth of a
    functional or subclassed model. Weights and outputs are those of the model; only that all
    `T x S` weights are computed, so that memory grows with them: give it a small batch. The
    model stays as it is, compiled or not. In a callback during `fit`, it has the weights of the
    moment. Other threads may use the model meanwhile; recordings of several take turns.

    A name is the path of the layer inside the model, `block_1` for the attention of that block
    and for its output, `block_1/context_attention` for its cross-attention. Of several layers of
    one path, the second that the model holds is `block_1#2`; the second run of one layer is
    `block_1@2`.

    Args:
        model: a Keras model, or layer. One in which any layer is not built is called once before.
        inputs: a batch of inputs.
        **options: of the call, such as a mask.

    Returns:
        A `Recording`.

    Raises:
        ValueError: for a model in which no `MultiHeadAttention` runs, or runs inside a compiled
            or rematerialized function, which has no values to record.
        RuntimeError: on JAX, during `fit` of another model that holds this one and its values.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn import analysis, models
    >>> model = models.CausalLM(vocabulary_size=50, hidden_size=16, num_layers=2, num_heads=2)
    >>> recording = analysis.record(model, np.array([[1, 2, 3]]))
    >>> list(recording.attention)
    ['block_1', 'block_2']
    >>> weights, mask = recording.attention["block_1"]
    >>> weights.shape
    (1, 2, 3, 3)
    >>> analysis.attention_entropy(weights, mask).shape
    (2,)
    """
    sync_state(model)
    if not all(layer.built for _, layer in walk(model)):  # some layers are built by running them
        model(inputs, training=False, **options)
    attention: list[tuple[Any, AttentionMap]] = []
    hidden: list[tuple[Any, HiddenState]] = []

    def attend(layer: Any, arguments: dict[str, Any], call: Callable) -> Any:
        asked = arguments["return_attention_scores"]
        output, weights, *cache = call(**{**arguments, "return_attention_scores": True})
        mask = _visible(layer, arguments, weights.shape, *cache)
        attention.append((layer, AttentionMap(_copy(layer, widen(weights)), _copy(layer, mask))))
        results = (output, weights, *cache) if asked else (output, *cache)
        return results[0] if len(results) == 1 else results

    def transform(layer: Any, arguments: dict[str, Any], call: Callable) -> Any:
        results = call(**arguments)
        values = results if arguments["cache"] is None else results[0]
        mask = arguments["inputs_mask"] if arguments["mask"] is None else arguments["mask"]
        mask = ops.ones(values.shape[:2], "bool") if mask is None else ops.cast(mask, "bool")
        mask = ops.broadcast_to(mask, values.shape[:2])
        hidden.append((layer, HiddenState(_copy(layer, widen(values)), _copy(layer, mask))))
        return results

    with _observed(MultiHeadAttention, attend), _observed(TransformerBlock, transform):
        model(inputs, training=False, **options)
    if not attention:
        raise ValueError(
            "`model` must run a `keras_ssattn.layers.MultiHeadAttention`. Received: "
            f"{type(model).__name__} named {model.name!r}, in which none ran"
        )
    names = layer_names(model, [layer for layer, _ in hidden + attention])
    return Recording(_by_name(attention, names), _by_name(hidden, names))


def _by_name(runs: list[tuple[Any, Any]], names: dict[int, str]) -> dict[str, Any]:
    """What the layers did in each run, by their names."""
    results: dict[str, Any] = {}
    count: Counter[int] = Counter()
    for layer, result in runs:
        name = names[id(layer)]
        count[id(layer)] += 1
        results[name if count[id(layer)] == 1 else f"{name}@{count[id(layer)]}"] = result
    return results


@contextmanager
def _observed(layer_class: Any, observe: Callable) -> Iterator[None]:
    """While it lasts, calls of such layers in this thread go through `observe`.

    By way of the class: layers and models are not touched, and need not be found.
    """
    with _lock:
        original, thread = layer_class.call, threading.get_ident()
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(self, *args, **kwargs)
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = {k: v for k, v in bound.arguments.items() if k != "self"}
            return observe(self, arguments, functools.partial(original, self))

        layer_class.call = call
        try:
            yield
        finally:
            layer_class.call = original


def _visible(layer: Any, arguments: dict[str, Any], sizes: tuple, cache: Any = None) -> Any:
    """The keys that each query sees in a call of `MultiHeadAttention`, `[B, H, T, S]`."""
    batch, _, length, key_length = sizes
    if cache is None:
        masks = (arguments["value_mask"], arguments["key_mask"])
        key_mask = both_masks(*masks, (batch, key_length))
    else:
        key_mask = cache.mask
    mask = visible_keys(
        length,
        key_length,
        mask=attention_mask_by_head(arguments["attention_mask"], sizes),
        key_mask=key_mask,
        causal=arguments["use_causal_mask"],
        window=layer.sliding_window,
        query_offset=arguments["cache_index"],
        segment_ids=arguments["segment_ids"],
    )
    mask = ops.ones(sizes, "bool") if mask is None else ops.broadcast_to(mask, sizes)
    query_mask = arguments["query_mask"]
    if query_mask is None:
        return mask
    return ops.logical_and(mask, ops.expand_dims(ops.cast(query_mask, "bool"), (1, 3)))


def _copy(layer: Any, x: Any) -> np.ndarray:
    """A NumPy array of its own: layers after this one may change the tensor in place."""
    try:
        return np.array(ops.convert_to_numpy(x))
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"`model` must run its attention layers eagerly. Received: {layer.path}, which runs "
            "inside a compiled or rematerialized function"
        ) from error
