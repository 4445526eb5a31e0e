# SPDX-License-Identifier: Apache-2.0
"""Hooks of the step and of checkpoints: each fires once for each call, in torch's order, and sees what it should."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from csgd_cuda import CSGD

from ..helpers import assert_same_bits, assert_same_snapshots, make_params, set_grads, snapshot
from .common import assert_same_tree, copies_of, go_on, optimizer_of, trained
from .options import with_options


class Log(list):
    """Hooks that write down their name, and return nothing."""

    def __call__(self, name):
        return lambda *args: self.append(name)


@contextlib.contextmanager
def all_step_hooks(optimizer, log):
    handles = [
        optimizer.register_step_post_hook(log("post")),
        register_optimizer_step_post_hook(log("global post")),
        optimizer.register_step_pre_hook(log("pre")),
        register_optimizer_step_pre_hook(log("global pre")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


STEP_ORDER = ["global pre", "pre", "step", "post", "global post"]


@with_options()
def test_step_all_hooks(options, device, fused):
    """Around the step, each once, whether or not there is a closure; and none after it was removed."""
    params, optimizer = trained(options, device, fused=fused)
    log = Log()

    def closure():
        log.append("step")
        return 0.5

    with all_step_hooks(optimizer, log):
        assert optimizer.step(closure) == 0.5
        assert log == STEP_ORDER
        log.clear()
        optimizer.step()
        assert log == [name for name in STEP_ORDER if name != "step"]
    log.clear()
    go_on(params, optimizer)
    assert not log


class Derived(CSGD):
    """As a user may write it: no step of its own."""


@pytest.mark.parametrize(
    "made",
    [
        lambda o: o,
        copy.deepcopy,
        lambda o: pickle.loads(pickle.dumps(o)),
        lambda o: [CSGD(o.param_groups[0]["params"]) for _ in range(3)][-1],
        lambda o: Derived(o.param_groups[0]["params"]),
    ],
    ids=["itself", "a deepcopy", "unpickled", "one of many", "of a derived class"],
)
def test_step_hooks_fire_once_whatever_the_optimizer_is(made, device, fused):
    """torch wraps the class's step in its hooks when an optimizer is made; twice would show here."""
    _, optimizer = trained({"momentum": 0.9}, device, fused=fused)
    optimizer, log = made(optimizer), Log()
    with all_step_hooks(optimizer, log):
        set_grads(optimizer.param_groups[0]["params"], seed=0)
        optimizer.step()
    assert log == [name for name in STEP_ORDER if name != "step"]


@with_options()
def test_step_pre_hook(options, device, fused):
    """Runs before anything is changed, may set gradients, and may replace the arguments."""
    params, optimizer = trained(options, device, fused=fused)
    twins, second = trained(options, device, fused=fused)
    before = snapshot(params, optimizer)
    seen = []

    def hook(hooked, args, kwargs):
        assert hooked is optimizer
        assert_same_snapshots(before, snapshot(params, optimizer))
        set_grads(params, seed=8)
        seen.append((args, kwargs))
        return (hooked, lambda: "of the hook"), {}

    handle = optimizer.register_step_pre_hook(hook)
    assert optimizer.step() == "of the hook"
    handle.remove()
    assert seen == [((optimizer,), {})]
    set_grads(twins, seed=8)
    second.step()
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, second))


@with_options()
def test_step_post_hook(options, device, fused):
    """Runs when everything has been changed, the state as well."""
    params, optimizer = trained(options, device, steps=0, fused=fused)
    seen = []
    handle = optimizer.register_step_post_hook(lambda *args: seen.append(snapshot(params, args[0])))
    for step in range(2):
        set_grads(params, seed=step)
        optimizer.step()
        assert len(seen) == step + 1
        assert_same_snapshots(seen[-1], snapshot(params, optimizer))
        assert int(optimizer.state[params[0]]["step"]) == step + 1
    handle.remove()
    optimizer.step()
    assert len(seen) == 2


def test_step_post_hook_does_not_run_after_an_error(device, fused):
    _, optimizer = trained({}, device, fused=fused)
    log = Log()
    optimizer.param_groups[0]["momentum"] = float("nan")
    with all_step_hooks(optimizer, log), pytest.raises(ValueError, match="momentum"):
        optimizer.step()
    assert log == ["global pre", "pre"]


@pytest.mark.parametrize("overflow", [False, True])
def test_step_hooks_fire_once_under_a_grad_scaler(overflow, device, fused):
    """None where the scaler skips the step; with fused=True the step itself finds out that it must not do anything."""
    param = torch.ones(70, device=device, requires_grad=True)
    optimizer, log = CSGD([param], fused=fused), Log()
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    scaler.scale((param * (float("inf") if overflow else 1.0)).sum()).backward()
    with all_step_hooks(optimizer, log):
        scaler.step(optimizer)
    assert log == ([] if overflow and not fused else [name for name in STEP_ORDER if name != "step"])


@with_options()
def test_state_dict_pre_and_post_hooks(options, device, fused):
    """Pre-hooks see the optimizer, post-hooks the dict; the last one's result is what the caller gets."""
    _, optimizer = trained(options, device, fused=fused)
    plain, log = optimizer.state_dict(), Log()
    handles = [
        optimizer.register_state_dict_pre_hook(log("pre")),
        optimizer.register_state_dict_pre_hook(log("first pre"), prepend=True),
        optimizer.register_state_dict_post_hook(log("post")),
        optimizer.register_state_dict_post_hook(log("first post"), prepend=True),
    ]
    assert_same_tree(plain, optimizer.state_dict())
    assert log == ["first pre", "pre", "first post", "post"]

    def lr_before(hooked):
        hooked.param_groups[0]["lr"] = 0.75

    def instead(hooked, state_dict):
        assert hooked is optimizer
        return {**state_dict, "epoch": 3}

    handles += [optimizer.register_state_dict_pre_hook(lr_before), optimizer.register_state_dict_post_hook(instead)]
    found = optimizer.state_dict()
    assert (found["epoch"], found["param_groups"][0]["lr"]) == (3, 0.75)
    assert_same_tree(plain["state"], found["state"])
    for handle in handles:
        handle.remove()
    log.clear()
    assert "epoch" not in optimizer.state_dict()
    assert not log


@with_options()
def test_load_state_dict_hooks_fire_once_and_in_order(options, device, fused):
    """And the optimizer's own helper, which reads the checkpoint before torch casts it, leaves no hook behind."""
    params, optimizer = trained(options, device, fused=fused)
    second, log = optimizer_of(copies_of(params), options, fused=fused), Log()
    handles = [
        second.register_load_state_dict_pre_hook(log("pre")),
        second.register_load_state_dict_pre_hook(log("first pre"), prepend=True),
        second.register_load_state_dict_post_hook(log("post")),
        second.register_load_state_dict_post_hook(log("first post"), prepend=True),
    ]
    for _ in range(2):
        second.load_state_dict(optimizer.state_dict())
        assert log == ["first pre", "pre", "first post", "post"]
        log.clear()
    with pytest.raises(ValueError, match="number of parameter groups"):
        second.load_state_dict({"state": {}, "param_groups": []})
    assert log == ["first pre", "pre"]
    log.clear()
    for handle in handles:
        handle.remove()
    second.load_state_dict(optimizer.state_dict())
    assert not log
    assert not second._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("returns", [True, False], ids=["returns a dict", "changes it in place"])
def test_load_state_dict_pre_hook_decides_what_is_loaded(returns, dtype, device, fused):
    """Every bit of what it hands on, also of the bound and the step, which torch would cast."""
    params, optimizer = trained({"momentum": 0.9}, device, dtype=dtype, fused=fused)
    given = optimizer.state_dict()
    kept = copy.deepcopy(given)
    bound, step = torch.tensor(1 + 2.0**-20, device=device), torch.tensor(2**31 + 1, device=device)
    buffer = torch.full_like(params[0], 0.375, requires_grad=False)

    def hook(_, state_dict):
        changed = copy.deepcopy(state_dict)
        changed["state"][0].update(lipschitz_bound=bound, step=step, momentum_buffer=buffer)
        changed["param_groups"][0]["lr"] = 0.625
        if returns:
            return changed
        state_dict.update(changed)
        return None

    second = CSGD(make_params([p.shape for p in params], dtype, device), fused=fused)
    second.register_load_state_dict_pre_hook(hook)
    second.load_state_dict(given)
    assert_same_tree(kept, given)
    state = second.state[second.param_groups[0]["params"][0]]
    for name, value in (("lipschitz_bound", bound), ("step", step), ("momentum_buffer", buffer)):
        assert state[name].dtype == value.dtype
        assert_same_bits(state[name], value, name)
    assert second.param_groups[0]["lr"] == 0.625


@with_options()
def test_load_state_dict_post_hook_sees_what_was_loaded(options, device, fused):
    params, optimizer = trained(options, device, dtype=torch.bfloat16, fused=fused)
    second, seen = optimizer_of(copies_of(params), options, fused=fused), []
    second.register_load_state_dict_post_hook(lambda hooked: seen.append(copy.deepcopy(hooked.state_dict())))
    second.load_state_dict(optimizer.state_dict())
    assert len(seen) == 1
    assert_same_tree(optimizer.state_dict(), seen[0])
