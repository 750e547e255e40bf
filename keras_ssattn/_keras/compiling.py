"""Functions that call a model's layers, compiled by the backend and kept with the model."""

from collections.abc import Callable, Hashable

import keras

from keras_ssattn._frameworks import compile_function
from keras_ssattn._keras.tree import foreign_part
from keras_ssattn._typing import Layer


class CompiledFunctions:
    """Functions compiled for a model, by their options, for the variables that it has now.

    An object that is no dictionary: those that belong to a model Keras and TensorFlow save.
    """

    def __init__(self) -> None:
        self.functions: dict[Hashable, Callable] = {}
        self.variables: list[keras.Variable] = []

    def get(
        self,
        options: Hashable,
        make: Callable,
        model: Layer,
        consumed: tuple[int, ...] | None = None,
    ) -> Callable:
        """The one of these options, compiled from what `make()` returns if there is none."""
        variables = model.variables
        if [id(v) for v in variables] != [id(v) for v in self.variables]:
            # as after quantization: those of the variables before would keep them in memory
            self.functions.clear()
            self.variables = list(variables)
        if options not in self.functions:
            foreign = foreign_part(model)
            self.functions[options] = compile_function(
                make(),
                variables,
                consumed,
                compiled=model.jit_compile is True,
                obstacle=foreign and f"{foreign} may do more than compute tensors",
            )
        return self.functions[options]
