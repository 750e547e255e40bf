"""Whether a model is being written for another runtime, which has fewer operations than Keras."""

import contextlib
import contextvars
from collections.abc import Iterator

from keras_ssattn._frameworks import is_compiling, is_traced
from keras_ssattn._typing import Option

_exporting: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "keras_ssattn_exporting", default=False
)


def is_exporting() -> bool:
    """Whether to keep to operations that every format has; their values are the same."""
    return is_traced() or (not is_compiling() and _exporting.get())


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """While it lasts, layers and functions keep to operations that other runtimes have as well.

    Then `implementation="auto"` of attention computes all weights, without loops over tiles, which
    ONNX, OpenVINO and LiteRT cannot hold, and a few functions are written in other words. Values
    are the same to the last digits of float32. The models of this package do so in their own
    `export`; do it around that of a model of your own. Traces by PyTorch itself
    (`torch.export`, `torch.jit.trace`, `torch.onnx`) need it not, and `torch.compile` passes over
    it.

    Example:

    >>> import keras
    >>> from keras_ssattn.layers import TransformerBlock
    >>> from keras_ssattn.ops import exporting
    >>> inputs = keras.Input((None, 16))
    >>> model = keras.Model(inputs, TransformerBlock(num_heads=2, causal=True)(inputs))
    >>> with exporting():  # model.export("model.onnx", format="onnx")
    ...     same = model(keras.ops.ones((2, 5, 16)))
    """
    token = _exporting.set(True)
    try:
        yield
    finally:
        _exporting.reset(token)


def exporting_to(
    format: str = "tf_saved_model",  # noqa: A002
    *_: Option,
    **__: Option,
) -> contextlib.AbstractContextManager:
    """`exporting()` for a call of `model.export`; a SavedModel has all operations, and loops."""
    return contextlib.nullcontext() if format == "tf_saved_model" else exporting()
