"""Trains on four simulated devices as on one, and says how. Run by test_distribution.py.

KERAS_BACKEND=jax python distribute_jax.py single|data|model OUTPUT.json
"""

import json
import math
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import keras
import numpy as np
from support.cases import sequences

import keras_ssattn
from keras_ssattn.distribution import layout_map
from keras_ssattn.models import CausalLM, generation

# Sizes that two devices cannot share.
UNEVEN = {
    "num_heads": {"num_heads": 3},
    "num_kv_heads": {"num_kv_heads": 1},
    "ffn_expansion": {"ffn_expansion": 1.25},
    "vocabulary_size": {"vocabulary_size": 9},
}


def shards_of(variables):
    """The shape of each variable, and that of the part which the first device has."""
    return {
        x.path: (list(x.shape), list(x.value.addressable_shards[0].data.shape)) for x in variables
    }


def errors():
    found = {}
    for name, options in UNEVEN.items():
        sizes = {"vocabulary_size": 8, "hidden_size": 12, "num_layers": 1, "num_heads": 2}
        try:
            CausalLM(**{**sizes, **options}, name="model")
        except ValueError as error:
            found[name] = str(error)
    return found


def exchanges():
    """The kinds of exchange between devices in a language model's gradient."""
    model = CausalLM(8, 8, 1, num_heads=4, num_kv_heads=2)
    values = [x.value for x in model.trainable_variables]
    layout = keras.distribution.distribution().get_data_layout((4, 8))
    tokens = keras.distribution.distribute_tensor(np.ones((4, 8), "int32"), layout)

    def loss(values, tokens):
        logits, _ = model.stateless_call(values, [], tokens)
        return keras.ops.mean(keras.ops.logsumexp(logits, -1))

    places = [x.sharding for x in values]
    step = jax.jit(jax.grad(loss), out_shardings=places).lower(values, tokens).compile()
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    return sorted(set(re.findall(rf" ({kinds})(?:-start)?\(", step.as_text())))


def cached_heads():
    """How many heads of keys a device caches while tokens are generated, of two."""
    model = CausalLM(8, 32, 1, num_heads=4, num_kv_heads=2)
    plan = generation._plan(model, np.ones((4, 5), "int32"), 8, 0.0, *[None] * 4, 1, (), None, 0)

    def decode(values, *inputs):
        with keras.StatelessScope(list(zip(model.variables, values, strict=True))):
            return generation._make_decoder(model, plan.choice)(*inputs)

    values = [x.value for x in model.variables]
    program = jax.jit(decode).lower(values, *plan.inputs()).compile().as_text()
    shapes = [[*map(int, x.split(","))] for x in re.findall(r"f32\[([\d,]+)\]", program)]
    caches = [shape for shape in shapes if 64 in shape and shape[-1] == 8]
    return sorted({math.prod(shape) // (4 * 64 * 8) for shape in caches})


def main(kind, output):
    devices = keras.distribution.list_devices()
    assert len(devices) == 4
    if kind == "data":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    elif kind == "model":
        mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
        parallel = keras.distribution.ModelParallel(
            layout_map=layout_map(mesh), batch_dim_name="batch"
        )
        keras.distribution.set_distribution(parallel)
    keras.utils.set_random_seed(11)
    model = keras_ssattn.build(
        6, hidden_size=8, num_heads=2, num_layers=2, dropout=0.0, window_size=7,
        normalizer=keras_ssattn.SSMax(use_bias=True),
    )  # fmt: skip
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = model.fit(
        sequences(batch=16),
        np.ones((16, 8), "float32"),
        batch_size=8,
        epochs=3,
        shuffle=False,
        verbose=0,
    ).history["loss"]
    adam = keras.optimizers.Adam()
    adam.build(model.trainable_variables)
    found = {"shards": shards_of(model.trainable_variables), "adam": shards_of(adam.variables)}
    if kind == "model":
        found.update(errors=errors(), exchanges=exchanges(), cached_heads=cached_heads())
    outputs = np.asarray(model.predict(sequences(seed=5), verbose=0)).tolist()
    with open(output, "w") as file:
        json.dump({"losses": losses, "outputs": outputs, **found}, file)
    assert jax.device_count() == 4


if __name__ == "__main__":
    main(*sys.argv[1:])
