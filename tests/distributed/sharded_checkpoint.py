# SPDX-License-Identifier: Apache-2.0
"""A training with fully_shard that saves itself with torch.distributed.checkpoint and goes on from there.

As a program, under torchrun: python -m tests.distributed.sharded_checkpoint FOLDER [--kill-rank R --kill-step S].
In its first life the rank kills itself in that step. Processes that are started again, by this torchrun or by a later
one, go on from the last checkpoint in FOLDER, and leave the weights in FOLDER/weights.pt.
"""

import argparse
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import heavy_tailed

STEPS, SAVE_EVERY = 8, 3
# For all parameters, and for each of the two groups.
OPTIONS = {
    CSGD: ({"momentum": 0.9}, [{"weight_decay": 1e-3}, {"nesterov": True, "calibration": 0.5}]),
    CalibratedAdamW: ({"eps": 1e-6}, [{"weight_decay": 0.1}, {"betas": (0.5, 0.9), "calibration": 0.5}]),
}


def split(model, how):
    """Spreads the layers over a mesh of the shape that ``how`` begins with: (2,) by fully_shard, (2, 2) by fully_shard
    with two replicas, (2, 2, "tensor") by fully_shard above tensor parallel."""
    *shape, last = how if how[-1] == "tensor" else (*how, None)
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("data", "tensor")[: len(shape)])
    if last == "tensor":
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        mesh = mesh["data"]
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)


def as_param(tensor, param):
    """A tensor that all ranks have whole, spread as a parameter is."""
    if not isinstance(param, DTensor):
        return tensor
    mesh = param.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim).redistribute(placements=param.placements)


class Training:
    """Two layers, each in a parameter group of its own; ``how`` see split(), None is a plain one, in one process."""

    def __init__(self, how, dtype=torch.bfloat16, seed=0, optimizer_class=CSGD):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(dtype)
        if how is not None:
            split(self.model, how)
        common, of_groups = OPTIONS[optimizer_class]
        groups = [{"params": list(self.model[k].parameters()), **own} for k, own in zip((0, 2), of_groups, strict=True)]
        self.optimizer = optimizer_class(groups, lr=0.05, seed=2**63 + 1, **common)
        self.step = 0

    def run_given(self, steps, in_step=lambda step: None):
        """Steps with gradients that depend on the step alone, not on the world size."""
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            for param in self.model.parameters():
                param.grad = as_param(heavy_tailed(tuple(param.shape), generator, param.dtype), param)
            in_step(self.step)
            self.optimizer.step()
            self.step += 1

    def run_real(self, steps, in_step=lambda step: None):
        """Steps with gradients of a loss, of this rank's data."""
        for _ in range(steps):
            generator = torch.Generator().manual_seed(100 * dist.get_rank() + self.step)
            x = torch.randn(8, 9, generator=generator)
            self.optimizer.zero_grad()
            (self.model(x) - x[:, :3]).square().mean().backward()
            in_step(self.step)
            self.optimizer.step()
            self.step += 1

    def _parts(self):
        parts = {"model": get_model_state_dict(self.model)}
        return {**parts, "optimizer": get_optimizer_state_dict(self.model, self.optimizer), "step": self.step}

    def save(self, folder):
        dcp.save(self._parts(), checkpoint_id=folder)

    def load(self, folder):
        parts = self._parts()
        dcp.load(parts, checkpoint_id=folder)
        set_model_state_dict(self.model, parts["model"])
        set_optimizer_state_dict(self.model, self.optimizer, parts["optimizer"])
        self.step = parts["step"]


def train_from_checkpoint(folder, given, in_step=lambda step: None):
    """Goes on from the last checkpoint in ``folder``, or begins, and trains to the end, with new checkpoints.

    Returns the step it went on after, or None, and the weights. ``given``: see run_given.
    """
    training = Training((dist.get_world_size(),), torch.float32)
    make_steps = training.run_given if given else training.run_real
    begun_after = None
    complete = [path for path in folder.glob("step-*") if (path / ".metadata").exists()]
    if complete:
        training.load(max(complete))
        begun_after = training.step
    while training.step < STEPS:
        make_steps(min(SAVE_EVERY, STEPS - training.step), in_step)
        training.save(folder / f"step-{training.step}")  # .metadata comes last
    return begun_after, [param.full_tensor().detach() for param in training.model.parameters()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-rank", type=int)
    parser.add_argument("--kill-step", type=int)
    parser.add_argument("--given", action="store_true", help="gradients that do not depend on the number of processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, first_life = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def in_step(step):
        if first_life and (rank, step) == (options.kill_rank, options.kill_step):
            os.kill(os.getpid(), signal.SIGKILL)

    begun_after, weights = train_from_checkpoint(options.folder, options.given, in_step)
    print(f"rank {rank} began after step {begun_after}", flush=True)
    if rank == 0:
        torch.save(weights, options.folder / "weights.pt")
    dist.barrier()  # no rank leaves before all have what they need
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
