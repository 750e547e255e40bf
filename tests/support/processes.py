"""Runs of two processes, which all end whatever happens; and what their programs share."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import keras
import numpy as np

from keras_ssattn.layers import SSMax
from keras_ssattn.models import CausalLM
from support import SCRIPTS, TESTS

KINDS = {"jax": "jax", "tensorflow": "tensorflow", "ddp": "torch", "fsdp": "torch"}
HERE = "127.0.0.1"  # the name of a machine need not resolve
STEPS, BATCH = 3, 8
KILLED = 2  # the step at which the second process is killed, if it is to be


def train(kind, folder, *killed):
    """Trains by two processes in a way of `KINDS`; their exit codes, and what they wrote."""
    script = SCRIPTS / f"processes_{KINDS[kind]}.py"
    if kind == "jax":
        address = f"{HERE}:{free_ports(1)[0]}"
        starts = [({}, script, folder, address, 2, process, *killed) for process in (0, 1)]
    elif kind == "tensorflow":
        workers = {"worker": [f"{HERE}:{port}" for port in free_ports(2)]}
        tasks = [{"cluster": workers, "task": {"type": "worker", "index": i}} for i in (0, 1)]
        starts = [({"TF_CONFIG": json.dumps(task)}, script, folder, *killed) for task in tasks]
    else:
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--local-addr={HERE}",
                    "--rdzv-backend=c10d", f"--rdzv-endpoint={HERE}:0")  # fmt: skip
        starts = [({"GLOO_SOCKET_IFNAME": "lo"}, *torchrun, script, folder, kind, *killed)]
    return run(starts, folder, {"KERAS_BACKEND": KINDS[kind]})


def free_ports(number):
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for x in found:
            x.bind((HERE, 0))
        return [x.getsockname()[1] for x in found]


def run(starts, folder, environment, limit=180):
    """Runs Python once for each of `starts`, an addition to the environment and arguments.

    It raises after `limit` seconds, and ends each process in any case.
    """
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    stop = time.monotonic() + limit
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / f"{i}.txt").open("w+")) for i in range(len(starts))]
        processes = []
        for (more, *arguments), file in zip(starts, files, strict=True):
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env={**environment, **more}, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(end, process)
            processes.append(process)
        codes = [process.wait(max(stop - time.monotonic(), 0)) for process in processes]
        for file in files:
            file.seek(0)
        return codes, "\n".join(file.read()[-4000:] for file in files)


def end(process):
    """Ends a process: first by the signal that a launcher hands on to its workers."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# What the programs share


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SGD = {"learning_rate": 0.5, "momentum": 0.9}


def make_model():
    keras.utils.set_random_seed(11)
    return CausalLM(16, 16, 1, num_heads=2, normalizer=SSMax(use_bias=True))


def make_compiled():
    model = make_model()
    model.compile(keras.optimizers.SGD(**SGD), LOSS)
    return model


def text(step, process=0, processes=1):
    """A process's part of the tokens of a step, and of those that follow them, `[B, 9]` each."""
    tokens = np.random.default_rng(step).integers(1, 16, (BATCH, 10))[process::processes]
    return tokens[:, :-1], tokens[:, 1:]


def kill_if(killed, process, step):
    """Kills the second process without a word, in the middle of training, if it is to be."""
    if killed and process == 1 and step == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
