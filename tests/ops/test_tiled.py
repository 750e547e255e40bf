"""`ops.attention(implementation="tiled")`: every tile, length and way to run it."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from support import oracle
from support.cases import NAMES
from support.derivatives import derivative
from support.helpers import gradients, relative_error, to_numpy

from keras_ssattn import ops
from keras_ssattn.ops import kernels
from keras_ssattn.ops._attention import choice
from keras_ssattn.ops._attention.tiled import band as tiled
from keras_ssattn.ops._attention.tiled.band import Band, TileSizes


def inputs(rng, length=37, key_length=41, heads=4, kv_heads=2, size=5, value_size=3):
    shapes = ((2, length, heads, size), (2, key_length, kv_heads, size),
              (2, key_length, kv_heads, value_size))  # fmt: skip
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "QUERY_TILE", 16)
    monkeypatch.setattr(tiled, "KEY_TILE", 8)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 30])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [0, 11])
@pytest.mark.parametrize("key_length", [None, 29])
def test_band_visits_what_is_seen_and_masks_what_is_cut(key_length, offset, causal, window):
    sizes, count = (6, 4), 8
    visible = oracle.visible(24, 32, causal=causal, window=window, query_offset=offset)[0, 0]
    if key_length is not None:
        visible[:, key_length:] = False
    seen = ops.Visibility.of(24, key_length or 32, causal=causal, window=window,
                             query_offset=offset)  # fmt: skip
    band = Band(seen, TileSizes(*sizes), 1, 1, kernels.Softmax())
    for i in range(4):
        visited = {}
        for start, stop, cut in band.ranges(i):
            visited.update(dict.fromkeys(range(start, stop), cut))
        for j in range(count):
            tile = visible[i * 6 : (i + 1) * 6, j * 4 : (j + 1) * 4]
            if not tile.any():
                assert j not in visited or (j + 1) * 4 > (key_length or 32)
            else:
                assert tile.all() or visited[j]
                if tile.all() and causal and window is None:
                    assert not visited[j]
            if visited.get(j):
                seen = to_numpy(band.visible(i, j))
                seen = np.broadcast_to(seen.reshape(seen.shape[-2:]), tile.shape)
                np.testing.assert_array_equal(seen, tile)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("normalizer", NAMES)
@hypothesis.settings(
    # JAX compiles each example anew
    max_examples=4 if keras.backend.backend() == "jax" else 25,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    lengths=st.sampled_from([(37, 41), (16, 16), (1, 33), (30, 3)]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    key_mask=st.none() | hnp.arrays(bool, (2, 41)),
    mask=st.none() | st.sampled_from([(37, 41), (2, 1, 37, 41), (1, 1, 1, 41), (2, 1, 37, 1)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 45),
    offset=st.sampled_from([0, 7, (0, 9)]),
    segments=st.none() | hnp.arrays("int32", (2, 41), elements=st.integers(0, 2)),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_equal_the_oracle(
    normalizer, lengths, heads, key_mask, mask, causal, window, offset, segments, seed
):
    length, key_length = lengths
    rng = np.random.default_rng(seed)
    # Multiples of 1/4: products that are exact. Rectified softpick's weight of a lone logit x near
    # 0 is x / (epsilon + x), as inexact as x itself, and its gradient is a rounding divided by x:
    # its logits are integers, so that none but 0 is near to 0.
    steps, scale = (1, 1.0) if normalizer == "rectified_softpick" else (4, 0.25)
    arrays = [np.round(steps * x) / steps for x in inputs(rng, length, key_length, *heads)]
    case = {"scale": scale, "causal": causal, "window": window}
    case["query_offset"] = offset if isinstance(offset, int) else np.array(offset)
    if key_mask is not None:
        case["key_mask"] = key_mask[:, :key_length]
    if mask is not None:
        case["mask"] = (rng.random(mask) < 0.6)[..., :length, :key_length]
    if segments is not None:
        case["segment_ids"] = (segments[:, :length], np.sort(segments)[:, :key_length])
    function = functools.partial(
        ops.attention, normalizer=normalizer, implementation="tiled", **case
    )
    run = compiled(function, fixed=True)
    expected = oracle.attention(*arrays, normalizer, **case)
    actual = to_numpy(run(*arrays))
    assert relative_error(actual, expected) < 2e-6
    np.testing.assert_array_equal(actual, to_numpy(run(*arrays)))
    cotangent = rng.normal(size=expected.shape).astype("float32")
    references = oracle.attention_gradients(*arrays, cotangent, normalizer, **case)
    for gradient, reference in zip(gradients(run, arrays, cotangent), references, strict=True):
        # Where every query sees one key, all gradients of queries and keys are 0.
        unit = 4e-6 if normalizer == "rectified_softpick" else 2e-6
        bound = unit * max(np.abs(reference).max(), 1.0)
        np.testing.assert_allclose(gradient, reference, rtol=0, atol=bound)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("normalizer", NAMES)
def test_gradient_is_that_of_the_oracle(normalizer, rng):
    arrays = inputs(rng, 17, 19, 2, 1, 3, 2)
    case = {"causal": True, "query_offset": 2, "window": 14}
    cotangent = rng.normal(size=(2, 17, 2, 2)).astype("float32")
    reference = functools.partial(oracle.attention, name=normalizer, **case)
    expected = oracle.finite_difference(reference, arrays, cotangent)
    analytic = oracle.attention_gradients(*arrays, cotangent, normalizer, **case)
    for a, e in zip(analytic, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-8)  # the oracle against itself
    function = functools.partial(
        ops.attention, normalizer=normalizer, implementation="tiled", **case
    )
    for a, e in zip(gradients(function, arrays, cotangent), expected, strict=True):
        assert relative_error(a, e) < 2e-6


def compiled(function, fixed=False):
    """The function as the backend compiles it, shapes unknown, unless fixed, where they can be."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow" and not fixed:
        import tensorflow as tf

        spec = tf.TensorSpec((None, None, 4, 5)), tf.TensorSpec((None, None, 2, 5))
        return tf.function(function, input_signature=[*spec, tf.TensorSpec((None, None, 2, 3))])
    return function


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", ["tiled", "auto"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalizer", NAMES)
def test_compiled_with_unknown_lengths(normalizer, causal, implementation, rng):
    case = {"causal": causal, "query_offset": 4}
    function = functools.partial(
        ops.attention, normalizer=normalizer, implementation=implementation, **case
    )
    run = compiled(function)
    for lengths in ((37, 41), (5, 9))[: 1 if keras.backend.backend() == "jax" else 2]:
        arrays = inputs(rng, *lengths)
        expected = oracle.attention(*arrays, normalizer, **case)
        assert relative_error(to_numpy(run(*arrays)), expected) < 2e-6
        cotangent = rng.normal(size=expected.shape).astype("float32")
        pair = [gradients(f, arrays, cotangent) for f in (run, function)]
        for gradient, reference in zip(*pair, strict=True):
            assert relative_error(gradient, reference) < 2e-6


@pytest.mark.backend("tensorflow", reason="the other backends know the lengths")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("visibility", ["mask", "column", "key_mask", "segment_ids"])
@pytest.mark.parametrize(("normalizer", "jit_compile"), [("ssmax", True), ("softpick", False)])
def test_any_visibility_with_unknown_lengths(normalizer, jit_compile, visibility, rng):
    """Of a mask, also which of its axes are one to broadcast is unknown."""
    import tensorflow as tf

    name = "mask" if visibility == "column" else visibility
    case = {"causal": visibility != "mask", "window": 9 if visibility == "key_mask" else None}

    def attend(query, key, value, x, implementation="auto"):
        options = {**case, name: x, "implementation": implementation}
        return ops.attention(query, key, value, normalizer, **options)

    graph = None
    for length in (37, 5)[: 1 if jit_compile else 2]:
        x = {
            "mask": rng.random((2, 4, length, length)) < 0.6,
            "column": rng.random((2, 1, length, 1)) < 0.6,
            "key_mask": rng.random((2, length)) < 0.6,
            "segment_ids": np.sort(rng.integers(0, 3, (2, length))),
        }[visibility]
        arrays = [tf.constant(x) for x in inputs(rng, length, length)]
        graph = graph or tf.function(
            attend,
            [tf.TensorSpec((None, None, *y.shape[2:])) for y in arrays]
            + [tf.TensorSpec([None] * x.ndim, x.dtype)],
            jit_compile=jit_compile,
        )
        of_oracle = {name: (x, x) if name == "segment_ids" else x}
        expected = oracle.attention(*map(to_numpy, arrays), normalizer, **case, **of_oracle)
        assert relative_error(to_numpy(graph(*arrays, x)), expected) < 2e-6
        cotangent = rng.normal(size=expected.shape).astype("float32")
        functions = functools.partial(attend, implementation="dense"), graph
        pair = [gradients(lambda *a, f=f, x=x: f(*a, x), arrays, cotangent) for f in functions]
        for reference, gradient in zip(*pair, strict=True):
            assert relative_error(gradient, reference) < 5e-6


@pytest.mark.backend("torch", reason="the others have compilers of their own")
@pytest.mark.usefixtures("small_tiles")
def test_traced_by_torch_compile(rng):
    """Graphs and guards of PyTorch's compiler, without the code that it would generate."""
    import torch

    function = functools.partial(
        ops.attention, normalizer="softpick", implementation="tiled", causal=True
    )
    run, arrays = torch.compile(function, backend="eager"), inputs(rng, 17, 17)
    assert relative_error(to_numpy(run(*arrays)), to_numpy(function(*arrays))) < 1e-6
    cotangent = rng.normal(size=(2, 17, 4, 3)).astype("float32")
    pair = [gradients(f, arrays, cotangent) for f in (run, function)]
    for gradient, reference in zip(*pair, strict=True):
        assert relative_error(gradient, reference) < 1e-6


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_nothing(lengths, rng):
    arrays = inputs(rng, *lengths)
    out = ops.attention(*arrays, "ssmax", implementation="tiled")
    np.testing.assert_array_equal(to_numpy(out), np.zeros((2, lengths[0], 4, 3)))


def test_auto_takes_tiles_where_there_are_many_weights(monkeypatch, rng):
    taken = []
    original = choice.IMPLEMENTATIONS["tiled"]
    spy = lambda *args: taken.append(1) or original(*args)  # noqa: E731
    monkeypatch.setitem(choice.IMPLEMENTATIONS, "tiled", spy)
    for length in (60, 725):
        q = rng.normal(size=(1, length, 1, 2)).astype("float32")
        ops.attention(q, q, q, "softpick", causal=True)
    assert len(taken) == 1


def test_auto_counts_the_weights_of_all_heads_on_pytorch(backend, monkeypatch, rng):
    taken = []
    for name in ("dense", "tiled"):
        implementation = lambda q, k, v, *args, name=name: taken.append(name) or v  # noqa: E731
        monkeypatch.setitem(choice.IMPLEMENTATIONS, name, implementation)
    for batch, length, heads in ((8, 256, 4), (4, 256, 4), (64, 128, 4), (1, 512, 8), (1, 720, 2)):
        q = np.zeros((batch, length, heads, 1), "float32")
        ops.attention(q, q, q, "softpick")
    few = ["dense"] * 5
    assert taken == (["tiled", "dense", "dense", "tiled", "dense"] if backend == "torch" else few)


@pytest.mark.backend("torch", reason="the others take tiles of one size")
def test_tiles_side_by_side_fit_a_cache_together(rng):
    seen = ops.Visibility.of(5000, 3000)
    sizes = {}
    shapes = ((1, 4, 4), (2, 4, 4), (4, 4, 4), (8, 4, 4), (99, 9, 9), (2, 8, 2))
    for batch, heads, kv_heads in shapes:
        query = keras.ops.zeros((batch, 1, heads, 1))
        sizes[batch, heads] = tuple(TileSizes.of(seen, query, kv_heads))
    assert sizes == {(1, 4): (256, 256), (2, 4): (256, 128), (4, 4): (128, 128), (8, 4): (128, 128),
                     (99, 9): (128, 128), (2, 8): (64, 256)}  # fmt: skip
    few = ops.Visibility.of(5, 3000)
    assert tuple(TileSizes.of(few, keras.ops.zeros((8, 1, 8, 1)), 8)) == (8, 256)


@pytest.mark.backend("torch", reason="the others have transformations of their own")
def test_auto_takes_what_can_be_transformed(rng):
    """Where PyTorch transforms a program, as many weights are computed as there are."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = (tensor_of(rng, (8, 256, 4, 2)) for _ in range(3))
    attend = lambda q: ops.attention(q, k, v, "rectified_softpick", causal=True)  # noqa: E731
    expected = torch.autograd.functional.vjp(attend, q, torch.ones_like(q))[1]
    found = torch.func.grad(lambda q: attend(q).sum())(q)
    assert relative_error(to_numpy(found), to_numpy(expected)) < 2e-5
    with FakeTensorMode() as mode:
        x = mode.from_tensor(q)
        for implementation in ("auto", "tiled"):
            out = ops.attention(x, x, x, "rectified_softpick", implementation=implementation)
            assert out.shape == q.shape


def tensor_of(rng, shape):
    return keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))


@pytest.mark.backend("torch", reason="it is PyTorch that differentiates by the upstream gradient")
@pytest.mark.parametrize("normalizer", NAMES)
def test_the_gradient_has_no_derivative_by_the_upstream_gradient_either(normalizer, rng):
    """Which `torch.autograd.functional.jvp` takes: it is refused, not zero."""
    import torch

    q, k, v = (tensor_of(rng, (1, 9, 2, 2)) for _ in range(3))
    attend = functools.partial(ops.attention, normalizer=normalizer, implementation="tiled")
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.functional.jvp(lambda q: attend(q, k, v), q, torch.ones_like(q))


@pytest.mark.backend("tensorflow", "torch", reason="JAX has float64 only where it is enabled")
@pytest.mark.parametrize("normalizer", NAMES)
def test_float64_of_any_input(normalizer, rng):
    q, k, v = inputs(rng)
    exact = [keras.ops.convert_to_tensor(x, "float64") for x in (q, k, v)]
    case = {"causal": True, "key_mask": np.arange(41) >= np.array([[3], [41]])}  # some see no key
    expected = oracle.attention(q, k, v, normalizer, **case)
    for mixed in ([exact[0], k, v], [q, exact[1], v], [q, k, exact[2]]):
        actual = ops.attention(*mixed, normalizer, implementation="tiled", **case)
        assert relative_error(to_numpy(actual), expected) < 2e-6
    for implementation in ("tiled", "dense", "auto"):
        actual = ops.attention(*exact, normalizer, implementation=implementation, **case)
        assert relative_error(to_numpy(actual), expected) < 1e-12


def test_symbolic(rng):
    x = keras.Input((1024, 2, 4))
    assert ops.attention(x, x, x, implementation="tiled").shape == (None, 1024, 2, 4)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("power", "causal"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("normalizer", NAMES)
def test_second_derivative_is_right_or_refused(normalizer, power, causal, backend, rng):
    arrays = inputs(rng)

    def second(implementation):
        def penalty(query):
            def total(q):
                options = {"implementation": implementation, "causal": causal}
                y = ops.attention(q, *arrays[1:], normalizer, **options)
                return keras.ops.sum(y**power)

            gradient = derivative(total, query)
            return keras.ops.sum(gradient**2)

        return to_numpy(derivative(penalty, arrays[0]))

    if backend == "jax" and not causal:
        assert relative_error(second("tiled"), second("dense")) < 1e-5
    else:
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            second("tiled")


@pytest.mark.parametrize("normalizer", NAMES)
def test_a_gradient_may_be_a_constant_of_another(normalizer, rng):
    """A step of the inner problem, not differentiated: first-order meta-learning."""
    arrays = inputs(rng)

    def gradient_of(implementation):
        def total(q):
            y = ops.attention(q, *arrays[1:], normalizer, implementation=implementation)
            return keras.ops.sum(y**2)

        def outer(query):
            gradient = derivative(total, query)
            return total(query - 0.1 * keras.ops.stop_gradient(gradient))

        return to_numpy(derivative(outer, arrays[0]))

    assert relative_error(gradient_of("tiled"), gradient_of("dense")) < 1e-4


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
def test_epsilon_is_in_the_unit_of_the_definition_at_any_logit(implementation):
    x = np.full((1, 1, 1, 1), 60.0, "float32")
    one = np.ones_like(x)
    y = ops.attention(
        x, one, one, "rectified_softpick", epsilon=float(np.exp(60)), implementation=implementation
    )
    np.testing.assert_allclose(to_numpy(y), 0.5, rtol=1e-5)
