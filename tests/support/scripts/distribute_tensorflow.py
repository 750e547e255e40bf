"""Trains under MirroredStrategy on two logical CPUs, or alone. Run by test_distribution.py.

KERAS_BACKEND=tensorflow python distribute_tensorflow.py single|mirrored OUTPUT.json
"""

import contextlib
import json
import sys

import keras
import numpy as np
import tensorflow as tf
from support.cases import sequence_model, sequences


def main(kind, output):
    [cpu] = tf.config.list_physical_devices("CPU")
    logical = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [logical, logical])
    scope = contextlib.nullcontext()
    if kind == "mirrored":
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        assert strategy.num_replicas_in_sync == 2
        scope = strategy.scope()
    keras.utils.set_random_seed(11)
    with scope:
        model = sequence_model("ssmax_bias")
        model.compile(keras.optimizers.SGD(0.1), "mse")
    data = tf.data.Dataset.from_tensor_slices((sequences(batch=16), np.ones((16, 10), "float32")))
    losses = model.fit(data.batch(8), epochs=3, verbose=0).history["loss"]
    outputs = model.predict(sequences(seed=5), verbose=0).tolist()
    with open(output, "w") as file:
        json.dump({"losses": losses, "outputs": outputs}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
