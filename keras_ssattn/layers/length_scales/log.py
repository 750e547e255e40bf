"""The learned length scale of SSMax."""

import math

import keras
import numpy as np
from keras import ops

from keras_ssattn._checks import check_flag, check_integer, check_number
from keras_ssattn._typing import Config, Shape, Tensor
from keras_ssattn.layers.length_scales.base import LengthScale
from keras_ssattn.ops.length_scales import linear_in_log

# Where s starts if nothing is said: s log n is 1 at 148 keys, and 0.8 to 1.7 at 64 to 4096.
INIT_S = 0.2


@keras.saving.register_keras_serializable(package="keras_ssattn")
class LogLengthScale(LengthScale):
    r"""SSMax's length scale :math:`s \log n + b` with learned s and b.

    Give it to any normalizer: `Softpick(length_scale=LogLengthScale(init_s=0.3))`. `SSMax` is
    softmax with this scale. s and b are kept and used in float32 under a mixed dtype policy.

    Args:
        init_s: initial s, a finite number. `"auto"` is the value at which the scale averages 1
            over n = 1 ... `train_length`: :math:`1 / \mathrm{mean}_n \log n`, so that
            training under a causal mask starts at ordinary softmax on average. Without one n is
            the length L, and :math:`1 / \log L` does so. Defaults to 0.2, the value of "auto"
            for about 400 keys; 1, the default before 0.2, is sharper than softmax.
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

    def __init__(
        self,
        init_s: float | str = INIT_S,
        use_bias: bool = False,
        train_length: int | None = None,
        num_heads: int | None = None,
        **kwargs: object,
    ) -> None:
        check_init_s(init_s, train_length)
        super().__init__(num_heads=num_heads, **kwargs)
        self.init_s = init_s
        self.use_bias = check_flag("use_bias", use_bias)
        self.train_length = train_length
        self.s: Tensor = None
        self.b: Tensor = None

    def build(self, n_shape: Shape) -> None:
        self.s = self._add_parameter("s", self.start_of_s())
        if self.use_bias:
            self.b = self._add_parameter("b", 0.0)

    def start_of_s(self) -> float:
        """The value of s before training."""
        if isinstance(self.init_s, str):
            return s_like_softmax(self.train_length or 2)
        return self.init_s

    def _add_parameter(self, name: str, value: float, trainable: bool = True) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=() if self.num_heads is None else (self.num_heads,),
            initializer=keras.initializers.Constant(value),
            trainable=trainable,
            autocast=False,
        )

    def __call__(self, n: Tensor) -> Tensor:
        if self.built and ops.is_tensor(n):
            return self.call(n)  # s and b are never cast: Keras has nothing to do around it
        return super().__call__(n)

    def call(self, n: Tensor) -> Tensor:
        s = ops.convert_to_tensor(self.s)
        b = ops.convert_to_tensor(self.b) if self.use_bias else 0.0
        if self.num_heads is not None:
            s = ops.expand_dims(s, -1)  # [H, 1]
            b = ops.expand_dims(b, -1) if self.use_bias else b
        return linear_in_log(n, s, b)

    def compute_output_shape(self, n_shape: Shape) -> Shape:
        if self.num_heads is None:
            return tuple(n_shape)
        return (*n_shape[:-2], self.num_heads, n_shape[-1])

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "init_s": self.init_s,
            "use_bias": self.use_bias,
            "train_length": self.train_length,
        }


def s_like_softmax(train_length: int, causal: bool = True, window: int | None = None) -> float:
    """1 / mean(log n), over the numbers n of keys that `train_length` queries see.

    Args:
        train_length: the number of queries and of keys, L.
        causal: whether a query sees the keys up to its own position, or all.
        window: how many keys it sees at most, itself and those before it; without `causal` as
            many after it, too.
    """
    reach = train_length if window is None else min(window, train_length)
    if causal:  # n = 1 ... reach, and from there on reach; the sum of log n is log(reach!)
        total = math.lgamma(reach + 1) + (train_length - reach) * math.log(reach)
    elif reach == train_length:
        total = train_length * math.log(train_length)
    else:
        position = np.arange(1, train_length + 1)
        n = np.minimum(position + reach - 1, train_length) - np.maximum(position - reach, 0)
        total = float(np.log(n).sum())
    return train_length / total if total else INIT_S  # with one key, s has no effect


def check_init_s(init_s: float | str, train_length: int | None) -> None:
    """Raises unless `init_s` is a finite number, or "auto" with a training length."""
    if init_s == "auto":
        if train_length is None:
            raise ValueError(
                '`train_length` must be an integer of 2 or more with `init_s="auto"`. Received: '
                f"train_length={train_length!r}"
            )
        check_integer("train_length", train_length, least=2)
        return
    check_number("init_s", init_s, 'a finite number or "auto"')
    if train_length is not None:
        raise ValueError(
            '`train_length` goes with `init_s="auto"`. Received: '
            f"train_length={train_length!r} with init_s={init_s!r}"
        )
