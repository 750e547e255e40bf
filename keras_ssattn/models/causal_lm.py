"""A decoder-only language model."""

import dataclasses
import numbers
from collections.abc import Mapping, MutableMapping
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from keras_ssattn._checks import (
    check_choice,
    check_divides,
    check_heads,
    check_integer,
    check_mask,
    check_rate,
)
from keras_ssattn._keras.compiling import CompiledFunctions
from keras_ssattn._keras.loading import freeze_sublayers
from keras_ssattn._keras.serialization import (
    Specification,
    check_options,
    own_config,
    policy_for,
)
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
from keras_ssattn.layers import RotaryEmbedding, TransformerBlock, normalizers
from keras_ssattn.layers.masks import CallMasks, PacksSegments, see, see_cache
from keras_ssattn.layers.rotary import serialize_rotary, specify
from keras_ssattn.layers.transformer import check_expansion
from keras_ssattn.models.generation import generate
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
        hidden_size: E, a multiple of `num_heads`.
        num_layers: number of blocks.
        num_heads: number of query heads.
        num_kv_heads: as in `MultiHeadAttention`.
        normalizer: as in `MultiHeadAttention`.
        rotary: `"default"`, a `RotaryEmbedding` layer (`RotaryEmbedding(fraction=0.5)` rotates
            half of the features), its config, or `None` for no positions.
        sliding_window, qk_norm: as in `MultiHeadAttention`.
        use_gate, implementation: likewise.
        ffn_type, ffn_expansion, norm, use_bias, dropout: as in `TransformerBlock`.
        tie_embeddings: whether the head is the transposed token embedding.
        padding_id: the token that is padding, `None` for none.
        remat: whether training computes each block's activations again in the backward pass, with
            `keras.remat`, instead of keeping them. It excludes dropout, which would be redrawn.
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
        rotary: Identifier = "default",
        sliding_window: int | None = None,
        qk_norm: bool = False,
        use_gate: bool = False,
        ffn_type: FeedForwardType = "gated",
        ffn_expansion: float | None = None,
        norm: NormName = "rms_norm",
        use_bias: bool = False,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        padding_id: int | None = None,
        remat: bool = False,
        implementation: Implementation = "auto",
        **kwargs: object,
    ) -> None:
        vocabulary_size = check_integer("vocabulary_size", vocabulary_size)
        hidden_size = check_integer("hidden_size", hidden_size)
        num_layers = check_integer("num_layers", num_layers)
        sliding_window = check_integer("sliding_window", sliding_window, optional=True)
        num_heads, num_kv_heads = check_heads(num_heads, num_kv_heads)
        check_rate("dropout", dropout)
        check_divides("num_heads", num_heads, "hidden_size", hidden_size)
        check_options(self, kwargs, self.hints)
        padding_id = _check_padding(padding_id, vocabulary_size)
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
        self._normalizer: Specification = normalizers.get_for_attention(normalizer)
        is_default = isinstance(rotary, str) and rotary == "default"
        self._rotary = specify(RotaryEmbedding() if is_default else rotary)
        self.sliding_window = sliding_window
        self.qk_norm = bool(qk_norm)
        self.use_gate = bool(use_gate)
        self.implementation = implementation
        self.ffn_type = ffn_type
        self.ffn_expansion = check_expansion(ffn_expansion)
        self.norm = norm
        self.use_bias = bool(use_bias)
        self.dropout = float(dropout)
        self.tie_embeddings = bool(tie_embeddings)
        self.padding_id = padding_id
        self.remat = bool(remat)
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

    def build(self, tokens_shape: Shape) -> None:
        if hasattr(self, "blocks"):  # the constructor has built it
            return
        options = {"dtype": self.dtype_policy}
        name = "token_embedding"
        self.token_embedding = keras.layers.Embedding(
            self.vocabulary_size, self.hidden_size, name=name, dtype=policy_for(self, name)
        )
        self.token_embedding.build((None, None))
        self.blocks = []
        for i in range(1, self.num_layers + 1):
            block = TransformerBlock(
                self.num_heads,
                num_kv_heads=self.num_kv_heads,
                normalizer=self._normalizer,
                causal=True,
                sliding_window=self.sliding_window,
                rotary=self._rotary,
                qk_norm=self.qk_norm,
                use_gate=self.use_gate,
                implementation=self.implementation,
                ffn_type=self.ffn_type,
                ffn_expansion=self.ffn_expansion,
                norm=self.norm,
                dropout=self.dropout,
                use_bias=self.use_bias,
                name=f"block_{i}",
                **options,
            )
            block.build((None, None, self.hidden_size))
            self.blocks.append(block)
        self.head = TokenHead(
            self.vocabulary_size, self.norm, self.tie_embeddings, name="head", **options
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
        x = self.token_embedding(tokens)
        seen, mask = see((x, x, x), CallMasks(mask, mask), True, segment_ids)
        seen = seen.within(self.sliding_window)
        for block, rotation in zip(self.blocks, self._rotations(seen), strict=True):

            def apply(x: Tensor, block: Layer = block, rotation: Layer = rotation) -> Tensor:
                # what a rematerialized block computes must not be kept for the next
                visibility = dataclasses.replace(seen) if self.remat else seen
                return block(
                    x, mask=mask, visibility=visibility, rotation=rotation, training=training
                )

            x = keras.remat(apply)(x) if self.remat and training else apply(x)
        return self._logits(x, mask)

    def _rotations(self, seen: Visibility) -> list[Rotation | None]:
        """The rotation of each block; those of the same settings share one."""
        made: dict[tuple, Rotation] = {}
        rotations: list[Rotation | None] = []
        for block in self.blocks:
            rotary = block.attention.rotary
            if rotary is None:
                rotations.append(None)
                continue
            settings = (rotary.theta, str(rotary.scaling))
            if settings not in made:
                made[settings] = block.attention.rotation(seen, self.compute_dtype)
            rotations.append(made[settings])
        return rotations

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
        x = self.token_embedding(tokens)
        visibility = see_cache(Cache(*cache[0]), cache_index, x, mask).within(self.sliding_window)
        rotations = self._rotations(visibility)
        caches = []
        for block, old, rotation in zip(self.blocks, cache, rotations, strict=True):
            x, new = block(
                x, mask=mask, cache=old, visibility=visibility, rotation=rotation, training=False
            )
            caches.append(new)
        return self._logits(x[:, -1:])[:, 0], tuple(caches)

    def rotary_state(self) -> tuple:
        """Rotary settings that a compiled function bakes in."""
        rotaries = [block.attention.rotary for block in self.blocks]
        return tuple((x.theta, str(x.scaling)) for x in rotaries if x is not None)

    def generate(
        self, prompts: ArrayLike, max_new_tokens: int, **options: Option
    ) -> list[np.ndarray]:
        """New tokens for each prompt; see `keras_ssattn.models.generate`.

        Args:
            prompts: token ids: a list of lists of any lengths, or integers `[B, T]`.
            max_new_tokens: the most tokens to generate for each.
            **options: `temperature`, `top_k`, `top_p`, `stop_tokens` and `seed`.

        Returns:
            A list of int32 arrays, one for each prompt.
        """
        return generate(self, prompts, max_new_tokens, **options)

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
            normalizer=self._normalizer.serialize(),
            rotary=serialize_rotary(self._rotary, rotaries),
        )
        return {**super().get_config(), **own}


def _check_padding(padding_id: int | None, vocabulary_size: int) -> int | None:
    """Returns `padding_id`, a token or `None`, or raises."""
    if padding_id is None:
        return None
    if (
        isinstance(padding_id, bool)
        or not isinstance(padding_id, numbers.Integral)
        or not 0 <= padding_id < vocabulary_size
    ):
        raise ValueError(
            "`padding_id` must be a token, from 0 to `vocabulary_size` - 1, or None. Received: "
            f"padding_id={padding_id!r}, vocabulary_size={vocabulary_size}"
        )
    return int(padding_id)
