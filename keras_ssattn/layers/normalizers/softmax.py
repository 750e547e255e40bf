"""Softmax, scalable softmax and softmax with a sink, as layers on logits."""

from typing import ClassVar

import keras
from keras import ops

from keras_ssattn._checks import check_number
from keras_ssattn._keras.serialization import Specification, check_options
from keras_ssattn._tensors import to_tensor
from keras_ssattn._typing import Axis, Config, Identifier, Shape, Tensor
from keras_ssattn.layers.length_scales.log import INIT_S, LogLengthScale, check_init_s
from keras_ssattn.layers.masks import align_left
from keras_ssattn.layers.normalizers.base import Normalizer
from keras_ssattn.ops import kernels, normalizers

SHARED = ("trainable", "dtype")  # options of a layer and of its length scale


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Softmax(Normalizer):
    """Softmax with masks that remove entries; see `keras_ssattn.ops.softmax`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        length_scale: a `LengthScale` layer, or `None`.
        num_heads: an integer for one set of parameters per head; see `Normalizer`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import Softmax
    >>> Softmax()(np.array([[1.0, 1.0]]))  # [[0.5, 0.5]]
    """

    def kernel(self) -> kernels.Kernel:
        return kernels.Softmax()


@keras.saving.register_keras_serializable(package="keras_ssattn")
class SSMax(Normalizer):
    r"""Scalable softmax, :math:`\mathrm{softmax}((s \log n + b)\, x)`, with learned s and b.

    Stand-alone, n is the number of unmasked entries along `axis`, and s is a scalar or one
    value per head. In an attention layer (`normalizer=SSMax(...)`) n is the number of keys
    that each query sees, and s has one value per query head.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        init_s: initial s, a finite number, or `"auto"` with `train_length`; see
            `LogLengthScale`. Defaults to 0.2.
        use_bias: whether to learn b, which starts at 0. The paper finds that b lowers the
            training loss and harms longer contexts.
        train_length: the training length for `init_s="auto"`.
        num_heads: `None` for scalar s and b; an integer for one of each per head, with logits
            `[..., H, T, S]` normalized over the last axis.
        **kwargs: of `keras.layers.Layer`. `trainable=False` fixes s and b.

    Call arguments:
        logits: floating-point tensor of any shape.
        mask: boolean, True = attend, broadcastable to `logits`.

    Raises:
        ValueError: for an invalid `init_s`, `train_length` or `num_heads`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import SSMax
    >>> layer = SSMax(init_s=0.43)
    >>> weights = layer(np.random.normal(size=(2, 1000)).astype("float32"))
    >>> len(layer.trainable_variables)
    1

    Reference: arXiv 2501.19399.
    """

    scale_class: type[LogLengthScale] = LogLengthScale
    hints: ClassVar[dict[str, str]] = {
        "s": "Did you mean 'init_s'?",
        "formula": "Edifice's formula is `keras_ssattn.ssmax.EdificeSSMax`",
    }

    def __init__(
        self,
        axis: Axis = -1,
        init_s: float | str = INIT_S,
        use_bias: bool = False,
        train_length: int | None = None,
        num_heads: int | None = None,
        **kwargs: object,
    ) -> None:
        check_options(self, kwargs, self.hints)
        check_init_s(init_s, train_length)
        options = {"init_s": init_s, "use_bias": use_bias, "train_length": train_length}
        shared: Config = {name: kwargs[name] for name in SHARED if name in kwargs}
        scale = Specification(self.scale_class, {**options, **shared})
        super().__init__(axis, scale, num_heads, **kwargs)

    def kernel(self) -> kernels.Kernel:
        return kernels.Softmax()

    def specification(self) -> Specification:
        return Specification.of(self)

    @property
    def s(self) -> keras.Variable | None:
        """The variable s, `[]` or `[H]`; `None` until the layer is built."""
        return self.length_scale.s

    @property
    def b(self) -> keras.Variable | None:
        """The variable b, shaped like s; `None` without a bias."""
        return self.length_scale.b

    def call(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        s = ops.convert_to_tensor(self.s)
        b = ops.convert_to_tensor(self.b) if self.length_scale.use_bias else 0.0
        if self.num_heads is not None:
            s = ops.expand_dims(s, (-2, -1))  # [H, 1, 1]
            b = ops.expand_dims(b, (-2, -1)) if self.length_scale.use_bias else b
        return normalizers.ssmax(logits, s, b=b, axis=self.axis, mask=align_left(mask, logits))

    def get_config(self) -> Config:
        config = super().get_config()
        del config["length_scale"]
        scale = self.length_scale
        return {
            **config,
            "init_s": scale.init_s,
            "use_bias": scale.use_bias,
            "train_length": scale.train_length,
        }

    @classmethod
    def from_config(cls, config: Config) -> "SSMax":
        config = dict(config)
        formula = config.pop("formula", "scale")  # of version 0.1.0
        if formula == "shift" and cls is SSMax:
            cls = keras.saving.get_registered_object("keras_ssattn>EdificeSSMax")
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_ssattn")
class SinkSoftmax(Normalizer):
    r"""Softmax with a learned sink, :math:`e^{x_j} / (e^s + \sum_k e^{x_k})`.

    See `keras_ssattn.ops.sink_softmax`. In an attention layer s has one value per query head.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        init_sink: initial s, a finite number. Defaults to 0, "softmax off by one".
        length_scale: a `LengthScale` layer, or `None`; it scales the logits, not the sink.
        num_heads: `None` for a scalar s; an integer for one per head; see `Normalizer`.
        **kwargs: of `keras.layers.Layer`. `trainable=False` fixes s.

    Raises:
        ValueError: for an `init_sink` that is not a finite number.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import SinkSoftmax
    >>> SinkSoftmax()(np.array([[0.0, 0.0, 0.0]]))  # [[0.25, 0.25, 0.25]]

    Reference: the published implementation of gpt-oss.
    """

    def __init__(
        self,
        axis: Axis = -1,
        init_sink: float = 0.0,
        length_scale: Identifier = None,
        num_heads: int | None = None,
        **kwargs: object,
    ) -> None:
        init_sink = check_number("init_sink", init_sink)
        super().__init__(axis, length_scale, num_heads, **kwargs)
        self.init_sink = init_sink
        self.sink: keras.Variable | None = None

    def build(self, logits_shape: Shape) -> None:
        super().build(logits_shape)
        self.sink = self.add_weight(
            name="sink",
            shape=() if self.num_heads is None else (self.num_heads,),
            initializer=keras.initializers.Constant(self.init_sink),
            autocast=False,
        )

    def kernel(self) -> kernels.Kernel:
        return kernels.SinkSoftmax(to_tensor(self.sink))

    def get_config(self) -> Config:
        return {**super().get_config(), "init_sink": self.init_sink}
