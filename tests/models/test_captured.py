"""Steps of generation that PyTorch runs as a graph of tensor operations."""

import collections
import concurrent.futures
import gc
import re
import shutil
import warnings
import weakref

import keras
import numpy as np
import pytest
from support.cases import HAS_GATE, randomize
from support.language import OPTIONS, PROMPTS, make

from keras_ssattn._keras.observing import observed_by
from keras_ssattn.models import CausalLM, generation

if keras.backend.backend() != "torch":
    pytest.skip("for torch only: the others compile what they generate by", allow_module_level=True)

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from keras_ssattn import _frameworks


@pytest.fixture
def at_once(monkeypatch):
    """Every step is captured when it first runs; a failure to is an error."""
    monkeypatch.setattr(_frameworks.Captured, "EAGER_RUNS", 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not be captured")
        yield


def first_step(model, count=5, **options):
    """A step of generation, and the tensors of its first run."""
    names = generation.generate.__kwdefaults__
    values = [{**names, **options}[name] for name in names]
    plan = generation._plan(model, PROMPTS, count, *values)
    start, step = (make(model, plan.choice) for make in
                   (generation._make_start, generation._make_step))  # fmt: skip
    inputs = [keras.ops.convert_to_tensor(x) for x in plan.inputs()]
    with torch.no_grad():
        state = start(*inputs)
    position = keras.ops.convert_to_tensor(np.int32(plan.tokens.shape[1]))
    return step, (position, *state, inputs[2][1], inputs[3])


def graphs(model):
    functions = model.generators.functions.values()
    captured = [x for x in functions if isinstance(x, _frameworks.Captured)]
    return [graph for x in captured for graph in x.graphs.values()]


SAMPLED = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}


@pytest.mark.parametrize("options", OPTIONS)
def test_step_is_the_eager_one_bit_for_bit(at_once, options):
    model = make(options)
    for how in ({}, SAMPLED):
        step, args = first_step(model, **how)
        with torch.no_grad():
            expected = step(*args)
        captured = _frameworks.Captured(step, (3,))
        actual = captured(*args)
        for x, y in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
            assert torch.equal(x, y)
        [graph] = captured.graphs.values()
        assert isinstance(graph, torch.fx.GraphModule)


@pytest.mark.parametrize(
    "options", ["ssmax_bias", "softpick_scaled", "groups", "three_scales", "padding"]
)
def test_tokens_are_the_eager_ones_before_and_after_capture(options, monkeypatch):
    model = make(options)
    monkeypatch.setattr(_frameworks.Captured, "EAGER_RUNS", 10**9)
    options = {"temperature": 1.5, "seed": 1}
    expected = model.generate(PROMPTS, 24, **options)
    model.generators.functions.clear()
    monkeypatch.setattr(_frameworks.Captured, "EAGER_RUNS", 7)
    for _ in range(2):
        for x, y in zip(
            model.generate(PROMPTS, 24, temperature=1.5, seed=1), expected, strict=True
        ):
            np.testing.assert_array_equal(x, y)
    [graph] = graphs(model)  # not one for each number of tokens
    assert isinstance(graph, torch.fx.GraphModule)
    model.generate(PROMPTS, 20, temperature=1.5)
    assert len(graphs(model)) == 1


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16", "float64"])
def test_other_dtypes_are_captured(at_once, policy):
    model = CausalLM(13, 12, 1, 2, dtype=policy)
    step, args = first_step(model)
    with torch.no_grad():
        expected = pytree.tree_leaves(step(*args))
    for x, y in zip(
        pytree.tree_leaves(_frameworks.Captured(step, (3,))(*args)), expected, strict=True
    ):
        assert torch.equal(x, y)


def test_graph_reads_the_weights_as_they_are(at_once):
    model = make("softpick_scaled")
    model.generate(PROMPTS, 3)
    weights = [np.random.default_rng(i).normal(size=w.shape) for i, w in enumerate(model.weights)]
    other = make("softpick_scaled")
    for x in (model, other):
        x.set_weights(weights)
    for x, y in zip(model.generate(PROMPTS, 8), other.generate(PROMPTS, 8), strict=True):
        np.testing.assert_array_equal(x, y)
    assert len(graphs(model)) == 1


def test_quantized_model_is_captured_anew(at_once):
    model = make("untied")
    model.generate(PROMPTS, 3)
    model.quantize("int8")
    step, args = first_step(model)
    with torch.no_grad():
        expected = step(*args)[0]
    tokens = [x[1] for x in model.generate(PROMPTS, 3)]
    np.testing.assert_array_equal(tokens, expected.numpy())


class Operations(TorchDispatchMode):
    """Counts the operations on tensors that are run."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not HAS_GATE, reason="the norms of the Keras of the floor take more")
@pytest.mark.parametrize("normalizer", ["softmax", "ssmax", "softpick"])
def test_step_takes_at_most_100_operations_a_layer(at_once, normalizer):
    layers = 4
    step, args = first_step(CausalLM(13, 16, layers, 2, normalizer=normalizer))
    with torch.no_grad(), Operations() as eager:
        step(*args)
    assert eager.count.total() <= 100 * layers
    captured = _frameworks.Captured(step, (3,))
    captured(*args)
    with Operations() as graph:
        captured(*args)
    assert graph.count.total() <= 92 * layers
    assert graph.count["aten.cos.default"] == 1  # of angles, for all layers
    assert graph.count["aten.index_put_.default"] == 2 * layers + 1  # keys, values; one mask
    assert graph.count["aten.index_put.default"] == graph.count["aten.clone.default"] == 0


class Counts(keras.layers.Layer):
    """A layer that no graph holds: it counts its calls, by NumPy."""

    def __init__(self):
        super().__init__()
        self.calls = np.zeros(1)

    def call(self, x):
        self.calls += 1
        return x * np.float32(np.sin(self.calls[0]))


class Bans(CausalLM):
    """A model that no graph holds: it looks at the logits."""

    def next_logits(self, *args, **kwargs):
        logits, cache = super().next_logits(*args, **kwargs)
        array = logits.numpy().copy()
        array[np.arange(len(array)), array.argmax(-1)] = -1e9
        return torch.tensor(array), cache


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (lambda: CausalLM(13, 12, 1, 2, activation=Counts()), "the activation <Counts"),
        (lambda: CausalLM(13, 12, 1, 2, activation=lambda x: x * 2), "activation.*lambda"),
        (lambda: Bans(13, 12, 1, 2), "Bans, a class of your own"),
        (
            lambda: CausalLM(13, 12, 1, 2, normalizer="softpick", implementation="tiled"),
            "Exception",
        ),
    ],
)
def test_what_cannot_be_captured_runs_eagerly_with_a_warning(make_model, reason, monkeypatch):
    found = []
    for runs in (10**9, 2):
        keras.utils.set_random_seed(0)
        model = randomize(make_model())
        monkeypatch.setattr(_frameworks.Captured, "EAGER_RUNS", runs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(np.array(model.generate(PROMPTS, 8)))
        said = [str(x.message) for x in caught if "could not be captured" in str(x.message)]
        assert len(said) == (runs == 2)
    assert re.search(f"The reason: .*{reason}", said[0], re.DOTALL)
    np.testing.assert_array_equal(*found)


def test_a_call_set_on_a_layer_is_not_captured(at_once):
    model = make("untied")
    expected = model.generate(PROMPTS, 4)
    layer, seen = model.blocks[0].feed_forward.up, []
    call = layer.call
    layer.call = lambda x: seen.append(1) or call(x)
    with pytest.warns(UserWarning, match="`call`, set on a Dense"):
        np.testing.assert_array_equal(model.generate(PROMPTS, 4), expected)
    assert len(seen) == 4


def test_settings_changed_later_are_followed(at_once):
    model = CausalLM(13, 12, 1, 2)
    randomize(model)
    before = model.generate(PROMPTS, 30, temperature=1.0, seed=0)
    for change in (
        lambda x: setattr(x, "embedding_scale", 7.0),
        lambda x: setattr(x.blocks[0].feed_forward.gate, "activation", keras.activations.relu),
        lambda x: setattr(x.blocks[0].attention_norm, "epsilon", 5.0),
    ):
        change(model)
        after = model.generate(PROMPTS, 30, temperature=1.0, seed=0)
        assert not np.array_equal(after, before)
        model.generators.functions.clear()
        np.testing.assert_array_equal(model.generate(PROMPTS, 30, temperature=1.0, seed=0), after)
        before = after


def test_autocast_is_followed(at_once, monkeypatch):
    model = make("untied")
    model.generate(PROMPTS, 6)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model.generate(PROMPTS, 6)
        model.generators.functions.clear()
        monkeypatch.setattr(_frameworks.Captured, "EAGER_RUNS", 10**9)
        np.testing.assert_array_equal(model.generate(PROMPTS, 6), actual)


def test_threads_capture_one_after_the_other(at_once):
    model = make("untied")
    expected = model.generate(PROMPTS, 5)
    call, models = torch.nn.Module.__call__, [make("untied") for _ in range(3)]
    for other in models:
        other.set_weights(model.get_weights())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for tokens in pool.map(lambda model: model.generate(PROMPTS, 5), models):
            np.testing.assert_array_equal(tokens, expected)
    assert torch.nn.Module.__call__ is call


def test_graphs_die_with_their_model(at_once):
    model = make("untied")
    model.generate(PROMPTS, 3)
    held = [weakref.ref(x) for x in (model, *graphs(model), model.weights[0].value)]
    assert len(held) == 3
    del model
    gc.collect()
    assert not any(x() for x in held)


def test_what_watches_layers_sees_every_step(at_once):
    model = make("untied")
    model.generate(PROMPTS, 4)
    seen = []

    class Watch:
        def attended(self, layer, weights, visible):
            seen.append(layer)

        def transformed(self, layer, values, mask):
            pass

    with observed_by(Watch()):
        model.generate(PROMPTS, 4)
    assert seen == [model.blocks[0].attention] * 4
    seen.clear()
    hook = model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    model.generate(PROMPTS, 4)
    hook.remove()
    model.generate(PROMPTS, 4)
    assert len(seen) == 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_compile_compiles_the_graph(at_once):
    model = make("untied")
    expected = model.generate(PROMPTS, 6)
    model.compile(jit_compile=True)
    for x, y in zip(model.generate(PROMPTS, 6), expected, strict=True):
        np.testing.assert_array_equal(x, y)
    assert [isinstance(x, torch.fx.GraphModule) for x in graphs(model)] == [True, False]


def test_without_a_compiler_the_graph_runs_as_it_is(at_once, monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda graph: fail)
    model = make("untied")
    expected = model.generate(PROMPTS, 6)
    model.compile(jit_compile=True)
    with pytest.warns(UserWarning, match="could not be compiled by `torch.compile`: no compiler"):
        np.testing.assert_array_equal(model.generate(PROMPTS, 6), expected)


# The optimization of graphs


def optimized(function, *args, consumed=()):
    graph = make_fx(torch.func.functionalize(function))(*args)
    _frameworks.optimize(graph, consumed)
    names = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    return graph, names


def test_constants_are_computed_once_and_the_same_things_too():
    def function(x):
        steps = torch.arange(3) * torch.tensor(2.0)
        again = torch.arange(3) * torch.tensor(2.0)
        return torch.sin(x + steps) + torch.sin(x + again)

    x = torch.ones(3)
    graph, names = optimized(function, x)
    assert names == ["add", "sin", "add_2"]
    assert torch.equal(graph(x), function(x))


def test_what_changes_nothing_is_left_out():
    def function(x, y):
        same = (x.detach().view(2, 3).expand(2, 3) * 1.0).exp()
        return same, y * 1.0, x.view(3, 2).neg(), x[:, :1].expand(2, 3).abs()

    x, y = torch.randn(2, 3), torch.arange(3)
    graph, names = optimized(function, x, y)
    for found, expected in zip(graph(x, y), function(x, y), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    # what is left changes a dtype or a shape
    assert names == ["exp", "mul_1", "view_1", "neg", "slice_1", "expand_1", "abs_1"]


def test_what_changes_the_order_in_memory_stays():
    x = torch.randn(2, 4)
    for function in (
        lambda x: (x[:, :2] * 1.0).reshape(-1).exp(),
        lambda x: (x[:, :1].expand(2, 4) * 1.0).reshape(-1).exp(),
    ):
        graph, _ = optimized(function, x)
        assert torch.equal(graph(x), function(x))


def test_a_value_is_not_written_over():
    def function(x, value):
        return torch.ops.aten.index_put(x, [torch.tensor([1])], value * 1.0), x * 2

    x, value = torch.randn(3, 2), torch.randn(1, 2)
    expected = function(x, value)
    graph, _ = optimized(function, x, value, consumed=(1,))
    for found, each in zip(graph(x, value), expected, strict=True):
        assert torch.equal(found, each)


def test_operations_of_others_are_called_as_they_are():
    library = torch.library.Library("keras_ssattn_tests", "DEF")
    library.define("relu(Tensor x) -> Tensor")
    library.impl("relu", lambda x: x.clamp(min=0) ** 2, "CompositeExplicitAutograd")
    function, x = torch.ops.keras_ssattn_tests.relu, torch.tensor([3.0, -1.0])
    graph, names = optimized(lambda x: function(x), x)
    assert len(names) == 1
    assert torch.equal(graph(x), function(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "bool", "int64"])
def test_constants_of_any_dtype(dtype):
    dtype = getattr(torch, dtype)
    graph, _ = optimized(lambda x: x + torch.tensor([1, 0], dtype=dtype), torch.ones(2))
    assert graph(torch.ones(2)).tolist() == [2, 1]


def test_weights_are_no_constants():
    weight = torch.nn.Parameter(torch.ones(3))
    held = torch.ones(3)
    graph, _ = optimized(lambda x: x + torch.exp(weight) + torch.exp(held), torch.ones(3))
    with torch.no_grad():
        weight.zero_()
        held.zero_()
    assert torch.equal(graph(torch.ones(3)), torch.full((3,), 3.0))


def test_draws_are_neither_constants_nor_the_same():
    graph, names = optimized(lambda x: torch.rand(3) - torch.rand(3) + x, torch.zeros(3))
    assert sum("rand" in name for name in names) == 2
    assert not torch.equal(graph(torch.zeros(3)), graph(torch.zeros(3)))


def test_writes_over_what_is_consumed_and_read_by_nobody_else():
    index, new = torch.tensor([1]), torch.ones(1, 1)

    def write(x, y):
        return _frameworks.write(x, index, new), _frameworks.write(y, index, new) + y

    x, y = torch.zeros(1, 3), torch.zeros(1, 3)
    graph, _ = optimized(write, x, y, consumed=(0, 1))
    first, second = graph(x, y)
    assert x.tolist() == first.tolist() == [[0, 1, 0]]
    assert first.data_ptr() == x.data_ptr()
    assert y.tolist() == [[0, 0, 0]]
    assert second.tolist() == [[0, 1, 0]]


def test_operations_in_place_are_refused():
    graph = make_fx(lambda x: (x * 1).add_(1))(torch.ones(2))
    with pytest.raises(ValueError, match="add_.* changes what it is given"):
        _frameworks.optimize(graph)
