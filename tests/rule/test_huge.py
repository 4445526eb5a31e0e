# SPDX-License-Identifier: Apache-2.0
"""A tensor of more than 2^31 elements: positions, counts and draws beyond 32 bits."""

import os

import pytest
import torch

from csgd_cuda import CSGD
from csgd_cuda.reference import philox

NUMEL = 2**31 + 73
NEEDED = 11 * 2**30  # bytes: parameter and gradient in bfloat16, and some room


def free_memory(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
def test_more_than_two_to_the_31_elements(device):
    if free_memory(device) < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of free memory")
    param = torch.zeros(NUMEL, dtype=torch.bfloat16, device=device, requires_grad=True)
    param.grad = torch.full_like(param, 0.25)
    optimizer = CSGD([param], lr=1.0, calibration=1.0, lipschitz=1.0, rounding="nearest", seed=5)
    optimizer.step()
    for begin in (0, 2**31 - 4096, NUMEL // 8 * 8 - 4096):
        end = min(begin + 8192, NUMEL)
        draws = philox.draws(begin, end, seed=5, stream=0, index=0, step=torch.tensor(0, device=device), device=device)
        expected = torch.where(draws.to(torch.int32) < 2**14, -1.0, 0.0).to(torch.bfloat16)
        assert torch.equal(param[begin:end], expected)
    assert abs(optimizer.density()[0] - 0.25) < 1e-4
