"""The base class of layers on logits."""

from typing import ClassVar

import keras
from keras import ops

from keras_ssattn._checks import check_axis, check_integer, normalize_axis
from keras_ssattn._keras.loading import StrictLoading, freeze_sublayers
from keras_ssattn._keras.serialization import Specification, check_options, serialize_options
from keras_ssattn._tensors import dtype_of, multiply_wide
from keras_ssattn._typing import Axis, Config, Identifier, Shape, Tensor
from keras_ssattn.layers import length_scales
from keras_ssattn.layers.masks import align_left
from keras_ssattn.ops import kernels, normalizers
from keras_ssattn.ops.kernels import Kernel


class Normalizer(StrictLoading):
    """Base class: a normalizing function and a length scale for its logits.

    A subclass returns from `kernel()` the `keras_ssattn.ops.kernels.Kernel` that defines it.

    Args:
        axis: the axis, or axes, to normalize over. Defaults to the last one.
        length_scale: a `LengthScale` layer, or its config; `None` for none. A layer is a
            specification: its options are copied, its parameters are not shared.
        num_heads: an integer for one set of parameters per head, with logits `[..., H, T, S]`
            normalized over the last axis; `None` for one set in all. Attention layers give theirs.

    Call arguments:
        logits: floating-point tensor of any shape.
        mask: boolean, True = attend, broadcastable to `logits` and of its rank; or Keras's own
            `[batch, time]`, for logits of rank 3 or more.

    Returns:
        Weights of the shape and dtype of `logits`; masked entries and rows are 0.

    Example:

    >>> from keras_ssattn.layers import Normalizer, Softpick
    >>> issubclass(Softpick, Normalizer)
    True
    """

    hints: ClassVar[dict[str, str]] = {
        "s": "Did you mean 'init_s', of `SSMax` or `LogLengthScale`?"
    }

    def __init__(
        self,
        axis: Axis = -1,
        length_scale: Identifier = None,
        num_heads: int | None = None,
        **kwargs: object,
    ) -> None:
        check_axis(axis)
        num_heads = check_integer("num_heads", num_heads, optional=True)
        check_options(self, kwargs, self.hints)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.axis = tuple(axis) if isinstance(axis, list) else axis
        scale = length_scales.get(length_scale)
        heads = {} if num_heads is None else {"num_heads": num_heads}
        # under a name that does not depend on how many others there are
        self.length_scale = scale.make(name="length_scale", **heads)
        self.num_heads = self.length_scale.num_heads

    def kernel(self) -> Kernel:
        """f, g and c of this layer; their own tensors have the shape `[H]`, or `[]`."""
        raise NotImplementedError

    @property
    def uses_count(self) -> bool:
        """Whether the weights depend on the number of keys beyond the sum over them."""
        return self.length_scale.uses_count

    def specification(self) -> Specification:
        """The class and options of this layer, and of its length scale."""
        scale = Specification.of(self.length_scale)
        return Specification.of(self, length_scale=scale)

    def build(self, logits_shape: Shape) -> None:
        num_heads = self.num_heads
        if num_heads is not None and (
            self.axis not in (-1, len(logits_shape) - 1)
            or len(logits_shape) < 3
            or logits_shape[-3] not in (None, num_heads)
        ):
            raise ValueError(
                "with parameters for each head, `logits` must have shape [..., H, T, S] and "
                f"`axis` be -1. Received: num_heads={num_heads}, axis={self.axis}, logits with "
                f"shape {tuple(logits_shape)}"
            )
        if not self.length_scale.built:
            self._require_no_query()
            self.length_scale.build((None,))
        freeze_sublayers(self)

    def build_for_attention(self, query_shape: Shape) -> None:
        """Builds the layer inside of attention, for queries `[B, T, H, D]`."""
        shapes = [(None, self.num_heads, None)]
        if self.length_scale.uses_query:
            shapes.append(tuple(query_shape))
        with keras.name_scope(self.name, caller=self):  # as Keras opens it around `build`
            self.length_scale.build(*shapes)
        self.build((None, self.num_heads, None, None))

    def _require_no_query(self) -> None:
        if self.length_scale.uses_query:
            raise ValueError(
                f"the length scale `{type(self.length_scale).__name__}` needs the query, which a "
                "normalizer alone does not have. Use it in an attention layer."
            )

    def call(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        self._require_no_query()
        mask = align_left(mask, logits)
        kernel = self.kernel()
        if self.num_heads is not None:  # heads are the third axis from the end
            rows = tuple(ops.expand_dims(x, (-2, -1)) for x in kernel.tensors)
            kernel = kernel.with_tensors(rows)
        if not self.uses_count:
            return normalizers.apply(kernel, logits, self.axis, mask)
        axes = normalize_axis(self.axis, len(logits.shape))
        n = ops.convert_to_tensor(kernels.entry_count(logits, axes, mask), "int32")
        if self.num_heads is None:
            factor = self.length_scale(n)
        else:  # the normalized axis is the last
            n = ops.reshape(n, (1, 1)) if mask is None else ops.squeeze(n, -1)  # [..., H|1, T|1]
            factor = ops.expand_dims(self.length_scale(n), -1)
        weights = normalizers.apply(kernel, multiply_wide(logits, factor), self.axis, mask)
        return ops.cast(weights, dtype_of(logits))

    def compute_output_shape(self, logits_shape: Shape) -> Shape:
        return logits_shape

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None) -> Tensor | None:
        # An entrywise mask has done its work; a mask of batch and time concerns later layers.
        if previous_mask is None or len(previous_mask.shape) == len(inputs.shape):
            return None
        return previous_mask

    def explain(self) -> str:
        return (
            f"The normalizer {self.path!r} is a `{type(self).__name__}`, that of the file is "
            'another: normalizer="sink_softmax" has weights of its own. Make the model with the '
            "`normalizer=` that it was saved with."
        )

    def get_config(self) -> Config:
        scale = serialize_options(self.length_scale)
        return {
            **super().get_config(),
            "axis": self.axis,
            "length_scale": scale,
            "num_heads": self.num_heads,
        }
