"""A transformer over windows of features, as Edifice's `build` makes it, and more."""

import inspect

import keras

from keras_ssattn._checks import check_choice, check_divides, check_flag, check_integer, check_rate
from keras_ssattn._keras.exporting import exporting_to
from keras_ssattn._typing import (
    ArrayLike,
    FeedForwardType,
    Identifier,
    Implementation,
    NormName,
    Option,
    OutputMode,
    Tensor,
)
from keras_ssattn.layers import (
    LastTimestep,
    MeanPool,
    MultiHeadAttention,
    SSMax,
    TransformerBlock,
    normalizers,
)
from keras_ssattn.layers.length_scales.log import s_like_softmax
from keras_ssattn.layers.norms import NORM_EPSILON, LayerNormalization
from keras_ssattn.layers.per_layer import specify_rotary


@keras.saving.register_keras_serializable(package="keras_ssattn")
class SequenceModel(keras.Model):
    """A functional model that, nested in another, passes a mask on where it keeps the time axis.

    Keras's own functional models honor a mask inside but warn that they destroy it. Made by
    `build`; a subclass of Keras's functional model, whose `export` keeps to operations that each
    format has, with nothing else of its own.

    Example:

    >>> import keras_ssattn
    >>> model = keras_ssattn.build(embed_dim=8, hidden_size=8, num_layers=1)
    >>> isinstance(model, keras_ssattn.models.SequenceModel)
    True
    """

    supports_masking = True

    def export(self, filepath: str, *args: Option, **options: Option) -> Option:
        """Keras's own `export`, within `keras_ssattn.ops.exporting()`."""
        with exporting_to(*args, **options):
            return super().export(filepath, *args, **options)

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None) -> Tensor | None:
        return previous_mask if len(self.output_shape) == 3 else None


# Legacy `.h5` files name a model by its class alone, without the package.
keras.saving.get_custom_objects()["SequenceModel"] = SequenceModel


def build(
    embed_dim: int,
    hidden_size: int = 256,
    num_heads: int = 4,
    num_layers: int = 6,
    dropout: float = 0.1,
    window_size: int | None = 60,
    normalizer: Identifier = "ssmax",
    output_mode: OutputMode = "last_timestep",
    *,
    final_norm: bool = True,
    causal: bool = True,
    rotary: Identifier = None,
    num_kv_heads: int | None = None,
    sliding_window: int | None = None,
    qk_norm: bool = False,
    use_gate: bool = False,
    ffn_type: FeedForwardType = "standard",
    activation: Identifier = None,
    norm: NormName = "layer_norm",
    implementation: Implementation = "auto",
    name: str | None = None,
) -> keras.Model:
    """Builds a transformer over windows of features.

    Input `[B, window_size, embed_dim]`; a dense `input_projection` where `embed_dim` differs
    from `hidden_size`; `num_layers` pre-norm blocks of causal attention and a feed-forward
    network of four times the size, dropout after each and between the blocks; a final layer
    normalization; the output. It is a functional `keras.Model`: train it, or use it as a
    layer in a model of your own.

    **There are no positions unless you ask for them**, as in Edifice. Without them the model is
    nearly blind to the order of the steps: a causal one sees of it only which steps come before
    each, one with `causal=False` nothing. Where order matters, as in most series, give
    `rotary="default"`. Edifice does not have `causal` and the options after it.

    Args:
        embed_dim: number of features at each step of the input.
        hidden_size: size of the model. Must be a multiple of `num_heads`.
        num_heads: number of attention heads.
        num_layers: number of blocks.
        dropout: rate of dropout.
        window_size: number of steps, T; `None` for any.
        normalizer: `"ssmax"`, `"softpick"`, `"rectified_softpick"`, `"sink_softmax"`,
            `"softmax"`, or a layer such as `SSMax(init_s=1.0)`. By the name `"ssmax"` s starts at
            1 / mean(log n) over the `window_size` steps, so that the model starts as softmax on
            average; with `window_size=None` where `SSMax` starts.
        output_mode: `"last_timestep"` (under a mask, the last step that it leaves), `"all"`
            or `"mean_pool"`.
        final_norm: whether to apply the final layer normalization.
        causal: whether a step sees no later one; `False` where the whole sequence is there
            before the answer, as in classification.
        rotary: positions: `"default"`, a `RotaryEmbedding` layer, its config, or `None` for none.
        num_kv_heads: number of key and value heads. Defaults to `num_heads`.
        sliding_window: how many steps a step sees, itself and those before it; with
            `causal=False` as many after it, too. `None` for all.
        qk_norm: whether to normalize each query and key by its root mean square.
        use_gate: whether to multiply each head's output by a learned gate between 0 and 1.
        ffn_type: `"standard"` or `"gated"`.
        activation: of the feed-forward networks. Defaults to GELU; gated, to SiLU.
        norm: of the blocks: `"layer_norm"`, `"rms_norm"` or `"offset_rms_norm"`. The final one is
            a layer normalization.
        implementation: of attention: `"auto"`, `"dense"`, `"tiled"` or `"fused"`.
        name: of the model. Defaults to the normalizer's name with `_transformer`.

    Returns:
        A `keras.Model` from `[B, T, embed_dim]` to `[B, hidden_size]`, or for
        `output_mode="all"` to `[B, T, hidden_size]`. A mask on its input is honored.

    Raises:
        ValueError: for sizes, rates and choices that do not fit.
        TypeError: for an unknown option.

    Example:

    >>> import keras_ssattn
    >>> model = keras_ssattn.build(embed_dim=256, num_layers=2)
    >>> model.output_shape
    (None, 256)

    A classifier of sequences of any length, padded with zeros, that knows the order of the steps:

    >>> import keras
    >>> encoder = keras_ssattn.build(
    ...     embed_dim=12, hidden_size=32, num_layers=2, window_size=None,
    ...     rotary="default", causal=False, output_mode="mean_pool",
    ... )
    >>> layers = [keras.Input((None, 12)), keras.layers.Masking(), encoder, keras.layers.Dense(9)]
    >>> keras.Sequential(layers).output_shape
    (None, 9)

    Reference: Edifice v0.2.0, `Blocks.SSMax.build`, `Blocks.Softpick.build`.
    """
    embed_dim = check_integer("embed_dim", embed_dim)
    hidden_size = check_integer("hidden_size", hidden_size)
    num_heads = check_integer("num_heads", num_heads)
    num_layers = check_integer("num_layers", num_layers)
    window_size = check_integer("window_size", window_size, optional=True)
    check_rate("dropout", dropout)
    check_choice("output_mode", output_mode, OutputMode)
    final_norm = check_flag("final_norm", final_norm)
    check_divides("num_heads", num_heads, "hidden_size", hidden_size)
    causal = check_flag("causal", causal)
    sliding_window = check_integer("sliding_window", sliding_window, optional=True)
    if normalizer == "ssmax" and window_size is not None:
        normalizer = SSMax(init_s=s_like_softmax(window_size, causal, sliding_window))
    normalizer, rotary = normalizers.get_for_attention(normalizer), specify_rotary(rotary)
    prefix = normalizers.name_of(normalizer)
    inputs = keras.Input((window_size, embed_dim), name="state_sequence")
    x = inputs
    if embed_dim != hidden_size:
        x = keras.layers.Dense(hidden_size, name="input_projection")(x)
    for i in range(1, num_layers + 1):
        block = TransformerBlock(
            num_heads,
            num_kv_heads=num_kv_heads,
            normalizer=normalizer,
            causal=causal,
            sliding_window=sliding_window,
            rotary=rotary,
            qk_norm=qk_norm,
            use_gate=use_gate,
            ffn_type=ffn_type,
            activation=activation,
            norm=norm,
            dropout=dropout,
            implementation=implementation,
            name=f"{prefix}_block_{i}",
        )
        x = block(x)
        if dropout > 0 and i < num_layers:
            x = keras.layers.Dropout(dropout, name=f"inter_block_dropout_{i}")(x)
    if final_norm:
        x = LayerNormalization(epsilon=NORM_EPSILON, name="final_norm")(x)
    if output_mode == "last_timestep":
        x = LastTimestep(name="last_timestep")(x)
    elif output_mode == "mean_pool":
        x = MeanPool(name="mean_pool")(x)
    return SequenceModel(inputs, x, name=name or f"{prefix}_transformer")


def build_attention(
    inputs: ArrayLike, normalizer: Identifier, hidden_size: int, num_heads: int, name: str
) -> Tensor:
    """Applies a new layer of causal self-attention to `[B, T, E]`, giving `[B, T, hidden_size]`."""
    hidden_size = check_integer("hidden_size", hidden_size)
    num_heads = check_integer("num_heads", num_heads)
    check_divides("num_heads", num_heads, "hidden_size", hidden_size)
    attention = MultiHeadAttention(
        num_heads,
        hidden_size // num_heads,
        normalizer=normalizer,
        output_shape=hidden_size,
        name=name,
    )
    return attention(inputs, inputs, use_causal_mask=True)


def output_size(hidden_size: int = 256, **options: Option) -> int:
    """The size of the last dimension of the output of `build` with the same options.

    Raises:
        TypeError: for an option that `build` does not have.
        ValueError: for a `hidden_size` that is not a positive integer.

    Example:

    >>> import keras_ssattn
    >>> keras_ssattn.output_size(hidden_size=128, num_layers=2)
    128
    """
    unknown = sorted(set(options) - set(inspect.signature(build).parameters))
    if unknown:
        raise TypeError(f"output_size() got an unexpected keyword argument {unknown[0]!r}")
    return check_integer("hidden_size", hidden_size)
