# SPDX-License-Identifier: Apache-2.0
"""What several test files share: raw bits, awkward data, and steps made by one backend."""

import torch

from csgd_cuda import CSGD

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STATE_NAMES = ("momentum_buffer", "step", "lipschitz_bound")
_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(tensor):
    """The raw bits as integers on the CPU; every NaN counts as the same, since processors differ in its payload."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point():
        tensor = tensor if tensor.dtype in DTYPES else tensor.float()  # float8 has too few operators
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
        tensor = tensor.view(_INTEGER[tensor.element_size()])
    return tensor


def assert_same_bits(a, b, what=""):
    a, b = bits(a), bits(b)
    assert a.shape == b.shape, what
    different = (a != b).nonzero()
    first = different[0].tolist() if len(different) else None
    assert first is None, f"{what}: {len(different)} of {a.numel()} differ, the first at {first}"


def snapshot(params, optimizer):
    """Copies of everything a step may change: [(name, tensor)]."""
    out = []
    for k, param in enumerate(params):
        out.append((f"param {k}", param.detach().clone()))
        state = optimizer.state.get(param, {})
        out.extend((f"{name} {k}", state[name].clone()) for name in STATE_NAMES if name in state)
    return out


def assert_same_snapshots(a, b):
    assert [name for name, _ in a] == [name for name, _ in b]
    for (name, x), (_, y) in zip(a, b, strict=True):
        assert_same_bits(x, y, name)


def heavy_tailed(shape, generator, dtype=torch.float32):
    """Values as gradients have them: most small, a few large, some exactly zero."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64) ** 3
    x[torch.rand(shape, generator=generator) < 0.05] = 0.0
    return x.to(dtype)


def make_params(shapes, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_() for shape in shapes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = heavy_tailed(tuple(param.shape), generator, param.dtype).to(param.device)


def run_steps(params, steps=3, **options):
    """Makes steps with gradients that depend on the step alone; returns the optimizer."""
    optimizer = CSGD(params, **{"lr": 0.1, "momentum": 0.9, **options})
    for step in range(steps):
        set_grads(params, seed=100 + step)
        optimizer.step()
    return optimizer
