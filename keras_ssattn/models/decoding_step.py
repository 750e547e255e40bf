"""A step of decoding as a model of its own, which other runtimes can read."""

import keras

from keras_ssattn._keras.exporting import exporting_to
from keras_ssattn._tensors import dtype_of
from keras_ssattn._typing import Config, Layer, Option, Tensor
from keras_ssattn.ops import Cache


class DecodingStep(keras.Model):
    """A step of a `CausalLM` with a cache, as a model to export, so that a runtime can generate.

    It computes `CausalLM.next_logits` on inputs in one row. A prompt may come in one step of
    several tokens, or one by one; each row of the batch has a position of its own.

    Args:
        model: a `CausalLM`, whose weights are used, not copied.
        **kwargs: of `keras.Model`.

    Call arguments:
        tokens: integers `[B, T]`, that follow those in the cache.
        index: integers `[B]`, the position of the first of them in each row; `index + T` must not
            pass S, the length of the cache.
        *cache: key `[B, S, K, D]`, value `[B, S, K, Dv]` and mask, boolean `[B, S]`, of each block,
            as in `CausalLM.make_cache`: at the start zeros, zeros and `True`.

    Returns:
        A list of the logits `[B, V]` after the last token, and of the new cache.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.models import CausalLM, DecodingStep
    >>> model = CausalLM(vocabulary_size=50, hidden_size=16, num_layers=1, num_heads=2)
    >>> step = DecodingStep(model)
    >>> (cache,) = model.make_cache(batch_size=2, length=32)
    >>> logits, *cache = step(np.array([[1], [4]]), np.array([0, 0]), *cache)
    >>> logits.shape
    (2, 50)
    >>> [spec.name for spec in step.input_signature()]  # of step.export("step.onnx", format="onnx")
    ['tokens', 'index', 'key_1', 'value_1', 'mask_1']
    """

    def __init__(self, model: Layer, **kwargs: Option) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.model = model
        self.built = True

    def call(self, tokens: Tensor, index: Tensor, *cache: Tensor) -> list[Tensor]:
        caches = tuple(Cache(*cache[i : i + 3]) for i in range(0, len(cache), 3))
        logits, caches = self.model.next_logits(tokens, caches, index)
        return [logits, *(x for one in caches for x in one)]

    def input_signature(
        self, num_tokens: int | None = None, length: int | None = None
    ) -> list[keras.InputSpec]:
        """The names, shapes and dtypes of the inputs.

        Args:
            num_tokens: T; `None` for any.
            length: S; `None` for any. JAX, which takes the unknown length of each input for
                another, needs a number.
        """
        spec = keras.InputSpec
        signature = [
            spec("int32", (None, num_tokens), name="tokens"),
            spec("int32", (None,), name="index"),
        ]
        for i, cache in enumerate(self.model.make_cache(1, 1), 1):
            for name, x in cache._asdict().items():
                shape = (None, length, *x.shape[2:])
                signature.append(spec(dtype_of(x), shape, name=f"{name}_{i}"))
        return signature

    def export(self, filepath: str, *args: Option, **options: Option) -> Option:
        """Keras's own `export`, with `input_signature()` unless another is given."""
        options["input_signature"] = options.get("input_signature") or self.input_signature()
        with exporting_to(*args, **options):
            return super().export(filepath, *args, **options)

    def get_config(self) -> Config:
        raise NotImplementedError("Save the `CausalLM`, and make the step of it anew.")
