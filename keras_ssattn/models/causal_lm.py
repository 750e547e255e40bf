"""A decoder-only language model."""

import numbers
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ssattn.layers import RotaryEmbedding, TransformerBlock, normalizers
from keras_ssattn.layers._config import (
    check_choice,
    check_expansion,
    check_groups,
    check_heads,
    check_positive,
    check_rate,
    freeze_sublayers,
    serialize_options,
    serialize_policy,
)
from keras_ssattn.layers.rotary import get_rotary, serialize_rotary
from keras_ssattn.models.compiled import CompiledFunctions
from keras_ssattn.models.configurations import CONFIGURATIONS
from keras_ssattn.models.generation import generate
from keras_ssattn.models.token_head import TokenHead


@keras.saving.register_keras_serializable(package="keras_ssattn")
class CausalLM(keras.Model):
    """A causal language model: token ids to logits of the next token, and to text.

    A token embedding, `num_layers` pre-norm `TransformerBlock`s with RMS normalization and a
    gated feed-forward network, a final normalization and a head. Train it with Keras's own
    `compile` and `fit`, targets shifted by one. With `padding_id`, padding takes no part in
    attention or in n, and as Keras does for any mask, the loss leaves out positions whose token
    is padding. What follows the last token of a text is padding, too: a target that ends the
    text, unless the loss has `ignore_class=padding_id`.

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
        ffn_type, ffn_expansion, norm, use_bias, dropout: as in `TransformerBlock`.
        tie_embeddings: whether the head is the transposed token embedding.
        padding_id: the token that is padding, `None` for none.
        remat: whether training computes each block's activations again in the backward pass,
            by `keras.remat`, rather than keep them. Without dropout only: it would be redrawn.
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

    def __init__(
        self,
        vocabulary_size: int,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        normalizer: Any = "ssmax",
        *,
        rotary: Any = "default",
        sliding_window: int | None = None,
        qk_norm: bool = False,
        ffn_type: str = "gated",
        ffn_expansion: float | None = None,
        norm: str = "rms_norm",
        use_bias: bool = False,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        padding_id: int | None = None,
        remat: bool = False,
        **kwargs: Any,
    ) -> None:
        vocabulary_size = check_positive("vocabulary_size", vocabulary_size)
        hidden_size = check_positive("hidden_size", hidden_size)
        num_layers = check_positive("num_layers", num_layers)
        sliding_window = check_positive("sliding_window", sliding_window, optional=True)
        num_heads, num_kv_heads = check_groups(num_heads, num_kv_heads)
        check_rate("dropout", dropout)
        check_heads(hidden_size, num_heads)
        if padding_id is not None and (
            isinstance(padding_id, bool)
            or not isinstance(padding_id, numbers.Integral)
            or not 0 <= padding_id < vocabulary_size
        ):
            raise ValueError(
                "`padding_id` must be a token, from 0 to `vocabulary_size` - 1, or None. Received: "
                f"padding_id={padding_id!r}, vocabulary_size={vocabulary_size}"
            )
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
        normalizer = normalizers.get_for_attention(normalizer)
        self._normalizer = lambda: normalizer  # a specification, no layer of this model
        rotary = get_rotary(RotaryEmbedding() if rotary == "default" else rotary)
        self._rotary = lambda: rotary
        self.sliding_window = sliding_window
        self.qk_norm = bool(qk_norm)
        self.ffn_type = ffn_type
        self.ffn_expansion = check_expansion(ffn_expansion)
        self.norm = norm
        self.use_bias = bool(use_bias)
        self.dropout = float(dropout)
        self.tie_embeddings = bool(tie_embeddings)
        self.padding_id = None if padding_id is None else int(padding_id)
        self.remat = bool(remat)
        self.generators = CompiledFunctions()
        self.build((None, None))

    @classmethod
    def from_name(cls, name: str, **options: Any) -> "CausalLM":
        """A new model of a named size, untrained.

        Args:
            name: `"ssmax_162m"`, the 12-layer 12-head model of arXiv 2501.19399, `"bytes_11m"` or
                `"bytes_1m"`, whose tokens are bytes; the number is that of parameters.
            **options: of the constructor, in place of those of the name.

        Raises:
            ValueError: for another name.
        """
        check_choice("name", name, tuple(CONFIGURATIONS))
        return cls(**{**CONFIGURATIONS[name], **options})

    def build(self, tokens_shape: Any) -> None:
        if hasattr(self, "blocks"):  # the constructor has built it
            return
        options = {"dtype": self.dtype_policy}
        self.token_embedding = keras.layers.Embedding(
            self.vocabulary_size, self.hidden_size, name="token_embedding", **options
        )
        self.token_embedding.build((None, None))
        self.blocks = []
        for i in range(1, self.num_layers + 1):
            block = TransformerBlock(
                self.num_heads,
                num_kv_heads=self.num_kv_heads,
                normalizer=self._normalizer(),
                causal=True,
                sliding_window=self.sliding_window,
                rotary=self._rotary(),
                qk_norm=self.qk_norm,
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
        self, tokens: Any, mask: Any = None, segment_ids: Any = None, training: bool | None = None
    ) -> Any:
        mask = self.compute_mask(tokens, mask)
        x = self.token_embedding(tokens)
        for block in self.blocks:

            def apply(x: Any, block: Any = block) -> Any:
                return block(x, mask=mask, segment_ids=segment_ids, training=training)

            x = keras.remat(apply)(x) if self.remat and training else apply(x)
        return self._logits(x)

    def _logits(self, x: Any) -> Any:
        return self.head(x, self._embeddings()) if self.tie_embeddings else self.head(x)

    def _embeddings(self) -> Any:
        """The embedding of every token, `[V, E]`."""
        if self.token_embedding.quantization_mode is None:
            return self.token_embedding.embeddings
        return self.token_embedding(ops.arange(self.vocabulary_size))

    def compute_mask(self, tokens: Any, previous_mask: Any = None) -> Any:
        if previous_mask is not None or self.padding_id is None:
            return previous_mask
        return ops.not_equal(tokens, self.padding_id)

    def make_cache(self, batch_size: int, length: int) -> tuple:
        """An empty `Cache` for each block, of `length` positions."""
        return tuple(block.make_cache(batch_size, length) for block in self.blocks)

    def next_logits(
        self, tokens: Any, cache: tuple, cache_index: Any = 0, mask: Any = None
    ) -> tuple[Any, tuple]:
        """Logits `[B, V]` after the last of T tokens, and the new cache.

        Args:
            tokens: integers `[B, T]`, that follow those in the cache.
            cache: of `make_cache`, or returned by the last step.
            cache_index: position of the first of them, as in `MultiHeadAttention`.
            mask: boolean `[B, T]`, False at padding, besides that of `padding_id`.
        """
        if self.padding_id is not None:
            seen = ops.not_equal(tokens, self.padding_id)
            mask = seen if mask is None else ops.logical_and(mask, seen)
        x = self.token_embedding(tokens)
        caches = []
        for block, old in zip(self.blocks, cache, strict=True):
            x, new = block(x, mask=mask, cache=old, cache_index=cache_index, training=False)
            caches.append(new)
        return self._logits(x[:, -1:])[:, 0], tuple(caches)

    def rotary_state(self) -> tuple:
        """What may be set on the rotary layers at any time, and a compiled function keeps."""
        rotaries = [block.attention.rotary for block in self.blocks]
        return tuple((x.theta, str(x.scaling)) for x in rotaries if x is not None)

    def generate(self, prompts: Any, max_new_tokens: int, **options: Any) -> list[Any]:
        """New tokens for each prompt; see `keras_ssattn.models.generate`.

        Args:
            prompts: token ids: a list of lists of any lengths, or integers `[B, T]`.
            max_new_tokens: the most tokens to generate for each.
            **options: `temperature`, `top_k`, `top_p`, `stop_tokens` and `seed`.

        Returns:
            A list of int32 arrays, one for each prompt.
        """
        return generate(self, prompts, max_new_tokens, **options)

    def projections(self) -> list[Any]:
        """The layers on which `quantize` and `enable_lora` work."""
        inner = [projection for block in self.blocks for projection in block.projections()]
        return [self.token_embedding, *inner, *self.head.projections()]

    def save_own_variables(self, store: Any) -> None:
        store["num_layers"] = np.array([self.num_layers])

    def load_own_variables(self, store: Any) -> None:
        # Keras passes over the weights of blocks that this model does not have
        saved = [int(x) for name in store.keys() for x in np.asarray(store[name])]  # noqa: SIM118
        if saved != [self.num_layers]:
            raise ValueError(
                f"The file must be of a `CausalLM` of {self.num_layers} blocks. Received: "
                f"num_layers={saved[0] if saved else None}"
            )

    def get_config(self) -> dict[str, Any]:
        config = {
            "vocabulary_size": self.vocabulary_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "normalizer": serialize_options(self._normalizer()),
            "rotary": serialize_rotary(
                self._rotary(), [block.attention.rotary for block in self.blocks]
            ),
            "sliding_window": self.sliding_window,
            "qk_norm": self.qk_norm,
            "ffn_type": self.ffn_type,
            "ffn_expansion": self.ffn_expansion,
            "norm": self.norm,
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "tie_embeddings": self.tie_embeddings,
            "padding_id": self.padding_id,
            "remat": self.remat,
        }
        return {**super().get_config(), **serialize_policy(self), **config}
