"""What an attention layer of Keras becomes: its options as those of this package's."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ssattn.layers import MultiHeadAttention, SSMax, normalizers

SAME_OPTIONS = (
    "name", "trainable", "dtype", "dropout", "use_bias", "sliding_window", "seed",
    "kernel_initializer", "bias_initializer", "kernel_regularizer", "bias_regularizer",
    "kernel_constraint", "bias_constraint",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Retrofit:
    """What the attention of a model is to become; see `convert_attention`."""

    normalizer: Any
    train_length: int | None = None
    causal: bool = True

    def normalizer_for(self, window: int | None) -> Any:
        """The normalizer of an attention layer with that sliding window."""
        if self.train_length is None:
            return self.normalizer
        return SSMax(init_s=start_of_s(self.train_length, self.causal, window))

    def get_config(self) -> dict[str, Any]:
        normalizer = self.normalizer
        if not isinstance(normalizer, str):
            normalizer = normalizer.serialize()
        return {
            "normalizer": normalizer,
            "train_length": self.train_length,
            "causal": self.causal,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Retrofit":
        normalizer = config["normalizer"]
        if not isinstance(normalizer, str):
            normalizer = normalizers.get_for_attention(normalizer)
        return cls(**{**config, "normalizer": normalizer})


def start_of_s(train_length: int, causal: bool, window: int | None) -> float:
    """1 / mean(log n) over the numbers n of keys that `train_length` queries see."""
    position = np.arange(1, train_length + 1)
    reach = train_length if window is None else window
    last = position if causal else np.minimum(position + reach - 1, train_length)
    n = last - np.maximum(position - reach, 0)
    mean = float(np.mean(np.log(n)))
    return 1.0 if mean == 0 else 1.0 / mean  # with a window of 1, s has no effect


@keras.saving.register_keras_serializable(package="keras_ssattn")
class ConvertedAttention(MultiHeadAttention):
    """What an attention layer of Keras becomes: it takes, as that does, masks of any dtype.

    True is where a mask is not 0.
    """

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        segment_ids: Any = None,
        cache: Any = None,
        cache_index: Any = 0,
    ) -> Any:
        return super().call(
            query,
            value,
            key,
            _to_bool(query_mask),
            _to_bool(value_mask),
            _to_bool(key_mask),
            _to_bool(attention_mask),
            return_attention_scores,
            training,
            use_causal_mask,
            segment_ids,
            cache,
            cache_index,
        )


def _to_bool(mask: Any) -> Any:
    return None if mask is None else ops.cast(mask, "bool")


def _from_multi_head(layer: Any, retrofit: Retrofit) -> ConvertedAttention:
    return ConvertedAttention.from_config(multi_head_options(layer, retrofit))


def multi_head_options(layer: Any, retrofit: Retrofit) -> dict[str, Any]:
    """The options of a `keras.layers.MultiHeadAttention`, as those of this package's."""
    config = layer.get_config()
    sizes = ("num_heads", "key_dim", "value_dim", "output_shape")
    return {**_same_options(config, retrofit), **{name: config[name] for name in sizes}}


def _from_grouped(layer: Any, retrofit: Retrofit) -> ConvertedAttention:
    config = layer.get_config()
    sizes = {
        "num_heads": config["num_query_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "key_dim": config["head_dim"],
    }
    return ConvertedAttention.from_config({**_same_options(config, retrofit), **sizes})


def _same_options(config: dict[str, Any], retrofit: Retrofit) -> dict[str, Any]:
    normalizer = retrofit.normalizer_for(config.get("sliding_window"))  # Keras 3.9 has none
    options = {name: config[name] for name in SAME_OPTIONS if name in config}
    return {**options, "normalizer": normalizer}


SUBSTITUTES = {
    keras.layers.MultiHeadAttention: _from_multi_head,
    keras.layers.GroupQueryAttention: _from_grouped,
}


def refusal_of_options(layer: Any) -> str | None:
    """Which option of a Keras attention layer this package's lacks, or `None`."""
    config = layer.get_config()
    shapes = (layer.get_build_config() or {}).get("shapes_dict", {})
    shapes = [tuple(shape) for shape in shapes.values() if shape is not None]
    axes = config.get("attention_axes")
    if any(len(shape) != 3 for shape in shapes):
        return f"inputs of shapes {shapes}, not [batch, time, features]"
    if axes is not None and tuple(axes) != (1,):
        return f"attention_axes={axes}"
    if config.get("use_gate"):
        return "use_gate=True"
    if config["activity_regularizer"] is not None:
        return "an activity_regularizer"
    # Keras leaves it out of the configuration
    if vars(layer).get("_flash_attention") and not keras.config.is_flash_attention_enabled():
        return "flash_attention=True"
    return None
