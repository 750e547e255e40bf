"""Layers as specifications, and dtype policies in configs."""

import copy
import dataclasses
import inspect
import re

import keras

from keras_ssattn._checks import did_you_mean
from keras_ssattn._typing import Config, Layer, Option


@dataclasses.dataclass(frozen=True)
class Specification:
    """The class and the options of a layer that is still to be made, any number of times.

    Attributes:
        cls: the class, which need not be registered.
        options: of its constructor; one may be a specification itself.
    """

    cls: type[keras.Layer]
    options: Config

    @classmethod
    def of(cls, layer: Layer, **parts: "Specification") -> "Specification":
        """The specification of a layer. Its weights are not shared.

        `parts` are options that are specifications themselves.
        """
        return cls(type(layer), {**unshared(layer.get_config()), **parts})

    def make(self, **options: Option) -> Layer:
        """A new layer, with some options other than its own."""
        plain = {k: copy.deepcopy(v) for k, v in self.options.items() if k not in options}
        return self.cls.from_config({**plain, **options})

    def serialize(self) -> Config:
        """What `keras.saving.serialize_keras_object` gives of an unbuilt layer."""
        options = {
            name: value.serialize() if isinstance(value, Specification) else copy.deepcopy(value)
            for name, value in self.options.items()
        }
        return {
            "module": self.cls.__module__,
            "class_name": self.cls.__name__,
            "config": options,
            "registered_name": keras.saving.get_registered_name(self.cls),
        }


def unshared(config: Option) -> Option:
    """A copy of a config without the marks of objects that several configs share.

    While it saves or loads, Keras marks objects by their `id`. Another object may have the `id` of
    one that is gone, as the layers are that only give their options.
    """
    if isinstance(config, dict):
        return {k: unshared(v) for k, v in config.items() if k != "shared_object_id"}
    if isinstance(config, list):
        return [unshared(x) for x in config]
    return copy.deepcopy(config)


def serialize_options(layer: Layer) -> Config:
    """The class and options of a layer held by another, the same before and after building."""
    config = keras.saving.serialize_keras_object(layer)
    config.pop("build_config", None)
    return config


def policy_for(owner: Layer, name: str) -> keras.DTypePolicy:
    """The dtype policy of the part `name` of a layer that is being built.

    A quantized layer is loaded with a map of policies by path. Keras's own layers do not save what
    they are given as a map.
    """
    policy = owner.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    return policy[f"{owner.path}/{name}"] if is_map else policy


def serialize_policy(layer: Layer) -> Config:
    """The `dtype` entry of a layer's config, where quantization has changed its projections.

    A layer with projections of its own dtype policies, as `model.quantize("int8")` makes
    them, is restored only from a map of policies by path.
    """
    if not layer.built:
        return {}
    quantized = [p for p in layer.projections() if p.quantization_mode is not None]
    if not quantized:
        return {}
    default = layer.dtype_policy
    if isinstance(default, keras.dtype_policies.DTypePolicyMap):
        default = default.default_policy
    policies = keras.dtype_policies.DTypePolicyMap(default_policy=default)
    above = len(layer.path) - len(layer.name)
    for projection in quantized:
        # The path above this layer depends on who builds it, a loaded model or a new one.
        path = re.escape(projection.path[above:])
        policies[f"^(.*/)?{path}$"] = projection.dtype_policy
    return {"dtype": unshared(keras.dtype_policies.serialize(policies))}


def own_config(layer: Layer, cls: type[keras.Layer], **serialized: Option) -> Config:
    """The options that the constructor of `cls` takes, from a layer's attributes of those names.

    `serialized` has those that a config does not keep as they are.
    """
    *names, _ = inspect.signature(cls).parameters  # without `kwargs`
    own = {x: serialized[x] if x in serialized else getattr(layer, x) for x in names}
    return {**serialize_policy(layer), **own}


LAYER_OPTIONS = (
    "activity_regularizer", "autocast", "batch_input_shape", "batch_shape", "batch_size", "dtype",
    "input_dtype", "input_shape", "name", "sparse", "trainable", "weights",
)  # fmt: skip


def check_options(owner: object, options: Config, hints: dict[str, str]) -> None:
    """Raises for a keyword that neither a layer nor Keras's base class takes.

    Args:
        owner: the layer that is being made.
        options: the keywords left over, for Keras's base class.
        hints: by a wrong keyword that is likely, what to say of it.
    """
    for name in options:
        if name not in LAYER_OPTIONS:
            known = inspect.signature(type(owner)).parameters
            hint = f". {hints[name]}" if name in hints else did_you_mean(name, known)
            raise TypeError(
                f"{type(owner).__name__}() got an unexpected keyword argument {name!r}{hint}"
            )
