"""PyTorch's own traces of models, of one length, that run at any other."""

import numpy as np
import pytest
from support.exports import LONG, MARKS, SHORT, assert_same

import keras_ssattn
from keras_ssattn.models import CausalLM

pytestmark = [*MARKS, pytest.mark.backend("torch", reason="its traces")]


@pytest.mark.parametrize("normalizer", ["ssmax", "softpick", "rectified_softpick", "sink_softmax"])
def test_jit_trace(normalizer, rng):
    import torch

    model = CausalLM(
        17, 8, num_layers=2, num_heads=2, num_kv_heads=1, normalizer=normalizer, padding_id=0,
        sliding_window=[7, None],
    )  # fmt: skip
    example = torch.ones((1, 3), dtype=torch.int32)
    traced = torch.jit.trace(model, example, check_trace=False)
    for sizes in (SHORT, LONG):
        x = rng.integers(0, 17, sizes).astype("int32")
        assert_same(model, lambda x: [traced(torch.from_numpy(x)).detach().numpy()], x)


def test_tiles_are_not_unrolled_in_export():
    import torch

    def nodes(length: int) -> int:
        model = keras_ssattn.build(
            8, 8, num_heads=2, num_layers=1, window_size=length, normalizer="softpick"
        )
        exported = torch.export.export(model, (torch.ones((1, length, 8)),), strict=False)
        x = np.random.default_rng(0).normal(size=(1, length, 8)).astype("float32")
        assert_same(model, lambda x: [exported.module()(torch.from_numpy(x)).detach().numpy()], x)
        return len(list(exported.graph.nodes))

    assert nodes(60) == nodes(1024)
