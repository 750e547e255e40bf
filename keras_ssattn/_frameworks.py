"""What backends have beyond Keras: compilers, fused attention, and PyTorch's graphs.

The one file that knows frameworks.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from keras_ssattn._typing import DType, Number, Shape, Tensor

if keras.backend.backend() == "torch":
    import torch
    from torch.fx import Node
    from torch.utils import _pytree as pytree

LARGEST_CONSTANT = 2**20  # entries
TRACING = threading.Lock()  # a trace changes PyTorch's modules while it lasts
# Of these PyTorch has functions of the same arguments, which it calls in half the time that one of
# `torch.ops` takes.
FUNCTIONS = (
    "abs", "add", "amax", "argmax", "bmm", "cat", "cos", "embedding", "exp", "expand", "expm1",
    "floor_divide", "le", "logical_and", "logical_not", "lt", "maximum", "mean", "mm", "mul", "neg",
    "permute", "pow", "reciprocal", "relu", "rsqrt", "select", "sigmoid", "sign", "sin", "sub",
    "sum", "transpose", "unsqueeze", "view", "where",
)  # fmt: skip


def compile_function(
    function: Callable,
    variables: list[keras.Variable],
    consumed: tuple[int, ...] | None = None,
    *,
    compiled: bool = False,
    obstacle: str | None = None,
) -> Callable:
    """Compiles a function of tensors that reads `variables` and changes nothing.

    By `jax.jit` on JAX, which is given the variables' values at each call, and by XLA on
    TensorFlow. On PyTorch it runs eagerly, without gradients, or one that runs often as a graph.

    Args:
        function: of tensors.
        variables: all that it reads.
        consumed: of a function that runs often, which arguments are of no use after a call:
            results are written over them.
        compiled: as in `Captured`.
        obstacle: likewise.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def stateless(values: list[Tensor], *args: Tensor) -> Tensor:
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                return function(*args)

        jitted = jax.jit(stateless, donate_argnums=[1 + i for i in consumed or ()])
        return lambda *args: jitted([v.value for v in variables], *args)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if backend == "torch":
        if consumed is None:
            return torch.no_grad()(function)
        return Captured(function, consumed, compiled, obstacle)
    return function


def is_traced() -> bool:
    """Whether PyTorch follows what runs, to write it down for another time or another runtime."""
    if keras.backend.backend() != "torch":
        return False
    if torch.jit.is_tracing():
        return True
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # from PyTorch 2.7 on
    return is_exporting is not None and is_exporting()


def is_compiling() -> bool:
    """Whether `torch.compile` follows what runs: it cannot look into a context of Python's."""
    return keras.backend.backend() == "torch" and torch.compiler.is_compiling()


def is_recording() -> bool:
    """Whether what runs may be differentiated later; PyTorch alone says that it will not be."""
    return keras.backend.backend() != "torch" or torch.is_grad_enabled()


def is_transforming() -> bool:
    """Whether PyTorch runs for something else: `torch.func`, `make_fx`, tensors without numbers."""
    if keras.backend.backend() != "torch":
        return False
    functorch = getattr(torch._C, "_functorch", None)
    levels = getattr(functorch, "peek_interpreter_stack", lambda: None)
    modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    early = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", lambda: 0)
    return levels() is not None or modes() > 0 or early() > 0


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor of PyTorch's, and of no class of tensors that stand for others."""
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def write_over(out: Tensor, name: str, *args: Tensor | Number) -> Tensor:
    """PyTorch's function of that name, with its result in `out`."""
    return getattr(torch, name)(*args, out=out)


def keep_where_positive(x: Tensor, y: Tensor) -> None:
    """Writes 0 over x where y is 0 or less, and not NaN; on PyTorch, in one pass."""
    torch.ops.aten.threshold_backward.grad_input(x, y, 0.0, grad_input=x)


def linear(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's `x @ kernel + bias` of matrices, in one piece of memory."""
    if bias is None:
        return x @ kernel
    if is_autocasting(x):  # which would round the sum to half
        return x @ kernel + bias
    return torch.addmm(bias, x, kernel)


def is_autocasting(x: Tensor) -> bool:
    """Whether PyTorch's autocast rounds arguments of products on the device of x."""
    device = x.device.type if isinstance(x, torch.Tensor) else "meta"
    return device != "meta" and torch.is_autocast_enabled(device)


def uncompiled(function: Callable) -> Callable:
    """A function that `torch.compile` leaves to run as it is, between two graphs."""
    return torch.compiler.disable(function) if keras.backend.backend() == "torch" else function


def in_full_precision(function: Callable) -> Callable:
    """A function of a tensor first, in which PyTorch's autocast rounds nothing to half.

    It would round the arguments of products, that were widened before; and float16 has no room for
    what softpick scales its logits by.
    """
    if keras.backend.backend() != "torch":
        return function

    @functools.wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_autocasting(x):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run


def constant_like(array: np.ndarray, x: Tensor) -> Tensor:
    """An array as a tensor of the dtype of `x`, and one that `torch.compile` can follow."""
    if keras.backend.backend() == "torch":
        return torch.as_tensor(array).to(x)
    return keras.ops.convert_to_tensor(array, x.dtype)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: Number, causal: bool
) -> Tensor:
    """PyTorch's own attention, of `[B, T, H, D]`, which reads keys and values where they lie.

    Keras's function copies them first: in a step of decoding the whole cache.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)


def cudnn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Number,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """Flash attention of cuDNN on JAX, of `[B, T, H, D]`; Keras's function has less of it.

    Args:
        query: in half precision.
        key: `[B, S, K, D]`.
        value: likewise.
        scale: what multiplies the logits.
        causal: whether a query sees no later key.
        window: with `causal`, how many keys it sees at most.
    """
    import jax

    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def has_cudnn_attention(
    shapes: tuple[Shape, ...], dtype: DType, causal: bool, window: int | None
) -> bool:
    """Whether JAX runs on a GPU and says that cuDNN serves such a query, key and value."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    device = getattr(jax.config, "jax_default_device", None)
    device = device or keras.distribution.list_devices()[0]
    if str(getattr(device, "platform", device)).split(":")[0] not in ("gpu", "cuda"):
        return False
    return _serves(shapes, dtype, causal, window)


@functools.cache
def _serves(shapes: tuple[Shape, ...], dtype: DType, causal: bool, window: int | None) -> bool:
    """Whether JAX traces cuDNN's attention and its gradient: it knows versions, GPUs and sizes."""
    import jax

    def total(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cudnn_attention(query, key, value, 1.0, causal, window).sum()

    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    try:
        jax.eval_shape(jax.grad(total, (0, 1, 2)), *arrays)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def write(old: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """A copy of `old`, `[B, S, ...]`, with `new` at positions `index` of S; it keeps the strides.

    Keras makes an index of every entry.
    """
    return torch.ops.aten.index_put(old, [None, index], new)


def over_devices(
    function: Callable,
    mesh: Any,
    inputs: list[tuple[str | None, ...]],
    output: tuple[str | None, ...],
) -> Callable:
    """A function of tensors that every device of a JAX mesh computes of its part of them.

    Args:
        function: of tensors; inside, `place_along` and `pass_on` know the devices.
        mesh: a `jax.sharding.Mesh`.
        inputs: for each tensor, the names of the mesh axes over which its axes are split.
        output: the same of the result.
    """
    import jax

    if not hasattr(jax, "shard_map"):
        raise NotImplementedError(
            f"`sequence_axis` needs JAX 0.6 or later. Received: JAX {jax.__version__}"
        )
    split = jax.sharding.PartitionSpec
    in_specs = tuple(split(*names) for names in inputs)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=split(*output), check_vma=False
    )
    return jax.jit(mapped)


def place_along(axis: str) -> Tensor:
    """The place of this device along an axis of the mesh, from 0."""
    import jax

    return jax.lax.axis_index(axis)


def pass_on(tensors: Any, axis: str, size: int, places: int) -> Any:
    """Tensors of the device so many places back along a circle of `size` devices."""
    import jax

    if places % size == 0:
        return tensors
    pairs = [(i, (i + places) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tensors)


class Captured:
    """A function of tensors that is captured as a graph once it has run often.

    The graph holds tensor operations alone: none of what Keras's layers do between them, what
    several layers compute alike only once, and in place of constants their values. It reads the
    model's variables as they are when it runs. To trace it takes as long as some hundred runs, so
    the first runs are eager. Where it cannot be traced all are, and a warning says why.

    Args:
        function: of tensors, or tuples of them, that changes none of them.
        consumed: which arguments are of no use after a call; the graph writes over their tensors.
        compiled: whether to compile the graph by `torch.compile`.
        obstacle: why it must not be captured, if it must not.
    """

    EAGER_RUNS = 16

    def __init__(
        self,
        function: Callable,
        consumed: Iterable[int] = (),
        compiled: bool = False,
        obstacle: str | None = None,
    ) -> None:
        self.function = torch.no_grad()(function)
        self.consumed = frozenset(consumed)
        self.compiled = compiled
        self.obstacle = obstacle
        self.runs: dict[tuple, int] = {}
        self.graphs: dict[tuple, Callable | None] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, structure = pytree.tree_flatten(args)
        if torch.is_autocast_enabled(leaves[0].device.type):  # a graph would keep its dtypes
            return self.function(*args)
        key = tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves)
        if key not in self.graphs:
            self.runs[key] = self.runs.get(key, 0) + 1
            if self.runs[key] <= self.EAGER_RUNS:
                return self.function(*args)
            with TRACING:
                self.graphs[key] = self._capture(leaves, structure)
        graph = self.graphs[key]
        if graph is None:
            return self.function(*args)
        with torch.inference_mode():
            return graph(*leaves)

    def _capture(self, leaves: list[Tensor], structure: pytree.TreeSpec) -> Callable | None:
        """The graph for tensors of these shapes, or `None`."""
        from torch.fx.experimental.proxy_tensor import make_fx

        def function(*leaves: Tensor) -> Any:
            return self.function(*pytree.tree_unflatten(leaves, structure))

        places = pytree.tree_unflatten(range(len(leaves)), structure)
        consumed = pytree.tree_leaves([places[i] for i in self.consumed])
        try:
            if self.obstacle is not None:
                raise ValueError(self.obstacle)
            with torch.no_grad():
                graph = make_fx(function)(*leaves)
                # a second time, since some of PyTorch's functions are of operations in place
                graph = make_fx(torch.func.functionalize(graph))(*leaves)
            optimize(graph, consumed)
        except Exception as error:
            warnings.warn(
                "a step of the model could not be captured as one graph, so it runs slowly, layer "
                f"by layer. The reason: {error}",
                stacklevel=3,
            )
            return None
        return self._compile(graph, leaves) if self.compiled else graph

    def _compile(self, graph: torch.fx.GraphModule, leaves: list[Tensor]) -> Callable:
        """The graph compiled, or, where there is no compiler, as it is."""
        compiled = torch.compile(graph)
        try:
            with torch.inference_mode():
                compiled(*(x.clone() for x in leaves))  # which compiles; it may write over them
        except Exception as error:
            warnings.warn(
                f"a step of the model could not be compiled by `torch.compile`: {error}",
                stacklevel=4,
            )
            return graph
        return compiled


def optimize(module: torch.fx.GraphModule, consumed: Iterable[int] = ()) -> None:
    """Computes constants now, and everything else once; writes over the inputs `consumed`.

    The graph must be without operations in place, as `functionalize` leaves it.
    """
    graph = module.graph
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)  # a `getitem` has none
        if schema is not None and schema.is_mutable:
            raise ValueError(f"{node.target} changes what it is given")
    start = next(iter(graph.nodes))
    values: dict[Node, Tensor] = {}  # of the constants
    first: dict[tuple, Node] = {}  # what computes each thing
    key: tuple
    for node in list(graph.nodes):
        if _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            continue
        if node.op == "call_function" and _is_pure(node):
            key = (node.target, repr(node.args), repr(node.kwargs))
            value = _value(module, node, values)
            if value is not None:
                entries = value.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
                key = (value.dtype, value.device, value.shape, entries)
                if key not in first:
                    name = f"_value_{len(values)}"
                    module.register_buffer(name, value)
                    with graph.inserting_before(start):
                        first[key] = graph.get_attr(name)
                    values[first[key]] = value
        elif node.op == "get_attr":
            key = (node.op, node.target)
        else:
            continue
        if first.setdefault(key, node) is not node:
            node.replace_all_uses_with(first[key])
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for i in consumed:
        users = list(inputs[i].users)
        writes = [x.target for x in users] == [torch.ops.aten.index_put.default]
        if writes and users[0].args[0] is inputs[i]:  # and it is no value that is written
            users[0].target = torch.ops.aten.index_put_.default
    for node in graph.nodes:
        is_aten = getattr(node.target, "namespace", None) == "aten"
        name = node.target.__name__.split(".")[0] if is_aten else ""
        if name in FUNCTIONS:
            node.target = getattr(torch if hasattr(torch, name) else torch.Tensor, name)
        elif node.op == "get_attr":  # found at once, and not among a module's own parameters
            vars(module)[node.target] = getattr(module, node.target)
    module.recompile()


def _changes_nothing(node: Node) -> bool:
    """Whether an operation gives what it is given, in a graph that is not differentiated."""
    given = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(given, torch.fx.Node):
        return False
    aten = torch.ops.aten
    old, new = given.meta.get("val"), node.meta.get("val")
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return False
    if node.target is aten.detach.default:
        return True
    same = old.dtype == new.dtype and old.shape == new.shape and old.stride() == new.stride()
    if node.target is aten.mul.Tensor:
        return same and isinstance(node.args[1], float) and node.args[1] == 1
    return same and node.target in (aten.expand.default, aten.view.default)


def _is_pure(node: Node) -> bool:
    """Whether an operation gives the same for the same arguments, and does nothing else."""
    tags = getattr(node.target, "tags", (torch.Tag.nondeterministic_seeded,))
    return torch.Tag.nondeterministic_seeded not in tags


def _value(module: torch.fx.GraphModule, node: Node, values: dict[Node, Tensor]) -> Tensor | None:
    """What an operation on constants computes; `None` for another, or where that is large.

    Weights are no constants: they may be trained on.
    """
    inputs = node.all_input_nodes
    if node.target is torch.ops.aten.lift_fresh_copy.default and inputs[0].op == "get_attr":
        return getattr(module, str(inputs[0].target))  # a number that was made a tensor
    if not all(x in values for x in inputs):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    function: Any = node.target
    value = function(*args, **kwargs)
    is_small = isinstance(value, torch.Tensor) and value.numel() <= LARGEST_CONSTANT
    return value.contiguous() if is_small else None
