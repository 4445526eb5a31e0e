# SPDX-License-Identifier: Apache-2.0
"""Blocks of a gradient with bounds of their own: what comes out by hand, in exact arithmetic, and its variance."""

from fractions import Fraction

import pytest
import torch

from csgd_cuda.distributed import codes
from csgd_cuda.distributed.clip_and_block import block_exponents, scale_blocks

from ..helpers import assert_same_bits, heavy_tailed
from .launch import draws_of, exchanged, run, with_hook

DTYPES = list(codes.SIGNIFICANT_BITS)
SEED, BLOCK = 2**64 - 7, 32
SHAPE = (1001,)


def gradient(rank, dtype, scale=1.0):
    """Blocks of sizes over many powers of two, one of zeros; not the same on all ranks."""
    generator = torch.Generator().manual_seed(rank)
    grad = heavy_tailed(SHAPE, generator)
    grad *= torch.exp2(-torch.arange(SHAPE[0]).div(48, rounding_mode="floor").roll(rank)) * scale
    grad[64:96] = 0
    return grad.to(dtype)


def exponents_by_hand(grads, unit, size, dtype):
    """The largest k for each block, by exact fractions: no coordinate beyond the size, no sum off the dtype's grid."""
    info = torch.finfo(dtype)
    smallest = Fraction(info.tiny) * Fraction(info.eps)
    out = []
    for begin in range(0, SHAPE[0], BLOCK):
        largest = max(Fraction(grad[begin : begin + BLOCK].abs().max().item()) for grad in grads)
        k = 15
        while k > 0 and (largest * 2**k > Fraction(size) or (Fraction(unit) / 2**k) % smallest != 0):
            k -= 1
        out.append(k)
    return out


def exchanged_blocks(rank, dtype, scale):
    model, _ = with_hook([SHAPE], dtype, seed=SEED, block=BLOCK)
    return exchanged(model, [gradient(rank, dtype, scale)])[0]


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["", "near the smallest numbers of float16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", [1, 3])
def test_mean_is_that_of_the_scaled_codes_exactly(world_size, dtype, scale):
    """Each block is coded under the bound divided by 2^k, and no rounding touches it."""
    grads = [gradient(rank, dtype, scale) for rank in range(world_size)]
    size = max(grad.abs().max().item() for grad in grads)
    unit = codes.unit_of(torch.tensor(size), world_size, dtype)
    ks = exponents_by_hand(grads, unit.item(), size, dtype)
    powers = torch.tensor([2.0**k for k in ks], dtype=torch.float64).repeat_interleave(BLOCK)[: SHAPE[0]]
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for rank, grad in enumerate(grads):
        which = {"seed": SEED, "step": torch.tensor(0), **draws_of(rank)}
        scaled = grad.to(torch.float64) * powers
        assert torch.equal(scaled.to(dtype).to(torch.float64), scaled)
        total += codes.encode(scaled.to(dtype), unit * world_size, **which).to(torch.float64) - 1
    for rank, got in enumerate(run(world_size, exchanged_blocks, dtype, scale)):
        assert torch.equal(got.to(torch.float64), total * unit / powers), f"rank {rank}"
    assert len(set(ks)) > 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 7, 64, 1001, 5000])
def test_scaling_there_and_back_changes_no_bit(block, dtype):
    grad = gradient(0, dtype)
    size, unit = grad.abs().max().float(), codes.unit_of(grad.abs().max().float(), 2, dtype)
    exponents = block_exponents(grad, block, size, unit, 2)
    scaled = grad.clone()
    scale_blocks(scaled, block, exponents, 1)
    assert scaled.abs().max() <= size
    assert (scaled != grad).any() == (exponents != 0).any()
    scale_blocks(scaled, block, exponents, -1)
    assert_same_bits(scaled, grad)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 0.0])
def test_gradients_without_a_finite_bound_are_left_alone(bad):
    grad = torch.ones(100) if bad != 0 else torch.zeros(100)
    grad[3] = bad
    size = torch.tensor(torch.inf if bad != 0 else 0.0)
    assert block_exponents(grad, 10, size, size.to(torch.float64), 2).eq(0).all()


def estimates(rank, block, steps):
    """The mean square of what the exchange adds to the mean gradient."""
    model, _ = with_hook([SHAPE], seed=SEED, block=block)
    mean = sum(gradient(r, torch.float32) for r in range(2)) / 2
    errors = [(exchanged(model, [gradient(rank, torch.float32)])[0] - mean).double() for _ in range(steps)]
    return torch.stack(errors).square().mean().item(), torch.stack(errors).mean(0)


def test_blocks_take_variance_away_and_add_no_bias():
    whole, _ = run(2, estimates, None, 100)[0]
    blocks, bias = run(2, estimates, BLOCK, 100)[0]
    assert blocks < 0.6 * whole
    # The mean of 100 errors of 1001 coordinates has a hundredth of their variance.
    assert bias.square().mean() < 1.5 * blocks / 100
