# SPDX-License-Identifier: Apache-2.0
"""Bad input gets an error that names what was wrong, and leaves every parameter and state untouched."""

import re

import pytest
import torch

from csgd_cuda import CSGD, csgd_, extension

from .helpers import assert_same_snapshots, make_params, run_steps, set_grads, snapshot

BAD_OPTIONS = [
    ({"lr": -0.1}, "lr must be a finite number >= 0"),
    ({"lr": float("nan")}, "lr must be a finite number, got nan"),
    ({"lr": torch.tensor(-1.0)}, "lr must be a finite number >= 0"),
    ({"lr": torch.ones(2)}, "lr must be a number or a tensor with one element"),
    ({"momentum": -0.1}, "momentum must be a finite number >= 0"),
    ({"weight_decay": -1}, "weight_decay must be a finite number >= 0"),
    ({"calibration": -1}, "calibration must be a finite number >= 0"),
    ({"calibration": float("inf")}, "calibration must be a finite number >= 0"),
    ({"lipschitz": -2.0}, "lipschitz must be a finite number >= 0"),
    ({"bound_decay": -0.01}, "bound_decay must be in [0, 1]"),
    ({"bound_decay": 1.01}, "bound_decay must be in [0, 1]"),
    ({"dampening": float("inf"), "momentum": 0.9}, "dampening must be a finite number"),
    ({"rounding": "up"}, "rounding must be 'stochastic' or 'nearest'"),
    ({"seed": -1}, "seed must be in 0 ... 2^64-1"),
    ({"seed": 2**64}, "seed must be in 0 ... 2^64-1"),
    ({"nesterov": True}, "nesterov needs momentum > 0 and dampening = 0"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs momentum > 0 and dampening = 0"),
    ({"differentiable": True}, "differentiable=True is not supported"),
    ({"fused": True, "foreach": True}, "fused and foreach cannot both be True"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_option_is_refused_by_the_constructor(options, message):
    params = make_params([(3,)], torch.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        CSGD(params, **options)
    optimizer = CSGD(params)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": make_params([(4,)], torch.float32), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("seed", [1.5, "1", None])
def test_seed_of_another_type(seed):
    with pytest.raises(TypeError):
        CSGD(make_params([(3,)], torch.float32), seed=seed)


SET_LATER = [
    ({"lr": float("inf")}, "lr must be a finite number, got inf"),
    ({"lr": float("nan")}, "lr must be a finite number, got nan"),
    ({"momentum": float("nan")}, "momentum must be"),
    ({"weight_decay": float("nan")}, "weight_decay must be"),
    ({"dampening": float("inf")}, "dampening must be"),
    ({"calibration": -1}, "calibration must be"),
    ({"lipschitz": -2.0}, "lipschitz must be"),
    ({"bound_decay": 1.01}, "bound_decay must be"),
    ({"rounding": "up"}, "rounding must be"),
    ({"lr": torch.ones(2)}, "lr must be a number or a tensor with one element"),
    ({"lr": torch.tensor(float("-inf"))}, "lr must be a finite number, got -inf"),
    ({"lr": torch.tensor(float("nan"))}, "lr must be a finite number, got nan"),
    ({"lr": torch.tensor([0.1]).to_sparse()}, "lr must be a dense tensor"),
    ({"seed": -1}, "seed must be in 0 ... 2^64-1"),
    ({"seed": 2**64}, "seed must be in 0 ... 2^64-1"),
    ({"differentiable": True}, "differentiable=True is not supported"),
]


@pytest.fixture
def trained(device, fused):
    """Two groups that have made steps and have new gradients: an error in the second must not step the first."""
    params = make_params([(50,), (60,)], torch.float32, device)
    optimizer = run_steps(params[:1], fused=fused)
    optimizer.add_param_group({"params": params[1:]})
    set_grads(params, seed=1)
    optimizer.step()
    set_grads(params, seed=2)
    return params, optimizer


@pytest.mark.parametrize(("options", "message"), SET_LATER, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_option_set_later_is_refused_by_the_step(options, message, trained):
    params, optimizer = trained
    before = snapshot(params, optimizer)
    optimizer.param_groups[1].update(options)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()
    assert_same_snapshots(before, snapshot(params, optimizer))


def break_state(name, value):
    def do(params, optimizer):
        optimizer.state[params[1]][name] = value

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
    "momentum buffer of another shape": (
        break_state("momentum_buffer", torch.zeros(59)), ValueError, "parameter 1: momentum_buffer has shape [59]",
    ),
    "momentum buffer of another dtype": (
        break_state("momentum_buffer", torch.zeros(60).half()), TypeError, "parameter 1: momentum_buffer has dtype",
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
    with pytest.raises(error, match=re.escape(message)):
        optimizer.step()
    assert_same_snapshots(before, snapshot(params, optimizer))


def test_error_on_the_first_step_leaves_no_state(device, fused):
    params = make_params([(50,), (60,)], torch.float32, device)
    optimizer = CSGD(params, momentum=0.9, fused=fused)
    set_grads(params, seed=2)
    sparse_grad(params, optimizer)
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtype_is_refused_by_the_constructor(dtype):
    param = torch.zeros(3).to(dtype).requires_grad_()
    with pytest.raises(TypeError, match="parameter 1"):
        CSGD([torch.zeros(3), param])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grads": []}, "grads must have 1 entries"),
        ({"steps": []}, "steps must have 1 entries"),
        ({"momentum_buffers": [torch.zeros(4)]}, "momentum_buffers must have 0 entries"),
        ({"momentum": 0.9}, "momentum_buffers must have 1 entries"),
        ({"lipschitz": 1.0}, "lipschitz_bounds must have 0 entries"),
        ({"indices": [2**32]}, "4294967296 is not a parameter index"),
        ({"lr": torch.tensor(float("inf"))}, "lr must be a finite number, got inf"),
        ({"momentum": float("nan")}, "momentum must be a finite number, got nan"),
        ({"indices": [-1]}, "-1 is not a parameter index"),
        ({"tallies": torch.zeros(0, 4, dtype=torch.int64), "indices": [1]}, "tallies must be a contiguous Long tensor"),
        ({"tallies": torch.zeros(1, dtype=torch.int64)}, "tallies must be a contiguous Long tensor"),
        ({"lr": torch.ones(3)}, "lr must be a number or a tensor with one element"),
        ({"grads": [torch.ones(4, device="meta")]}, "parameter 0: gradient is on meta, expected cpu"),
        ({"lipschitz_bounds": [torch.zeros((), device="meta")]}, "parameter 0: lipschitz_bound"),
        ({"steps": [torch.tensor(0, device="meta")]}, "parameter 0: step"),
        ({"lr": torch.tensor(0.1, device="meta")}, "lr is a tensor on meta, expected cpu"),
        ({"found_inf": torch.tensor(0.0, device="meta")}, "found_inf must be one Float on cpu"),
        ({"tallies": torch.zeros(1, 4, dtype=torch.int64, device="meta")}, "tallies must be a contiguous Long tensor"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_functional_form_checks_its_lists(arguments, message, fused):
    call = {
        "params": [torch.ones(4)],
        "grads": [torch.ones(4)],
        "momentum_buffers": [],
        "steps": [torch.tensor(0)],
        "lipschitz_bounds": [torch.tensor(0.0)],
        "lr": 0.1,
        "fused": fused,
        **arguments,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        csgd_(**call)
    assert call["params"][0].eq(1).all()


def test_tallies_are_counted_from_the_first_index(fused):
    lists = {name: [torch.ones(4), torch.ones(3)] for name in ("params", "grads")}
    lists["steps"] = [torch.tensor(0), torch.tensor(0)]
    tallies = torch.zeros(3, 4, dtype=torch.int64)
    csgd_(**lists, momentum_buffers=[], lipschitz_bounds=[], lipschitz=0.5, lr=0.1, fused=fused, indices=[5, 7],
          tallies=tallies)  # fmt: skip
    assert tallies[:, 0].tolist() == [4, 0, 3]
    with pytest.raises(ValueError, match="the first must be the smallest, got 7 and 5"):
        csgd_(**lists, momentum_buffers=[], lipschitz_bounds=[], lipschitz=0.5, lr=0.1, fused=fused, indices=[7, 5],
              tallies=tallies)  # fmt: skip


@pytest.mark.parametrize("name", ["steps", "lipschitz_bounds"])
def test_state_shared_by_two_parameters_is_refused(name, fused):
    lists = {"steps": [torch.tensor(0), torch.tensor(0)], "lipschitz_bounds": [torch.tensor(0.0), torch.tensor(0.0)]}
    lists[name] = [lists[name][0]] * 2
    params = [torch.ones(3), torch.ones(4)]
    with pytest.raises(ValueError, match=f"{name} must be a tensor of its own for each parameter"):
        csgd_(params, [torch.ones_like(p) for p in params], [], **lists, lr=0.1, fused=fused)
    assert params[0].eq(1).all()


def test_inference_tensor_outside_inference_mode_is_refused(fused):
    with torch.inference_mode():
        param = torch.ones(3)
    state = ([torch.ones(3)], [torch.zeros(3)], [torch.tensor(0)], [torch.tensor(0.0)])
    with pytest.raises(ValueError, match=r"parameter 0: the parameter is an inference tensor"):
        csgd_([param], *state, lr=0.1, momentum=0.9, fused=fused)
    assert not state[1][0].any()
    with torch.inference_mode():
        csgd_([param], *state, lr=0.1, momentum=0.9, fused=fused)
        assert param.eq(1 - torch.tensor(0.1)).all()


def test_fused_where_it_cannot_be_says_why(monkeypatch):
    params = make_params([(3,)], torch.float32, "meta")
    optimizer = CSGD(params, fused=True)  # a model may be made on meta, and be somewhere else by the first step
    set_grads(params, seed=0)
    with pytest.raises(RuntimeError, match=r"fused=True, but .*no kernel for device type 'meta'"):
        optimizer.step()
    monkeypatch.setattr(extension, "_C", None)
    monkeypatch.setattr(extension, "load_error", "for a test")
    with pytest.raises(RuntimeError, match=r"fused=True, but the extension is not built .*for a test"):
        CSGD(make_params([(3,)], torch.float32), fused=True)


def test_parameters_on_two_devices_in_one_call(fused):
    params = [torch.ones(3), torch.ones(3, device="meta")]
    with pytest.raises(ValueError, match="parameter 1 is on meta, expected cpu"):
        csgd_(
            params, [torch.ones_like(p) for p in params], [], [torch.tensor(0) for _ in params],
            [torch.tensor(0.0) for _ in params], lr=0.1, fused=fused,
        )  # fmt: skip
    assert params[0].eq(1).all()


def test_checkpoint_of_another_model_is_refused():
    optimizer = run_steps(make_params([(50,)], torch.float32))
    params = make_params([(60,)], torch.float32)
    other = run_steps(params)
    before = snapshot(params, other)
    with pytest.raises(ValueError, match=re.escape("parameter 0: the loaded momentum_buffer has shape [50]")):
        other.load_state_dict(optimizer.state_dict())
    assert_same_snapshots(before, snapshot(params, other))
