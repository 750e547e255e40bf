"""Layers that own the parameters of a length scale."""

import math
import numbers
from typing import Any

import keras
from keras import ops

from keras_ssattn.layers._config import StrictLoading, check_positive
from keras_ssattn.ops import log_length_scale


@keras.saving.register_keras_serializable(package="keras_ssattn")
class LengthScale(StrictLoading):
    """No length scale: the logits are left as they are, whatever the number of keys.

    The base class of length scales. A subclass sets `uses_count = True` and returns from
    `call(n)` the factor that multiplies the logits of a query that sees n keys. One with
    `uses_query = True` too returns from `call(n, query)` the factor of the query, `[B, T, H, D]`
    or broadcastable to it; it has a use in attention layers only.

    Args:
        num_heads: number of attention heads, for one set of parameters per head; `None` for
            one set in all. Attention layers set it themselves.

    Call arguments:
        n: int32 tensor, the number of keys that each query sees; `[..., H or 1, T]` where
            there is a set of parameters per head.

    Returns:
        A float32 tensor broadcastable to that shape, here of ones.

    Raises:
        ValueError: for a `num_heads` that is not a positive integer or `None`.

    Example:

    >>> import keras
    >>> from keras_ssattn.layers import LengthScale
    >>> class RootLengthScale(LengthScale):
    ...     uses_count = True
    ...     def call(self, n):
    ...         return keras.ops.sqrt(keras.ops.cast(n, "float32"))
    >>> float(RootLengthScale()(keras.ops.array([9]))[0])
    3.0
    """

    uses_count = False
    uses_query = False  # whether `call` takes the query as well
    query_size: int | None = None  # features of a query head; attention layers set it

    def __init__(self, num_heads: int | None = None, **kwargs: Any) -> None:
        num_heads = check_positive("num_heads", num_heads, optional=True)
        super().__init__(**kwargs)
        self.num_heads = num_heads

    def call(self, n: Any) -> Any:
        return ops.ones_like(n, dtype="float32")

    def compute_output_shape(self, n_shape: Any) -> tuple:
        return tuple(n_shape)

    def compute_output_spec(self, n: Any) -> Any:
        return keras.KerasTensor(self.compute_output_shape(n.shape), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_heads": self.num_heads}


@keras.saving.register_keras_serializable(package="keras_ssattn")
class LogLengthScale(LengthScale):
    r"""SSMax's length scale :math:`s \log n + b` with learned s and b.

    Give it to any normalizer: `Softpick(length_scale=LogLengthScale(init_s=0.3))`. `SSMax` is
    softmax with this scale. s and b are kept and used in float32 under a mixed dtype policy.

    Args:
        init_s: initial s, a finite number. `"auto"` is the value at which the scale averages 1
            over n = 1 ... `train_length`: :math:`1 / \mathrm{mean}_n \log n`, so that
            training starts at ordinary softmax on average. Defaults to 1.
        use_bias: whether to learn b, which starts at 0.
        train_length: the training length for `init_s="auto"`, 2 or more.
        num_heads: `None` for scalar s and b; an integer for one of each per head, n then
            having shape `[..., H or 1, T]`.
        **kwargs: of `keras.layers.Layer`. `trainable=False` fixes s and b.

    Call arguments:
        n: int32 tensor, the number of keys that each query sees.

    Raises:
        ValueError: for an `init_s` that is not a finite number or `"auto"`, or a
            `train_length` missing or below 2 with `"auto"`, or given without it.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import LogLengthScale
    >>> scale = LogLengthScale(init_s="auto", train_length=1024)
    >>> _ = scale(np.array([1024]))
    >>> round(float(scale.s), 3)
    0.168

    Reference: arXiv 2501.19399.
    """

    uses_count = True
    has_gradient = True  # SSMax's "shift" formula takes it away

    def __init__(
        self,
        init_s: float | str = 1.0,
        use_bias: bool = False,
        train_length: int | None = None,
        num_heads: int | None = None,
        **kwargs: Any,
    ) -> None:
        _check_init_s(init_s, train_length)
        super().__init__(num_heads=num_heads, **kwargs)
        self.init_s = init_s
        self.use_bias = use_bias
        self.train_length = train_length
        self.s: Any = None
        self.b: Any = None

    def build(self, input_shape: Any) -> None:
        init_s: Any = self.init_s
        if init_s == "auto":
            length: Any = self.train_length
            init_s = length / math.lgamma(length + 1)  # the mean of log n is log(L!) / L
        self.s = self._add_parameter("s", init_s)
        if self.use_bias:
            self.b = self._add_parameter("b", 0.0)

    def _add_parameter(self, name: str, value: float) -> Any:
        return self.add_weight(
            name=name,
            shape=() if self.num_heads is None else (self.num_heads,),
            initializer=keras.initializers.Constant(value),
            trainable=self.has_gradient,
            autocast=False,
        )

    def __call__(self, n: Any) -> Any:
        if self.built and ops.is_tensor(n):
            return self.call(n)  # s and b are never cast: Keras has nothing to do around it
        return super().__call__(n)

    def call(self, n: Any) -> Any:
        s = ops.convert_to_tensor(self.s)
        b = ops.convert_to_tensor(self.b) if self.use_bias else 0.0
        if self.num_heads is not None:
            s = ops.expand_dims(s, -1)  # [H, 1]
            b = ops.expand_dims(b, -1) if self.use_bias else b
        return log_length_scale(n, s, b)

    def compute_output_shape(self, n_shape: Any) -> tuple:
        if self.num_heads is None:
            return tuple(n_shape)
        return (*n_shape[:-2], self.num_heads, n_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "init_s": self.init_s,
            "use_bias": self.use_bias,
            "train_length": self.train_length,
        }


def _check_init_s(init_s: Any, train_length: Any) -> None:
    if init_s == "auto":
        if (
            isinstance(train_length, bool)
            or not isinstance(train_length, numbers.Integral)
            or train_length < 2
        ):
            raise ValueError(
                '`train_length` must be an integer of 2 or more with `init_s="auto"`. Received: '
                f"train_length={train_length!r}"
            )
    elif (
        isinstance(init_s, bool)
        or not isinstance(init_s, numbers.Real)
        or not math.isfinite(init_s)
    ):
        raise ValueError(f'`init_s` must be a finite number or "auto". Received: init_s={init_s!r}')
    elif train_length is not None:
        raise ValueError(
            '`train_length` goes with `init_s="auto"`. Received: '
            f"train_length={train_length!r} with init_s={init_s!r}"
        )
