"""Rectified softpick by e^x less 1: quicker where PyTorch computes on a CPU, and less exact.

There an e^x - 1 that is exact near 0 takes several times as long as e^x, and more than the products
of a tile. As e^x less 1, d is off by 2^-22 max(e^x, 1) at most. If Z is at least 1/8 for each of n
keys, the output is off by 18 x 2^-22 of the greatest value from that; measured, with logits up to
26, all errors together were those of dense attention in float32. That is of the values, not of the
output, which is small where nearly all logits are negative. A tile of rows is looked at once it is
computed; where Z is smaller, it is computed again, exactly. Weights of logits up to 0 are exactly
0, here too.
"""

import dataclasses
import functools

from keras_ssattn._frameworks import keep_where_positive, write_over
from keras_ssattn._typing import Shape, Tensor
from keras_ssattn.ops import in_place, stacks
from keras_ssattn.ops.kernels import Kernel, RectifiedSoftpick

LEAST, MOST = 2.0**-3, 2.0**43  # of Z: for each key, and in all (e^30, the headroom)


@dataclasses.dataclass(frozen=True, eq=False)
class QuickRectifiedSoftpick(RectifiedSoftpick):
    """`RectifiedSoftpick` of tiles with m = 0 and d = e^x less 1."""

    headroom = None

    @staticmethod
    def holds(total: Tensor, total_per_key: Tensor) -> bool:
        """Whether rows of such sums are exact enough, and no logit has passed the headroom."""
        return bool(total_per_key.amin() >= LEAST and total.amax() <= MOST)

    def sums(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """With |d| = 2 max(d, 0) - d, for which nothing but the sums of f and d is needed."""
        d = x.exp_().sub_(self._kept("one", x, ()))
        total = in_place.row_sum(d)
        f = d.relu_()
        return f, in_place.row_sum(f).mul_(2).sub_(total)

    def gradient(
        self, x: Tensor, m: Tensor, upstream: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """With dx = (dN . v where s > 0, else 0, - delta) s e^x, s the sign of x."""
        s = write_over(self._kept("s", x, x.shape), "sign", x)
        x.exp_()
        s *= x
        f = x.sub_(self._kept("one", x, ())).relu_()
        keep_where_positive(upstream, s)
        upstream -= delta
        upstream *= s
        return f, upstream

    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {}

    def _kept(self, name: str, x: Tensor, shape: Shape) -> Tensor:
        """Ones like x, the same tensor for one tile after another."""
        if name not in self._tensors:
            self._tensors[name] = x.new_ones(shape)
        return self._tensors[name]


def quick_kernel(kernel: Kernel, query: Tensor) -> QuickRectifiedSoftpick | None:
    """The quick form of a kernel where there is one."""
    if not isinstance(kernel, RectifiedSoftpick) or not stacks.can_be_read(query):
        return None
    return QuickRectifiedSoftpick(kernel.epsilon)
