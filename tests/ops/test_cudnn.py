"""cuDNN's attention on JAX, without a GPU: what is asked of it, when, and that it lowers for one.

In its place JAX's own attention computes the same arguments, as JAX documents them.
"""

import functools

import keras
import numpy as np
import pytest
from support import oracle
from support.helpers import relative_error, to_numpy

from keras_ssattn import _frameworks, layers, ops

pytestmark = pytest.mark.backend("jax")
SERVED = {
    "all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "a window beyond int32": {"window": 2**40},
}
PADDING = np.arange(8) < np.array([[5], [8]])
OTHERS = {
    "a window on both sides": {"window": 3},
    "padding": {"causal": True, "key_mask": PADDING},
    "padding of one row": {"key_mask": PADDING[:1]},
    "an offset": {"causal": True, "query_offset": 1},
    "an offset per row": {"causal": True, "query_offset": np.array([0, 0])},
    "a mask": {"mask": np.ones((8, 8), bool)},
    "segments": {"causal": True, "segment_ids": (np.arange(16).reshape(2, 8) // 3,) * 2},
}


@pytest.fixture
def gpu(monkeypatch):
    """A pretended one with cuDNN 9.13."""
    name = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["gpu:0"])
    monkeypatch.setattr(f"{name}.check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(f"{name}.check_compute_capability", lambda _: True)
    _frameworks._serves.cache_clear()
    yield
    _frameworks._serves.cache_clear()


@pytest.fixture
def asked(gpu, monkeypatch):
    """What cuDNN is asked for, which JAX computes."""
    import jax

    compute, calls = jax.nn.dot_product_attention, []

    def stand_in(*args, implementation, **options):
        assert implementation == "cudnn"
        calls.append(options)
        return compute(*args, implementation="xla", **options)

    real = _frameworks.cudnn_attention  # of which JAX's own checks are made

    def cudnn_attention(*args):
        with monkeypatch.context() as patch:
            patch.setattr(jax.nn, "dot_product_attention", stand_in)
            return real(*args)

    monkeypatch.setattr("keras_ssattn.ops._attention.cudnn.cudnn_attention", cudnn_attention)
    return calls


def halves(rng, dtype="bfloat16", heads=4, kv_heads=2, length=8, key_length=8, size=16):
    shapes = [(2, length, heads, size), *[(2, key_length, kv_heads, size)] * 2]
    return [keras.ops.cast(rng.normal(size=shape), dtype) for shape in shapes]


def error_of(arrays, normalizer, **options):
    out = ops.attention(*arrays, normalizer, **options)
    assert keras.utils.standardize_dtype(out.dtype) == keras.utils.standardize_dtype(
        arrays[2].dtype
    )
    options.pop("implementation", None)
    if "key_mask" in options:
        options["key_mask"] = np.broadcast_to(options["key_mask"], (2, 8))
    expected = oracle.attention(*[to_numpy(x) for x in arrays], normalizer, **options)
    return relative_error(to_numpy(out), expected)


@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED)
@pytest.mark.parametrize("normalizer", ["softmax", "ssmax"])
def test_fused_asks_cudnn_and_equals_oracle(normalizer, case, asked, rng):
    assert error_of(halves(rng), normalizer, implementation="fused", **case) < 3 * 2**-8
    (options,) = asked
    assert options["is_causal"] is case.get("causal", False)
    assert options["local_window_size"] == ((2, 0) if case.get("window") == 3 else None)
    assert (options["scale"] == 0.25) == (normalizer == "softmax")


@pytest.mark.parametrize("case", [*OTHERS.values(), {"causal": True}], ids=[*OTHERS, "causal"])
def test_auto_asks_for_nothing(case, asked, rng):
    assert error_of(halves(rng), "softmax", **case) < 2**-8
    assert asked == []


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_what_cudnn_does_not_hide_is_refused(case, gpu, rng):
    with pytest.raises(ValueError, match=r"without masks but causality.*masks \["):
        ops.attention(*halves(rng), "softmax", implementation="fused", **case)


@pytest.mark.parametrize(
    ("normalizer", "options"),
    [
        ("softpick", {}),
        ("rectified_softpick", {}),
        ("sink_softmax", {}),
        ("softmax", {"dtype": "float32"}),
        ("ssmax", {"dtype": "float16"}),  # the query times log n may pass 65504
        ("softmax", {"size": 12}),  # not a multiple of 8
        ("softmax", {"size": 512}),
        ("softmax", {"key_length": 6}),  # which cuDNN may align at the end
    ],
)
def test_what_cudnn_cannot_is_refused(normalizer, options, gpu, rng):
    arrays = halves(rng, **options)
    with pytest.raises(ValueError, match="fused.*On JAX with a GPU.*Received: .* on jax"):
        ops.attention(*arrays, normalizer, causal=True, implementation="fused")


def test_queries_and_keys_of_two_lengths(asked, rng):
    assert error_of(halves(rng, key_length=6), "softmax", implementation="fused") < 2**-6
    assert len(asked) == 1


def test_scales_in_half_precision(asked, rng):
    arrays = halves(rng, "float16", 4, 1)
    assert error_of(arrays, "softmax", causal=True, implementation="fused") < 3 * 2**-11
    with pytest.raises(ValueError, match="float16"):  # where cuDNN's scale cannot be negative
        ops.attention(*arrays, "softmax", scale=-3e4, implementation="fused")
    options = {"scale": -0.5, "implementation": "fused"}
    assert error_of(halves(rng), "softmax", causal=True, **options) < 3 * 2**-8
    assert [x["scale"] for x in asked] == [0.25, 1.0]


@pytest.mark.parametrize("device", ["cpu:0", "tpu:0", "rocm:0"])
def test_on_other_devices_it_is_refused(device, gpu, monkeypatch, rng):
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: [device])
    with pytest.raises(ValueError, match=r"fused.*JAX with a GPU.*bfloat16"):
        ops.attention(*halves(rng), implementation="fused")


def test_without_cudnn_it_is_refused(gpu, monkeypatch, rng):
    def undetected():
        raise RuntimeError("cuDNN is not detected.")

    name = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(name, undetected)
    with pytest.raises(ValueError, match=r"fused.*JAX with a GPU.*bfloat16"):
        ops.attention(*halves(rng), implementation="fused")


def test_a_gpu_that_is_not_used_is_not_asked(gpu, rng):
    import jax

    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(ValueError, match="JAX with a GPU"),
    ):
        ops.attention(*halves(rng), implementation="fused")


def test_layers_ask_for_it(asked, rng):
    layer = layers.MultiHeadAttention(4, 16, flash_attention=True, dtype="bfloat16")
    x = rng.normal(size=(2, 8, 64))
    layer(x, x, use_causal_mask=True)
    assert len(asked) == 1
    other = layers.MultiHeadAttention(4, 16, normalizer="softpick", flash_attention=True)
    with pytest.raises(ValueError, match="flash_attention=True serves softmax.*softpick"):
        other(x, x)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("case", ["all", "causal", "window"])
def test_it_lowers_for_a_gpu(case, gradient, gpu, rng):
    """JAX's own checks, and the call that the compiler would be given."""
    import jax

    attend = functools.partial(
        ops.attention, normalizer="ssmax", implementation="fused", **SERVED[case]
    )
    function = attend
    if gradient:
        total = lambda *args: attend(*args).astype("float32").sum()  # noqa: E731
        function = jax.grad(total, (0, 1, 2))
    text = jax.jit(function).trace(*halves(rng)).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert ("__cudnn$fmhaSoftmaxBackward" in text) == gradient
