"""Rectified softpick by powers of two: quicker where PyTorch computes on a CPU, a little less exact.

There e^x - 1 takes several times as long as 2^y, and more time than the products of a tile. With
y = x log2(e), d = 2^y - 1 is right to 2^-22 max(2^y, 1). If Z is at least 1/8 for each of n keys,
that is an error of the output of at most 2^-22 (1 + 8) of the greatest value, and as rounding is
to either side, far less. So every row is looked at once it is computed, and where this does not
hold, its tile is computed again, exactly. Weights of logits up to 0 are exactly 0, here too.
"""

import dataclasses
import functools
import math

from keras_ssattn._frameworks import write_over
from keras_ssattn._typing import Tensor
from keras_ssattn.ops import in_place, stacks
from keras_ssattn.ops.kernels import Functions, Kernel, RectifiedSoftpick

LEAST, MOST = 1 / 8, math.exp(RectifiedSoftpick.headroom or 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class PowersOfTwo(RectifiedSoftpick):
    """`RectifiedSoftpick` of y in place of x, with m = 0; only tiles that are seen whole."""

    headroom = None

    def holds(self, m: Tensor, total: Tensor, num_keys: int) -> bool:
        """Whether rows of so many keys are exact enough, and no logit has passed the headroom."""
        lowest, highest = total.aminmax()
        return bool(lowest >= LEAST * num_keys and highest <= MOST and not m.any())

    def values(self, x: Tensor, m: Tensor, on: Functions) -> tuple[Tensor, Tensor]:
        d = x.exp2_().sub_(self._one(x))
        return write_over(self._room("f", d), "clamp_min", d, 0.0), d.abs_()

    def gradient(
        self, x: Tensor, m: Tensor, upstream: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        s = write_over(self._room("s", x), "sign", x)
        x.exp2_()
        s *= x  # s e^x
        upstream *= write_over(self._room("f", x), "clamp_min", s, 0.0)
        return x.sub_(self._one(x)).relu_(), in_place.subtract_product(upstream, s, delta)

    def _one(self, x):
        if "one" not in self._rooms: self._rooms["one"]=x.new_ones(())
        return self._rooms["one"]

    @functools.cached_property
    def _rooms(self) -> dict[str, Tensor]:
        return {}

    def _room(self, name: str, x: Tensor) -> Tensor:
        """Memory of the shape of x, the same for one tile after another."""
        found = self._rooms.get(name)
        if found is None:
            found = self._rooms[name] = x.new_empty(x.shape)
        return found


def quick_kernel(kernel: Kernel, query: Tensor) -> PowersOfTwo | None:
    """The quick form of a kernel where there is one."""
    if isinstance(kernel, RectifiedSoftpick) and stacks.runs_on_cpu_eagerly(query):
        return PowersOfTwo(kernel.epsilon)
    return None
