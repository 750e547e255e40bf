"""Makes this package's attention from the options of Keras's attention layers."""

import functools
import inspect
import re
from typing import Any

import keras
from keras import ops

from keras_ssattn._typing import Config, Identifier, Tensor
from keras_ssattn.layers import MultiHeadAttention

NAMES = {  # our names for options of `GroupQueryAttention`
    "head_dim": "key_dim",
    "num_query_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}


@keras.saving.register_keras_serializable(package="keras_ssattn")
class ConvertedAttention(MultiHeadAttention):
    """Replaces an attention layer of Keras. Like that layer, it takes masks of any dtype.

    A mask is True where it is not 0.
    """

    @functools.wraps(MultiHeadAttention.call)  # Keras reads the names of the arguments
    def call(  # type: ignore[override]
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor = None,
        query_mask: Tensor = None,
        value_mask: Tensor = None,
        key_mask: Tensor = None,
        attention_mask: Tensor = None,
        *args: Tensor,
        **kwargs: Tensor,
    ) -> Tensor:
        masks: Any = [
            None if mask is None else ops.cast(mask, "bool")
            for mask in (query_mask, value_mask, key_mask, attention_mask)
        ]
        return super().call(query, value, key, *masks, *args, **kwargs)


def make_attention(options: Config, normalizer: Identifier) -> ConvertedAttention:
    """Makes the replacement of a layer of Keras that has these options."""
    return ConvertedAttention.from_config(converted_options(options, normalizer))


def converted_options(options: Config, normalizer: Identifier) -> Config:
    """Translates options of a layer of Keras to options of this package's layer."""
    same = {NAMES.get(name, name): x for name, x in options.items()}
    return {**same, "normalizer": normalizer}


def options_of_call(cls: type, *args: object, **kwargs: object) -> Config:
    """Returns all options by name, with defaults, from the arguments of a constructor."""
    bound = inspect.signature(cls.__init__).bind(None, *args, **kwargs)  # type: ignore[misc]
    bound.apply_defaults()
    options = {**bound.arguments, **bound.arguments["kwargs"]}
    del options["self"], options["kwargs"]
    unknown = bound.arguments["kwargs"].keys() - {"name", "trainable", "dtype", "autocast"}
    if unknown:
        raise TypeError(f"`{cls.__name__}` must get options of its own. Received: {unknown}")
    if options.get("name") is None:  # then it gets the name that Keras would give
        stem = re.sub("(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        count = keras.backend.get_uid(stem)
        options["name"] = stem if count == 1 else f"{stem}_{count - 1}"
    return options


def options_of_layer(layer: keras.Layer) -> Config:
    """Returns the options of an attention layer by name, from its attributes.

    Its configuration does not serve: Keras leaves out `flash_attention`, and the `get_config` of
    KerasHub's `LlamaAttention` raises.
    """
    kept = vars(layer)
    names = inspect.signature(type(layer).__init__).parameters
    return {name: kept.get(f"_{name}", kept.get(name)) for name in ("name", *names)}
