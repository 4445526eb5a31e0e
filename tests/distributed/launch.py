# SPDX-License-Identifier: Apache-2.0
"""Runs a function in several processes of one gloo group on this machine, and what they run it on."""

import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from csgd_cuda.distributed import CalibratedHookState, calibrated_hook

PATIENCE = 60  # seconds for all processes together

# One process imports torch, the others are forked from it. Not what is tested: that is found by the path of the child.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    [
        "torch.nn.parallel",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "pytest",
        "hypothesis",
    ]
)


def run(world_size, function, *args, lost=()):
    """What ``function(rank, *args)`` returns on each rank; ranks in ``lost`` are expected to end without an answer."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            forkserver.Process(target=_run_one, args=(rank, world_size, folder, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(PATIENCE)
        finally:
            for process in processes:
                process.kill()
        answers = [Path(folder, f"{rank}.pt") for rank in range(world_size)]
        absent = {rank for rank, path in enumerate(answers) if not path.exists()}
        assert absent == set(lost), f"no answer from ranks {sorted(absent)}"
        results = [None if rank in absent else torch.load(path) for rank, path in enumerate(answers)]
    for rank, result in enumerate(results):
        assert result is None or "error" not in result, f"rank {rank}: {result['error']}"
    return [None if result is None else result["result"] for result in results]


def _run_one(rank, world_size, folder, function, args):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE // 2))
    try:
        answer = {"result": function(rank, *args)}
    except Exception:
        answer = {"error": traceback.format_exc()}
    torch.save(answer, f"{folder}/{rank}.part")
    Path(folder, f"{rank}.part").rename(f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class Given(torch.nn.Module):
    """Parameters whose gradients are what forward is given; one that is given None is not used."""

    def __init__(self, shapes, dtype=torch.float32):
        super().__init__()
        self.of = torch.nn.ParameterList(torch.zeros(shape, dtype=dtype) for shape in shapes)

    def forward(self, grads):
        pairs = zip(self.of, grads, strict=True)
        return sum((param * grad).sum() for param, grad in pairs if grad is not None)


def with_hook(shapes, dtype=torch.float32, bucket_cap_mb=25, of_model=None, **options):
    """(DistributedDataParallel around Given, the state of its hook); options of the state, and ``of_model``'s."""
    model = DistributedDataParallel(Given(shapes, dtype), bucket_cap_mb=bucket_cap_mb, **(of_model or {}))
    state = CalibratedHookState(model, **options)
    model.register_comm_hook(state, calibrated_hook)
    return model, state


def exchanged(model, grads):
    """The gradients after a backward pass that gave this rank ``grads``."""
    model.zero_grad()
    model(grads).backward()
    return [param.grad.clone() for param in model.module.of]


def draws_of(rank, parameter=0):
    """The arguments of an encode that tell a rank's draws from those of others: a pair of ranks shares them."""
    return {"index": parameter + (rank // 2 << 16), "antithetic": rank % 2 == 1}
