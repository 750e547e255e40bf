"""Rectified softpick by powers of two: quicker where PyTorch computes on a CPU, and less exact.

There e^x - 1 takes several times as long as 2^y, and more than the products of a tile. With
y = x log2(e), d = 2^y - 1 is off by 2^-22 max(2^y, 1) at most, and by the rounding of y. If Z is
at least 1/8 for each of n keys, the output is off by 18 x 2^-22 of the greatest value from the
first; measured, with logits up to 27, it was 2 x 2^-22 in all. That is of the values, not of the
output, which is small where nearly all logits are negative. A tile of rows is looked at once it is
computed; where Z is smaller, it is computed again, exactly. Weights of logits up to 0 are exactly
0, here too.
"""

import dataclasses
import functools

from keras_ssattn._frameworks import write_over
from keras_ssattn._typing import Shape, Tensor
from keras_ssattn.ops import in_place, stacks
from keras_ssattn.ops.kernels import Functions, Kernel, RectifiedSoftpick

LEAST, MOST = 2.0**-3, 2.0**43  # of Z: for each key, and in all (e^30, the headroom)


@dataclasses.dataclass(frozen=True, eq=False)
class PowersOfTwo(RectifiedSoftpick):
    """`RectifiedSoftpick` of y in place of x, with m = 0."""

    headroom = None

    @staticmethod
    def holds(total: Tensor, total_per_key: Tensor) -> bool:
        """Whether rows of such sums are exact enough, and no logit has passed the headroom."""
        return bool(total_per_key.amin() >= LEAST and total.amax() <= MOST)

    def values(self, x: Tensor, m: Tensor, on: Functions) -> tuple[Tensor, Tensor]:
        d = x.exp2_().sub_(self._kept("one", x, ()))
        return write_over(self._kept("f", x, x.shape), "clamp_min", d, 0.0), d.abs_()

    def gradient(
        self, x: Tensor, m: Tensor, upstream: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        s = write_over(self._kept("s", x, x.shape), "sign", x)
        x.exp2_()
        s *= x  # s e^x
        upstream *= write_over(self._kept("f", x, x.shape), "clamp_min", s, 0.0)
        f = x.sub_(self._kept("one", x, ())).relu_()
        return f, in_place.subtract_product(upstream, s, delta)

    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {}

    def _kept(self, name: str, x: Tensor, shape: Shape) -> Tensor:
        """Ones like x, the same tensor for one tile after another."""
        if name not in self._tensors:
            self._tensors[name] = x.new_ones(shape)
        return self._tensors[name]


def quick_kernel(kernel: Kernel, query: Tensor) -> PowersOfTwo | None:
    """The quick form of a kernel where there is one."""
    if not isinstance(kernel, RectifiedSoftpick) or not stacks.can_be_read(query):
        return None
    return PowersOfTwo(kernel.epsilon)
