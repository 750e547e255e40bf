"""Trains a model on several processes with PyTorch's DistributedDataParallel, on CPUs.

    KERAS_BACKEND=torch torchrun --nproc-per-node 2 torch_ddp.py OUTPUT_PREFIX

Every process sees its own part of each batch; gradients are averaged over the processes. Process
r writes OUTPUT_PREFIX-r.npz with its losses and the weights it ends with.
"""

import os
import sys

import keras
import numpy as np
import torch
import torch.distributed
from support.cases import sequence_model, sequences
from torch.nn.parallel import DistributedDataParallel

STEPS = 3


def main(prefix):
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    keras.utils.set_random_seed(11)
    model = sequence_model("ssmax_bias")  # a Keras model on PyTorch is a torch.nn.Module
    parallel = DistributedDataParallel(model)  # starts every process from the weights of the first
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        inputs = torch.from_numpy(sequences(batch=8, seed=step)[rank::size])
        loss = (parallel(inputs) - 1.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = {v.path: v.numpy() for v in model.trainable_variables}
    np.savez(f"{prefix}-{rank}.npz", losses=losses, **weights)
    torch.distributed.barrier()
    # Not by way of destructors: that of the process group waits, with Python's lock held, for a
    # thread that may need the lock to end.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
