# SPDX-License-Identifier: Apache-2.0
"""Density, bounds, and the warning where the reference steps parameters on a GPU."""

import contextlib
import copy
import gc
import linecache
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode

from csgd_cuda import CSGD, extension

from ..helpers import DTYPES, make_params, run_steps, set_grads


def test_bounds_are_those_of_the_state_and_of_the_groups(device, fused, optimizer_class):
    """Exactly, in every dtype; the parameter without a gradient has none yet."""
    params = [make_params([(40,)], dtype, device)[0] for dtype in DTYPES]
    fixed = make_params([(5,), (6,)], torch.float32, device)
    optimizer = optimizer_class([{"params": params}, {"params": fixed, "lipschitz": 0.3}], lr=0.1, fused=fused)
    assert list(optimizer.lipschitz_bounds().values()) == [0.0] * 4 + [0.3] * 2
    set_grads(params[:3], seed=0)
    optimizer.step()
    bounds = list(optimizer.lipschitz_bounds().values())
    largest = [optimizer.state[p]["lipschitz_bound"].item() for p in params[:3]]
    if optimizer_class is CSGD:  # without momentum: the gradients are the directions
        assert largest == [p.grad.abs().max().item() for p in params[:3]]
    assert bounds == [*largest, 0.0, 0.3, 0.3]
    assert all(largest)


def test_an_estimate_counts_only_while_no_constant_is_given(device, fused, optimizer_class):
    (param,) = params = make_params([(40,)], torch.float32, device)
    optimizer = run_steps(params, optimizer_class=optimizer_class, fused=fused)
    estimate = optimizer.state[param]["lipschitz_bound"].item()
    optimizer.param_groups[0]["lipschitz"] = 2
    assert optimizer.lipschitz_bounds() == {0: 2.0}
    optimizer.param_groups[0]["lipschitz"] = None
    assert optimizer.lipschitz_bounds() == {0: estimate}


def test_figures_go_by_the_names_of_the_parameters(device, fused, optimizer_class):
    """Those of named_parameters(), over all groups, and of a checkpoint that brings its own."""
    model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Linear(10, 3)).to(device)
    names = [name for name, _ in model.named_parameters()]
    named = list(model.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "lipschitz": 2.0}]
    optimizer = optimizer_class(groups, lr=0.1, fused=fused)
    unnamed = optimizer_class(copy.deepcopy(model).parameters(), lr=0.1, fused=fused)
    for each in (optimizer, unnamed):
        params = [param for group in each.param_groups for param in group["params"]]
        for step in range(2):
            set_grads(params, seed=step)
            each.step()
    for figures in (optimizer.density(), optimizer.lipschitz_bounds()):
        assert list(figures) == names
    assert optimizer.lipschitz_bounds()["1.bias"] == 2.0
    for figures in (unnamed.density(), unnamed.lipschitz_bounds()):
        assert list(figures) == [0, 1, 2, 3]
    assert list(optimizer.density().values())[:3] == list(unnamed.density().values())[:3]
    sizes = {name: param.numel() for name, param in named}
    moved = sum(round(share * sizes[name]) for name, share in optimizer.density().items())
    assert optimizer.overall_density() == moved / sum(sizes.values())
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0]["param_names"] = ["a", "b", "c"]
    optimizer.load_state_dict(checkpoint)
    assert list(optimizer.density()) == ["a", "b", "c", "1.bias"]


def test_names_that_two_parameters_share_tell_none_apart(fused):
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    optimizer = CSGD([{"params": list(model.named_parameters())} for model in models], fused=fused)
    assert list(optimizer.lipschitz_bounds()) == [0, 1, 2, 3]


def test_no_figure_is_nan_after_a_checkpoint_was_loaded(device, fused, optimizer_class):
    """In the optimizer that saved it the density stays; another one has made no step."""
    params = make_params([(40,), (0,), (3,)], torch.float32, device)
    optimizer = run_steps(params, optimizer_class=optimizer_class, fused=fused)
    density, overall = optimizer.density(), optimizer.overall_density()
    assert set(density) == {0, 2}
    other = optimizer_class(make_params([(40,), (0,), (3,)], torch.float32, device), fused=fused)
    for each in (optimizer, other):
        each.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert not any(map(math.isnan, [*each.density().values(), *each.lipschitz_bounds().values()]))
    assert (optimizer.density(), optimizer.overall_density()) == (density, overall)
    assert (other.density(), other.overall_density()) == ({}, None)


def test_bounds_are_read_at_once(device, fused, monkeypatch):
    """On a GPU each read waits for it."""
    optimizer = run_steps(make_params([(40,)] * 5, torch.float32, device), fused=fused)
    reads = []
    for name in ("item", "tolist", "__float__", "cpu"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, read=read, name=name: reads.append(name) or read(*a))
    assert len(optimizer.lipschitz_bounds()) == 5
    assert reads == ["tolist"]


def test_there_are_no_numbers_on_meta(optimizer_class):
    params = make_params([(40,)], torch.float32, "meta") + make_params([(40,)], torch.float32)
    optimizer = run_steps(params, optimizer_class=optimizer_class)
    assert list(optimizer.density()) == [1]
    bounds = optimizer.lipschitz_bounds()
    assert math.isnan(bounds[0])
    assert bounds[1] > 0


@pytest.fixture
def without_cuda_kernel(monkeypatch):
    """As in a process that has not warned yet, with an extension for the CPU alone. Needs no GPU."""
    monkeypatch.setattr(extension, "_with_cuda", False)
    monkeypatch.setattr(extension, "_warned_of", set())


@pytest.mark.usefixtures("without_cuda_kernel")
def test_reference_on_a_gpu_is_warned_of_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [extension.backend_name(torch.device("cuda"), None) for _ in range(3)]
    assert names == ["reference"] * 3
    (warning,) = caught
    assert warning.category is UserWarning
    for part in ("since the extension", "CSGD_CUDA_BUILD=cuda", "fused=False"):
        assert part in str(warning.message)


@pytest.mark.usefixtures("without_cuda_kernel")
@pytest.mark.parametrize("frozen", [False, True])
def test_warning_points_at_the_users_line(frozen):
    """That of the constructor, or of the step where that is the first to see the parameter. Fake tensors: no GPU."""
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        param = torch.nn.Parameter(torch.empty(8, device="cuda"), requires_grad=not frozen)
        optimizer = CSGD([param], momentum=0.9)
        assert len(caught) == (not frozen)
        param.grad = torch.empty(8, device="cuda")
        for _ in range(3):
            with contextlib.suppress(RuntimeError):  # for torch without CUDA cannot make the step
                optimizer.step()
    (warning,) = caught
    assert "pure-PyTorch reference" in str(warning.message)
    assert warning.filename == __file__
    assert (
        linecache.getline(__file__, warning.lineno)
        .strip()
        .startswith("optimizer.step()" if frozen else "optimizer = CSGD(")
    )


@pytest.mark.usefixtures("without_cuda_kernel")
def test_no_warning_where_the_reference_is_meant_or_nothing_can_be_built():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extension.takes_kernel(torch.device("cuda"), False)
        for device_type in ("cpu", "mps"):
            extension.takes_kernel(torch.device(device_type), None)


@pytest.mark.usefixtures("without_cuda_kernel")
def test_warning_does_not_break_a_graph():
    """torch.compile cannot trace it; the constructor, which is not compiled, has warned before."""

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return x + len(extension.backend_name(torch.device("cuda"), None))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compiled(torch.zeros(())) == len("reference")
    assert not extension._warned_of


class Replayed:
    """Rows of tallies to which a step writes as often as it likes, as a CUDA graph of that step would."""

    def __init__(self, optimizer, device):
        rows = optimizer._tallies.rows(device, 1)
        self.address, self.alive = rows.data_ptr(), weakref.ref(rows)


@pytest.fixture
def stepped(device, fused):
    """An optimizer that has made a step, and the device of its parameter."""
    return run_steps(make_params([(40,)], torch.float32, device), steps=1, fused=fused), device


def add_and_step(optimizer, device):
    optimizer.add_param_group({"params": make_params([(30,)], torch.float32, device)})
    set_grads([p for group in optimizer.param_groups for p in group["params"]], seed=0)
    optimizer.step()


def test_counts_of_an_earlier_step_keep_their_memory(stepped):
    """A CUDA graph of the earlier step still writes to the old rows. The density is read from the new ones."""
    optimizer, device = stepped
    earlier = Replayed(optimizer, device)
    add_and_step(optimizer, device)
    density = optimizer.density()
    gc.collect()
    rows = earlier.alive()
    assert rows is not None
    assert rows.data_ptr() == earlier.address != optimizer._tallies.rows(device, 2).data_ptr()
    rows[0, 0] = 7  # a replay
    assert optimizer.density() == density
    assert len(density) == 2
    assert all(share > 0 for share in density.values())


def test_counts_stay_in_their_memory_while_no_parameters_are_added(stepped):
    """Neither steps nor a loaded checkpoint replace the rows: the density is that of the last step made here."""
    optimizer, device = stepped
    earlier = Replayed(optimizer, device)
    set_grads(optimizer.param_groups[0]["params"], seed=1)
    for _ in range(3):
        optimizer.step()
    density = optimizer.density()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.density() == density
    optimizer.step()
    assert optimizer.density()[0] > 0
    assert optimizer._tallies.rows(device, 1) is earlier.alive()
    assert optimizer._tallies.rows(device, 1).data_ptr() == earlier.address


def test_a_kept_plan_counts_in_the_memory_in_use_now(stepped):
    """Of a copy, whose first step makes no state, the plan of the first step is kept already."""
    optimizer, device = stepped
    add_and_step(optimizer, device)
    other = copy.deepcopy(optimizer)
    for group in other.param_groups:
        set_grads(group["params"], seed=3)
    other.step()
    plan = other._plan
    assert plan is not None
    rows = other._tallies.rows_on
    rows[device] = torch.full_like(rows[device], -1)
    assert other.density() == {}
    other.step()
    assert other._plan is plan
    assert len(other.density()) == 2


def test_outgrown_counts_are_never_more_than_those_in_use(stepped):
    optimizer, device = stepped
    for k in range(40):
        add_and_step(optimizer, device)
        assert sum(map(len, optimizer._tallies._outgrown)) <= len(optimizer._tallies.rows(device, k + 2)) <= 2 * (k + 2)


def test_a_copy_counts_in_memory_of_its_own(stepped):
    optimizer, device = stepped
    add_and_step(optimizer, device)
    density = optimizer.density()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.density() == {}
        for group in other.param_groups:
            set_grads(group["params"], seed=3)
        other.step()
        assert not other._tallies._outgrown
        assert len(other.density()) == 2
    assert optimizer.density() == density
