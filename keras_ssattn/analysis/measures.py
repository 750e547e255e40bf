"""Measures of attention weights and of hidden activations.

Weights are `[B, H, T, S]`, with a mask of the keys that each query sees. Every measure is of the
keys seen: a weight on a hidden key counts for nothing, a query that sees no key not at all. What
cannot be measured, because nothing is seen, is NaN, and so is the measure of weights with NaN.
Softpick's weights have signs, and rows that do not sum to one: `attention_entropy`, `sink_rate`
and `sparsity` are of their magnitudes.

All arithmetic is in float32, in float64 for float64 inputs.
"""

import math

import numpy as np
from keras import ops

from keras_ssattn._checks import check_broadcastable
from keras_ssattn._typing import ArrayLike, Axis, Tensor
from keras_ssattn.analysis._checks import check_index, check_threshold, check_values, check_weights


def attention_entropy(weights: ArrayLike, mask: ArrayLike | None = None) -> Tensor:
    r"""Entropy of the weights of a query, in nats, averaged over queries.

    .. math:: -\sum_j p_j \log p_j, \quad p_j = |w_j| / \sum_k |w_k|, \quad 0 \log 0 = 0

    0 where all weight is on one key, :math:`\log n` where it is equal on n. The weights of
    softmax are p. Those of a softpick are divided by the sum of their magnitudes, so that it is
    measured how they are spread, not how large they are. A query without any weight, as
    rectified softpick makes, spreads nothing and does not enter the average.

    Args:
        weights: floating-point `[B, H, T, S]`.
        mask: boolean, broadcastable to it, True where a query sees a key. `None` for all.

    Returns:
        A float32 tensor `[H]`, NaN for a head in which no query has any weight.

    Raises:
        TypeError: for weights that are not floating-point, or a float mask.
        ValueError: for shapes that do not fit.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.analysis import attention_entropy
    >>> weights = np.array([[[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]])
    >>> round(float(attention_entropy(weights)[0]), 4)  # the mean of log 2 and 0
    0.3466
    """
    weights, _ = check_weights(weights, mask)
    size = ops.abs(weights)
    total = ops.sum(size, axis=-1, keepdims=True)
    p = size / ops.where(total == 0, 1.0, total)
    terms = p * ops.log(ops.where(p > 0, p, 1.0))
    return _mean(-ops.sum(terms, axis=-1), total[..., 0] != 0, axis=(0, 2))


def sink_rate(weights: ArrayLike, mask: ArrayLike | None = None, threshold: float = 0.3) -> Tensor:
    r"""The share of heads that are attention sinks.

    .. math:: \frac{1}{BH} \sum_{b,h} \left[ \frac{1}{|Q|} \sum_{i \in Q} |w_{bhi1}| > \tau \right]

    A head of a sequence is one if the weight on its first key, averaged over the queries that see
    that key, exceeds the threshold. The first key is the first that any query sees: after padding
    on the left, the first that is no padding.

    Average it over the layers for the sink rate of a model. Note that short sequences have high
    ones: under a causal mask, uniform attention over T keys puts :math:`(1 + 1/2 + ... + 1/T)/T`
    on the first, which exceeds 0.3 up to T = 9.

    Args:
        weights: floating-point `[B, H, T, S]`.
        mask: boolean, broadcastable to it, True where a query sees a key. `None` for all.
        threshold: a number, 0 or more.

    Returns:
        A float32 scalar.

    Raises:
        TypeError: for weights that are not floating-point, or a float mask.
        ValueError: for shapes that do not fit, or a negative threshold.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.analysis import sink_rate
    >>> first, even = [[0.9, 0.1], [0.7, 0.3]], [[0.1, 0.9], [0.3, 0.7]]
    >>> float(sink_rate(np.array([[first, even]])))
    0.5

    References: Gu et al., arXiv 2410.10781; Zuhri et al., arXiv 2504.20966.
    """
    check_threshold("threshold", threshold)
    weights, mask = check_weights(weights, mask)
    seen = ops.any(mask, axis=2, keepdims=True)  # [B, H, 1, S]
    is_first = ops.logical_and(seen, ops.cumsum(ops.cast(seen, "int32"), axis=-1) == 1)
    mean, found = _mean_on(ops.abs(weights), mask, is_first)
    return _mean(_share(mean > threshold, mean), found, axis=(0, 1))


def sparsity(weights: ArrayLike, mask: ArrayLike | None = None, threshold: float = 0.0) -> Tensor:
    r"""The share of weights that are zero, among those on keys that are seen.

    Exactly zero unless `threshold` is given, else of a magnitude of at most that. Without a mask,
    the zeros above the diagonal of causal attention are counted, too. In half precision softmax
    has zeros as well, where it underflows.

    Args:
        weights: floating-point `[B, H, T, S]`.
        mask: boolean, broadcastable to it, True where a query sees a key. `None` for all.
        threshold: a number, 0 or more.

    Returns:
        A float32 tensor `[H]`.

    Raises:
        TypeError: for weights that are not floating-point, or a float mask.
        ValueError: for shapes that do not fit, or a negative threshold.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.analysis import sparsity
    >>> weights = np.array([[[[1.0, 0.0], [0.5, 0.0]]]])
    >>> round(float(sparsity(weights, mask=[[True, False], [True, True]])[0]), 4)  # 1 of 3
    0.3333

    Reference: Zuhri et al., arXiv 2504.20966.
    """
    check_threshold("threshold", threshold)
    weights, mask = check_weights(weights, mask)
    zero = _share(ops.abs(weights) <= threshold, weights)
    return _mean(zero, mask, axis=(0, 2, 3))


def weight_on(
    weights: ArrayLike,
    key_index: ArrayLike,
    query_index: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Tensor:
    """The weight that queries put on a marked key, such as the needle of a retrieval task.

    The mean over the queries that see the key, with its sign, or that of one query.

    Args:
        weights: floating-point `[B, H, T, S]`.
        key_index: position of the key, an integer or integers `[B]`, negative from the end.
        query_index: position of the query, likewise. `None` for all that see the key.
        mask: boolean, broadcastable to `weights`, True where a query sees a key. `None` for all.

    Returns:
        A float32 tensor `[B, H]`, NaN where no such query sees the key.

    Raises:
        TypeError: for weights that are not floating-point, indices that are not integers, or a
            float mask.
        ValueError: for shapes that do not fit, or an index outside the weights.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.analysis import weight_on
    >>> weights = np.array([[[[0.75, 0.25], [0.25, 0.75]]]])
    >>> float(weight_on(weights, key_index=0)[0, 0])
    0.5
    >>> float(weight_on(weights, key_index=0, query_index=-1)[0, 0])
    0.25
    """
    weights, mask = check_weights(weights, mask)
    batch, _, queries, keys = weights.shape
    is_key = _one_hot("key_index", key_index, batch, keys)  # [B|1, S]
    if query_index is not None:
        is_query = _one_hot("query_index", query_index, batch, queries)  # [B|1, T]
        mask = ops.logical_and(mask, ops.expand_dims(is_query, (1, 3)))
    mean, found = _mean_on(weights, mask, ops.expand_dims(is_key, (1, 2)))
    return ops.where(found, mean, math.nan)


def kurtosis(values: ArrayLike, mask: ArrayLike | None = None) -> Tensor:
    r"""Kurtosis of hidden activations: the fourth standardized moment of all of them.

    .. math:: \mathrm{mean}((x - \mu)^4) / \mathrm{mean}((x - \mu)^2)^2

    Pearson's, 3 for a normal distribution; 3 is not subtracted. All features at all positions of
    all sequences are one sample, as in the paper, which takes all layers together as well. A few
    massive activations raise it to hundreds or thousands.

    Args:
        values: floating-point `[B, T, E]`, or of any shape `[..., E]`.
        mask: boolean `[B, T]`, or of the shape without the last axis; False at padding.

    Returns:
        A float32 scalar, NaN where all values are the same or there are none.

    Raises:
        TypeError: for values that are not floating-point, or a float mask.
        ValueError: for a mask of another shape.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.analysis import kurtosis
    >>> round(float(kurtosis(np.array([[[-1.0, 1.0]]]))), 4)
    1.0
    >>> round(float(kurtosis(np.eye(100)[None])))  # one activation of 100 in each position
    98

    Reference: Zuhri et al., arXiv 2504.20966.
    """
    values, mask = check_values(values, mask)
    values = values / 16  # so that no range overflows, nor its inverse falls below normal numbers
    low = ops.min(ops.where(mask, values, math.inf), initial=math.inf)
    high = ops.max(ops.where(mask, values, -math.inf), initial=-math.inf)
    x = (values - low) / (high - low)  # in [0, 1]: no power overflows
    square = ops.square(x - _mean(x, mask))
    return _mean(ops.square(square / _mean(square, mask)), mask)


def max_activation(values: ArrayLike, mask: ArrayLike | None = None) -> Tensor:
    """The largest magnitude of hidden activations.

    Args:
        values: floating-point `[B, T, E]`, or of any shape `[..., E]`.
        mask: boolean `[B, T]`, or of the shape without the last axis; False at padding.

    Returns:
        A float32 scalar, NaN where there are none or the mask leaves none.

    Raises:
        TypeError: for values that are not floating-point, or a float mask.
        ValueError: for a mask of another shape.

    Example:

    >>> import numpy as np
    >>> from keras_ssattn.analysis import max_activation
    >>> float(max_activation(np.array([[[1.0, -3.0], [9.0, 0.0]]]), mask=[[True, False]]))
    3.0

    Reference: Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762.
    """
    values, mask = check_values(values, mask)
    largest = ops.max(ops.where(mask, ops.abs(values), -1.0), initial=-1.0)
    return ops.where(largest < 0, math.nan, largest)


def _mean(x: Tensor, where: Tensor, axis: Axis | None = None) -> Tensor:
    """The mean of the entries of `x` for which `where`, NaN if there are none."""
    where = ops.broadcast_to(where, x.shape)
    total = ops.sum(ops.where(where, x, 0.0), axis=axis)
    count = ops.sum(ops.cast(where, x.dtype), axis=axis)
    return ops.where(count > 0, total / ops.maximum(count, 1.0), math.nan)


def _share(condition: Tensor, x: Tensor) -> Tensor:
    """1 where the condition on `x` holds, 0 where not, NaN where `x` is NaN."""
    return ops.where(ops.isnan(x), math.nan, ops.cast(condition, x.dtype))


def _mean_on(weights: Tensor, mask: Tensor, is_key: Tensor) -> tuple[Tensor, Tensor]:
    """The mean weight on one key over the queries that see it, and whether any does, `[B, H]`."""
    on_key = ops.logical_and(mask, is_key)
    count = ops.sum(ops.cast(on_key, weights.dtype), axis=(2, 3))
    total = ops.sum(ops.where(on_key, weights, 0.0), axis=(2, 3))
    return total / ops.maximum(count, 1.0), count > 0


def _one_hot(name: str, index: ArrayLike, batch: int, length: int) -> Tensor:
    """Boolean `[B|1, length]`, True at the index of each row."""
    index = check_index(name, index)
    check_broadcastable(name, index.shape, (batch,), "[B]")
    if np.any(index < -length) or np.any(index >= length):
        raise ValueError(
            f"`{name}` must lie in [-{length}, {length}). Received: {name}={index.tolist()}"
        )
    return ops.convert_to_tensor(np.reshape(index, (-1, 1)) % length == np.arange(length))
