"""The learned length scales of a model."""

import numpy as np
from keras import ops

from keras_ssattn._checks import check_choice
from keras_ssattn._keras.state import sync_state
from keras_ssattn._keras.tree import walk
from keras_ssattn._typing import Layer
from keras_ssattn.analysis._names import layer_names
from keras_ssattn.layers import LengthScale


def learned_scale(model: Layer, parameter: str = "s") -> dict[str, np.ndarray]:
    r"""The learned s, or b, of :math:`s \log n + b`, by layer and head.

    Of every SSMax and every other normalizer with a `LogLengthScale`, in attention layers and by
    itself, from the weights alone. In a callback during `fit`, it is that of the moment.

    Args:
        model: a Keras model, or layer, that is built.
        parameter: `"s"` or `"b"`.

    Returns:
        A dictionary from the name of the layer, as in `record`, to a float32 array: `[H]` in
        attention, `[]` for a normalizer by itself. Layers without the parameter are not in it.

    Raises:
        ValueError: for a model that is not built, or another parameter.
        RuntimeError: as `record`.

    Example:

    >>> import keras_ssattn
    >>> model = keras_ssattn.build(embed_dim=8, hidden_size=8, num_heads=2, num_layers=1)
    >>> s = keras_ssattn.analysis.learned_scale(model)
    >>> [round(float(x), 3) for x in s["ssmax_block_1"]]  # 1/mean(log n), n = 1 ... 60
    [0.318, 0.318]

    Reference: Nakanishi, arXiv 2501.19399.
    """
    check_choice("parameter", parameter, ("s", "b"))
    if not model.built:
        raise ValueError(
            "`model` must be built: call it on a batch first. Received: "
            f"{type(model).__name__} named {model.name!r}, which has no weights yet"
        )
    sync_state(model)
    names = layer_names(model)
    return {
        names[id(layer)]: np.array(ops.convert_to_numpy(weight.value), "float32")
        for _, layer in walk(model)
        if isinstance(layer, LengthScale)
        for weight in layer.weights
        if weight.name == parameter
    }
