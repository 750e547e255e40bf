"""A trained model's attention exchanged for this package's."""

import numbers
from typing import Any

import keras

from keras_ssattn._keras.tree import walk
from keras_ssattn.conversion.converted import cannot_be_loaded, foreign_below, mark, scope_with
from keras_ssattn.conversion.copies import Copies, custom_objects
from keras_ssattn.conversion.retrofit import Retrofit
from keras_ssattn.conversion.substitution import refusal, substituted
from keras_ssattn.layers import normalizers


def convert_attention(
    model: Any,
    normalizer: Any = "ssmax",
    train_length: int | None = None,
    *,
    causal: bool = True,
) -> Any:
    r"""Makes a new model of a trained one, with this package's attention and the same weights.

    Every `keras.layers.MultiHeadAttention` and `GroupQueryAttention` becomes a
    `keras_ssattn.layers.MultiHeadAttention`, wherever it is: in functional and sequential
    models, in models inside models, in layers and models of your own. As in Keras's, a mask of
    any dtype is True where it is not 0. In KerasHub's models so do
    `CachedMultiHeadAttention` (as in `GPT2CausalLM`) and Llama's attention, and `generate` goes
    on working with its cache. Names, options, trainable flags and shared layers stay.

    With `"ssmax"`, s starts in every head at

    .. math:: s = 1 / \mathrm{mean}_n \log n

    so that on average over the numbers n of keys that queries saw in training the scale
    :math:`s \log n` is 1, and the model begins near its old self. Where :math:`s \log n = 1`, or
    with `"softmax"`, it gives its old outputs.

    Args:
        model: a built `keras.Model`. It is left as it is. Classes of your own are made again
            from their configuration, as `keras.models.load_model` would; compilation is not
            carried over (KerasHub compiles its tasks itself; the sampler stays).
        normalizer: as in `MultiHeadAttention`: a name, a layer such as `SSMax(init_s=0.2)`, or
            its config.
        train_length: L, the length of the sequences that the model was trained on; with
            `"ssmax"`, and only with it, it must be given.
        causal: whether each query saw the keys up to its own, n = 1 ... L, as in language
            models, or all of them, n = L, as in encoders. Sliding windows are taken into account,
            padding is not. s alone depends on it; at any time n is counted from the masks.
            All attention starts from the one s. Where a query sees all keys of another sequence,
            in cross-attention, its n is the length of that one throughout: there, in a model
            with causal attention too, s should start at 1 / log of it, which you can `assign`
            to `normalizer.s`.

    Returns:
        The new model. It saves and loads as any other, after `import keras_ssattn`; but load its
        weights into converted models only: Keras does not notice an s that a model lacks.
        KerasHub's presets have no place for it: `save_to_preset` raises. The model differs from
        the old one where a query sees no key: there attention gives zeros.

    Raises:
        TypeError: for a `model` that is no `keras.Model`, or is not built.
        ValueError: if there is no attention, or some that cannot be converted: the message
            names each such layer and what prevents it, such as `use_gate=True`, attention over
            other axes than time, quantization, LoRA anywhere, a class that cannot be made again
            or shares its name with another, or a dtype policy that only a global one of before
            has set. Also for an unknown normalizer, and a `train_length` below 2, missing or out
            of place.

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
    wanted = _check(model, normalizer, train_length, causal)
    paths = {id(layer): path for path, layer in walk(model)}
    found = foreign_below(model)
    if not found:
        raise ValueError(
            "`model` must have a `keras.layers.MultiHeadAttention` or `GroupQueryAttention`. "
            f"Received: `{model.name}`, without any"
        )
    refusals = [(path, refusal(layer, wanted)) for path, layer in found]
    refusals += [
        (path, "LoRA is enabled")
        for path, layer in walk(model)
        if getattr(layer, "lora_enabled", False)
    ]
    _raise_for([(path, reason) for path, reason in refusals if reason is not None])
    custom = custom_objects(model)
    with substituted(wanted), scope_with(custom):
        copies = Copies(paths)
        new = copies.make(model)
        if not new.built:
            new.build_from_config(model.get_build_config())
            new.built = True
    _raise_for(
        [
            (path, f"the class that holds the `{type(layer).__name__}` does not make it anew")
            for path, layer in foreign_below(new)
        ]
    )
    copies.copy_state(model, new)
    mark(new, wanted)
    with scope_with(custom):
        _raise_for(cannot_be_loaded(new))
    return new


def _check(model: Any, normalizer: Any, train_length: Any, causal: Any) -> Retrofit:
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
    if not isinstance(causal, bool):
        raise ValueError(f"`causal` must be True or False. Received: causal={causal!r}")
    named = isinstance(normalizer, str)
    return Retrofit(normalizer if named else specification, train_length, causal)


def _raise_for(reasons: list[tuple[str, str]]) -> None:
    if reasons:
        lines = "".join(f"\n- {path}: {reason}" for path, reason in reasons)
        raise ValueError(f"`model` must consist of layers that can be converted. Received:{lines}")
