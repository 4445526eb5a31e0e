# SPDX-License-Identifier: Apache-2.0
"""The exchange on a GPU: one rank is all that one GPU gives NCCL, but its codes, kernels and streams are all there."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from csgd_cuda.distributed import CalibratedHookState, calibrated_hook

from ..conftest import need_kernel
from ..helpers import assert_same_bits, run_steps, set_grads
from .launch import Given, exchanged, run
from .test_hook import SEED, SHAPES, given_gradients

CUDA = torch.device("cuda", 0)
STEPS = 3


@pytest.fixture
def nccl():
    """This process is the only rank of a group."""
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        pytest.skip("no GPU with NCCL")
    need_kernel(CUDA)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=CUDA)
    yield
    dist.destroy_process_group()


def exchanged_gradients(rank, device, options):
    """In small buckets, so that the exchange of one goes on beside the backward pass of the next."""
    model = DistributedDataParallel(Given(SHAPES).to(device), bucket_cap_mb=0.001)
    model.register_comm_hook(CalibratedHookState(model, seed=SEED, skip_below=8, **options), calibrated_hook)
    out = []
    for step in range(STEPS):
        grads = exchanged(model, [grad.to(device) for grad in given_gradients(rank, step)])
        out += [grad.cpu() for grad in grads]
    return out


@pytest.mark.parametrize("options", [
    {}, {"clip": 1.5}, {"block": 32}, {"clip": 1.5, "block": 32}, {"compact": True, "clip": 1.5, "block": 32},
], ids=str)  # fmt: skip
def test_hook_on_a_gpu_makes_the_bits_of_a_cpu(options, nccl):
    got = exchanged_gradients(0, CUDA, options)
    (expected,) = run(1, exchanged_gradients, torch.device("cpu"), options)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, f"step {k // len(SHAPES)}, parameter {k % len(SHAPES)}")


def test_dtensor_on_a_gpu_is_stepped_as_a_plain_tensor(nccl):
    mesh = init_device_mesh("cuda", (1,))
    plain = torch.linspace(-1, 1, 3 * 700, device=CUDA).view(3, 700).requires_grad_()
    sharded = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(1)]))
    optimizers = [run_steps([param], steps=0, fused=True) for param in (plain, sharded)]
    for step in range(STEPS):
        set_grads([plain], seed=step)
        sharded.grad = distribute_tensor(plain.grad, mesh, [Shard(1)])
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(sharded.full_tensor(), plain)
