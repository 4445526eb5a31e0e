# SPDX-License-Identifier: Apache-2.0
"""Bad input gets an error that names what was wrong, and leaves every parameter and state untouched."""

import copy
import re

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW, extension

from ..helpers import (
    USUAL_OPTIONS,
    assert_same_bits,
    assert_same_snapshots,
    make_params,
    run_steps,
    set_grads,
    snapshot,
)

# Of both optimizers, and those of each.
BAD_OPTIONS = [
    ({"lr": -0.1}, ValueError, "lr must be a finite number >= 0"),
    ({"lr": float("nan")}, ValueError, "lr must be a finite number, got nan"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be a finite number >= 0"),
    ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor with one element"),
    ({"weight_decay": -1}, ValueError, "weight_decay must be a finite number >= 0"),
    ({"calibration": -1}, ValueError, "calibration must be a finite number >= 0"),
    ({"calibration": float("inf")}, ValueError, "calibration must be a finite number >= 0"),
    ({"lipschitz": -2.0}, ValueError, "lipschitz must be a finite number >= 0"),
    ({"bound_decay": -0.01}, ValueError, "bound_decay must be in [0, 1]"),
    ({"bound_decay": 1.01}, ValueError, "bound_decay must be in [0, 1]"),
    ({"rounding": "up"}, ValueError, "rounding must be 'stochastic' or 'nearest'"),
    ({"seed": -1}, ValueError, "seed must be in 0 ... 2^64-1"),
    ({"seed": 2**64}, ValueError, "seed must be in 0 ... 2^64-1"),
    ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ({"seed": "1"}, TypeError, "seed must be an integer"),
    ({"seed": None}, TypeError, "seed must be an integer"),
    ({"maximize": "False"}, TypeError, "maximize must be True or False, got 'False'"),  # it would count as true
    ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
    ({"fused": True, "foreach": True}, ValueError, "fused and foreach cannot both be True"),
]
OWN_BAD_OPTIONS = {
    CSGD: [
        ({"momentum": -0.1}, ValueError, "momentum must be a finite number >= 0"),
        ({"dampening": float("inf"), "momentum": 0.9}, ValueError, "dampening must be a finite number"),
        ({"nesterov": True}, ValueError, "nesterov needs momentum > 0 and dampening = 0"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError,
            "nesterov needs momentum > 0 and dampening = 0",
        ),
        ({"nesterov": "False", "momentum": 0.9}, TypeError, "nesterov must be True or False, got 'False'"),
    ],
    CalibratedAdamW: [
        ({"betas": (1.0, 0.9)}, ValueError, "betas must be two numbers in [0, 1), got 1.0 among them"),
        ({"betas": (0.9, -1e-9)}, ValueError, "betas must be two numbers in [0, 1), got -1e-09 among them"),
        ({"betas": (0.9, float("nan"))}, ValueError, "betas must be two numbers in [0, 1), got nan among them"),
        ({"betas": (0.9, torch.tensor(1.0))}, ValueError, "betas must be two numbers in [0, 1), got 1.0 among them"),
        ({"betas": (torch.ones(2), 0.9)}, ValueError, "betas must be a number or a tensor with one element, got 2"),
        ({"betas": (0.9,)}, TypeError, "betas must be two numbers, got (0.9,) of type tuple"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9 of type float"),
        ({"betas": "0.9, 0.99"}, TypeError, "betas must be two numbers, got '0.9, 0.99' of type str"),
        ({"betas": ("0.9", 0.99)}, TypeError, "betas must be two numbers, got ('0.9', 0.99) of type tuple"),
        ({"eps": -1e-8}, ValueError, "eps must be a finite number >= 0"),
        ({"eps": float("inf")}, ValueError, "eps must be a finite number >= 0"),
        ({"amsgrad": True}, ValueError, "amsgrad=True is not supported"),
    ],
}  # fmt: skip


def cases_of_each(common, own):
    """pytest.mark.parametrize over the optimizers, each with the common cases and its own."""
    cases = [(optimizer, *case) for optimizer, its_own in own.items() for case in [*common, *its_own]]
    ids = [f"{optimizer.__name__}-{options}" for optimizer, options, *_ in cases]
    return pytest.mark.parametrize(("optimizer_class", "options", "error", "message"), cases, ids=ids)


@cases_of_each(BAD_OPTIONS, OWN_BAD_OPTIONS)
def test_bad_option_is_refused_by_the_constructor(optimizer_class, options, error, message):
    params = make_params([(3,)], torch.float32)
    with pytest.raises(error, match=re.escape(message)):
        optimizer_class(params, **options)
    optimizer = optimizer_class(params)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group({"params": make_params([(4,)], torch.float32), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["sparsety", "momentun", "beta"])
def test_unknown_option_is_refused_by_the_constructor(name, optimizer_class):
    with pytest.raises(TypeError, match=f"{optimizer_class.__name__} got an unexpected keyword argument '{name}'"):
        optimizer_class(make_params([(3,)], torch.float32), **{name: 0.5})


def test_betas_become_a_tuple_of_numbers():
    """Tensors are read once, and a list that a user changes in place is not missed."""
    params = make_params([(3,)], torch.float32)
    for betas in ([0.5, 0.75], (torch.tensor(0.5), torch.tensor([0.75])), (0.5, 0.75)):
        optimizer = run_steps(params, optimizer_class=CalibratedAdamW, betas=betas)
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
        assert all(type(beta) is float for beta in optimizer.param_groups[0]["betas"])
    expected = run_steps(twins := make_params([(3,)], torch.float32), optimizer_class=CalibratedAdamW)
    params = make_params([(3,)], torch.float32)
    optimizer = run_steps(params, optimizer_class=CalibratedAdamW)
    for each, of_each in ((optimizer, params), (expected, twins)):
        each.param_groups[0]["betas"] = [0.5, 0.75] if each is optimizer else (0.5, 0.75)
        set_grads(of_each, seed=5)
        each.step()
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, expected))


INCOMPLETE = [("exp_avg",), ("exp_avg_sq",), ("step",), ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("missing", INCOMPLETE, ids=str)
def test_incomplete_state_of_adamw_is_named(missing):
    """By a step and by load_state_dict; all or nothing may be missing, and nothing is changed."""
    params = make_params([(3,), (4,)], torch.float32)
    optimizer = run_steps(params, optimizer_class=CalibratedAdamW)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for name in missing:
        del checkpoint["state"][1][name]
    before = snapshot(params, optimizer)
    expected = f"parameter 1: its state has .*, but no {', '.join(missing)};"
    with pytest.raises(ValueError, match=expected):
        optimizer.load_state_dict(checkpoint)
    assert_same_snapshots(before, snapshot(params, optimizer))
    for name in missing:
        del optimizer.state[params[1]][name]
    before = snapshot(params, optimizer)
    with pytest.raises(ValueError, match=expected):
        optimizer.step()
    assert_same_snapshots(before, snapshot(params, optimizer))
    optimizer.state[params[1]].clear()
    optimizer.step()
    assert int(optimizer.state[params[1]]["step"]) == 1


def adamw_of(params, **options):
    return CalibratedAdamW(params, **options)


WRONG_CHECKPOINTS = {
    "SGD's into AdamW": (torch.optim.SGD, {"momentum": 0.9}, adamw_of, "a parameter group of it has no betas"),
    "CSGD's into AdamW": (CSGD, {}, adamw_of, "a parameter group of it has no betas"),
    "AdamW's into CSGD": (torch.optim.AdamW, {}, CSGD, "a parameter group of it has no momentum"),
    "ours of AdamW into CSGD": (adamw_of, {}, CSGD, "a parameter group of it has no momentum"),
    "NAdam's into AdamW": (torch.optim.NAdam, {}, adamw_of, "a parameter group of it has no amsgrad"),
    "with amsgrad": (torch.optim.AdamW, {"amsgrad": True}, adamw_of, "amsgrad=True is not supported"),
    "Adam's with its decay": (
        torch.optim.Adam, {"weight_decay": 0.1}, adamw_of, "decoupled_weight_decay=False with weight_decay=0.1 is the"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "options", "ours", "message"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS)
def test_checkpoint_of_another_optimizer_is_refused(theirs, options, ours, message):
    params = make_params([(3,), (4,)], torch.float32)
    other = theirs(make_params([(3,), (4,)], torch.float32), lr=0.5, **options)
    set_grads(other.param_groups[0]["params"], seed=0)
    other.step()
    optimizer = ours(params)
    set_grads(params, seed=1)
    optimizer.step()
    before, groups = snapshot(params, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(other.state_dict())
    assert_same_snapshots(before, snapshot(params, optimizer))
    assert optimizer.state_dict()["param_groups"] == groups


def test_adam_without_decay_is_gone_on_with():
    """It makes the steps of AdamW then."""
    theirs, ours = make_params([(70,)], torch.float64), make_params([(70,)], torch.float64)
    adam = torch.optim.Adam(theirs, lr=0.1)
    set_grads(theirs, seed=0)
    adam.step()
    optimizer = adamw_of(ours)
    optimizer.load_state_dict(adam.state_dict())
    assert "decoupled_weight_decay" not in optimizer.param_groups[0]
    ours[0].data.copy_(theirs[0])
    for params, each in ((theirs, adam), (ours, optimizer)):
        set_grads(params, seed=1)
        each.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-13, atol=1e-13)


def test_means_in_float32_are_rounded_to_nearest_when_loaded():
    """Of training in mixed precision, into a bfloat16 model; the count of float32 becomes an integer."""
    theirs, ours = make_params([(70,)], torch.float32), make_params([(70,)], torch.bfloat16)
    adamw = torch.optim.AdamW(theirs)
    for step in range(3):
        set_grads(theirs, seed=step)
        adamw.step()
    optimizer = adamw_of(ours)
    optimizer.load_state_dict(adamw.state_dict())
    state = optimizer.state[ours[0]]
    assert state["step"].dtype is torch.int64
    assert int(state["step"]) == 3
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(state[name], adamw.state[theirs[0]][name].bfloat16())


SET_LATER = [
    ({"lr": float("inf")}, ValueError, "lr must be a finite number, got inf"),
    ({"lr": float("nan")}, ValueError, "lr must be a finite number, got nan"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay must be"),
    ({"calibration": -1}, ValueError, "calibration must be"),
    ({"lipschitz": -2.0}, ValueError, "lipschitz must be"),
    ({"bound_decay": 1.01}, ValueError, "bound_decay must be"),
    ({"rounding": "up"}, ValueError, "rounding must be"),
    ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor with one element"),
    ({"lr": torch.tensor(float("-inf"))}, ValueError, "lr must be a finite number, got -inf"),
    ({"lr": torch.tensor(float("nan"))}, ValueError, "lr must be a finite number, got nan"),
    ({"lr": torch.tensor([0.1]).to_sparse()}, ValueError, "lr must be a dense tensor"),
    ({"seed": -1}, ValueError, "seed must be in 0 ... 2^64-1"),
    ({"seed": 2**64}, ValueError, "seed must be in 0 ... 2^64-1"),
    ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
]
# A step takes some of what CSGD's constructor refuses, as schedulers set it; of AdamW's own options nothing.
OWN_SET_LATER = {
    CSGD: [
        ({"momentum": float("nan")}, ValueError, "momentum must be"),
        ({"dampening": float("inf")}, ValueError, "dampening must be"),
    ],
    CalibratedAdamW: OWN_BAD_OPTIONS[CalibratedAdamW],
}


@pytest.fixture
def trained(device, fused, optimizer_class):
    """Two groups that have made steps and have new gradients: an error in the second must not step the first."""
    params = make_params([(50,), (60,)], torch.float32, device)
    optimizer = run_steps(params[:1], optimizer_class=optimizer_class, fused=fused)
    optimizer.add_param_group({"params": params[1:]})
    set_grads(params, seed=1)
    optimizer.step()
    set_grads(params, seed=2)
    return params, optimizer


@cases_of_each(SET_LATER, OWN_SET_LATER)
def test_bad_option_set_later_is_refused_by_the_step(options, error, message, trained):
    params, optimizer = trained
    before = snapshot(params, optimizer)
    optimizer.param_groups[1].update(options)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.step()
    assert_same_snapshots(before, snapshot(params, optimizer))


def break_state(name, value):
    def do(params, optimizer):
        optimizer.state[params[1]][name] = value

    return do


def break_buffer(value):
    """The last of its buffers."""

    def do(params, optimizer):
        optimizer.state[params[1]][optimizer.direction.buffers[-1]] = value

    return do


def break_data(value):
    def do(params, optimizer):
        params[1].data = value

    return do


def sparse_grad(params, optimizer):
    embedding = torch.nn.Embedding(60, 1, sparse=True, device=params[1].device)
    embedding(torch.tensor([3], device=params[1].device)).sum().backward()
    params[1].data = embedding.weight.data
    params[1].grad = embedding.weight.grad


BROKEN = {
    "sparse gradient": (sparse_grad, TypeError, "parameter 1: gradient is sparse"),
    "gradient of another shape": (
        break_data(torch.zeros(61)), ValueError, "parameter 1: gradient has shape [60], expected [61]",
    ),
    "gradient of another dtype": (
        break_data(torch.zeros(60, dtype=torch.float64)), TypeError, "parameter 1: gradient has dtype",
    ),
    "overlapping parameter": (
        break_data(torch.zeros(1).expand(60)), ValueError, "parameter 1 may overlap itself in memory",
    ),
    "complex parameter": (
        break_data(torch.zeros(60, dtype=torch.complex64)), TypeError, "parameter 1 is complex",
    ),
    "parameter in float8": (
        break_data(torch.zeros(60, dtype=torch.float8_e4m3fn)), TypeError, "parameter 1 has dtype",
    ),
    "buffer of another shape": (
        break_buffer(torch.zeros(59)), ValueError, "parameter 1: {buffer} has shape [59]",
    ),
    "buffer of another dtype": (
        break_buffer(torch.zeros(60).half()), TypeError, "parameter 1: {buffer} has dtype",
    ),
    "step in float32": (
        break_state("step", torch.tensor(4.0)), ValueError, "parameter 1: step must be one",
    ),
    "bound in another dtype": (
        break_state("lipschitz_bound", torch.tensor(4.0).half()), ValueError, "parameter 1: lipschitz_bound must be",
    ),
    "loss scale of another dtype": (
        lambda params, optimizer: setattr(optimizer, "grad_scale", torch.tensor(2.0, dtype=torch.float64)),
        ValueError, "grad_scale must be one Float",
    ),
    "overflow flag of two elements": (
        lambda params, optimizer: setattr(optimizer, "found_inf", torch.zeros(2)), ValueError, "found_inf must be one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("same_group", [False, True])
@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN.keys())
def test_broken_tensor_is_refused_by_the_step(case, same_group, trained, fused, device):
    break_it, error, message = case
    params, optimizer = trained
    if device.type != "cpu" and break_it is not sparse_grad:
        pytest.skip("the broken tensors are on the CPU")
    if same_group:
        optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]
    break_it(params, optimizer)
    before = snapshot(params, optimizer)
    with pytest.raises(error, match=re.escape(message.format(buffer=optimizer.direction.buffers[-1]))):
        optimizer.step()
    assert_same_snapshots(before, snapshot(params, optimizer))


def test_error_on_the_first_step_leaves_no_state(device, fused, optimizer_class):
    params = make_params([(50,), (60,)], torch.float32, device)
    optimizer = optimizer_class(params, **USUAL_OPTIONS[optimizer_class], fused=fused)
    set_grads(params, seed=2)
    sparse_grad(params, optimizer)
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtype_is_refused_by_the_constructor(dtype, optimizer_class):
    param = torch.zeros(3).to(dtype).requires_grad_()
    with pytest.raises(TypeError, match="parameter 1"):
        optimizer_class([torch.zeros(3), param])


@pytest.mark.parametrize(
    ("optimizer_class", "options"), [(CSGD, {"momentum": 0.9}), (CSGD, {}), (CalibratedAdamW, {})], ids=str
)
def test_model_converted_between_steps_is_told_how_to_convert_the_state(optimizer_class, options, fused):
    """torch.optim.SGD would go on with a momentum buffer in the old dtype."""
    model = torch.nn.Linear(4, 3)
    optimizer = optimizer_class(model.parameters(), lr=0.1, **options, fused=fused)
    set_grads(model.parameters(), seed=0)
    optimizer.step()
    model.double()
    set_grads(model.parameters(), seed=1)
    with pytest.raises((TypeError, ValueError), match=r"optimizer.load_state_dict\(optimizer.state_dict\(\)\)"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch is older")
def test_gradient_of_a_dtype_of_its_own_is_refused(fused, optimizer_class):
    (param,) = make_params([(4,)], torch.float32)
    param.grad_dtype = torch.bfloat16
    param.grad = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"parameter 0: gradient has dtype .*param\.grad_dtype"):
        optimizer_class([param], fused=fused).step()


def test_fused_where_it_cannot_be_says_why(monkeypatch, optimizer_class):
    params = make_params([(3,)], torch.float32, "meta")
    optimizer = optimizer_class(
        params, fused=True
    )  # a model may be made on meta, and be somewhere else by the first step
    set_grads(params, seed=0)
    with pytest.raises(RuntimeError, match=r"fused=True, but .*no kernel for device type 'meta'"):
        optimizer.step()
    monkeypatch.setattr(extension, "_C", None)
    monkeypatch.setattr(extension, "load_error", "for a test")
    with pytest.raises(RuntimeError, match=r"fused=True, but the extension is not built .*for a test"):
        optimizer_class(make_params([(3,)], torch.float32), fused=True)


def test_checkpoint_of_another_model_is_refused(optimizer_class):
    optimizer = run_steps(make_params([(50,)], torch.float32), optimizer_class=optimizer_class)
    params = make_params([(60,)], torch.float32)
    other = run_steps(params, optimizer_class=optimizer_class)
    before = snapshot(params, other)
    buffer = optimizer.direction.buffers[0]
    with pytest.raises(ValueError, match=re.escape(f"parameter 0: the loaded {buffer} has shape [50]")):
        other.load_state_dict(optimizer.state_dict())
    assert_same_snapshots(before, snapshot(params, other))
