# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that this version did not write: older ones, those of torch's optimizers, named ones, unfit ones."""

import copy

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import TORCH_CLASS, assert_same_bits, assert_same_snapshots, make_params, run_steps, snapshot
from .common import SHAPES, assert_same_tree, copies_of, go_on, optimizer_of, other_options, tolerance_of, trained
from .info import INFO
from .options import class_of, of_torch, with_options, without_class

OWN_NAMES = ["calibration", "lipschitz", "bound_decay", "rounding", "seed", "first_index"]
LATER_FLAGS = [*INFO.not_og_supported_flags, *OWN_NAMES]


def later_flags(options):
    return [*LATER_FLAGS, "nesterov"] if class_of(options) is CSGD else LATER_FLAGS


@with_options()
def test_can_load_older_state_dict(options, device, fused):
    """An option that the checkpoint does not know yet stays what the group was made with; all others are loaded."""
    _, optimizer = trained(options, device, fused=fused)
    own = {**without_class(other_options(options)), "maximize": True, "capturable": True, "fused": fused}
    for missing in later_flags(options):
        old = copy.deepcopy(optimizer.state_dict())
        del old["param_groups"][0][missing]
        params = make_params(SHAPES, torch.float32, device)
        second = class_of(options)([{"params": params, **own}])  # of the group alone: the defaults are others
        second.load_state_dict(old)
        group = second.param_groups[0]
        assert set(group) == set(optimizer.param_groups[0])
        assert group[missing] == own.get(missing, second.defaults[missing]), missing
        for name, value in old["param_groups"][0].items():
            if name != "params":
                assert group[name] == value, f"{name}, without {missing}"
        go_on(params, second, steps=1)
        assert all(int(state["step"]) == 3 for state in second.state.values())


@with_options()
def test_much_older_state_dict_goes_on_alike(options, device, fused):
    """All of them missing at once, where the optimizer was made with the same options."""
    params, optimizer = trained(options, device, fused=fused)
    old = copy.deepcopy(optimizer.state_dict())
    for name in later_flags(options):
        del old["param_groups"][0][name]
    twins = copies_of(params)
    second = optimizer_of(twins, options, fused=fused)
    second.load_state_dict(old)
    go_on(params, optimizer, seed=1)
    go_on(twins, second, seed=1)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, second))


@with_options(how=[{"foreach": False}, {"foreach": True}, {"fused": True}, "of an old torch", "with other ids"])
def test_can_load_state_dict_of_torch(how, options, device, fused):
    """However that one ran. torch's options are its, ours are ours, and the next step is its next step."""
    torch_class = TORCH_CLASS[class_of(options)]
    theirs = make_params(SHAPES, torch.float64, device)
    run = how if isinstance(how, dict) else {}
    if torch_class is torch.optim.AdamW and isinstance(options.get("lr"), torch.Tensor) and run.get("foreach"):
        run = {}  # torch refuses a tensor then
    torchs = torch_class(theirs, **of_torch(options), **run)
    go_on(theirs, torchs, steps=3)
    checkpoint = copy.deepcopy(torchs.state_dict())
    (group,) = checkpoint["param_groups"]
    if how == "of an old torch":
        for name in ("nesterov", "maximize", "foreach", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(name, None)
    elif how == "with other ids":  # as torch wrote them up to 1.5: addresses
        ids = [140234 + 512 * k for k in range(len(theirs))]
        group["params"] = ids
        checkpoint["state"] = {ids[k]: state for k, state in checkpoint["state"].items()}
    ours = copies_of(theirs)
    own = {"calibration": 2.0, "seed": 77, "bound_decay": 0.5, "rounding": "nearest", "fused": fused}
    missing = {name: options[name] for name in ("nesterov", "maximize") if name not in group and name in options}
    of_class = {"momentum": 0.75} if class_of(options) is CSGD else {"optimizer": CalibratedAdamW, "betas": (0.1, 0.2)}
    calibrated = optimizer_of(ours, {"lr": 9.0, **of_class, **own, **missing})
    calibrated.load_state_dict(checkpoint)
    loaded = calibrated.param_groups[0]
    assert set(loaded) == set(calibrated.defaults) | {"params"}
    for name in set(torchs.defaults) - {"fused", "foreach", "differentiable", "decoupled_weight_decay"}:
        assert loaded[name] == torchs.param_groups[0][name], name
    for name in {*OWN_NAMES, "fused", "foreach", "differentiable"}:
        assert loaded[name] == calibrated.defaults[name], name
    go_on(ours, calibrated, steps=1, seed=1)
    go_on(theirs, torchs, steps=1, seed=1)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance_of(options))
        for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            if torchs.state[b].get(name) is not None:
                torch.testing.assert_close(calibrated.state[a][name], torchs.state[b][name], **tolerance_of(options))
        counted = "step" in torchs.state[b] and 4  # SGD does not count, and a buffer is of one step at least
        assert int(calibrated.state[a]["step"]) == (counted or 1 + bool(options.get("momentum")))
    go_on(ours, calibrated, steps=1, seed=2)
    assert list(calibrated.density().values())[-1] < 0.75  # and from then on calibrated


def names_of(optimizer):
    return [group.get("param_names") for group in optimizer.param_groups]


def test_detour_over_torch_keeps_the_bound_and_the_count(device, fused, optimizer_class):
    """SGD does not count steps, AdamW does."""
    params = make_params(SHAPES, torch.float32, device)
    optimizer = run_steps(params, steps=3, optimizer_class=optimizer_class, fused=fused)
    detour = TORCH_CLASS[optimizer_class](params)
    detour.load_state_dict(optimizer.state_dict())
    go_on(params, detour, steps=2)
    back = optimizer_class(params, fused=fused)
    back.load_state_dict(detour.state_dict())
    for param in params:
        assert int(back.state[param]["step"]) == (3 if optimizer_class is CSGD else 5)
        assert_same_bits(back.state[param]["lipschitz_bound"], optimizer.state[param]["lipschitz_bound"])
        for name in optimizer_class.direction.buffers:
            assert_same_bits(back.state[param][name], detour.state[param][name])


@with_options(saved_names=[None, "abc"], own_names=[None, "xyz"])
def test_can_load_from_and_to_named_state_dict(own_names, saved_names, options, device, fused):
    """Names come along and replace what there was, and go by position all the same: they decide nothing else."""

    def optimizer_with(names, params):
        return optimizer_of(params if names is None else list(zip(names, params, strict=True)), options, fused=fused)

    params = make_params(SHAPES, torch.float32, device)
    optimizer = optimizer_with(saved_names, params)
    go_on(params, optimizer)
    state_dict = optimizer.state_dict()
    assert state_dict["param_groups"][0].get("param_names") == (None if saved_names is None else list(saved_names))
    twins = copies_of(params)
    second = optimizer_with(own_names, twins)
    second.load_state_dict(state_dict)
    kept = saved_names or own_names
    assert names_of(second) == [None if kept is None else list(kept)]
    assert_same_tree(state_dict["state"], second.state_dict()["state"])
    go_on(params, optimizer, seed=1)
    go_on(twins, second, seed=1)
    assert_same_snapshots(snapshot(params, optimizer), snapshot(twins, second))


def test_names_of_another_order_can_be_mapped_by_a_hook(device, fused):
    """What torch recommends for a model whose parameters have moved: the state follows the names."""
    params, names = make_params(SHAPES, torch.float32, device), ["a", "b", "c"]
    optimizer = CSGD(list(zip(names, params, strict=True)), momentum=0.9, fused=fused)
    go_on(params, optimizer)
    turned = list(reversed(copies_of(params)))
    second = CSGD(list(zip(reversed(names), turned, strict=True)), fused=fused)

    def by_name(loading, state_dict):
        (group,), (own,) = state_dict["param_groups"], loading.param_groups
        at = [group["param_names"].index(name) for name in own["param_names"]]
        return {
            "state": {k: state_dict["state"][old] for k, old in enumerate(at)},
            "param_groups": [{**group, "param_names": own["param_names"]}],
        }

    second.register_load_state_dict_pre_hook(by_name)
    second.load_state_dict(optimizer.state_dict())
    assert names_of(second) == [["c", "b", "a"]]
    assert_same_snapshots(snapshot(params, optimizer), snapshot(list(reversed(turned)), second))


UNFIT = {
    "fewer groups": (lambda d: d["param_groups"].pop(), "different number of parameter groups"),
    "fewer parameters": (lambda d: d["param_groups"][1]["params"].pop(), "doesn't match the size"),
    "momentum of another shape": (
        lambda d: d["state"][1].update(momentum_buffer=torch.zeros(71)),
        r"parameter 1: the loaded momentum_buffer has shape \[71\], expected \[70\]",
    ),
}


@pytest.mark.parametrize("case", UNFIT.values(), ids=UNFIT.keys())
def test_unfit_state_dict_changes_nothing(case, device, fused):
    spoil, message = case
    params = make_params(SHAPES, torch.float32, device)
    optimizer = CSGD([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], momentum=0.9, fused=fused)
    go_on(params, optimizer)
    before, unfit = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    spoil(unfit)
    unfit["param_groups"][0]["lr"] = 123.0
    calls = []
    optimizer.register_load_state_dict_post_hook(calls.append)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(unfit)
    assert_same_tree(before, optimizer.state_dict())
    assert not calls
    optimizer.load_state_dict(before)
    assert_same_tree(before, optimizer.state_dict())


PRUNED = {
    "sparsity": 0.5, "sparsity_schedule": ("cubic", 0, 4), "threshold_every": 2, "structure": "filter",
    "threshold_scope": "group", "regrow": False, "dropped_momentum": "keep",
}  # fmt: skip


@pytest.mark.parametrize("of", ["CSGD", "an older CSGD", "SGD"])
@pytest.mark.parametrize("in_group", [False, True])
def test_checkpoint_of_a_training_without_pruning_leaves_pruning_as_it_is(in_group, of, device, fused):
    """It is then pruned from the loaded weights on, by a schedule that begins."""
    params = make_params(SHAPES, torch.float32, device)
    optimizer = (torch.optim.SGD if of == "SGD" else CSGD)(params, lr=0.1, momentum=0.9)
    go_on(params, optimizer)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    if of == "an older CSGD":
        for name in [*PRUNED, "threshold_step"]:
            del checkpoint["param_groups"][0][name]
    twins = copies_of(params)
    groups = [{"params": twins, **PRUNED}] if in_group else twins
    pruned = CSGD(groups, fused=fused, **({} if in_group else PRUNED))
    go_on(twins, pruned, steps=1)
    pruned.load_state_dict(checkpoint)
    (group,) = pruned.param_groups
    assert {name: group[name] for name in PRUNED} == PRUNED
    assert (group["threshold_step"], group["lr"], group["momentum"]) == (0, 0.1, 0.9)
    go_on(twins, pruned, steps=4)
    assert int((twins[0] != 0).any(dim=1).sum()) == 1  # of three filters: round(1.5) are dropped


def test_checkpoint_of_a_pruned_training_brings_its_pruning(device, fused):
    params, optimizer = trained(PRUNED, device, steps=3, fused=fused)
    for own in ({}, {"sparsity": 0.25, "structure": "element"}):
        second = CSGD(copies_of(params), fused=fused, **own)
        second.load_state_dict(optimizer.state_dict())
        (group,) = second.param_groups
        assert {name: group[name] for name in PRUNED} == PRUNED
        assert group["threshold_step"] == 3


def test_pruning_that_was_switched_off_stays_off_in_copies(device, fused):
    _, optimizer = trained(PRUNED, device, fused=fused)
    optimizer.param_groups[0]["sparsity"] = 0.0
    assert copy.deepcopy(optimizer).param_groups[0]["sparsity"] == 0.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["sparsity"] == 0.0
