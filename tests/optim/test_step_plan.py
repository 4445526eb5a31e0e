# SPDX-License-Identifier: Apache-2.0
"""A step's plan is kept for the next step, and dropped when anything it relies on has changed.

Each case makes steps with one change between them, once with plans as they are kept, once with a new plan for every
step: the same bits, or the same error.
"""

import copy
import gc
import pickle
import weakref
from collections import defaultdict

import pytest
import torch

from csgd_cuda import CSGD
from csgd_cuda.optim import base, plan

from ..helpers import assert_same_snapshots, make_params, set_grads, snapshot

SHAPES = [(5,), (300,), (2, 3), (64,)]
MISSING = torch.device("meta")


def grads_replaced(opt, params):
    for param in params[:3]:
        param.grad = param.grad.clone().neg_()


def grads_changed_in_place(opt, params):
    for param in params[:3]:
        param.grad.mul_(3)


def one_grad_gone(opt, params):
    params[1].grad = None


def one_grad_appears(opt, params):
    params[3].grad = torch.ones_like(params[3])


def all_grads_gone(opt, params):
    opt.zero_grad(set_to_none=True)


def group_added(opt, params):
    extra = torch.full((9,), 2.0, dtype=params[0].dtype, device=params[0].device).requires_grad_()
    extra.grad = torch.ones_like(extra)
    params.append(extra)
    opt.add_param_group({"params": [extra], "lr": 0.5})


def param_put_in_its_place(opt, params):
    params[0] = torch.full_like(params[0], 3.0).requires_grad_()
    params[0].grad = torch.ones_like(params[0])
    opt.param_groups[0]["params"][0] = params[0]


def param_moved_to_another_group(opt, params):
    opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())


def param_groups_in_another_order(opt, params):
    opt.param_groups.reverse()


def state_loaded(opt, params):
    state_dict = copy.deepcopy(opt.state_dict())
    for state in state_dict["state"].values():
        state["momentum_buffer"].mul_(2)
        state["step"].add_(7)
    opt.load_state_dict(state_dict)


def buffer_replaced(opt, params):
    opt.state[params[1]]["momentum_buffer"] = torch.ones_like(params[1])


def buffer_deleted(opt, params):
    del opt.state[params[1]]["momentum_buffer"]


def buffer_is_none(opt, params):
    opt.state[params[1]]["momentum_buffer"] = None


def bound_replaced(opt, params):
    bound = opt.state[params[1]]["lipschitz_bound"]
    opt.state[params[1]]["lipschitz_bound"] = torch.full_like(bound, 100)


def bound_changed_by_data(opt, params):
    bound = opt.state[params[1]]["lipschitz_bound"]
    bound.data = torch.full_like(bound, 100)


def state_of_one_replaced(opt, params):
    opt.state[params[1]] = {}


def state_cleared(opt, params):
    opt.state.clear()


def state_is_another_dict(opt, params):
    opt.state = defaultdict(dict)


def param_data_replaced(opt, params):
    params[1].data = torch.full_like(params[1], 0.5)


def layout_changed(opt, params):
    grad = params[2].grad
    params[2].data = params[2].data.t().contiguous().t()
    params[2].grad = grad


def moved_to_another_dtype(opt, params):
    for param in params:
        grad, param.grad = param.grad, None
        param.data = param.data.double()
        param.grad = None if grad is None else grad.double()
        for name, tensor in opt.state.get(param, {}).items():
            if name != "step":
                tensor.data = tensor.data.double()


def moved_to_another_device(opt, params):
    """As Module.to() does where torch.__future__.set_swap_module_params_on_conversion() is on."""
    for param in params:
        grad = param.grad
        torch.utils.swap_tensors(param, param.detach().to(MISSING).requires_grad_())
        param.grad = None if grad is None else grad.to(MISSING)


def option(name, value):
    def change(opt, params):
        opt.param_groups[0][name] = value

    change.__name__ = f"{name}={value}"
    return change


def lr_tensor_changed_in_place(dtype):
    def change(opt, params):
        opt.param_groups[0]["lr"] = torch.tensor(0.25, dtype=dtype)
        opt.step()
        opt.param_groups[0]["lr"].mul_(2)

    change.__name__ = f"lr changed in place, {dtype}"
    return change


def scaler_comes_and_goes(opt, params):
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    opt.step()
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    del opt.grad_scale, opt.found_inf


CHANGES = [
    grads_replaced, grads_changed_in_place, one_grad_gone, one_grad_appears, all_grads_gone, group_added,
    param_put_in_its_place, param_moved_to_another_group, param_groups_in_another_order, state_loaded, buffer_replaced,
    buffer_deleted, buffer_is_none, bound_replaced, bound_changed_by_data, state_of_one_replaced, state_cleared,
    state_is_another_dict, param_data_replaced, layout_changed, moved_to_another_dtype, moved_to_another_device,
    *(option("lr", v) for v in (0.5, torch.tensor(0.5), -1.0)), option("momentum", 0.0), option("momentum", 0.5),
    option("weight_decay", 0.1), option("dampening", 0.5), option("nesterov", True), option("maximize", True),
    option("calibration", 0.0), option("lipschitz", 2.0), option("bound_decay", 0.5), option("rounding", "nearest"),
    option("seed", 5), option("first_index", 100), option("first_index", 2),
    option("fused", False), option("foreach", True),
    lr_tensor_changed_in_place(torch.float32), lr_tensor_changed_in_place(torch.float16), scaler_comes_and_goes,
]  # fmt: skip


def run(change, *, fused, device, keep, options):
    """Steps with ``change`` in the middle: the snapshot after the last, and the message of an error."""
    params = make_params(SHAPES, torch.float32, device)
    set_grads(params, seed=1)
    params[3].grad = None
    opt = CSGD(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}],
        **{"lr": 0.1, "momentum": 0.9, "fused": fused, **options},
    )

    def step():
        if not keep:
            opt._plan = None
        opt.step()

    for _ in range(3):
        step()
    assert opt._plan is not None
    change(opt, params)
    error = None
    try:
        for _ in range(3):
            step()
    except (ValueError, TypeError, RuntimeError) as raised:
        error = str(raised)
    return [] if params[0].device == MISSING else snapshot(params, opt), error


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("options", [{}, {"momentum": 0, "lipschitz": 1.0}], ids=["state", "little state"])
def test_change_between_steps_is_seen(change, options, fused, device):
    if options and ("buffer" in change.__name__ or "bound" in change.__name__ or change is state_loaded):
        pytest.skip("there is no such state")
    kept, kept_error = run(change, fused=fused, device=device, keep=True, options=options)
    new, new_error = run(change, fused=fused, device=device, keep=False, options=options)
    assert kept_error == new_error
    assert_same_snapshots(kept, new)


@pytest.fixture
def plans(monkeypatch):
    """The plans made, counted."""
    made = []

    class Counted(plan.StepPlan):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(base, "StepPlan", Counted)
    return made


def test_plan_is_kept_in_ordinary_training(plans):
    """New gradients and another lr in each step: as in any training loop with a schedule."""
    params = make_params(SHAPES, torch.float32)
    opt = CSGD(params, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for step in range(6):
        opt.zero_grad()
        set_grads(params, seed=step)
        opt.step()
        schedule.step()
    assert len(plans) == 2  # the first makes the state


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_copies_do_not_share_a_plan(copied):
    params = make_params(SHAPES, torch.float32)
    opt = CSGD(params, lr=0.1, momentum=0.9)
    for step in range(3):
        set_grads(params, seed=step)
        opt.step()
    other = copied(opt)
    theirs = other.param_groups[0]["params"]
    before = [param.detach().clone() for param in params]
    set_grads(theirs, seed=3)
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    set_grads(params, seed=3)
    opt.step()
    assert_same_snapshots(snapshot(params, opt), snapshot(theirs, other))


def test_plan_keeps_no_gradient_and_no_state_alive():
    """The memory of gradients that are freed, and of state that is moved elsewhere, is free."""
    params = make_params(SHAPES, torch.float32)
    opt = CSGD(params, lr=0.1, momentum=0.9)
    for step in range(3):
        set_grads(params, seed=step)
        opt.step()
    assert opt._plan is not None
    alive = [weakref.ref(param.grad) for param in params]
    alive += [weakref.ref(tensor) for state in opt.state.values() for tensor in state.values()]
    opt.zero_grad(set_to_none=True)
    opt.state.clear()
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def states_missing_one(states, params):
    states.pop(params[1])


def states_in_another_order(states, params):
    states[params[0]] = states.pop(params[0])


def states_of_others_between(states, params):
    own = dict(states)
    states.clear()
    for param in params:
        states[torch.zeros(1)] = {"step": None}
        states[param] = own[param]


def entry_missing(states, params):
    del states[params[2]]["step"]


def entry_none(states, params):
    states[params[2]]["step"] = None


def gradient_missing(states, params):
    params[2].grad = None


GATHERED = [
    None, states_missing_one, states_in_another_order, states_of_others_between, entry_missing, entry_none,
    gradient_missing,
]  # fmt: skip


@pytest.mark.parametrize("change", GATHERED, ids=lambda change: getattr(change, "__name__", "all there"))
def test_gathering_in_python_and_compiled_is_the_same(compiled, change):
    params = make_params(SHAPES, torch.float32)
    set_grads(params, seed=0)
    names = ("step", "momentum_buffer")
    states = {param: {name: torch.zeros(()) for name in (*names, "more")} for param in params}
    if change is not None:
        change(states, params)
    lists, others = plan.gather(params, states, names), compiled.gather(params, states, names)
    if lists is None or others is None:
        assert lists is others
    else:
        assert [plan.same(*pair) for pair in zip(lists, others, strict=True)] == [True] * 3
    assert (lists is None) == (change in (states_missing_one, entry_missing, entry_none, gradient_missing))


@pytest.mark.parametrize("function", ["python", "compiled"])
def test_lists_are_the_same_only_with_the_very_same_objects(request, function):
    same = plan.same if function == "python" else request.getfixturevalue("compiled").same
    one, equal = [1.5, torch.ones(3)], [float("1.5"), torch.ones(3)]
    assert same(one, list(one))
    assert same([], [])
    for other in (equal, one[:1], [*one, None], one[::-1]):
        assert not same(one, other)


@pytest.mark.parametrize("name", ["momentum", "rounding", "nesterov", "seed", "tallies", "params", "indices"])
def test_function_of_the_operator_names_an_argument_of_another_type(compiled, name):
    lists = {name: [] for name in ("params", "grads", "momentum_buffers", "steps", "lipschitz_bounds", "indices")}
    options = {
        "lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "calibration": 0.25,
        "lipschitz": None, "bound_decay": 0.99, "rounding": "nearest", "seed": 2**64 - 1, "maximize": False,
        "fresh_momentum": False, "lr_tensor": None, "grad_scale": None, "found_inf": None, "tallies": None,
        "check_only": False,
    }  # fmt: skip
    compiled.csgd_(*lists.values(), [], **options)
    (lists if name in lists else options)[name] = object()
    with pytest.raises(TypeError, match=f"{name} must be"):
        compiled.csgd_(*lists.values(), [], **options)
    with pytest.raises(TypeError, match="17 keyword arguments"):
        compiled.csgd_(*lists.values(), [])
    with pytest.raises(TypeError, match="no keyword argument other"):
        compiled.csgd_(*lists.values(), [], **{**dict(list(options.items())[1:]), "other": 1})
