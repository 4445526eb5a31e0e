# SPDX-License-Identifier: Apache-2.0
"""first_index: which random draws a group's parameters take."""

import pytest
import torch

from ..helpers import USUAL_OPTIONS, assert_same_bits, make_params, run_steps, set_grads


def test_first_index_makes_several_optimizers_draw_as_one(fused, device, optimizer_class):
    shapes = [(300,), (7,), (64, 3), (1000,)]
    together = make_params(shapes, torch.float32, device)
    one = run_steps(together, optimizer_class=optimizer_class, fused=fused)
    apart = make_params(shapes, torch.float32, device)
    groups = [{"params": apart[3:], "first_index": 3}, {"params": apart[1:3], "first_index": 1}]
    options = USUAL_OPTIONS[optimizer_class]
    several = [optimizer_class(params, **options, fused=fused) for params in (apart[:1], groups)]
    for step in range(3):
        set_grads(apart, seed=100 + step)
        for optimizer in several:
            optimizer.step()
    for a, b in zip(together, apart, strict=True):
        assert_same_bits(a, b)
    shares = one.density()
    assert several[0].density() == {0: shares[0]}
    assert several[1].density() == {0: shares[3], 1: shares[1], 2: shares[2]}


@pytest.mark.parametrize("first_index", [-1, 2**32, 2**32 - 1, 1.5])
def test_first_index_out_of_range_is_an_error(first_index, optimizer_class):
    with pytest.raises((ValueError, TypeError), match=r"first_index|integer"):
        optimizer_class(make_params([(3,), (4,)], torch.float32), first_index=first_index)


def test_first_index_of_the_constructor_is_that_of_the_whole_optimizer(fused, device, optimizer_class):
    """Groups without their own count on from it, one that joins later as well; copies and checkpoints keep it."""
    shapes = [(300,), (7,), (64, 3), (1000,)]
    params = make_params(shapes, torch.float32, device)
    one = run_steps([torch.zeros(1, device=device), *params], optimizer_class=optimizer_class, fused=fused)
    apart = make_params(shapes, torch.float32, device)
    groups, options = [{"params": apart[:1]}, {"params": apart[1:3]}], USUAL_OPTIONS[optimizer_class]
    optimizer = optimizer_class(groups, **options, fused=fused, first_index=1)
    optimizer.add_param_group({"params": apart[3:]})
    assert [group["first_index"] for group in optimizer.param_groups] == [1, 2, 4]
    for step in range(3):
        set_grads([torch.zeros(1), *apart], seed=100 + step)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    for a, b in zip(params, apart, strict=True):
        assert_same_bits(a, b)
    assert list(one.density().values())[1:] == list(optimizer.density().values())


def test_groups_that_would_draw_the_same_are_an_error(optimizer_class):
    params = make_params([(3,), (4,), (5,)], torch.float32)
    with pytest.raises(ValueError, match="draw the same random numbers"):
        optimizer_class([{"params": params[:2]}, {"params": params[2:], "first_index": 1}])
    optimizer = optimizer_class([{"params": params[:1], "first_index": 1}])
    with pytest.raises(ValueError, match="draw the same random numbers"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:], "first_index": 5})
    optimizer.param_groups[0]["first_index"] = 6
    set_grads(params, seed=0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="draw the same random numbers"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
