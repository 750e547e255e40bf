"""Replaces the attention of a trained model with this package's."""

import numbers

import keras

from keras_ssattn._checks import check_flag
from keras_ssattn._keras.tree import walk
from keras_ssattn._typing import Config, Identifier
from keras_ssattn.conversion.cloning import Clones, custom_objects
from keras_ssattn.conversion.holders import (
    Conversion,
    Converted,
    foreign_below,
    holders_below,
    original_class,
    refusal,
    scope_with,
)
from keras_ssattn.conversion.hub import is_of_kerashub
from keras_ssattn.layers import normalizers


def convert_attention(
    model: keras.Model,
    normalizer: Identifier = "ssmax",
    train_length: int | None = None,
    *,
    causal: bool = True,
) -> keras.Model:
    r"""Makes a new model with this package's attention and the weights of a trained model.

    It replaces each `keras.layers.MultiHeadAttention` and `GroupQueryAttention` by a
    `keras_ssattn.layers.MultiHeadAttention`: in functional and sequential models, in models
    inside models, and in your own layers and models. In KerasHub's models it also replaces
    `CachedMultiHeadAttention`, as in GPT-2 and OPT, and the attention of Llama, Mistral, Phi-3,
    Qwen, Qwen3 and Gemma 1, and with `"sink_softmax"` that of gpt-oss, whose learned sinks it
    takes over; `generate` goes on working with its cache. Names, options, trainable flags and
    shared layers stay. As in Keras's attention, masks may be of any dtype, and are True where they
    are not 0. Qwen's sliding windows count where KerasHub applies them, which 0.32 does not do on
    JAX and PyTorch.

    With `"ssmax"`, s starts in every head at

    .. math:: s = 1 / \mathrm{mean}_n \log n

    over the numbers n of keys that queries saw in training. So the mean scale :math:`s \log n` is
    1, and the new model starts close to the old one. Where :math:`s \log n = 1`, and everywhere
    with `"softmax"`, it gives the old outputs.

    Args:
        model: a built `keras.Model`, which is not changed. Your own classes are made again from
            their configuration, as `keras.models.load_model` makes them. The new model is not
            compiled (but KerasHub compiles its tasks itself; they keep their sampler).
        normalizer: as in `MultiHeadAttention`: a name, a layer such as `SSMax(init_s=0.2)`, or
            its config.
        train_length: L, the length of the sequences that the model was trained on. Required with
            `"ssmax"`, and allowed only there.
        causal: whether each query saw the keys up to its own position, n = 1 ... L, as in
            language models, or all keys, n = L, as in encoders. Sliding windows are counted,
            padding is not. Only the first value of s depends on it: later, n comes from the masks.
            All converted layers start from one s. In cross-attention n is the length of the keys,
            also in models whose other attention is causal: there, `assign` 1 / log of that length
            to `normalizer.s`.

    Returns:
        The new model. After `import keras_ssattn` it saves and loads like any other. Load its
        weights into converted models only: Keras ignores an s that a model does not have.
        KerasHub's `save_to_preset` raises, as presets cannot hold s. Where a query sees no key,
        the new attention gives zeros, and the old one did not.

    Raises:
        TypeError: if `model` is not a `keras.Model`, or is not built.
        ValueError: if there is no attention, or some of it cannot be converted. The message names
            each such layer with the reason: an attention class of its own (as with ALiBi, in Bloom
            and Falcon), a soft cap on the logits, dropout of the heads' outputs, learned sinks
            without `"sink_softmax"`, quantization, LoRA anywhere, a class that cannot be made again
            or shares its name with another, or a dtype policy that came from a global one which
            has changed since. Also for an unknown normalizer, and for a `train_length` below 2,
            missing or out of place.

    Example:

    >>> import keras
    >>> from keras_ssattn.models import convert_attention
    >>> x = keras.Input((None, 16))
    >>> y = keras.layers.MultiHeadAttention(2, 8, name="attention")(x, x, use_causal_mask=True)
    >>> model = convert_attention(keras.Model(x, y), normalizer="ssmax", train_length=1024)
    >>> s = model.get_layer("attention").normalizer.s
    >>> round(float(s[0]), 3)
    0.168

    Reference: arXiv 2501.19399, section on replacing softmax after training.
    """
    options = _check(model, normalizer, train_length, causal)
    _raise_for(_refusals(model, options["normalizer"]))
    conversion = Conversion.from_config(options, holders_below(model, foreign_below))
    custom = custom_objects(model)
    with conversion.active(), scope_with(custom):
        clones = Clones(model)
        new = clones.make(model)
        if not new.built:
            new.build_from_config(model.get_build_config())
            new.built = True
    _raise_for(
        [
            (path, f"the class that holds the `{type(layer).__name__}` does not make it anew")
            for path, layer in foreign_below(new)
        ]
    )
    clones.copy_state(new)
    with scope_with(custom):
        _raise_for(_not_loadable(new, clones))
    return new


def _refusals(model: keras.Model, normalizer: Identifier) -> list[tuple[str, str]]:
    """The paths of the layers that cannot be converted, with the reasons."""
    found = foreign_below(model)
    if not found:
        raise ValueError(
            "`model` must have a `keras.layers.MultiHeadAttention` or `GroupQueryAttention`. "
            f"Received: `{model.name}`, without any"
        )
    reasons = [(path, refusal(layer, normalizer)) for path, layer in found]
    reasons += [
        (path, "LoRA is enabled")
        for path, layer in walk(model)
        if getattr(layer, "lora_enabled", False)
    ]
    return [(path, reason) for path, reason in reasons if reason is not None]


def _not_loadable(new: keras.Model, clones: Clones) -> list[tuple[str, str]]:
    """The converted layers that could not be loaded from a file, and why.

    If the configuration did not change, it can be loaded: the conversion has just made the layer
    from it. It changes if it contains that of the attention. Then loading is tried.
    """
    converted = [(path, layer) for path, layer in walk(new) if isinstance(layer, Converted)]
    inside = {id(y) for _, x in converted for _, y in walk(x) if y is not x}
    reasons = []
    for path, layer in converted:
        # The configurations of KerasHub's layers contain no attention
        if id(layer) in inside or is_of_kerashub(original_class(layer).__module__):
            continue
        config = keras.saving.serialize_keras_object(layer.get_config())
        before = keras.saving.serialize_keras_object(clones.original_of(layer).get_config())
        if config["layer"]["config"] == before:
            continue
        config["layer"].pop("build_config", None)  # without it, no weights are made
        try:
            type(layer).from_config(config)
        except Exception as error:
            name = original_class(layer).__name__
            reasons.append((path, f"`{name}`, once converted, could not be loaded: {error}"))
    return reasons


def _check(model: object, normalizer: Identifier, train_length: object, causal: object) -> Config:
    """Checks the arguments, and returns those that a `Conversion` takes."""
    if not isinstance(model, keras.Model) or not model.built:
        raise TypeError(f"`model` must be a `keras.Model` that is built. Received: model={model!r}")
    specification = normalizers.get_for_attention(normalizer)
    if normalizer == "ssmax" and (
        isinstance(train_length, bool)
        or not isinstance(train_length, numbers.Integral)
        or train_length < 2
    ):
        raise ValueError(
            '`train_length` must be an integer of 2 or more with normalizer="ssmax". Received: '
            f"train_length={train_length!r}"
        )
    if normalizer != "ssmax" and train_length is not None:
        raise ValueError(
            '`train_length` goes with normalizer="ssmax". Received: '
            f"train_length={train_length!r} with normalizer={normalizer!r}"
        )
    causal = check_flag("causal", causal)
    if not isinstance(normalizer, str):
        normalizer = specification
    return {"normalizer": normalizer, "train_length": train_length, "causal": causal}


def _raise_for(reasons: list[tuple[str, str]]) -> None:
    if reasons:
        lines = "".join(f"\n- {path}: {reason}" for path, reason in reasons)
        raise ValueError(f"`model` must consist of layers that can be converted. Received:{lines}")
