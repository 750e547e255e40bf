"""Tiled attention: every normalizer in memory linear in the number of keys."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ssattn._frameworks import in_full_precision, is_recording, uncompiled
from keras_ssattn._keras.heads_layout import heads_layout
from keras_ssattn._tensors import cast, dtype_of, widen
from keras_ssattn._typing import Number, Tensor
from keras_ssattn.ops import stacks
from keras_ssattn.ops._attention.tiled import backward, devices, forward
from keras_ssattn.ops._attention.tiled.band import Band, TileSizes
from keras_ssattn.ops._attention.tiled.forward import Tiles
from keras_ssattn.ops._attention.tiled.quick import quick_kernels
from keras_ssattn.ops._attention.tiled.ring import Ring
from keras_ssattn.ops.kernels import Kernel
from keras_ssattn.ops.visibility import Visibility


@in_full_precision
@uncompiled  # `torch.compile` would write every tile into the graph
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Kernel,
    factor: Number | Tensor,
    visibility: Visibility,
) -> Tensor:
    """`keras_ssattn.ops.attention` without a `T x S` tensor, forward or backward.

    Only the output and two numbers per row of the forward pass are kept. The backward pass is
    written by hand. Differentiating it again raises an error, except on JAX.
    """
    dtype, key_mask = dtype_of(value), visibility.key_mask
    if key_mask is not None and kernel.absent == 0:
        # a key of zeros has the logit 0, which such a kernel ignores
        key = ops.where(key_mask[:, :, None, None], key, ops.zeros_like(key))
        if not stacks.can_be_read(query):  # else `Band.counts` asks for it
            visibility = dataclasses.replace(visibility, key_mask=None)
    if query.shape[-1] == 1:  # XLA would round a product of one number twice, and never alike
        query, key = (ops.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1))) for x in (query, key))
    if not isinstance(factor, (int, float)):
        query, factor = widen(query) * factor, 1.0
    arrays = query, key, value
    if "float64" in (dtype_of(x) for x in arrays):
        arrays = tuple(ops.cast(x, "float64") for x in arrays)
    layout = heads_layout()
    if layout is not None:
        make = functools.partial(_with_gradient, kernel, factor)
        return cast(devices.attention(make, arrays, kernel, visibility, layout), dtype)
    attend = _with_gradient(kernel, factor, visibility)
    learned = (x + 0.0 for x in kernel.tensors)  # TensorFlow takes no variables here
    return cast(attend(*arrays, *learned, *visibility.tensors), dtype)


def _with_gradient(
    kernel: Kernel, factor: Number, visibility: Visibility, ring: Ring | None = None
) -> Callable[..., Tensor]:
    """The function of query, key, value, and of the tensors of kernel and visibility.

    JAX wants every tensor to be an argument: it may not be closed over. Cutting into tiles is
    inside, and the backward pass makes the band anew, because under XLA TensorFlow knows sizes
    that are unknown until the graph runs from the shapes of what a function is given alone.
    """

    @ops.custom_gradient
    def attend(query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor) -> tuple[Tensor, Any]:
        layout = _Layout(kernel, factor, visibility, query, key, tensors)
        tiles = layout.tiles(query, key, value)
        residuals = forward.run(tiles) if ring is None else ring.forward(tiles)

        @in_full_precision
        def gradient_of(given: Tensor) -> tuple[Tensor | None, ...]:
            # what follows is never differentiated on PyTorch: keep nothing for it
            upstream = ops.stop_gradient(given) if stacks.runs_eagerly() else given
            again = _Layout(kernel, factor, visibility, query, key, tensors)
            tiles = again.of(residuals.queries, residuals.keys, residuals.values)
            upstream = stacks.split(upstream, again.sizes.query, again.group_size)
            run = backward.run if ring is None else ring.backward
            return again.gradients(run(residuals, upstream, tiles), given, query, key, value)

        # Keras gives the upstream gradient by position on some backends, by name on others
        def gradient(*args: Tensor, upstream: Tensor = None) -> tuple[Tensor | None, ...]:
            return gradient_of(args[0] if upstream is None else upstream)

        length = ops.shape(query)[1]
        return stacks.merge(residuals.outputs, length, layout.group_size), gradient

    return attend


class _Layout:
    """Kernel and visibility with the tensors of one pass, and how these are cut into tiles."""

    def __init__(
        self,
        kernel: Kernel,
        factor: Number,
        visibility: Visibility,
        query: Tensor,
        key: Tensor,
        tensors: tuple[Tensor, ...],
    ) -> None:
        own = len(kernel.tensors)
        self.factor = factor
        self.sinks, self.count = tensors[:own], len(tensors)
        self.group_size = query.shape[2] // key.shape[2]
        lengths = ops.shape(query)[1], ops.shape(key)[1]
        self.visibility = visibility.with_tensors(tensors[own:], *lengths)
        self.sizes = TileSizes.of(self.visibility, query, key.shape[2])
        self.band = Band(self.visibility, self.sizes, self.group_size, key.shape[2], kernel)
        self.kernel = kernel.with_tensors(tuple(self._by_row(x) for x in self.sinks))

    def _by_row(self, x: Tensor) -> Tensor:
        """`[H]` as one value per row of a tile, `[1, K, rows, 1]`."""
        x = ops.reshape(x, (1, -1, self.group_size, 1))
        x = ops.repeat(x, self.sizes.query, axis=3)
        return ops.reshape(x, (1, -1, self.group_size * self.sizes.query, 1))

    def _by_head(self, x: Tensor) -> Tensor:
        """The sum over a stack `[n, B, K, rows, 1]` of what one head has, `[H]`."""
        x = ops.sum(x, axis=(0, 1, 4))  # [K, rows]
        x = ops.reshape(x, (-1, self.group_size, self.sizes.query))
        return ops.reshape(ops.sum(x, axis=2), (-1,))

    def tiles(self, query: Tensor, key: Tensor, value: Tensor) -> Tiles:
        return self.of(
            stacks.split(query, self.sizes.query, self.group_size),
            stacks.split(key, self.sizes.key),
            stacks.split(value, self.sizes.key),
        )

    def of(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tiles:
        """Stacks with what belongs to them."""
        quick = quick_kernels(self.kernel, queries)
        scale = self.factor * self.kernel.prescale
        return Tiles(queries, keys, values, self.kernel, self.band, scale, quick)

    def gradients(
        self, found: backward.Gradients, given: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each argument of the function that is differentiated.

        `given` is the gradient of the function's result.
        """
        length, key_length = self.visibility.query_length, self.visibility.key_length
        merged = (
            (stacks.merge(found.query, length, self.group_size), query),
            (stacks.merge(found.key, key_length), key),
            (stacks.merge(found.value, key_length), value),
            *zip(map(self._by_head, found.constants), self.sinks, strict=True),
        )
        gradients = tuple(self._final(ops.cast(g, x.dtype), x, given) for g, x in merged)
        return (*gradients, *(None for _ in range(self.count - len(self.sinks))))

    def _final(self, gradient: Tensor, x: Tensor, given: Tensor) -> Tensor:
        """The gradient of x, marked as one that cannot be differentiated again, where that is so.

        JAX differentiates through both passes, if their loops have bounds that are known.
        TensorFlow cannot, and on PyTorch what the forward pass kept is a constant, so that a
        second derivative would be wrong.
        """
        bounded = not self.visibility.causal and self.visibility.window is None
        if not is_recording() or (keras.backend.backend() == "jax" and bounded):
            return gradient
        return _once(gradient, x, given)


@ops.custom_gradient
def _once(gradient: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor, Any]:
    def refuse(*args: Tensor, upstream: Tensor = None) -> Tensor:
        raise NotImplementedError(
            'implementation="tiled" of attention has no second derivative on the '
            f"{keras.backend.backend()} backend (on JAX it has one without `causal` and "
            '`window`); implementation="dense" has.'
        )

    return gradient + 0.0, refuse
