"""Layers on logits, one per normalizer; attention layers take them as `normalizer=`."""

from typing import Any

import keras
from keras import ops

from keras_ssattn.layers.length_scale import LengthScale, LogLengthScale
from keras_ssattn.ops import normalizers
from keras_ssattn.ops._arguments import dtype_of, widen


class Normalizer(keras.layers.Layer):
    """Base class: a normalizing function and a length scale for its logits.

    A subclass names the function of `keras_ssattn.ops` in `kernel`, and the function's own
    options in `kernel_options()`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        length_scale: a `LengthScale` layer, or its config; `None` for none.

    Call arguments:
        logits: floating-point tensor of any shape.
        mask: boolean, True = attend, broadcastable to `logits` and of its rank. A mask of
            lower rank is aligned to the left, as Keras's own masks `[batch, time]` are.

    Returns:
        Weights of the shape and dtype of `logits`; masked entries and rows are 0.
    """

    kernel = ""

    def __init__(self, axis: Any = -1, length_scale: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.axis = axis
        self.length_scale = _length_scale(length_scale)

    def kernel_options(self) -> dict[str, Any]:
        """Options that the function of `keras_ssattn.ops` takes beside axis and mask."""
        return {}

    @property
    def uses_count(self) -> bool:
        """Whether the weights depend on the number of keys beyond the sum over them."""
        return self.length_scale.uses_count

    def build(self, input_shape: Any) -> None:
        if not self.length_scale.built:
            self.length_scale.build((None,))

    def call(self, logits: Any, mask: Any = None) -> Any:
        mask = _align_left(mask, logits)
        function = getattr(normalizers, self.kernel)
        options = self.kernel_options()
        if not self.uses_count:
            return function(logits, axis=self.axis, mask=mask, **options)
        n = ops.convert_to_tensor(normalizers.entry_count(logits, self.axis, mask), "int32")
        if self.length_scale.num_heads is None:
            factor = self.length_scale(n)
        else:  # heads are the third axis from the end, the normalized axis is the last
            n = ops.reshape(n, (1, 1)) if mask is None else ops.squeeze(n, -1)  # [..., H|1, T|1]
            factor = ops.expand_dims(self.length_scale(n), -1)
        weights = function(widen(logits) * factor, axis=self.axis, mask=mask, **options)
        return ops.cast(weights, dtype_of(logits))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        # An entrywise mask has done its work; a mask of batch and time concerns later layers.
        if previous_mask is None or len(previous_mask.shape) == len(inputs.shape):
            return None
        return previous_mask

    def copy_for(self, num_heads: int, **kwargs: Any) -> "Normalizer":
        """An unbuilt copy, of the same options, with parameters for `num_heads` heads."""
        config = self.get_config()
        copy = type(self).from_config({**config, **kwargs})
        copy.length_scale.num_heads = num_heads
        return copy

    def get_config(self) -> dict[str, Any]:
        scale = keras.saving.serialize_keras_object(self.length_scale)
        return {**super().get_config(), "axis": self.axis, "length_scale": scale}


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Softmax(Normalizer):
    """Softmax with masks that remove entries; see `keras_ssattn.ops.softmax`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        length_scale: a `LengthScale` layer, or `None`.

    Example:

    >>> from keras_ssattn.layers import Softmax
    >>> Softmax()([[1.0, 1.0]])  # [[0.5, 0.5]]
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
        trainable = kwargs.get("trainable", True) and formula == "scale"
        scale = LogLengthScale(
            init_s,
            use_bias,
            train_length,
            num_heads,
            trainable=trainable,
            dtype=kwargs.get("dtype"),
            name="length_scale",
        )
        super().__init__(axis, scale, **kwargs)
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
        mask = _align_left(mask, logits)
        return normalizers.ssmax(
            logits, s, b=b, axis=self.axis, mask=mask, formula=self.formula
        )

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


@keras.saving.register_keras_serializable(package="keras_ssattn")
class Softpick(Normalizer):
    r"""Signed softpick, :math:`x_j / (1 + \sum_k |x_k|)`; see `keras_ssattn.ops.softpick`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        length_scale: a `LengthScale` layer, or `None`. "Scalable softpick" is
            `Softpick(length_scale=LogLengthScale())`.

    Example:

    >>> from keras_ssattn.layers import Softpick
    >>> Softpick()([[1.0, -2.0, 0.0]])  # [[0.25, -0.5, 0.]]
    """

    kernel = "softpick"


@keras.saving.register_keras_serializable(package="keras_ssattn")
class RectifiedSoftpick(Normalizer):
    r"""Rectified softpick, :math:`\max(e^{x_j}-1, 0) / (\epsilon + \sum_k |e^{x_k}-1|)`.

    See `keras_ssattn.ops.rectified_softpick`.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        epsilon: positive number added to the sum.
        length_scale: a `LengthScale` layer, or `None`.

    Raises:
        ValueError: for an `epsilon` that is not a positive number.

    Example:

    >>> from keras_ssattn.layers import RectifiedSoftpick
    >>> RectifiedSoftpick()([[1.0, 0.0, -5.0]])  # [[0.6337, 0., 0.]]

    Reference: arXiv 2504.20966.
    """

    kernel = "rectified_softpick"

    def __init__(
        self, axis: Any = -1, epsilon: float = 1e-6, length_scale: Any = None, **kwargs: Any
    ) -> None:
        normalizers.check_epsilon(epsilon)
        super().__init__(axis, length_scale, **kwargs)
        self.epsilon = epsilon

    def kernel_options(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}


NORMALIZERS: dict[str, type[Normalizer]] = {
    "softmax": Softmax,
    "ssmax": SSMax,
    "softpick": Softpick,
    "rectified_softpick": RectifiedSoftpick,
}


def get(identifier: Any) -> Normalizer:
    """Returns the normalizer layer for a name, a layer, or the config of one.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str) and identifier in NORMALIZERS:
        return NORMALIZERS[identifier]()
    if not isinstance(identifier, Normalizer):
        raise ValueError(
            f"`normalizer` must be one of {tuple(NORMALIZERS)}, an instance of one of "
            f"{tuple(c.__name__ for c in NORMALIZERS.values())}, or its config. Received: "
            f"normalizer={identifier!r}"
        )
    return identifier


def name_of(normalizer: Normalizer) -> str:
    """The name under which `get` knows the class of a normalizer."""
    for name, cls in NORMALIZERS.items():
        if type(normalizer) is cls:
            return name
    return normalizer.kernel


def layer(inputs: Any, normalizer: str = "ssmax", **options: Any) -> Any:
    """Normalizes a tensor of logits with a new layer.

    Args:
        inputs: logits, a symbolic tensor or an eager one.
        normalizer: `"ssmax"`, `"softpick"`, `"rectified_softpick"` or `"softmax"`.
        **options: of that normalizer's layer: `name`, `axis`, `init_s` and so on.

    Returns:
        A tensor of the shape of `inputs`.

    Raises:
        ValueError: for an unknown normalizer, or an invalid option.
        TypeError: for an option that the layer does not have.

    Example:

    >>> import keras
    >>> import keras_ssattn
    >>> keras_ssattn.layer(keras.Input((10,)), normalizer="softpick", axis=-1).shape
    (None, 10)
    """
    if not isinstance(normalizer, str) or normalizer not in NORMALIZERS:
        raise ValueError(
            f"`normalizer` must be one of {tuple(NORMALIZERS)}. Received: "
            f"normalizer={normalizer!r}"
        )
    return NORMALIZERS[normalizer](**options)(inputs)


def _length_scale(value: Any) -> LengthScale:
    if isinstance(value, dict):
        value = keras.saving.deserialize_keras_object(value)
    if value is None:
        return LengthScale(name="length_scale")
    if not isinstance(value, LengthScale):
        raise ValueError(
            "`length_scale` must be a `LengthScale` layer, its config, or None. Received: "
            f"length_scale={value!r}"
        )
    return value


def _align_left(mask: Any, logits: Any) -> Any:
    while mask is not None and len(mask.shape) < len(logits.shape):
        mask = ops.expand_dims(mask, -1)
    return mask
