r"""What tiled attention needs of a normalizer, for tiles of logits seen one after the other.

Attention is :math:`o_i = \sum_j f(x_{ij}) v_j / Z_i` with :math:`Z_i = c + \sum_j g(x_{ij})`.
With :math:`dN = dO / Z` and :math:`\delta = dN \cdot o`, its gradient is

.. math::
    dx_{ij} = f'(x_{ij}) (dN_i \cdot v_j) - g'(x_{ij}) \delta_i, \quad
    dv_j = \sum_i f(x_{ij}) dN_i

A kernel gives f and g, their derivatives, and c. Where m is the largest logit of a row so far,
f, g and c may all be multiplied by e^-m, which cancels. The normalizers themselves, on whole
rows, are in `normalizers.py`; tests hold the two together.
"""

from typing import Any, NamedTuple

from keras import ops

LOWEST = -3.0e38  # finite, so that LOWEST - LOWEST is 0


class Softmax:
    """f = g = exp(x - m), c = 0."""

    uses_max = True
    first_max = LOWEST
    linear = False
    absent = -float("inf")  # the logit of a key that is not seen: f = g = f' = g' = 0
    query_scale = 1.0

    def values(self, x: Any, m: Any) -> tuple[Any, Any]:
        """f and g."""
        e = ops.exp(x - m)
        return e, e

    def derivatives(self, x: Any, m: Any) -> tuple[Any, Any, Any]:
        """f, f' and g'."""
        e = ops.exp(x - m)
        return e, e, e

    def constant(self, m: Any) -> Any:
        """c."""
        return 0.0


class Softpick:
    """f = x, g = |x|, c = 1, all times 2^-24, lest the sum of the largest logits overflow.

    f is linear, so over tiles that are seen whole the numerator needs no logits:
    sum_j (q . k_j) v_j = q . sum_j (k_j v_j^T).
    """

    uses_max = False
    first_max = 0.0
    linear = True
    absent = 0.0
    query_scale = 2.0**-24  # x arrives multiplied by it

    def values(self, x: Any, m: Any) -> tuple[Any, Any]:
        return x, ops.abs(x)

    def derivatives(self, x: Any, m: Any) -> tuple[Any, Any, Any]:
        return x, ops.ones_like(x), ops.sign(x)

    def constant(self, m: Any) -> Any:
        return self.query_scale


class RectifiedSoftpick(NamedTuple):
    """f = max(e^x - 1, 0), g = |e^x - 1|, c = epsilon, all times e^-m with m >= 0."""

    epsilon: float

    uses_max = True
    first_max = 0.0
    linear = False
    absent = 0.0
    query_scale = 1.0

    def values(self, x: Any, m: Any) -> tuple[Any, Any]:
        g = -ops.expm1(-ops.abs(x)) * ops.exp(ops.relu(x) - m)
        return ops.where(x > 0, g, 0.0), g

    def derivatives(self, x: Any, m: Any) -> tuple[Any, Any, Any]:
        below = ops.expm1(-ops.abs(x))  # e^-|x| - 1
        above = ops.exp(ops.relu(x) - m)  # e^max(x, 0) e^-m
        slope = ops.where(x > 0, above, 0.0)
        return -below * slope, slope, slope - ops.where(x < 0, (1.0 + below) * above, 0.0)

    def constant(self, m: Any) -> Any:
        return self.epsilon * ops.exp(-m)


def get(name: str, epsilon: float) -> Any:
    """The kernel of that name."""
    if name == "rectified_softpick":
        return RectifiedSoftpick(epsilon)
    return {"softmax": Softmax, "softpick": Softpick}[name]()
