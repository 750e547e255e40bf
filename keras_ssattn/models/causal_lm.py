"""A decoder-only language model."""

import dataclasses
import math
import os
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from keras_ssattn._checks import (
    check_choice,
    check_divides,
    check_flag,
    check_heads,
    check_integer,
    check_mask,
    check_number,
    check_padding_id,
    check_rate,
)
from keras_ssattn._keras.compiling import CompiledFunctions
from keras_ssattn._keras.exporting import exporting_to
from keras_ssattn._keras.initializing import unless_read
from keras_ssattn._keras.loading import freeze_sublayers
from keras_ssattn._keras.serialization import (
    check_options,
    own_config,
    policy_for,
)
from keras_ssattn._keras.splitting import check_split
from keras_ssattn._tensors import dtype_of, is_known
from keras_ssattn._typing import (
    ArrayLike,
    Config,
    FeedForwardType,
    Identifier,
    Implementation,
    Layer,
    NormName,
    Option,
    Shape,
    Tensor,
)
from keras_ssattn.checkpoints import Checkpoint, write_checkpoint
from keras_ssattn.layers import TransformerBlock, normalizers
from keras_ssattn.layers.feed_forward import get_activation
from keras_ssattn.layers.masks import CallMasks, PacksSegments, see, see_cache
from keras_ssattn.layers.norms import check_epsilon
from keras_ssattn.layers.per_layer import (
    check_window,
    for_each_layer,
    one_or_each,
    serialize_rotaries,
    specify_rotary,
)
from keras_ssattn.layers.projection import PROJECTIONS, check_biases
from keras_ssattn.layers.transformer import check_expansion
from keras_ssattn.models.generation import generate, stream
from keras_ssattn.models.presets import CONFIGURATIONS
from keras_ssattn.models.token_head import TokenHead
from keras_ssattn.ops import Cache, Visibility
from keras_ssattn.ops.rotary import Rotation


@keras.saving.register_keras_serializable(package="keras_ssattn")
class CausalLM(PacksSegments, keras.Model):
    """A causal language model: token ids to logits of the next token, and to text.

    A token embedding, `num_layers` pre-norm `TransformerBlock`s with RMS normalization and a
    gated feed-forward network, a final normalization and a head. Train it with Keras's own
    `compile` and `fit`, with targets shifted by one. With `padding_id`, padding takes no part in
    attention or in n, and the loss leaves out positions whose token is padding, as Keras does for
    any mask. The target after a text's last token is padding too; the loss counts it unless it has
    `ignore_class=padding_id`.

    Args:
        vocabulary_size: V, number of tokens.
        hidden_size: E, a multiple of `num_heads` unless `key_dim` is given.
        num_layers: number of blocks.
        num_heads: number of query heads.
        num_kv_heads: as in `MultiHeadAttention`.
        normalizer: as in `MultiHeadAttention`, or a list of one for each block.
        key_dim: size of each head. Defaults to `hidden_size / num_heads`.
        rotary: `"default"`, a `RotaryEmbedding` layer (`RotaryEmbedding(fraction=0.5)` rotates
            half of the features), its config, or `None` for no positions; or a list of one for
            each block.
        sliding_window: as in `MultiHeadAttention`, or a list of one for each block. For lists
            that models in use have, see `keras_ssattn.models.layer_pattern`.
        qk_norm, use_gate, implementation: as in `MultiHeadAttention`.
        ffn_type, ffn_expansion, activation: as in `TransformerBlock`.
        norm, norm_epsilon, use_bias, dropout: likewise.
        embedding_scale: what the token embeddings are multiplied by, though not in the head.
        tie_embeddings: whether the head is the transposed token embedding.
        padding_id: the token that is padding, `None` for none.
        remat: whether training computes each block's activations again in the backward pass, with
            `keras.remat`, instead of keeping them. It excludes dropout, which would be redrawn.
        huggingface_config: fields of a config.json for `to_huggingface`, without effect here.
        **kwargs: of `keras.Model`.

    Call arguments:
        tokens: integers `[B, T]`, or floats that are, as of a `keras.Input` without a dtype.
        mask: boolean `[B, T]`, False at padding. Defaults to `tokens != padding_id`.
        segment_ids: integers `[B, T]` of texts packed into one row, as in `MultiHeadAttention`.
        training: whether dropout applies.

    Returns:
        Logits `[B, T, V]`, float32 or wider.

    Raises:
        ValueError: for sizes, rates and choices that do not fit.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.models import CausalLM
    >>> model = CausalLM(vocabulary_size=50, hidden_size=16, num_layers=1, num_heads=2)
    >>> model(np.array([[1, 2, 3]])).shape
    (1, 3, 50)
    >>> [len(x) for x in model.generate([[1, 2, 3], [4]], max_new_tokens=5)]
    [5, 5]
    """

    hints: ClassVar[dict[str, str]] = {"causal": "The model is always causal"}

    def __init__(
        self,
        vocabulary_size: int,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        normalizer: Identifier = "ssmax",
        *,
        key_dim: int | None = None,
        rotary: Identifier = "default",
        sliding_window: int | Sequence[int | None] | None = None,
        qk_norm: bool = False,
        use_gate: bool = False,
        ffn_type: FeedForwardType = "gated",
        ffn_expansion: float | None = None,
        activation: Identifier = None,
        norm: NormName = "rms_norm",
        norm_epsilon: float | None = None,
        use_bias: bool | Collection[str] = False,
        dropout: float = 0.0,
        embedding_scale: float = 1.0,
        tie_embeddings: bool = True,
        padding_id: int | None = None,
        remat: bool = False,
        implementation: Implementation = "auto",
        huggingface_config: Config | None = None,
        **kwargs: object,
    ) -> None:
        vocabulary_size = check_integer("vocabulary_size", vocabulary_size)
        hidden_size = check_integer("hidden_size", hidden_size)
        num_layers = check_integer("num_layers", num_layers)
        key_dim = check_integer("key_dim", key_dim, optional=True)
        num_heads, num_kv_heads = check_heads(num_heads, num_kv_heads)
        check_rate("dropout", dropout)
        if key_dim is None:
            check_divides("num_heads", num_heads, "hidden_size", hidden_size)
        check_options(self, kwargs, self.hints)
        padding_id = check_padding_id(padding_id, vocabulary_size)
        if remat and dropout > 0:
            raise ValueError(
                "`remat` would draw dropout anew in the backward pass. Received: "
                f"remat={remat}, dropout={dropout}"
            )
        # token ids that come as floats would be rounded to half precision
        super().__init__(**{"autocast": False, **kwargs})
        self.supports_masking = True
        self.vocabulary_size = vocabulary_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.key_dim = key_dim
        self._normalizers = for_each_layer(
            "normalizer", normalizer, num_layers, normalizers.get_for_attention
        )
        self._rotaries = for_each_layer("rotary", rotary, num_layers, specify_rotary)
        self._windows = for_each_layer("sliding_window", sliding_window, num_layers, check_window)
        self.qk_norm = check_flag("qk_norm", qk_norm)
        self.use_gate = check_flag("use_gate", use_gate)
        self.implementation = implementation
        self.ffn_type = ffn_type
        self.ffn_expansion = check_expansion(ffn_expansion)
        self.activation = None if activation is None else get_activation(activation)
        self.norm = norm
        self.norm_epsilon = check_epsilon(norm_epsilon)
        self.use_bias = check_biases(use_bias, (*PROJECTIONS, "feed_forward"))
        self.embedding_scale = check_number(
            "embedding_scale", embedding_scale, "a positive number", lambda x: 0 < x < math.inf
        )
        self.dropout = float(dropout)
        self.tie_embeddings = check_flag("tie_embeddings", tie_embeddings)
        self.padding_id = padding_id
        self.remat = check_flag("remat", remat)
        self.huggingface_config = huggingface_config
        self.generators = CompiledFunctions()
        self.build((None, None))

    @classmethod
    def from_name(cls, name: str, **options: Option) -> "CausalLM":
        """A new model of a named size, untrained.

        Args:
            name: `"ssmax_162m"`, the 12-layer 12-head model of arXiv 2501.19399, `"bytes_11m"` or
                `"bytes_1m"`, whose tokens are bytes; the number is that of parameters.
            **options: of the constructor, in place of those of the name.

        Raises:
            ValueError: for another name.
        """
        check_choice("name", name, CONFIGURATIONS)
        return cls(**{**CONFIGURATIONS[name], **options})

    @classmethod
    def from_huggingface(cls, folder: str | os.PathLike, **options: Option) -> "CausalLM":
        """A released model from a local folder in Hugging Face's layout, with its weights.

        The folder has a config.json, and safetensors in one file or several with an index.
        Families: Llama 2 and 3, Mistral, Ministral, Ministral 3 (also inside of Mistral 3, and in
        8-bit floats), Qwen 2 and 3, SmolLM 3, Phi 3 and Gemma 1. All of config.json and of the
        files' headers is checked first; a field or a tensor that is not known is refused by its
        name. The tokenizer is not part of it.

        Args:
            folder: the path of the folder.
            **options: of the constructor, in place of those of the folder, such as
                `normalizer=SSMax(init_s="auto", train_length=4096)` or `dtype="float32"`. The
                dtype is otherwise that of the folder.

        Raises:
            ValueError: for a folder that is not understood as a whole, or options that add
                weights other than those of a normalizer.
        """
        return Checkpoint(folder).load(cls, options)

    def to_huggingface(
        self, folder: str | os.PathLike, max_shard_size: float = 5e9, **fields: Option
    ) -> None:
        """Writes the model to a folder that `transformers` reads, in the dtype of its weights.

        Args:
            folder: a path; it is made if there is none.
            max_shard_size: the most bytes of weights in one file.
            **fields: further fields of config.json, such as `eos_token_id=2`. Those that
                `from_huggingface` has met and that have no effect are written as well.

        A `padding_id` is written as `pad_token_id`. Neither `transformers` nor `from_huggingface`
        takes a mask from it: `transformers` needs an attention mask for padding, and
        `from_huggingface` the option `padding_id`. Files of weights that the folder had before are
        replaced.

        Raises:
            ValueError: for a model with what no family has, such as SSMax, or of a class that
                computes something else.
        """
        for name in ("call", "_embed", "_shared", "_logits"):
            if getattr(type(self), name) is not getattr(CausalLM, name):
                raise ValueError(
                    "no Hugging Face family computes what a class of one's own does. Received: "
                    f"{type(self).__name__}, with another `{name}`"
                )
        write_checkpoint(self, folder, self.huggingface_config, max_shard_size, **fields)

    @property
    def sliding_window(self) -> int | list[int | None] | None:
        """The window of all blocks, or a list of those of each."""
        return one_or_each(self._windows)

    def build(self, tokens_shape: Shape) -> None:
        if hasattr(self, "blocks"):  # the constructor has built it
            return
        options = {"dtype": self.dtype_policy}
        name, shape = "token_embedding", (self.vocabulary_size, self.hidden_size)
        check_split(self, f"{name}/embeddings", shape, "`vocabulary_size`")
        self.token_embedding = keras.layers.Embedding(
            *shape,
            embeddings_initializer=unless_read("uniform", self, name),
            name=name,
            dtype=policy_for(self, name),
        )
        self.token_embedding.build((None, None))
        self.blocks = []
        for i in range(self.num_layers):
            block = TransformerBlock(
                self.num_heads,
                self.key_dim,
                num_kv_heads=self.num_kv_heads,
                normalizer=self._normalizers[i],
                causal=True,
                sliding_window=self._windows[i],
                rotary=self._rotaries[i],
                qk_norm=self.qk_norm,
                use_gate=self.use_gate,
                implementation=self.implementation,
                ffn_type=self.ffn_type,
                ffn_expansion=self.ffn_expansion,
                activation=self.activation,
                norm=self.norm,
                norm_epsilon=self.norm_epsilon,
                dropout=self.dropout,
                use_bias=self.use_bias,
                name=f"block_{i + 1}",
                **options,
            )
            block.build((None, None, self.hidden_size))
            self.blocks.append(block)
        self.head = TokenHead(
            self.vocabulary_size,
            self.norm,
            self.tie_embeddings,
            self.norm_epsilon,
            name="head",
            **options,
        )
        self.head.build((None, None, self.hidden_size))
        freeze_sublayers(self)

    def call(
        self,
        tokens: Tensor,
        mask: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        training: bool | None = None,
    ) -> Tensor:
        mask = self.compute_mask(tokens, mask)
        x = self._embed(tokens)
        seen, mask = see((x, x, x), CallMasks(mask, mask), True, segment_ids)
        for block, shared in zip(self.blocks, self._shared(seen), strict=True):

            def apply(x: Tensor, block: Layer = block, shared: Config = shared) -> Tensor:
                if self.remat:  # what a block computes must not be kept for the next
                    visibility = dataclasses.replace(shared["visibility"])
                    shared = {**shared, "visibility": visibility}
                return block(x, mask=mask, training=training, **shared)

            x = keras.remat(apply)(x) if self.remat and training else apply(x)
        return self._logits(x, mask)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings `[B, T, E]`, scaled."""
        x = self.token_embedding(tokens)
        if self.embedding_scale == 1.0:
            return x
        return x * ops.convert_to_tensor(self.embedding_scale, dtype_of(x))

    def _shared(self, seen: Visibility) -> list[Config]:
        """Visibility and rotation for each block; those of the same settings share them."""
        windows = {window: seen.within(window) for window in set(self._windows)}
        rotations: dict[tuple | None, Rotation | None] = {None: None}
        shared: list[Config] = []
        for block, settings, window in zip(
            self.blocks, self.rotary_state(), self._windows, strict=True
        ):
            if settings not in rotations:
                rotations[settings] = block.attention.rotation(seen, self.compute_dtype)
            shared.append({"visibility": windows[window], "rotation": rotations[settings]})
        return shared

    def _logits(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(x, self._embeddings() if self.tie_embeddings else None, mask=mask)

    def _embeddings(self) -> Tensor:
        """The embedding of every token, `[V, E]`."""
        if self.token_embedding.quantization_mode is None:
            return self.token_embedding.embeddings
        return self.token_embedding(ops.arange(0, self.vocabulary_size))

    def compute_mask(self, tokens: Tensor, previous_mask: Tensor | None = None) -> Tensor | None:
        if previous_mask is not None or self.padding_id is None:
            return previous_mask
        return ops.not_equal(tokens, self.padding_id)

    def make_cache(self, batch_size: int, length: int) -> tuple[Cache, ...]:
        """An empty `Cache` for each block, of `length` positions."""
        return tuple(block.make_cache(batch_size, length) for block in self.blocks)

    def next_logits(
        self,
        tokens: Tensor,
        cache: tuple[Cache, ...],
        cache_index: int | ArrayLike = 0,
        mask: ArrayLike | None = None,
    ) -> tuple[Tensor, tuple[Cache, ...]]:
        """Logits `[B, V]` after the last of T tokens, and the new cache.

        Args:
            tokens: integers `[B, T]`, that follow those in the cache.
            cache: of `make_cache`, or returned by the last step.
            cache_index: position of the first of them, as in `MultiHeadAttention`.
            mask: boolean `[B, T]`, False at padding, besides that of `padding_id`.
        """
        mask = check_mask("mask", mask, rank=2)
        if self.padding_id is not None:
            seen = ops.not_equal(tokens, self.padding_id)
            mask = seen if mask is None else ops.logical_and(mask, seen)
        x = self._embed(tokens)
        seen = see_cache(Cache(*cache[0]), cache_index, x, mask)
        caches = []
        for block, old, shared in zip(self.blocks, cache, self._shared(seen), strict=True):
            x, new = block(x, mask=mask, cache=old, training=False, **shared)
            caches.append(new)
        last = x if is_known(x.shape[1]) and x.shape[1] == 1 else x[:, -1:]
        return self._logits(last)[:, 0], tuple(caches)

    def rotary_state(self) -> tuple:
        """Rotary settings of each block, that a compiled function bakes in."""
        rotaries = [block.attention.rotary for block in self.blocks]
        return tuple(x and (x.theta, x.fraction, str(x.scaling)) for x in rotaries)

    def generate(
        self, prompts: ArrayLike, max_new_tokens: int, **options: Option
    ) -> list[np.ndarray]:
        """New tokens for each prompt; see `keras_ssattn.models.generate`.

        Args:
            prompts: token ids: a list of lists of any lengths, or integers `[B, T]`.
            max_new_tokens: the most tokens to generate for each.
            **options: of `generate`: `temperature`, `top_p`, `stop_tokens`, `seed` and others.

        Returns:
            A list of int32 arrays, one for each prompt.
        """
        return generate(self, prompts, max_new_tokens, **options)

    def stream(
        self, prompts: ArrayLike, max_new_tokens: int, **options: Option
    ) -> Iterator[np.ndarray]:
        """The tokens of `generate` as they come, an int32 array `[B]` for each step.

        It takes what `generate` takes, and gives -1 for rows that have ended; see
        `keras_ssattn.models.stream`.
        """
        return stream(self, prompts, max_new_tokens, **options)

    def export(self, filepath: str, *args: Option, **options: Option) -> Option:
        """Keras's own `export`, from integers `[B, T]` unless an `input_signature` is given."""
        tokens = keras.InputSpec("int32", (None, None), name="tokens")
        options["input_signature"] = options.get("input_signature") or [tokens]
        with exporting_to(*args, **options):
            return super().export(filepath, *args, **options)

    def projections(self) -> list[Layer]:
        """The layers on which `quantize` and `enable_lora` work."""
        inner = [projection for block in self.blocks for projection in block.projections()]
        return [self.token_embedding, *inner, *self.head.projections()]

    def save_own_variables(self, store: MutableMapping[str, Tensor]) -> None:
        store["num_layers"] = np.array([self.num_layers])

    def load_own_variables(self, store: Mapping[str, Tensor]) -> None:
        # Keras passes over the weights of blocks that this model does not have
        saved = [int(x) for name in store.keys() for x in np.asarray(store[name])]  # noqa: SIM118
        if saved != [self.num_layers]:
            raise ValueError(
                f"The file must be of a `CausalLM` of {self.num_layers} blocks. Received: "
                f"num_layers={saved[0] if saved else None}"
            )

    def get_config(self) -> Config:
        rotaries = [block.attention.rotary for block in self.blocks]
        own = own_config(
            self,
            CausalLM,
            normalizer=one_or_each([x.serialize() for x in self._normalizers]),
            rotary=serialize_rotaries(self._rotaries, rotaries),
            activation=self.activation and keras.activations.serialize(self.activation),
            huggingface_config=self.huggingface_config and {**self.huggingface_config},
        )
        return {**super().get_config(), **own}
