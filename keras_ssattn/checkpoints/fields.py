"""The fields of a config.json, each of which must be asked for before it is left."""

import numbers
import sys
from typing import Any

from keras_ssattn._checks import did_you_mean
from keras_ssattn._typing import Config, Option

REQUIRED: Any = object()
LARGEST = sys.float_info.max  # of integers as well: each can be made a float

# Fields that change nothing of what a decoder computes from tokens to logits.
WITHOUT_EFFECT = frozenset(
    (
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
        "architectures", "attn_implementation", "auto_map", "bos_token_id",
        "chunk_size_feed_forward", "dtype", "eos_token_id", "finetuning_task", "id2label",
        "initializer_range", "is_decoder", "label2id", "max_position_embeddings", "model_type",
        "name_or_path", "num_labels", "output_attentions", "output_hidden_states",
        "pad_token_id", "prefix", "pretraining_tp", "problem_type", "return_dict",
        "sep_token_id", "task_specific_params", "tie_last_hidden_states", "tokenizer_class",
        "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed",
        "unsloth_version", "use_bfloat16", "use_cache",
        # of generation, which may stand there, too
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
        "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
        "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature",
        "top_k", "top_p", "typical_p",
    )
)  # fmt: skip
# Fields that would change it; with these values they do not.
MUST_EQUAL: Config = {
    "add_cross_attention": False,
    "attention_dropout": 0,
    "cross_attention_hidden_size": None,
    "embd_pdrop": 0,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "resid_pdrop": 0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
}


class Fields:
    """Fields of a config.json that are taken one by one; those left over are refused.

    Args:
        config: the fields by name.
        where: what they are of, for messages.
    """

    def __init__(self, config: Config, where: str = "config.json") -> None:
        self.config = config
        self.left = dict(config)
        self.where = where
        self.asked: set[str] = set()

    def take(self, name: str, default: Option = None) -> Option:
        """The value of a field, which may be `None`; `default` if there is none."""
        self.asked.add(name)
        if name not in self.left and default is REQUIRED:
            raise ValueError(f"{self.where} must have the field {name!r}. It has not.")
        return self.left.pop(name, default)

    def integer(self, name: str, default: Option = REQUIRED) -> int:
        """An integer of 1 or more; where the field is null, the default."""
        return self._number(name, default, numbers.Integral, "a positive integer")

    def count(self, name: str, default: int) -> int:
        """An integer of 0 or more; where the field is null, the default."""
        value = self.left.get(name)
        zero = type(value) is int and value == 0
        return self.take(name) if zero else self.integer(name, default)

    def number(self, name: str, default: Option = REQUIRED) -> float:
        """A positive number; where the field is null, the default."""
        return float(self._number(name, default, numbers.Real, "a positive number"))

    def slope(self, name: str) -> float:
        """A finite number of any sign."""
        value = self.take(name)
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not fits or not -LARGEST <= value <= LARGEST:
            self.refuse(name, value, "a finite number")
        return float(value)

    def _number(self, name: str, default: Option, kind: Any, expected: str) -> Any:
        value = self.take(name, default)
        value = default if value is None and default is not REQUIRED else value
        return self._check(name, value, kind, expected)

    def _check(self, name: str, value: Option, kind: Any, expected: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= LARGEST:
            self.refuse(name, value, expected)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or False; where the field is null, the default."""
        value = self.take(name, default)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def window(self, name: str, default: int | None) -> int | None:
        """A positive integer, or null."""
        value = self.take(name, default)
        if value is None:
            return None
        return self._check(name, value, numbers.Integral, "a positive integer or null")

    def each(self, name: str, count: int, choices: tuple) -> list | None:
        """A list of one of the choices for each layer, or null."""
        value = self.take(name)
        fits = isinstance(value, list) and len(value) == count and all(x in choices for x in value)
        if value is not None and not fits:
            self.refuse(name, value, f"a list of {count} of {choices}")
        return value

    def require(self, values: Config) -> None:
        """Raises unless these fields are missing, null, or of these values."""
        for name, value in values.items():
            found = self.take(name)
            if found is not None and found != value:
                self.refuse(name, found, f"{value!r}, the only value that is supported here")

    def refuse(self, name: str, value: object, expected: str) -> None:
        raise ValueError(f"{self.where}: {name!r} must be {expected}. Received: {value!r}")

    def finish(self, without_effect: frozenset[str] = frozenset()) -> None:
        """Raises for a field that nobody has asked for, unless it is null or without effect."""
        for name, value in self.left.items():
            if value is not None and name not in without_effect:
                raise ValueError(
                    f"{self.where} has the field {name!r}, which this package does not know, and "
                    f"which may change the model. Received: {name}={value!r}"
                    f"{did_you_mean(name, sorted(self.asked | without_effect))}"
                )
