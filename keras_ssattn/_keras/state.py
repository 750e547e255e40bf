"""The weights of a model during `fit`."""

from keras_ssattn._typing import Layer


def sync_state(model: Layer) -> None:
    """Gives a model, or layer, the weights of the moment in a callback during `fit` on JAX.

    There the model that is fitted keeps the values outside of all variables until asked.
    """
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
    try:
        for weight in model.weights:
            weight.value  # noqa: B018
    except TypeError as error:  # a variable without a value
        raise RuntimeError(
            "`model` must have values for its weights. During `fit` on JAX the model that is "
            "fitted keeps them: use that model, or call `jax_state_sync()` of it first. Received: "
            f"{type(model).__name__} named {model.name!r}, part of a model that is fitted"
        ) from error
