"""Softmax and scalable softmax, as layers on logits."""

from typing import Any

import keras
from keras import ops

from keras_ssattn.layers._masks import align_left
from keras_ssattn.layers.length_scale import LogLengthScale
from keras_ssattn.layers.normalizer import Normalizer
from keras_ssattn.ops import normalizers


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Softmax(Normalizer):
    """Softmax with masks that remove entries; see `keras_ssattn.ops.softmax`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        length_scale: a `LengthScale` layer, or `None`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import Softmax
    >>> Softmax()(np.array([[1.0, 1.0]]))  # [[0.5, 0.5]]
    """

    kernel = "softmax"


@keras.saving.register_keras_serializable(package="keras_ssattn")
class SSMax(Normalizer):
    r"""Scalable softmax, :math:`\mathrm{softmax}((s \log n + b)\, x)`, with learned s and b.

    Stand-alone, n is the number of unmasked entries along `axis`, and s is a scalar or one
    value per head. In an attention layer (`normalizer=SSMax(...)`) n is the number of keys
    that each query sees, and s has one value per query head.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        init_s: initial s, a number, or `"auto"` for 1 / mean(log n) over n = 1 ...
            `train_length`, at which training starts as ordinary softmax on average. Defaults
            to 1.
        use_bias: whether to learn b, which starts at 0. The paper finds that b lowers the
            training loss and harms longer contexts.
        train_length: the training length for `init_s="auto"`.
        formula: `"scale"` as above, or `"shift"`, `softmax(x - s log n)` as Edifice documents
            it, which equals softmax; s then has no gradient and is not trainable.
        num_heads: `None` for scalar s and b; an integer for one of each per head, with logits
            `[..., H, T, S]` normalized over the last axis.
        **kwargs: of `keras.layers.Layer`. `trainable=False` fixes s and b.

    Call arguments:
        logits: floating-point tensor of any shape.
        mask: boolean, True = attend, broadcastable to `logits`.

    Raises:
        ValueError: for an unknown formula or an invalid `init_s`, `train_length`, `num_heads`.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.layers import SSMax
    >>> layer = SSMax(init_s=0.43)
    >>> weights = layer(np.random.normal(size=(2, 1000)).astype("float32"))
    >>> len(layer.trainable_variables)
    1

    Reference: arXiv 2501.19399.
    """

    kernel = "softmax"

    def __init__(
        self,
        axis: Any = -1,
        init_s: float | str = 1.0,
        use_bias: bool = False,
        train_length: int | None = None,
        formula: str = "scale",
        num_heads: int | None = None,
        **kwargs: Any,
    ) -> None:
        if formula not in ("scale", "shift"):
            raise ValueError(f'`formula` must be "scale" or "shift". Received: formula={formula!r}')
        if formula == "shift" and use_bias:
            raise ValueError(
                '`use_bias` must be False with `formula="shift"`. Received: use_bias=True'
            )
        scale = LogLengthScale(
            init_s,
            use_bias,
            train_length,
            num_heads,
            trainable=kwargs.get("trainable", True),
            dtype=kwargs.get("dtype"),
        )
        super().__init__(axis, scale, **kwargs)
        self.length_scale.has_gradient = formula == "scale"
        self.formula = formula

    @property
    def s(self) -> Any:
        """The variable s, `[]` or `[H]`; `None` until the layer is built."""
        return self.length_scale.s

    @property
    def b(self) -> Any:
        """The variable b, shaped like s; `None` without a bias."""
        return self.length_scale.b

    @property
    def uses_count(self) -> bool:
        return self.formula == "scale"

    def call(self, logits: Any, mask: Any = None) -> Any:
        s = ops.convert_to_tensor(self.s)
        b = ops.convert_to_tensor(self.b) if self.length_scale.use_bias else 0.0
        if self.length_scale.num_heads is not None:
            s = ops.expand_dims(s, (-2, -1))  # [H, 1, 1]
            b = ops.expand_dims(b, (-2, -1)) if self.length_scale.use_bias else b
        mask = align_left(mask, logits)
        return normalizers.ssmax(logits, s, b=b, axis=self.axis, mask=mask, formula=self.formula)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["length_scale"]
        scale = self.length_scale
        return {
            **config,
            "init_s": scale.init_s,
            "use_bias": scale.use_bias,
            "train_length": scale.train_length,
            "formula": self.formula,
            "num_heads": scale.num_heads,
        }
