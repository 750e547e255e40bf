"""Trains a language model on several processes of JAX, of two devices each.

    KERAS_BACKEND=jax python processes_jax.py FOLDER ADDRESS PROCESSES PROCESS [killed]

ADDRESS is that of the first process, which writes FOLDER/model.keras after every step, and
FOLDER/losses.json at the end. Run by test_processes.py.
"""

import json
import os
import sys
from pathlib import Path

flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
os.environ["XLA_FLAGS"] = flags

import jax
import keras
from jax.experimental import multihost_utils
from support.processes import BATCH, STEPS, kill_if, make_compiled, text

from keras_ssattn.distribution import layout_map


def distribute(address, processes, process):
    """Splits the batch over the processes, and the model over the devices of each."""
    jax.distributed.initialize(
        address, processes, process, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10
    )
    devices = keras.distribution.list_devices()  # of all processes
    mesh = keras.distribution.DeviceMesh((processes, 2), ("batch", "model"), devices)
    parallel = keras.distribution.ModelParallel(
        layout_map=layout_map(mesh),
        batch_dim_name="batch",
        auto_shard_dataset=False,  # each process is given its own part of the batch
    )
    keras.distribution.set_distribution(parallel)


def save(model, file):
    """Gathers a compiled model and writes it. All processes call this, and the first one writes."""
    variables = [*model.variables, *model.optimizer.variables]
    arrays = multihost_utils.process_allgather([x.value for x in variables], tiled=True)
    if jax.process_index() == 0:
        parallel = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        whole = type(model).from_config(model.get_config())
        whole.compile_from_config(model.get_compile_config())
        variables = [*whole.variables, *whole.optimizer.variables]
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)
        whole.save(part := file.with_name("part.keras"))
        os.replace(part, file)
        keras.distribution.set_distribution(parallel)


def main(folder, address, processes, process, killed=False):
    folder, processes, process = Path(folder), int(processes), int(process)
    distribute(address, processes, process)
    model, losses = make_compiled(), []
    for step in range(STEPS):
        kill_if(killed, process, step)
        tokens, targets = text(step, process, processes)
        fit = model.fit(tokens, targets, batch_size=BATCH // processes, verbose=0)
        losses += fit.history["loss"]
        save(model, folder / "model.keras")
    if process == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
