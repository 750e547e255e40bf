"""The attention weights and hidden states of one pass through a model."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from keras import ops

from keras_ssattn._keras.observing import observed_by
from keras_ssattn._keras.state import sync_state
from keras_ssattn._keras.tree import walk
from keras_ssattn._tensors import widen
from keras_ssattn._typing import ArrayLike, Layer, Tensor
from keras_ssattn.analysis._names import layer_names

T = TypeVar("T")


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


def record(model: Layer, inputs: ArrayLike, **options: ArrayLike) -> Recording:
    """Runs a model once, in inference mode, and returns what its attention layers did.

    Every `MultiHeadAttention` and `TransformerBlock` that runs is recorded, at any depth of a
    functional or subclassed model. Weights and outputs are those of the model; only that all
    `T x S` weights are computed, so that memory grows with them: give it a small batch. The
    model stays as it is, compiled or not. In a callback during `fit`, it has the weights of the
    moment. Other threads may use the model meanwhile, and record it.

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
    watching = _Recorder()
    with observed_by(watching):
        model(inputs, training=False, **options)
    attention, hidden = watching.attention, watching.hidden
    if not attention:
        raise ValueError(
            "`model` must run a `keras_ssattn.layers.MultiHeadAttention`. Received: "
            f"{type(model).__name__} named {model.name!r}, in which none ran"
        )
    names = layer_names(model, [layer for layer, _ in hidden + attention])
    return Recording(_by_name(attention, names), _by_name(hidden, names))


class _Recorder:
    """Keeps what the layers of one pass say that they did, in order."""

    def __init__(self) -> None:
        self.attention: list[tuple[Layer, AttentionMap]] = []
        self.hidden: list[tuple[Layer, HiddenState]] = []

    def attended(self, layer: Layer, weights: Tensor, visible: Tensor) -> None:
        arrays = _copy(layer, widen(weights)), _copy(layer, visible)
        self.attention.append((layer, AttentionMap(*arrays)))

    def transformed(self, layer: Layer, values: Tensor, mask: Tensor | None) -> None:
        sizes = values.shape[:2]
        mask = ops.ones(sizes, "bool") if mask is None else ops.cast(mask, "bool")
        arrays = _copy(layer, widen(values)), _copy(layer, ops.broadcast_to(mask, sizes))
        self.hidden.append((layer, HiddenState(*arrays)))


def _by_name(runs: Sequence[tuple[Layer, T]], names: dict[int, str]) -> dict[str, T]:
    """What the layers did in each run, by their names."""
    results: dict[str, T] = {}
    count: Counter[int] = Counter()
    for layer, result in runs:
        name = names[id(layer)]
        count[id(layer)] += 1
        results[name if count[id(layer)] == 1 else f"{name}@{count[id(layer)]}"] = result
    return results


def _copy(layer: Layer, x: Tensor) -> np.ndarray:
    """A NumPy array of its own: layers after this one may change the tensor in place."""
    try:
        return np.array(ops.convert_to_numpy(x))
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"`model` must run its attention layers eagerly. Received: {layer.path}, which runs "
            "inside a compiled or rematerialized function"
        ) from error
