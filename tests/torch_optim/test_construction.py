# SPDX-License-Identifier: Apache-2.0
"""What is refused, what is printed, what a copy has, what the state holds."""

import copy
import inspect

import pytest
import torch

from csgd_cuda import CSGD

from ..helpers import TORCH_CLASS, assert_same_snapshots, make_params, set_grads, snapshot
from .common import assert_same_tree, go_on, optimizer_of, trained
from .info import INFOS, TORCH_INFOS, OptimizerErrorEnum
from .options import OPTION_VALUES, class_of, with_options, without_class

# torch's error inputs exist for the CPU only.
ERRORS = [(cls, error) for cls, info in INFOS.items() for error in info.optim_error_inputs_func("cpu", torch.float32)]


def test_optim_inputs_do_not_choose_an_implementation(optimizer_class):
    """The tests do that, for every input."""
    for each in INFOS[optimizer_class].optim_inputs_func("cpu"):
        assert not {"foreach", "fused", "differentiable"} & set(each.kwargs), each.desc


def test_all_values_of_the_inputs_of_torch_are_among_the_options(optimizer_class):
    values = OPTION_VALUES[optimizer_class].values()
    ours = [given for of_option in values for options in of_option for given in options.items()]
    for each in TORCH_INFOS[optimizer_class].optim_inputs_func("cpu"):
        if each.kwargs.get("amsgrad"):  # refused
            continue
        assert all(given in ours for given in each.kwargs.items()), each.desc


@pytest.mark.parametrize(
    ("cls", "error"), ERRORS, ids=[f"{cls.__name__}: {error.optimizer_error_input.desc}" for cls, error in ERRORS]
)
def test_errors(cls, error):
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    params = make_params([(2, 3)], torch.float32) if given.params is None else given.params
    if issubclass(error.error_type, Warning):  # a warning of torch, and ours is an error of it at once
        with pytest.warns(error.error_type, match=error.error_regex), pytest.raises(ValueError, match="given twice"):
            cls(params, **given.kwargs)
        return
    with pytest.raises(error.error_type, match=error.error_regex):
        cls(params, **given.kwargs)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_duplicate_params_in_one_group_are_refused_before_the_first_step(fused):
    """Both would advance one step and one bound; torch, too, announces an error."""
    first, second, third = make_params([(3,), (4,), (5,)], torch.float32)
    with pytest.raises(ValueError, match="parameter 2 is given twice"):
        CSGD([first, second, first], fused=fused)
    optimizer = CSGD([first], fused=fused)
    with pytest.raises(ValueError, match="parameter 3 is given twice"):
        optimizer.add_param_group({"params": [second, third, third]})
    assert [group["params"] for group in optimizer.param_groups] == [[first]]


def test_duplicate_params_across_groups_are_refused(fused):
    first, second = make_params([(3,), (4,)], torch.float32)
    optimizer = CSGD([first], fused=fused)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [second, first]})
    assert [group["params"] for group in optimizer.param_groups] == [[first]]


@with_options(made=["new", "stepped", "loaded"])
def test_optimizer_can_be_printed(made, options, device, fused):
    """Every option of every group, by name and value; and those of torch in its words."""
    params = make_params([(3,), (4,)], torch.float32, device)
    optimizer = optimizer_of([{"params": params[:1]}, {"params": params[1:], "lr": 0.125}], options, fused=fused)
    if made != "new":
        go_on(params, optimizer)
    if made == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    text = repr(optimizer)
    assert text == str(optimizer)
    assert text.startswith(f"{class_of(options).__name__} (\nParameter Group 0\n")
    groups = text.split("Parameter Group ")[1:]
    assert len(groups) == 2
    for lines, group in zip(groups, optimizer.param_groups, strict=True):
        for name, value in {**without_class(options), "fused": fused, "lr": group["lr"]}.items():
            assert f"    {name}: {value}\n" in lines
    assert "    lr: 0.125\n" in groups[1]
    of_torch = set(TORCH_CLASS[class_of(options)]([torch.zeros(1)]).defaults) - {"decoupled_weight_decay"}
    assert of_torch < set(optimizer.defaults)


def test_defaults_are_those_of_torch(optimizer_class):
    """An option that torch's optimizer has, too, is the same one when it is not given."""
    ours, theirs = (cls([torch.zeros(1)]).defaults for cls in (optimizer_class, TORCH_CLASS[optimizer_class]))
    theirs.pop("decoupled_weight_decay", None)  # no option of AdamW, but what torch makes AdamW of Adam with
    assert {name: ours[name] for name in theirs} == theirs


def test_arguments_by_position_are_those_of_torch(optimizer_class):
    ours, theirs = (
        inspect.signature(cls).parameters.values() for cls in (optimizer_class, TORCH_CLASS[optimizer_class])
    )
    positional = [[p.name for p in params if p.kind is p.POSITIONAL_OR_KEYWORD] for params in (ours, theirs)]
    assert positional[0] == positional[1]


@with_options()
def test_deepcopy_copies_all_public_attrs(options, device, fused):
    params, optimizer = trained(options, device, fused=fused)
    twin = copy.deepcopy(optimizer)
    public = {name for name in optimizer.__dict__ if not name.startswith("_")}
    assert public == {name for name in twin.__dict__ if not name.startswith("_")}
    assert {"param_groups", "state", "defaults"} <= public
    assert_same_tree(optimizer.defaults, twin.defaults)
    assert_same_tree(optimizer.state_dict(), twin.state_dict())
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twin.param_groups[0]["params"], twin))


@with_options()
def test_deepcopy_shares_nothing_and_goes_on_alike(options, device, fused):
    params, optimizer = trained(options, device, fused=fused)
    twin = copy.deepcopy(optimizer)
    copied = twin.param_groups[0]["params"]
    before = snapshot(params, optimizer)
    go_on(copied, twin, seed=1)
    twin.param_groups[0]["weight_decay"] = 0.25
    assert_same_snapshots(before, snapshot(params, optimizer))
    assert optimizer.param_groups[0]["weight_decay"] != 0.25
    go_on(params, optimizer, seed=1)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(copied, twin))


@with_options()
def test_non_empty_state(options, device, fused):
    """One step makes the state of each parameter that has a gradient, and of no other."""
    params = make_params([(3, 5), (70,), (8,)], torch.float32, device)
    optimizer = optimizer_of(params, options, fused=fused)
    set_grads(params, seed=0)
    params[1].grad = None
    optimizer.step()
    expected = {"step"}
    expected |= set(optimizer.direction.buffers_for(optimizer.param_groups[0]))
    expected |= {"lipschitz_bound"} if options.get("lipschitz") is None else set()
    assert set(optimizer.state) == {params[0], params[2]}
    for param in (params[0], params[2]):
        assert set(optimizer.state[param]) == expected
        assert int(optimizer.state[param]["step"]) == 1
        for name in expected - {"step"}:
            assert optimizer.state[param][name].any(), name
