# SPDX-License-Identifier: Apache-2.0
"""A few calls of the CUDA kernels, short enough for compute-sanitizer: every dtype, tails, misalignment, options."""

from pathlib import Path
from sys import path

path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from csgd_cuda import CSGD, calibrate_grad

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


def main():
    device = torch.device("cuda")
    steps(device)
    calibrations(device)
    torch.cuda.synchronize()
    print("steps and calibrations made")


if __name__ == "__main__":
    main()
