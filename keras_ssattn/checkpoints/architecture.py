"""What a language model computes, in plain values: between config.json and `CausalLM`."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from keras_ssattn._keras.serialization import Specification
from keras_ssattn._typing import Config, Layer, NormName, Option
from keras_ssattn.layers import LengthScale, PositionTemperature, RotaryEmbedding, Softmax
from keras_ssattn.layers.feed_forward import get_activation
from keras_ssattn.layers.per_layer import one_or_each
from keras_ssattn.layers.projection import has_bias


class Temperature(NamedTuple):
    """The position temperature, `1 + beta log(1 + floor(position / original_length))`."""

    beta: float
    original_length: int


class Rotary(NamedTuple):
    """Rotary positions: base, share of the features, and scaling as sorted pairs."""

    theta: float
    fraction: float = 1.0
    scaling: tuple[tuple[str, Option], ...] = ()


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The function of a model but for its weights.

    Attributes:
        activation: of the gates of the feed-forward network, a name of `FeedForward`.
        biases: names of the parts with biases, as `use_bias` of `CausalLM` has them.
        tied: whether the head is the token embedding.
        rotary: of the layers that have positions.
        has_positions: whether a layer has them, for each.
        windows: the sliding window of each layer.
    """

    vocabulary_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    norm_epsilon: float
    rotary: Rotary
    has_positions: tuple[bool, ...]
    windows: tuple[int | None, ...]
    activation: str = "silu"
    norm: NormName = "rms_norm"
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    tied: bool = False
    embedding_scale: float = 1.0
    temperature: Temperature | None = None

    def options(self) -> Config:
        """Those of `CausalLM`."""
        theta, fraction, scaling = self.rotary
        rotary = RotaryEmbedding(theta, fraction, dict(scaling) or None)
        scale = self.temperature and PositionTemperature(*self.temperature)
        return {
            "vocabulary_size": self.vocabulary_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "key_dim": self.key_dim,
            "normalizer": Softmax(length_scale=scale),
            "rotary": one_or_each([rotary if x else None for x in self.has_positions]),
            "sliding_window": one_or_each(self.windows),
            "qk_norm": self.qk_norm,
            "ffn_type": "gated",
            "ffn_expansion": self.inner_size / self.hidden_size,
            "activation": self.activation,
            "norm": self.norm,
            "norm_epsilon": self.norm_epsilon,
            "use_bias": self.biases,
            "embedding_scale": self.embedding_scale,
            "tie_embeddings": self.tied,
        }


BIASED = ("query", "key", "value", "attention_output", "feed_forward")


def architecture_of(model: Layer) -> Architecture:
    """That of a `CausalLM`.

    Raises:
        ValueError: for a model with what no family in Hugging Face folders has.
    """
    layers = [block.attention for block in model.blocks]
    first, feed_forward = layers[0], model.blocks[0].feed_forward
    rotaries = {
        _rotary_of(layer.rotary, layer.key_dim) for layer in layers if layer.rotary is not None
    }
    temperatures = {_temperature_of(layer.normalizer) for layer in layers}
    for name, found, fits in (
        ("use_gate", model.use_gate, not model.use_gate),
        ("ffn_type", model.ffn_type, model.ffn_type == "gated"),
        ("norm", model.norm, model.norm != "layer_norm"),
        ("rotary", model.get_config()["rotary"], len(rotaries) <= 1),
        ("normalizer", [layer.normalizer for layer in layers], len(temperatures) == 1),
        ("norm_epsilon", model.norm_epsilon, not model.qk_norm or model.norm_epsilon),
    ):
        if not fits:
            raise ValueError(f"no Hugging Face family has such a model. Received: {name}={found}")
    return Architecture(
        vocabulary_size=model.vocabulary_size,
        hidden_size=model.hidden_size,
        inner_size=feed_forward.inner_size,
        num_layers=model.num_layers,
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        key_dim=first.key_dim,
        norm_epsilon=model.blocks[0].attention_norm.epsilon,
        rotary=rotaries.pop() if rotaries else Rotary(1e4),
        has_positions=tuple(layer.rotary is not None for layer in layers),
        windows=tuple(layer.sliding_window for layer in layers),
        activation=_name_of(feed_forward.activation),
        norm=model.norm,
        biases=tuple(name for name in BIASED if has_bias(model.use_bias, name)),
        qk_norm=model.qk_norm,
        tied=model.tie_embeddings,
        embedding_scale=model.embedding_scale,
        temperature=temperatures.pop(),
    )


def _name_of(activation: Callable) -> str:
    """The name that stands for a function, which another of the same name is not."""
    name = getattr(activation, "__name__", None)
    try:
        if isinstance(name, str) and get_activation(name) is activation:
            return name
    except ValueError:
        pass
    raise ValueError(
        f"no Hugging Face family has a function of one's own. Received: activation={activation!r}"
    )


def _rotary_of(layer: RotaryEmbedding, key_dim: int) -> Rotary:
    if type(layer) is not RotaryEmbedding:
        raise ValueError(f"no Hugging Face family has these positions. Received: rotary={layer!r}")
    scaling = layer.scaling or {}
    if scaling.get("type") == "yarn":  # a file always has them
        scaling = {"beta_fast": 32, "beta_slow": 1, "truncate": True, **scaling}
    size = 2 * int(layer.fraction * key_dim / 2 + 1e-6)  # as the layer rounds it
    return Rotary(layer.theta, size / key_dim, sorted_pairs(scaling))


def sorted_pairs(scaling: Config) -> tuple[tuple[str, Option], ...]:
    """The entries of a scaling, in one order."""
    return tuple(sorted(scaling.items()))


def _temperature_of(normalizer: Layer) -> Temperature | None:
    scale = normalizer.length_scale
    if type(normalizer) is Softmax and type(scale) is LengthScale:
        return None
    fits = type(normalizer) is Softmax and type(scale) is PositionTemperature
    if not fits or scale.first_position != 0:
        specification: Specification = normalizer.specification()
        raise ValueError(
            "a Hugging Face folder has no place for this normalizer and length scale, which "
            "`model.save` keeps; only `Softmax`, and `PositionTemperature` from position 0, have "
            f"one. Received: {specification.cls.__name__} with {type(scale).__name__}"
        )
    return Temperature(scale.beta, scale.original_length)
