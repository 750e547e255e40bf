"""PyTorch's own traces of models, of one length, that run at any other."""

import numpy as np
import pytest
from support.exports import LONG, MARKS, SHORT, assert_same

import keras_ssattn
from keras_ssattn.layers import RotaryEmbedding
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


def build_with_rotary(fraction):
    rotary = RotaryEmbedding(fraction=fraction)
    return keras_ssattn.build(8, 8, num_heads=2, num_layers=1, window_size=None, rotary=rotary)


@pytest.mark.parametrize(
    ("model", "most"),
    [
        (lambda: keras_ssattn.build(8, 8, num_heads=2, num_layers=1, window_size=None), 2),
        (lambda: build_with_rotary(1.0), 2),
        (lambda: build_with_rotary(0.5), 2),
        (lambda: CausalLM(17, 8, 1, 2, padding_id=0, sliding_window=3), 2),
        (lambda: CausalLM(17, 8, 1, 2, normalizer="rectified_softpick"), 2),
    ],
    ids=["build", "rotary", "half of rotary", "padding", "rectified_softpick"],
)
def test_compile_makes_few_graphs_for_all_lengths(model, most, rng):
    """Of one length, then of any: two, of a whole model. Keras's own attention makes more."""
    import torch

    torch.compiler.reset()
    model, graphs = model(), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, dynamic=True, backend=count)
    is_text = isinstance(model, CausalLM)
    for sizes in ((2, 7), (2, 9), (3, 20), (3, 40)):
        x = rng.integers(0, 17, sizes) if is_text else rng.normal(size=(*sizes, 8))
        x = torch.tensor(x, dtype=torch.int32 if is_text else torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
    assert len(graphs) <= most


def test_tiles_are_not_compiled(rng):
    """They run as they are, forward and backward, between the graphs."""
    import torch

    torch.compiler.reset()
    model = keras_ssattn.build(
        8, 8, num_heads=2, num_layers=1, window_size=None, normalizer="softpick",
        implementation="tiled",
    )  # fmt: skip
    x = torch.tensor(rng.normal(size=(1, 300, 8)), dtype=torch.float32)
    gradients = []
    for call in (torch.compile(model, dynamic=True, backend="eager"), model):
        model.zero_grad()
        call(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    torch.testing.assert_close(*gradients)
