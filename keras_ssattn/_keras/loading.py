"""Layers that take their own weights from a file, and refuse any other."""

import weakref
from collections.abc import Mapping

import keras

from keras_ssattn._typing import Tensor


class StrictLoading(keras.layers.Layer):
    """A layer that refuses a file for good once the file has weights that are not its own.

    In a subclassed model Keras looks for a layer under more than one name. It forgets a refusal if
    it finds nothing under the next name, and the layer expects no weights.
    """

    _refused: tuple[weakref.ref, str] | None = None  # the file, and the error

    def load_own_variables(self, store: Mapping[str, Tensor]) -> None:
        file = getattr(store, "h5_file", None)
        if file is not None and self._refused is not None and self._refused[0]() is file:
            raise ValueError(self._refused[1])
        try:
            super().load_own_variables(store)
        except ValueError as error:
            message = f"{error} {self.explain()}".strip()
            self._refused = None if file is None else (weakref.ref(file), message)
            raise ValueError(message) from error

    def explain(self) -> str:
        """What an error about other weights says after Keras's own words."""
        return ""


class NoWeights(StrictLoading, keras.layers.Identity):
    """Stands where an optional layer is left out, and does nothing.

    Keras ignores weights in a file that belong to no layer of the model. This layer takes the place
    of the missing one and expects no weights, so a file that has some is refused.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x  # without what Keras does around a call, which on PyTorch takes time

    call = __call__


def freeze_sublayers(layer: keras.Layer) -> None:
    """Carries `trainable=False` on to the layers that `build` has just made."""
    if not layer.trainable:
        layer.trainable = True  # on TensorFlow, setting the value that it has does nothing
        layer.trainable = False
