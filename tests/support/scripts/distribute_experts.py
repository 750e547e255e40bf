"""Trains an example's experts on four simulated devices and on one. Run by test_moe_routing.py.

KERAS_BACKEND=jax python distribute_experts.py OUTPUT.json
"""

import json
import os
import sys
from pathlib import Path

flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = flags

import keras
import numpy as np
from support import ROOT

from keras_ssattn.distribution import layout_map

sys.path.insert(0, str(ROOT / "examples"))
import moe_routing


def train():
    """What a model predicts after training, and which share of each weight a device has."""
    keras.utils.set_random_seed(0)
    model = moe_routing.make_model("softpick")
    x = np.random.default_rng(0).normal(size=(8, 64)).astype("float32")
    model.fit(x, np.arange(8), epochs=2, shuffle=False, verbose=0)
    shares = {
        v.path: v.value.addressable_shards[0].data.size / v.value.size
        for v in model.variables
        if v.path.startswith("experts")
    }
    return model.predict(x, verbose=0).tolist(), shares


def main(output):
    single, _ = train()
    keras.utils.clear_session()
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((1, 4), ("batch", "model"), devices)
    layouts = layout_map(mesh)
    moe_routing.split_experts(layouts)
    parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    keras.distribution.set_distribution(parallel)
    outputs, shares = train()
    found = {"single": single, "parallel": outputs, "shares": shares}
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
