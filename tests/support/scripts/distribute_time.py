"""Attention and a language model over four simulated devices along time, and on one device.

Run by test_sequence_axis.py; writes the largest relative differences by case.

KERAS_BACKEND=jax python distribute_time.py OUTPUT.json
"""

import contextlib
import json
import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=4"
)

import jax
import jax.extend
import keras
import numpy as np
from support.helpers import relative_error

from keras_ssattn import ops
from keras_ssattn.distribution import layout_map
from keras_ssattn.models import CausalLM

RNG = np.random.default_rng(0)
PACKED = np.sort(RNG.integers(0, 3, size=(2, 40)), axis=1)
MASK = RNG.random((2, 1, 40, 40)) > 0.3
# For each case: the mesh (batch, sequence, model), the normalizer, sizes, and options of attention.
CASES = {
    "causal": ((1, 4, 1), "softmax", {}, {"causal": True}),
    "window": ((1, 4, 1), "softpick", {}, {"causal": True, "window": 7}),
    "window on both sides": ((1, 4, 1), "ssmax", {}, {"window": 7, "mask": MASK}),
    "wide window": ((1, 4, 1), "rectified_softpick", {}, {"causal": True, "window": 25}),
    "padding": (
        (2, 2, 1),
        "softmax",
        {},
        {"key_mask": np.arange(40) < np.array([[31], [40]])},
    ),
    "packed": ((1, 2, 2), "sink_softmax", {}, {"causal": True, "segment_ids": PACKED}),
    "lengths that four does not divide": (
        (1, 4, 1),
        "softmax",
        {"length": 38, "key_length": 41},
        {"causal": True, "query_offset": np.array([3, 0])},
    ),
    "signed, not divided": ((1, 4, 1), "softpick", {"length": 38, "key_length": 41}, {}),
    "row mask, three rows of a batch over two": (
        (2, 2, 1),
        "softmax",
        {"batch": 3},
        {"mask": RNG.random((1, 4, 1, 40)) > 0.3},
    ),
    "a window that hides nothing": ((1, 4, 1), "softmax", {}, {"window": 2**31 - 8}),
    "the last positions": (
        (1, 4, 1),
        "softpick",
        {},
        {"causal": True, "window": 9, "query_offset": np.array([2**31 - 41, 3])},
    ),
    "dense": ((1, 4, 1), "softmax", {}, {"causal": True, "implementation": "dense"}),
}


@contextlib.contextmanager
def over(shape):
    names = ("batch", "sequence", "model")
    mesh = keras.distribution.DeviceMesh(shape, names, keras.distribution.list_devices())
    layouts = layout_map(mesh, sequence_axis="sequence")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    yield
    keras.distribution.set_distribution(None)


def inputs(batch=2, length=40, key_length=40, size=8, dtype="float32"):
    """Query, key, value, length scale and sinks; four heads share two of keys.

    The scales are not near 0, where the gradient of rectified softpick by them is a rounding.
    """
    rng = np.random.default_rng(1)
    shapes = [(batch, length, 4, size), *[(batch, key_length, 2, size)] * 2, (4, length), (4,)]
    arrays = [rng.normal(size=shape) for shape in shapes]
    arrays[3] = 0.5 + np.abs(arrays[3])
    return [jax.numpy.asarray(x, dtype) for x in arrays]


def loss(normalizer, options):
    def function(query, key, value, length_scale, sink):
        given = {"implementation": "tiled", **options}
        if normalizer == "sink_softmax":
            given["sink"] = sink
        out = ops.attention(query, key, value, normalizer, length_scale=length_scale, **given)
        weights = np.random.default_rng(2).normal(size=out.shape)
        return (out * weights).sum(), out

    return jax.value_and_grad(function, argnums=range(5), has_aux=True)


def difference(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(relative_error(x, y) for x, y in pairs)


def compare(shape, normalizer, sizes, options, wrap=jax.jit):
    """The largest relative difference of results and gradients."""
    arrays = inputs(**sizes)
    expected = wrap(loss(normalizer, options))(*arrays)
    with over(shape):
        found = wrap(loss(normalizer, options))(*arrays)
    return difference((found[0][1], found[1]), (expected[0][1], expected[1]))


def second_derivatives():
    """Of keys' gradients, without masks; and what a causal one raises."""
    query, key, value, *_ = inputs(length=8, key_length=8)

    def twice(implementation, causal=False):
        def of_key(key):
            options = {"implementation": implementation, "causal": causal}
            return (ops.attention(query, key, value, **options) ** 2).sum()

        return jax.jit(jax.grad(lambda key: (jax.grad(of_key)(key) ** 2).sum()))(key)

    expected = twice("dense")
    with over((1, 4, 1)):
        found = difference(twice("tiled"), expected)
        try:
            twice("tiled", causal=True)
        except NotImplementedError as error:
            return found, str(error)
    return found, ""


def passes(window):
    """How often each device passes keys on in the forward pass."""
    query, key, value, *_ = inputs()

    def function(*arrays):
        options = {"implementation": "tiled", "causal": True, "window": window}
        return ops.attention(*arrays, **options)

    with over((1, 4, 1)):
        jaxpr = jax.make_jaxpr(function)(query, key, value)

    def walk(jaxpr, times):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "ppermute":
                total += times
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                total += walk(inner, times * equation.params.get("length", 1))
        return total

    return walk(jaxpr.jaxpr, 1) / 2  # keys and values


def peak(shape):
    """Bytes that a device needs for a gradient of attention over 32,768 positions."""
    sizes = [(1, 32768, heads, 32) for heads in (8, 2, 2, 8)]

    def function(query, key, value, weights):
        return (ops.attention(query, key, value, causal=True) * weights).sum()

    with contextlib.nullcontext() if shape is None else over(shape):
        sharding = None
        if shape is not None:
            mesh = keras.distribution.distribution().device_mesh.backend_mesh
            spec = jax.sharding.PartitionSpec("batch", "sequence", "model")
            sharding = jax.sharding.NamedSharding(mesh, spec)
        arrays = [jax.ShapeDtypeStruct(x, "float32", sharding=sharding) for x in sizes]
        gradient = jax.jit(jax.grad(function, argnums=(0, 1, 2)), out_shardings=sharding)
        memory = gradient.lower(*arrays).compile().memory_analysis()
    parts = ("temp", "argument", "output")
    return sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)


def train(folder, shape=None):
    """Losses, logits and tokens of a language model, saved and read without devices."""
    tokens = np.random.default_rng(0).integers(1, 32, size=(8, 34))
    tokens[0, 20:] = 0
    with contextlib.nullcontext() if shape is None else over(shape):
        keras.utils.set_random_seed(3)
        options = {"implementation": "tiled", "remat": True, "padding_id": 0}
        model = CausalLM(32, 16, 2, 4, num_kv_heads=2, sliding_window=[None, 9], **options)
        crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), crossentropy)
        batches = tokens[:, :-1], tokens[:, 1:]  # 33 positions, which four does not divide
        history = model.fit(*batches, batch_size=4, epochs=2, shuffle=False, verbose=0)
        new = model.generate([[5, 6, 7], [8]], 6)
        model.save(f"{folder}.keras")
    logits = np.asarray(keras.saving.load_model(f"{folder}.keras")(tokens))
    return history.history["loss"], logits, np.array(new)


def main(output):
    found = {name: compare(*case) for name, case in CASES.items()}
    found["bfloat16"] = compare((1, 4, 1), "softmax", {"dtype": "bfloat16"}, {"causal": True})
    small = {"length": 8, "key_length": 8}
    found["eager"] = compare((1, 4, 1), "softmax", small, {}, wrap=lambda x: x)
    single, split = train(f"{output}-1"), train(f"{output}-4", (2, 2, 1))
    second, refusal = second_derivatives()
    result = {
        "differences": found,
        "losses": difference(split[0], single[0]),
        "logits": difference(split[1], single[1]),
        "tokens": bool((split[2] == single[2]).all()),
        "second": second,
        "refusal": refusal,
        "passes": [passes(window) for window in (1, 2, 11, 12, None)],
        "peak": peak((1, 4, 1)) / peak(None),
    }
    with open(output, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
