"""A function that calls layers, compiled by the backend; the one file that knows frameworks."""

from collections.abc import Callable, Hashable

import keras

from keras_ssattn._keras.tree import foreign_part
from keras_ssattn._typing import Layer, Tensor


def compile_function(
    function: Callable, model: Layer, consumed: tuple[int, ...] | None = None
) -> Callable:
    """Compiles a function of tensors that reads a model's variables and changes nothing.

    By `jax.jit` on JAX, which is given the variables' values at each call, and by XLA on
    TensorFlow. On PyTorch it runs eagerly, without gradients, or one that runs often as a graph.

    Args:
        function: of tensors.
        model: of which it reads variables.
        consumed: of a function that runs often, which arguments are of no use after a call:
            results are written over them.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        variables = model.variables

        def stateless(values: list[Tensor], *args: Tensor) -> Tensor:
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                return function(*args)

        compiled = jax.jit(stateless, donate_argnums=[1 + i for i in consumed or ()])
        return lambda *args: compiled([v.value for v in variables], *args)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if backend == "torch":
        from keras_ssattn import _torch

        if consumed is None:
            return _torch.without_gradients(function)
        foreign = foreign_part(model)
        obstacle = foreign and f"{foreign} may do more than compute tensors"
        return _torch.Captured(function, consumed, model.jit_compile is True, obstacle)
    return function


def is_traced() -> bool:
    """Whether PyTorch follows what runs, to write it down for another time or another runtime."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    if torch.jit.is_tracing():
        return True
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # from PyTorch 2.7 on
    return is_exporting is not None and is_exporting()


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
            self.functions[options] = compile_function(make(), model, consumed)
        return self.functions[options]
