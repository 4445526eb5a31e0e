# SPDX-License-Identifier: Apache-2.0
"""A training with fully_shard that saves itself with torch.distributed.checkpoint and goes on from there.

As a program, under torchrun: python -m tests.distributed.sharded_checkpoint FOLDER [--kill-rank R --kill-step S].
In its first life the rank kills itself in that step; the restarted processes go on from the last checkpoint in FOLDER,
and leave the weights in FOLDER/weights.pt.
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
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from csgd_cuda import CSGD

from ..helpers import heavy_tailed

STEPS, SAVE_EVERY = 8, 3


class Training:
    """Two layers, each in a parameter group of its own; ``world_size`` None is a plain one, in one process."""

    def __init__(self, world_size, dtype=torch.bfloat16, seed=0):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(dtype)
        if world_size is not None:
            mesh = init_device_mesh("cpu", (world_size,))
            fully_shard(self.model[0], mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        first, last = (list(self.model[k].parameters()) for k in (0, 2))
        groups = [{"params": first, "weight_decay": 1e-3}, {"params": last, "nesterov": True, "calibration": 0.5}]
        self.optimizer = CSGD(groups, lr=0.05, momentum=0.9, seed=2**63 + 1)
        self.step = 0

    def run_given(self, steps):
        """Steps with gradients that depend on the step alone, not on the world size."""
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            for param in self.model.parameters():
                grad = heavy_tailed(tuple(param.shape), generator, param.dtype)
                if isinstance(param, DTensor):
                    grad = distribute_tensor(grad, param.device_mesh, param.placements)
                param.grad = grad
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-rank", type=int)
    parser.add_argument("--kill-step", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, first_life = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def in_step(step):
        if first_life and (rank, step) == (options.kill_rank, options.kill_step):
            os.kill(os.getpid(), signal.SIGKILL)

    training = Training(dist.get_world_size(), torch.float32)
    complete = [path for path in options.folder.glob("step-*") if (path / ".metadata").exists()]
    if complete:
        training.load(max(complete))
        print(f"rank {rank} goes on after step {training.step}", flush=True)
    while training.step < STEPS:
        training.run_real(min(SAVE_EVERY, STEPS - training.step), in_step)
        training.save(options.folder / f"step-{training.step}")  # .metadata comes last
    weights = [param.full_tensor() for param in training.model.parameters()]
    if rank == 0:
        torch.save(weights, options.folder / "weights.pt")
    dist.barrier()  # nobody leaves before all have what they came for
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
