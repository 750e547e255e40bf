"""Trains a language model on several processes of PyTorch, by DDP or by FSDP2.

    KERAS_BACKEND=torch torchrun --nproc-per-node 2 processes_torch.py FOLDER ddp|fsdp [killed]

The first process writes FOLDER/model.keras after every step, and FOLDER/losses.json at the end.
Run by test_processes.py.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from support.processes import LOSS, SGD, STEPS, kill_if, make_model, text
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def shard(model):
    """Splits the weights of each part of a model over the processes, by FSDP2; gives the parts.

    A part gathers its weights while it is called, and Keras's variables have to follow them.
    """
    parts = [model.token_embedding, *model.blocks, model.head]
    for part in parts:
        for module in list(part.modules()):
            module.named_parameters()  # has older Keras collect them, which FSDP2 must not do
        # a tied head takes the embeddings after their layer's call
        fully_shard(part, reshard_after_forward=part is not model.token_embedding)
        part.register_forward_pre_hook(follow)
        part.register_forward_hook(follow)
    return parts


def follow(part, *_):
    for variable in part.variables:
        variable._value = part.torch_params[variable.path]


def gather(model, parts):
    """The whole model; every process has to take part, and only the first one gets it."""
    weights = {k: x.full_tensor() for part in parts for k, x in part.torch_params.items()}
    if torch.distributed.get_rank() > 0:
        return None
    whole = type(model).from_config(model.get_config())
    for variable in whole.variables:
        variable.assign(weights[variable.path])
    return whole


def main(folder, kind, killed=False):
    torch.distributed.init_process_group("gloo")
    process, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    folder, model = Path(folder), make_model()
    if kind == "fsdp":
        call, parts = model, shard(model)
        parameters = [x for part in parts for x in part.parameters()]
    else:
        call = DistributedDataParallel(model)
        parameters = call.parameters()
    optimizer, losses = torch.optim.SGD(parameters, SGD["learning_rate"], SGD["momentum"]), []
    for step in range(STEPS):
        kill_if(killed, process, step)
        tokens, targets = map(torch.from_numpy, text(step, process, processes))
        loss = LOSS(targets, call(tokens))
        optimizer.zero_grad()
        loss.backward()  # gradients are averaged over the processes
        optimizer.step()
        torch.distributed.all_reduce(loss.detach_())
        losses.append(loss.item() / processes)
        whole = gather(model, parts) if kind == "fsdp" else model
        if process == 0:
            whole.save(part := folder / "part.keras")
            os.replace(part, folder / "model.keras")
    if process == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    # Not by way of destructors: that of the process group waits, with Python's lock held, for a
    # thread that may need the lock to end.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
