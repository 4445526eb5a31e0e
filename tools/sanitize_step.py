# SPDX-License-Identifier: Apache-2.0
"""A few steps of the CUDA kernels, short enough for compute-sanitizer: every dtype, tails, misalignment, options."""

from pathlib import Path
from sys import path

path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from csgd_cuda import CSGD


def main():
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        base = torch.zeros(5000, dtype=dtype, device=device)
        params = [torch.zeros(n, dtype=dtype, device=device) for n in (0, 1, 9, 2049, 70000)] + [base[3:]]
        for options in ({}, {"weight_decay": 0.1, "nesterov": True}, {"momentum": 0.0, "lipschitz": 1.0}):
            optimizer = CSGD(params, **{"lr": 0.1, "momentum": 0.9, **options}, fused=True)
            for _ in range(2):
                for param in params:
                    param.grad = torch.full_like(param, 0.5)
                optimizer.step()
    torch.cuda.synchronize()
    print("steps made")


if __name__ == "__main__":
    main()
