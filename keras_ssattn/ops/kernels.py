r"""What tiled attention needs of a normalizer, for tiles of logits seen one after the other.

Attention is :math:`o_i = \sum_j f(x_{ij}) v_j / Z_i` with :math:`Z_i = c + \sum_j g(x_{ij})`.
With :math:`dN_i = dO_i / Z_i` and :math:`\delta_i = dN_i \cdot o_i`, its gradients are

.. math::
    dx_{ij} = f'(x_{ij}) (dN_i \cdot v_j) - g'(x_{ij}) \delta_i, \quad
    dv_j = \sum_i f(x_{ij}) dN_i

A kernel gives f, g, c and dx. f, g and c may all be multiplied by e^-m, which cancels, where m is
a maximum over the keys seen so far. Where a tile is changed by augmented assignments, PyTorch does
so in place, which spares it memory. The normalizers themselves, on whole rows, are in
`normalizers.py`; tests hold the two together.
"""

from typing import Any

from keras import ops

LOWEST = -3.0e38  # finite, so that LOWEST - LOWEST is 0


class Softmax:
    """f = g = exp(x - m), c = 0."""

    first_max = LOWEST
    linear = False
    absent = -float("inf")  # a logit for which f, g and dx are 0
    query_scale = 1.0

    def peak(self, x: Any) -> Any:
        """What m must not be below."""
        return ops.max(x, axis=-1, keepdims=True)

    def values(self, x: Any, m: Any) -> tuple[Any, Any]:
        """Returns f and g."""
        e = ops.exp(x - m)
        return e, e

    def gradient(self, x: Any, m: Any, upstream: Any, delta: Any) -> tuple[Any, Any]:
        """Returns f and dx; `upstream` is dN . v."""
        e = ops.exp(x - m)
        return e, e * (upstream - delta)

    def constant(self, m: Any) -> Any:
        """Returns c."""
        return 0.0


class Softpick:
    """f = x, g = |x|, c = 1, all times 2^-24, lest the sum of the largest logits overflow.

    f is linear, so over tiles that are seen whole the numerator needs no logits:
    sum_j (q . k_j) v_j = q . sum_j (k_j v_j^T).
    """

    first_max = 0.0
    linear = True
    absent = 0.0  # f and g are 0 there; dx is not
    query_scale = 2.0**-24  # x arrives multiplied by it

    def values(self, x: Any, m: Any) -> tuple[Any, Any]:
        return x, abs(x)

    def gradient(self, x: Any, m: Any, upstream: Any, delta: Any) -> tuple[Any, Any]:
        return x, upstream - ops.sign(x) * delta

    def constant(self, m: Any) -> Any:
        return self.query_scale


class RectifiedSoftpick:
    """f = max(d, 0), g = |d|, c = epsilon e^-m with d = (e^x - 1) e^-m and m >= 0.

    m stays 0, and d = expm1(x) exact near 0, as long as no logit passes `HEADROOM`.
    """

    HEADROOM = 30.0
    first_max = 0.0
    linear = False
    absent = 0.0
    query_scale = 1.0

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def peak(self, x: Any) -> Any:
        return ops.max(x, axis=-1, keepdims=True) - self.HEADROOM

    def difference(self, x: Any, m: Any) -> Any:
        """Returns d, as (e^(x - m) - 1) + (1 - e^-m), which does not overflow."""
        d = ops.expm1(x - m)
        d -= ops.expm1(-m)
        return d

    def values(self, x: Any, m: Any) -> tuple[Any, Any]:
        d = self.difference(x, m)
        return ops.relu(d), abs(d)

    def gradient(self, x: Any, m: Any, upstream: Any, delta: Any) -> tuple[Any, Any]:
        d, sign = self.difference(x, m), ops.sign(x)
        f, slope = ops.relu(d), ops.relu(sign)
        slope *= upstream
        sign *= delta
        slope -= sign
        slope *= d + ops.exp(-m)
        return f, slope

    def constant(self, m: Any) -> Any:
        return self.epsilon * ops.exp(-m)


def get(name: str, epsilon: float) -> Any:
    """The kernel of that name."""
    if name == "rectified_softpick":
        return RectifiedSoftpick(epsilon)
    return {"softmax": Softmax, "softpick": Softpick}[name]()
