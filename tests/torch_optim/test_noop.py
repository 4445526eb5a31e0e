# SPDX-License-Identifier: Apache-2.0
"""Steps that must not do anything: no gradient, a zero gradient, an overflow."""

import torch

from ..helpers import DTYPES, assert_same_bits, assert_same_snapshots, make_params, set_grads, snapshot
from .common import SHAPES, go_on, optimizer_of, trained
from .options import NO_DECAY, with_options


def snapshot_and_density(params, optimizer):
    return snapshot(params, optimizer), optimizer.density()


@with_options(steps_before=[0, 2])
def test_step_is_noop_when_params_have_no_grad(steps_before, options, device, fused):
    """Neither momentum nor weight decay act, and no state is made."""
    params, optimizer = trained(options, device, steps=steps_before, fused=fused)
    optimizer.zero_grad()
    before, density = snapshot_and_density(params, optimizer)
    assert optimizer.step() is None
    assert optimizer.step(lambda: 2.5) == 2.5
    after, density_after = snapshot_and_density(params, optimizer)
    assert_same_snapshots(before, after)
    assert density == density_after
    assert len(optimizer.state) == (len(params) if steps_before else 0)


@with_options(weight_decay=NO_DECAY, dtype=DTYPES)
def test_step_is_noop_for_zero_grads(dtype, options, device, fused):
    """Zeros of either sign: not a bit changes without weight decay."""
    params = make_params([*SHAPES, (64,)], dtype, device)
    with torch.no_grad():
        params[3].zero_()
    before = [param.detach().clone() for param in params]
    optimizer = optimizer_of(params, options, fused=fused)
    for zero in (0.0, -0.0):
        for param in params:
            param.grad = torch.full_like(param, zero)
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert_same_bits(param, old)
        state = optimizer.state[param]
        assert int(state["step"]) == 2  # counted all the same: a step was made
        for name in {"momentum_buffer", "exp_avg", "exp_avg_sq", "lipschitz_bound"} & set(state):
            assert not state[name].any()
    # Where there is a bound, nothing is picked; without one, everything is, and takes a step of length zero.
    bounded = options.get("lipschitz", 0) * options.get("calibration", 1) > 0
    assert set(optimizer.density().values()) == {0.0 if bounded else 1.0}


def test_zero_grads_do_not_stop_the_momentum(device, fused):
    """A zero gradient is not a missing one: the momentum goes on."""
    params, optimizer = trained({"momentum": 0.5, "lr": 1.0, "calibration": 0.0}, device, steps=1, fused=fused)
    before = [(param.detach().clone(), optimizer.state[param]["momentum_buffer"].clone()) for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, (old, momentum_buffer) in zip(params, before, strict=True):
        assert_same_bits(param, old - momentum_buffer * 0.5)


@with_options(steps_before=[0, 2], found_inf=[1.0, 2.0])
def test_fused_does_not_step_if_foundinf(steps_before, found_inf, options, device, fused):
    """Also on the first step, also where GradScaler has added up two devices; and then training goes on."""

    def overflow(params, optimizer, grad, grad_scale):
        optimizer.found_inf = torch.tensor(found_inf, device=device)
        optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale, device=device)
        for param in params:
            param.grad = torch.full_like(param, grad)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale

    params, optimizer = trained(options, device, steps=steps_before, fused=fused)
    before, density = snapshot_and_density(params, optimizer)
    for grad, grad_scale in ((float("inf"), None), (float("nan"), 65536.0), (1.0, 0.0), (1.0, None)):
        overflow(params, optimizer, grad, grad_scale)
        after, density_after = snapshot_and_density(params, optimizer)
        if steps_before == 0:  # the state may exist by now, but as if no step had been made
            assert not any(tensor.any() for name, tensor in after if not name.startswith("param"))
            after = [(name, tensor) for name, tensor in after if name.startswith("param")]
        assert_same_snapshots(before, after)
        assert density == density_after

    untroubled, second = trained(options, device, steps=steps_before, fused=fused)
    for ps, o in ((params, optimizer), (untroubled, second)):
        go_on(ps, o, seed=1)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(untroubled, second))


@with_options(steps_before=[0, 2])
def test_fused_steps_if_no_inf_was_found(steps_before, options, device, fused):
    """found_inf of 0 is a step like any other, and a loss scale that is a power of two leaves no trace."""
    results = []
    for scale in (None, 1024.0):
        params, optimizer = trained(options, device, steps=steps_before, fused=fused)
        set_grads(params, seed=7)
        if scale is not None:
            optimizer.found_inf = torch.tensor(0.0, device=device)
            optimizer.grad_scale = torch.tensor(scale, device=device)
            for param in params:
                param.grad *= scale
        optimizer.step()
        results.append(snapshot_and_density(params, optimizer))
    assert_same_snapshots(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
