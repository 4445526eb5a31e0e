# SPDX-License-Identifier: Apache-2.0
"""What CSGD says about itself: bounds."""

import torch

from csgd_cuda import CSGD

from .helpers import DTYPES, make_params, run_steps, set_grads


def test_bounds_are_those_of_the_state_and_of_the_groups(device, fused):
    """Exactly, in every dtype; the parameter without a gradient has none yet."""
    params = [make_params([(40,)], dtype, device)[0] for dtype in DTYPES]
    fixed = make_params([(5,), (6,)], torch.float32, device)
    optimizer = CSGD([{"params": params}, {"params": fixed, "lipschitz": 0.3}], lr=0.1, fused=fused)
    assert optimizer.lipschitz_bounds() == [0.0] * 4 + [0.3] * 2
    set_grads(params[:3], seed=0)
    optimizer.step()
    bounds = optimizer.lipschitz_bounds()
    largest = [p.grad.abs().max().item() for p in params[:3]]
    assert bounds == [*largest, 0.0, 0.3, 0.3]
    assert all(largest)


def test_an_estimate_counts_only_while_no_constant_is_given(device, fused):
    (param,) = params = make_params([(40,)], torch.float32, device)
    optimizer = run_steps(params, fused=fused)
    estimate = optimizer.state[param]["lipschitz_bound"].item()
    optimizer.param_groups[0]["lipschitz"] = 2
    assert optimizer.lipschitz_bounds() == [2.0]
    optimizer.param_groups[0]["lipschitz"] = None
    assert optimizer.lipschitz_bounds() == [estimate]


def test_bounds_are_read_at_once(device, fused, monkeypatch):
    """On a GPU each read waits for it."""
    optimizer = run_steps(make_params([(40,)] * 5, torch.float32, device), fused=fused)
    reads = []
    for name in ("item", "tolist", "__float__", "cpu"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, read=read, name=name: reads.append(name) or read(*a))
    assert len(optimizer.lipschitz_bounds()) == 5
    assert reads == ["tolist"]
