"""Attention with any normalizer, any visibility and any length scale."""

from collections.abc import Sequence

import keras

from keras_ssattn._checks import check_choice
from keras_ssattn._typing import ArrayLike, Implementation, Option, Tensor
from keras_ssattn.ops._attention.arguments import prepare
from keras_ssattn.ops._attention.choice import attend, attend_weights
from keras_ssattn.ops._attention.symbolic import Attention
from keras_ssattn.ops.kernels import Kernel


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    normalizer: str | Kernel = "softmax",
    scale: float | None = None,
    mask: ArrayLike | None = None,
    key_mask: ArrayLike | None = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: int | ArrayLike = 0,
    *,
    segment_ids: ArrayLike | Sequence[ArrayLike] | None = None,
    length_scale: ArrayLike | None = None,
    epsilon: float = 1e-6,
    sink: ArrayLike = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    r"""Scaled dot-product attention, :math:`o_i = \sum_j w_{ij} v_j`.

    The weights are `normalizer(x)` of the logits
    :math:`x_{ij} = a_i \, (q_i \cdot k_j) \cdot scale` over the keys that query i sees. The
    length scale a multiplies the query, so it costs nothing and cannot meet a mask.

    Args:
        query: floating-point `[B, T, H, D]`.
        key: `[B, S, K, D]`. K divides H; `H / K` query heads in a row share a key head.
        value: `[B, S, K, Dv]`.
        normalizer: `"softmax"`, `"ssmax"`, `"softpick"`, `"rectified_softpick"` or
            `"sink_softmax"`. `"ssmax"` is softmax whose length scale is, unless given, `log n`
            (`s = 1`).
        scale: number that multiplies the logits. Defaults to `1 / sqrt(D)`.
        mask: boolean `[T, S]`, or broadcastable to `[B, H, T, S]`; True = attend.
        key_mask: boolean `[B, S]`, False at padded keys.
        causal: whether a query sees no later position.
        window: a query sees keys less than `window` positions away. `None` for all.
        query_offset: position of the first query, an integer or an integer tensor `[B]`.
        segment_ids: integers `[B, T]`, where T = S, of sequences packed into one, which do not
            see each other; or a pair of those of the queries, `[B, T]`, and the keys, `[B, S]`.
        length_scale: the factor a, a number or a tensor broadcastable to `[B, H, T]`, such as
            `log_length_scale(key_count(...), s)`. Defaults to 1.
        epsilon: of `rectified_softpick`; the others do not use it.
        sink: of `sink_softmax`, the logit of the sink: a number or `[H]`.
        implementation: `"dense"` computes all `T x S` weights, in float32 for half inputs.
            `"tiled"` computes them a tile at a time, in memory linear in T and S, and again in
            the backward pass; it skips tiles that `causal` and `window` hide. It has a second
            derivative on JAX only, without these two. `"fused"` is a kernel for softmax, ssmax and
            sink_softmax: PyTorch's own; and on JAX with a GPU what cuDNN serves in half precision,
            softmax and (in bfloat16, in which it rounds the scaled query) ssmax, causal or in a
            window of that, without other masks. Elsewhere, and in float64, it raises. It has no
            second derivative. `"auto"` takes `"fused"` on PyTorch, if it
            needs no mask beyond causality, or one of at most 2^22 entries; else `"tiled"` where
            `T * S` passes 2^19 (724 x 724), or is unknown until a TensorFlow graph runs (a short
            input is then one tile), and on PyTorch on a CPU also from `B * H * T * S` = 2^21 on,
            if T and S are 256 or more; else `"dense"`. In export it takes `"dense"` in place of
            `"tiled"`; see `exporting`. Rectified softpick in tiles on PyTorch on a CPU may be off
            by 4e-6 of the greatest value, not of the output.

    Returns:
        `[B, T, H, Dv]` in the dtype of `value`. A query that sees no key gets zeros.

    Raises:
        TypeError: for inputs that are not floating-point, or a float mask.
        ValueError: for any other argument that does not fit.
        NotImplementedError: where the gradient of tiled attention is differentiated and has no
            derivative.

    Sizes that are unknown until a graph runs are compared when it runs: those that do not fit
    raise the backend's own error.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> q = keras.random.normal((2, 7, 4, 16))
    >>> kv = keras.random.normal((2, 7, 1, 16))  # four query heads share one of keys
    >>> ops.attention(q, kv, kv, normalizer="ssmax", causal=True).shape
    (2, 7, 4, 16)

    References: arXiv 2501.19399 (SSMax), arXiv 2504.20966 (rectified softpick).
    """
    check_choice("implementation", implementation, Implementation)
    parts = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,)
    tensors = query, key, value, mask, key_mask, query_offset, length_scale, sink, *parts
    if any(isinstance(x, keras.KerasTensor) for x in tensors):
        if segment_ids is not None and len(parts) == 1:
            segment_ids = segment_ids, segment_ids
        step = Attention(normalizer, scale, causal, window, epsilon, implementation)
        return step(
            query, key, value, mask=mask, key_mask=key_mask, query_offset=query_offset,
            segment_ids=segment_ids, length_scale=length_scale, sink=sink,
        )  # fmt: skip
    prepared = prepare(
        query, key, value, normalizer, scale, mask, key_mask, causal, window, query_offset,
        segment_ids=segment_ids, length_scale=length_scale, epsilon=epsilon, sink=sink,
    )  # fmt: skip
    return attend(**vars(prepared), implementation=implementation)


def attention_weights(query: ArrayLike, key: ArrayLike, *args: Option, **options: Option) -> Tensor:
    """The weights `[B, H, T, S]` that `attention` with these arguments gives the values.

    They are float32 (float64 for float64 inputs). Arguments and errors are `attention`'s, without
    `value` and `implementation`.

    Example:

    >>> import keras
    >>> from keras_ssattn import ops
    >>> q = keras.random.normal((2, 7, 4, 16))
    >>> ops.attention_weights(q, q, normalizer="softpick", causal=True).shape
    (2, 4, 7, 7)
    """
    prepared = prepare(query, key, key, *args, **options)
    return attend_weights(
        prepared.query, prepared.key, prepared.kernel, prepared.factor, prepared.visibility
    )
