"""Loads a folder on four simulated devices, and says what each holds. Run by test_distribution.py.

KERAS_BACKEND=jax python load_distributed.py FOLDER OUTPUT.json
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import keras
import numpy as np

from keras_ssattn.distribution import layout_map
from keras_ssattn.models import CausalLM


def main(folder, output):
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((1, 4), ("batch", "model"), devices)
    parallel = keras.distribution.ModelParallel(layout_map=layout_map(mesh), batch_dim_name="batch")
    keras.distribution.set_distribution(parallel)
    largest, put = [], jax.device_put

    def watched(x, where=None, **options):  # what goes to one device as a whole
        if isinstance(x, np.ndarray) and len(getattr(where, "device_set", [0])) == 1:
            largest.append(x.size)
        return put(x, where, **options)

    jax.device_put = watched
    model = CausalLM.from_huggingface(folder, dtype="float32")
    shards = {
        v.path: (list(v.shape), [list(s.data.shape) for s in v.value.addressable_shards])
        for v in model.weights
    }
    logits = np.asarray(model(np.arange(3, 20)[None])).tolist()
    with open(output, "w") as file:
        json.dump({"shards": shards, "logits": logits, "whole": max(largest, default=0)}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
