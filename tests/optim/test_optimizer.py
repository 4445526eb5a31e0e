# SPDX-License-Identifier: Apache-2.0
"""CSGD as an optimizer: groups, state, checkpoints, closures, loss scaling."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from csgd_cuda import CSGD, CalibratedAdamW

from ..conftest import need_kernel
from ..helpers import (
    DTYPES,
    assert_same_bits,
    assert_same_snapshots,
    make_params,
    run_steps,
    set_grads,
    snapshot,
)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused_option", [None, "demanded"])
@pytest.mark.parametrize("start", [0, 2**24, 2**32 - 1])
def test_resume_restores_every_bit(dtype, start, fused_option, device, fused, optimizer_class):
    """torch casts a loaded bound to the parameter's dtype, and a loaded step to float32 when fused."""
    options = {"fused": fused if fused_option else (None if fused else False), "weight_decay": 0.01}
    params = make_params([(100,), (3, 5, 7)], dtype, device)
    optimizer = run_steps(params, steps=2, optimizer_class=optimizer_class, **options)
    for param in params:
        optimizer.state[param]["step"] += start
    checkpoint = through_a_file({"params": params, "optimizer": optimizer.state_dict()})
    resumed = [p.detach().to(device).requires_grad_() for p in checkpoint["params"]]
    second = optimizer_class(resumed, lr=7.0, fused=options["fused"])
    second.load_state_dict(checkpoint["optimizer"])
    assert_same_snapshots(snapshot(params, optimizer), snapshot(resumed, second))
    for step in range(2):
        for ps, o in ((params, optimizer), (resumed, second)):
            set_grads(ps, seed=step)
            o.step()
    assert_same_snapshots(snapshot(params, optimizer), snapshot(resumed, second))


def test_loading_shares_nothing_with_the_checkpoint(device, fused, optimizer_class):
    params = make_params([(10,)], torch.float32, device)
    optimizer = run_steps(params, fused=fused, optimizer_class=optimizer_class)
    checkpoint = optimizer.state_dict()
    second = optimizer_class(make_params([(10,)], torch.float32, device), fused=fused)
    second.load_state_dict(checkpoint)
    before = snapshot(params, optimizer)
    set_grads(second.param_groups[0]["params"], seed=0)
    second.step()
    assert_same_snapshots(before, snapshot(params, optimizer))


def test_loaded_state_has_no_more_tensors_than_the_saved_one(device, optimizer_class):
    """Each entry is one tensor, and not a view that keeps another."""
    params = make_params([(10,), (3, 4)], torch.bfloat16, device)
    optimizer = run_steps(params, optimizer_class=optimizer_class)
    checkpoint = optimizer.state_dict()
    for state in checkpoint["state"].values():
        state["step"] = state["step"].reshape(1)  # accepted as well
    optimizer.load_state_dict(checkpoint)
    for state in optimizer.state.values():
        assert state["step"].shape == ()
        assert not [name for name, tensor in state.items() if tensor._is_view()]


def test_what_others_keep_in_the_state_is_loaded_too(device):
    """Wrappers such as Lookahead do: on the parameter's device, and no longer the checkpoint's tensor."""
    params = make_params([(10,)], torch.bfloat16, device)
    optimizer = run_steps(params)
    slow = torch.full((10,), 0.1, dtype=torch.bfloat16)
    optimizer.state[params[0]]["slow"] = {"weights": [slow], "count": 3}
    optimizer.load_state_dict(optimizer.state_dict())
    loaded = optimizer.state[params[0]]["slow"]
    assert loaded["count"] == 3
    assert loaded["weights"][0].device == params[0].device
    assert loaded["weights"][0] is not slow
    assert_same_bits(loaded["weights"][0], slow)


def test_state_is_what_the_documentation_says(device, fused, optimizer_class):
    params = [p for dtype in DTYPES for p in make_params([(4, 5)], dtype, device)]
    optimizer = run_steps(params, fused=fused, optimizer_class=optimizer_class)
    buffers = {CSGD: ["momentum_buffer"], CalibratedAdamW: ["exp_avg", "exp_avg_sq"]}[optimizer_class]
    for param in params:
        state = optimizer.state[param]
        assert set(state) == {*buffers, "step", "lipschitz_bound"}
        assert all(tensor.device == param.device for tensor in state.values())
        assert all((state[name].dtype, state[name].stride()) == (param.dtype, param.stride()) for name in buffers)
        assert (state["step"].dtype, state["step"].shape, int(state["step"])) == (torch.int64, (), 3)
        opmath = torch.float64 if param.dtype is torch.float64 else torch.float32
        assert (state["lipschitz_bound"].dtype, state["lipschitz_bound"].shape) == (opmath, ())


def test_bound_is_the_decayed_running_maximum(device, fused):
    param = torch.zeros(3, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = CSGD([param], lr=0.1, bound_decay=0.5, fused=fused)
    for largest, expected in ((2.0, 2.0), (0.25, 1.0), (0.75, 0.75), (math.inf, 0.375), (math.nan, 0.1875)):
        param.grad = torch.tensor([0.0, -largest, 0.0], dtype=torch.float64, device=device)
        optimizer.step()
        assert optimizer.state[param]["lipschitz_bound"].item() == expected


def test_fixed_lipschitz_constant_needs_no_bound(device, fused):
    params = make_params([(50,)], torch.float32, device)
    optimizer = run_steps(params, lipschitz=2.0, fused=fused)
    assert "lipschitz_bound" not in optimizer.state[params[0]]


PRUNED = {"sparsity": 0.5}
COMING_BACK = {**PRUNED, "lr": 0.5}  # with steps so large that dropped weights come back
# Option: its value in one group, and what both groups have beside it, so that it matters.
OF_ONE_GROUP = {
    "lr": (torch.tensor(0.02), {}), "weight_decay": (0.3, {}), "maximize": (True, {}),
    "momentum": (0.5, {}), "dampening": (0.3, {}), "nesterov": (True, {}),
    "betas": ((0.8, 0.9), {}), "eps": (0.5, {}),
    "calibration": (1.0, {}), "lipschitz": (2.0, {}), "bound_decay": (0.1, {}), "rounding": ("nearest", {}),
    "seed": (3, {}), "first_index": (50, {}),
    "sparsity": (0.5, {}), "sparsity_schedule": (("cubic", 0, 9), PRUNED), "threshold_every": (2, PRUNED),
    "structure": ("filter", PRUNED), "filter_dim": (1, {**PRUNED, "structure": "filter"}),
    "threshold_scope": ("group", PRUNED), "regrow": (False, COMING_BACK), "dropped_momentum": ("keep", COMING_BACK),
}  # fmt: skip
# How the step is made, which no bit shows; amsgrad can only be False, and threshold_step is a count.
EXECUTION = {"fused", "foreach", "capturable", "differentiable", "amsgrad", "threshold_step"}


def test_no_option_is_left_out(optimizer_class):
    defaults = optimizer_class(make_params([(2, 2)], torch.float32, torch.device("cpu"))).defaults
    assert defaults.keys() - EXECUTION <= OF_ONE_GROUP.keys()


@pytest.mark.filterwarnings("ignore:several optimizers")  # which draw alike on purpose
@pytest.mark.parametrize("option", OF_ONE_GROUP)
def test_every_option_may_differ_between_groups(option, device, fused, optimizer_class):
    """Two groups in one optimizer make the bits of two optimizers that know their parameters' indices."""
    value, others = OF_ONE_GROUP[option]
    shapes, dtype = [(8, 12), (6, 5)], torch.bfloat16
    if option not in optimizer_class(make_params(shapes, dtype, device)).defaults:
        pytest.skip("an option of the other optimizer")
    usual = {"momentum": 0.9} if optimizer_class is CSGD else {}
    both = {"lr": 0.05, "weight_decay": 0.1, "fused": fused, **usual, **others}
    # The third one shows that the option matters.
    together, alone, without = ([make_params(shapes, dtype, device, seed=k) for k in range(2)] for _ in range(3))
    grouped = [{"params": together[0], option: value}, {"params": together[1]}]
    optimizers = [optimizer_class(grouped, **both)]
    for k in range(2):
        own = {"first_index": 2 * k} | ({option: value} if k == 0 else {})
        optimizers.append(optimizer_class(alone[k], **{**both, **own}))
    optimizers.append(optimizer_class(without[0], **both))
    for step in range(5):
        for params in (together, alone, without):
            set_grads([*params[0], *params[1]], seed=step)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip([*together[0], *together[1]], [*alone[0], *alone[1]], strict=True):
        assert_same_bits(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(together[0], without[0], strict=True))


class _RecordCalls(TorchDispatchMode):
    """check_only of each call of the step's operator."""

    def __init__(self):
        super().__init__()
        self.checks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.csgd_cuda.csgd_.default:
            self.checks.append(kwargs["check_only"])
        return func(*args, **(kwargs or {}))


def test_one_operator_call_for_each_group(device):
    """Whatever the number of tensors and dtypes; a group without gradients costs none. Several are checked first."""
    need_kernel(device)
    groups = [[p for dtype in DTYPES for p in make_params([(9,), (3, 4)], dtype, device)] for _ in range(3)]
    optimizer = CSGD([{"params": params} for params in groups], lr=0.1, momentum=0.9, fused=True)
    for with_gradients, expected in ((groups[0], [False]), (groups[0] + groups[2], [True, True, False, False])):
        set_grads(with_gradients, seed=0)
        with _RecordCalls() as calls:
            optimizer.step()
        assert calls.checks == expected


def test_density_counts_what_moved(device, fused):
    params = make_params([(1000,), (50,), (0,), (7,)], torch.float32, device)
    optimizer = CSGD(params, lr=0.5, fused=fused)
    assert optimizer.density() == {}
    assert optimizer.overall_density() is None
    for step in range(3):
        set_grads(params, seed=step)
        params[3].grad = None
        before = [p.detach().clone() for p in params]
        optimizer.step()
    changed = [int((p.detach() != b).sum()) for p, b in zip(params, before, strict=True)]
    shares = optimizer.density()
    assert shares == {0: changed[0] / 1000, 1: changed[1] / 50}
    assert 0 < shares[0] < 0.5
    assert optimizer.overall_density() == (changed[0] + changed[1]) / 1050
    optimizer.add_param_group({"params": make_params([(3,)], torch.float32, device)})
    assert optimizer.density() == shares


def test_closure_is_evaluated_with_gradients(device, fused):
    (param,) = params = make_params([(10,)], torch.float32, device)
    optimizer = CSGD(params, lr=0.1, fused=fused)

    def closure():
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_with_the_same_bits(copy_of, device, fused):
    params = make_params([(500,)], torch.bfloat16, device)
    optimizer = run_steps(params, fused=fused)
    second = copy_of(optimizer)
    copied = second.param_groups[0]["params"]
    for ps, o in ((params, optimizer), (copied, second)):
        set_grads(ps, seed=0)
        o.step()
    assert_same_snapshots(snapshot(params, optimizer), snapshot(copied, second))
    assert optimizer.density() == second.density()


def test_grad_scaler_trains(device, fused):
    """The loss scale is undone (with fused=True inside the step), an overflow is skipped, and the scale goes down."""
    param = torch.full((64,), 2.0, device=device, requires_grad=True)
    optimizer = CSGD([param], lr=0.25, calibration=0.0, fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=100)
    for loss_factor, expected in ((1.0, 1.0), (math.inf, 1.0), (1.0, 0.5)):
        optimizer.zero_grad()
        scaler.scale((param * param).sum() * loss_factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert param.eq(expected).all()
    assert scaler.get_scale() == 512.0
    assert int(optimizer.state[param]["step"]) == 2


def test_grad_scaler_after_clipping(device, fused):
    """scaler.unscale_ has divided already; then only found_inf is passed on."""
    param = torch.full((4,), 3.0, device=device, requires_grad=True)
    optimizer = CSGD([param], lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    scaler.scale((param * param).sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([param], 1.0)
    scaler.step(optimizer)
    torch.testing.assert_close(param.detach(), torch.full_like(param, 2.5))


def test_learning_rate_as_a_tensor(device, fused):
    """The same bits as the number, on the CPU or on the parameter's device; schedulers change it in place."""
    results = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64, device=device)):
        params = make_params([(100,)], torch.float64, device)
        results.append(snapshot(params, run_steps(params, lr=lr, fused=fused)))
    assert_same_snapshots(results[0], results[1])
    assert_same_snapshots(results[0], results[2])


def test_parameters_without_gradient_are_left_alone(device, fused):
    params = make_params([(5,), (6,)], torch.float32, device)
    optimizer = CSGD(params, lr=0.1, momentum=0.9, fused=fused)
    optimizer.step()
    assert not optimizer.state


def test_empty_parameter_counts_its_steps(device, fused):
    (param,) = params = make_params([(0, 3)], torch.float32, device)
    optimizer = run_steps(params, fused=fused)
    assert int(optimizer.state[param]["step"]) == 3


def test_drop_in_call_of_sgd(device):
    """The arguments of torch.optim.SGD, by position and by name."""
    params = make_params([(5,)], torch.float32, device)
    optimizer = CSGD(params, 0.1, 0.9, 0, 1e-4, True, maximize=True, foreach=True, fused=None, differentiable=False)
    set_grads(params, seed=0)
    optimizer.step()
    assert "momentum: 0.9" in repr(optimizer)


def test_named_parameters_and_schedulers(device, fused):
    model = torch.nn.Linear(4, 3).to(device)
    optimizer = CSGD(model.named_parameters(), lr=1.0, fused=fused)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(2):
        model(torch.ones(2, 4, device=device)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_backend_names_what_is_used(device, fused, optimizer_class):
    optimizer = optimizer_class(make_params([(5,)], torch.float32, device), fused=fused)
    assert optimizer.backend() == (f"{device.type} kernel" if fused else "reference")
