# SPDX-License-Identifier: Apache-2.0
"""A few calls of the CUDA kernels, short enough for compute-sanitizer: every dtype, tails, misalignment, options."""

from os import environ
from pathlib import Path
from sys import path

# Each tensor an allocation of its own: in a block of torch's cache no access beyond a tensor's end would be seen.
environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from csgd_cuda import CSGD, calibrate_grad, hard_threshold_
from csgd_cuda.distributed.coding import choose_coding
from csgd_cuda.distributed.shards import ShardLayout
from csgd_cuda.optim.direction import SGD
from csgd_cuda.optim.options import step_options
from csgd_cuda.tensors import StepTensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def steps(device):
    for dtype in DTYPES:
        base = torch.zeros(5000, dtype=dtype, device=device)
        params = [torch.zeros(n, dtype=dtype, device=device) for n in (0, 1, 9, 2049, 70000)] + [base[3:]]
        for options in ({}, {"weight_decay": 0.1, "nesterov": True}, {"momentum": 0.0, "lipschitz": 1.0}):
            optimizer = CSGD(params, **{"lr": 0.1, "momentum": 0.9, **options}, fused=True)
            for _ in range(2):
                for param in params:
                    param.grad = torch.full_like(param, 0.5)
                optimizer.step()


def calibrations(device):
    for dtype in DTYPES:
        base = torch.zeros(5000, dtype=dtype, device=device)
        grads = [torch.full((n, 3), 0.5, dtype=dtype, device=device) for n in (0, 1, 683, 30000)] + [
            base[3:].view(-1, 1)
        ]
        for grad in grads:
            channels = grad.shape[1]
            state = {"index": torch.tensor(0, device=device), "step": torch.tensor(0, device=device)}
            for bound in (
                {"lipschitz_bound": torch.zeros(channels, dtype=torch.float64, device=device), "channel_dim": 1},
                {"lipschitz_bound": torch.zeros((), dtype=torch.float64, device=device)},
                {"lipschitz": 1.0},
            ):
                for _ in range(2):
                    calibrate_grad(grad, **state, **bound, fused=True)


def shards(device):
    for dtype in DTYPES:
        params = [torch.zeros(n, dtype=dtype, device=device) for n in (0, 1, 9, 2049, 70000)]
        for layout in (
            ShardLayout(1003, 70000, 70000, 1, 70000),
            ShardLayout(5, 3, 10, 7, 70),
            ShardLayout(2, 1, 7, 9, 63),
        ):
            buffers = {"momentum_buffer": [torch.zeros_like(p) for p in params]}
            tensors = StepTensors(
                params, [torch.full_like(p, 0.5) for p in params], buffers,
                [torch.tensor(0, device=device) for _ in params], [], list(range(len(params))), [*layout] * len(params),
            )  # fmt: skip
            options = {name: option.default for name, option in SGD.options.items()} | {
                "lr": 0.1,
                "momentum": 0.9,
                "lipschitz": 1,
            }
            of_call = {"fresh_momentum": False, "grad_scale": None, "found_inf": None, "tallies": None}
            SGD.step(tensors, step_options(SGD.options, options, device) | of_call, kernel=True)


def prunings(device):
    """Steps of pruned parameters, with all structures."""
    shapes = [(1, 4), (3, 8), (64, 32, 1), (300, 4, 3, 3), (70, 1000)]
    for dtype in DTYPES:
        base = torch.zeros(5000, dtype=dtype, device=device)
        params = [torch.randn(shape, device=device).to(dtype) for shape in shapes] + [base[3:4803].view(100, 48)]
        for param in params:
            param.requires_grad_()
        for options in (
            {}, {"regrow": False}, {"threshold_scope": "group"}, {"threshold_scope": "group", "regrow": False},
            {"structure": "filter"}, {"structure": "filter", "regrow": False}, {"structure": "2:4", "regrow": False},
        ):  # fmt: skip
            optimizer = CSGD(params, lr=0.1, momentum=0.9, sparsity=0.5, threshold_every=2, **options, fused=True)
            for _ in range(4):
                for param in params:
                    param.grad = torch.full_like(param, 0.5)
                optimizer.step()
        masks = [(param > 0)[1:] for param in params]  # at any address
        parts = [param.detach()[1:] for param in params]
        hard_threshold_(parts, [1000], masks=masks, across=True, fused=True)


def exchanges(device):
    coding = choose_coding(device, fused=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grads = [torch.full((n,), 0.25, dtype=dtype, device=device) for n in (1, 9, 2049, 70000)]
        for ranks in (1, 3):
            bounds = torch.full((len(grads),), 0.75, dtype=torch.float64, device=device)
            codes = coding.encode(grads, bounds, range(len(grads)), seed=1, step=0)
            words = coding.pack(codes, ranks)
            coding.decode(coding.add(words).expand(ranks, -1).contiguous(), bounds / ranks, grads)


def main():
    device = torch.device("cuda")
    steps(device)
    shards(device)
    calibrations(device)
    exchanges(device)
    prunings(device)
    torch.cuda.synchronize()
    print("steps, calibrations, exchanges and prunings made")


if __name__ == "__main__":
    main()
