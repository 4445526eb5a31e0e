# SPDX-License-Identifier: Apache-2.0
"""The functional steps check their lists: what was wrong is named, and nothing is touched."""

import re

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import FUNCTIONS, USUAL_OPTIONS, step_operator


def lists_of(optimizer_class, params):
    """What both functions take first: a gradient of ones for each parameter, and the state of a fresh one."""
    return {
        "params": params,
        "grads": [torch.ones_like(param) for param in params],
        **{f"{name}s": [torch.zeros_like(param) for param in params] for name in optimizer_class.direction.buffers},
        "steps": [torch.tensor(0) for _ in params],
        "lipschitz_bounds": [torch.tensor(0.0) for _ in params],
    }


def make_step(optimizer_class, lists, **options):
    FUNCTIONS[optimizer_class](**{**lists, **USUAL_OPTIONS[optimizer_class], **options})


def assert_refused(optimizer_class, lists, message, **options):
    before = [tensor.clone() for tensors in lists.values() for tensor in tensors]
    with pytest.raises(ValueError, match=re.escape(message)):
        make_step(optimizer_class, lists, **options)
    for a, b in zip(before, (tensor for tensors in lists.values() for tensor in tensors), strict=True):
        assert a.device.type == "meta" or torch.equal(a, b)


WRONG_LISTS = [
    ({"grads": []}, "grads must have 1 entries"),
    ({"steps": []}, "steps must have 1 entries"),
    ({"grads": [torch.ones(4, device="meta")]}, "parameter 0: gradient is on meta, expected cpu"),
    ({"lipschitz_bounds": [torch.zeros((), device="meta")]}, "parameter 0: lipschitz_bound"),
    ({"steps": [torch.tensor(0, device="meta")]}, "parameter 0: step"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_LISTS, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_list_is_named(wrong, message, optimizer_class, fused):
    assert_refused(optimizer_class, {**lists_of(optimizer_class, [torch.ones(4)]), **wrong}, message, fused=fused)


WRONG_BUFFERS = {
    "none": (lambda buffer: [], "{}s must have 1 entries"),
    "on another device": (lambda buffer: [buffer.to("meta")], "parameter 0: {} is on meta, expected cpu"),
    "of another shape": (lambda buffer: [buffer[:3]], "parameter 0: {} has shape [3], expected [4]"),
    "overlapping": (lambda buffer: [buffer[:1].expand(4)], "parameter 0: {} may overlap itself in memory"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG_BUFFERS.values(), ids=WRONG_BUFFERS)
def test_wrong_buffer_is_named(wrong, message, optimizer_class, fused):
    for name in optimizer_class.direction.buffers:
        lists = lists_of(optimizer_class, [torch.ones(4)])
        lists[f"{name}s"] = wrong(lists[f"{name}s"][0])
        assert_refused(optimizer_class, lists, message.format(name), fused=fused)


WRONG_OPTIONS = [
    ({"lipschitz": 1.0}, "lipschitz_bounds must have 0 entries"),
    ({"indices": [2**32]}, "4294967296 is not a parameter index"),
    ({"indices": [-1]}, "-1 is not a parameter index"),
    ({"lr": torch.tensor(float("inf"))}, "lr must be a finite number, got inf"),
    ({"lr": torch.ones(3)}, "lr must be a number or a tensor with one element"),
    ({"lr": torch.tensor(0.1, device="meta")}, "lr is a tensor on meta, expected cpu"),
    ({"found_inf": torch.tensor(0.0, device="meta")}, "found_inf must be one Float on cpu"),
]
OWN_WRONG_OPTIONS = {
    CSGD: [
        ({"momentum": 0}, "momentum_buffers must have 0 entries"),
        ({"momentum": float("nan")}, "momentum must be a finite number, got nan"),
    ],
    CalibratedAdamW: [
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in [0, 1), got 1.0 among them"),
        ({"betas": (torch.tensor(-0.5), 0.9)}, "betas must be two numbers in [0, 1), got -0.5 among them"),
        ({"eps": -1e-8}, "eps must be a finite number >= 0"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number, got inf"),
    ],
}
CASES = [(each, *case) for each, own in OWN_WRONG_OPTIONS.items() for case in [*WRONG_OPTIONS, *own]]


@pytest.mark.parametrize(
    ("optimizer_class", "options", "message"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_wrong_option_is_named(optimizer_class, options, message, fused):
    assert_refused(optimizer_class, lists_of(optimizer_class, [torch.ones(4)]), message, fused=fused, **options)


@pytest.mark.parametrize("name", ["steps", "lipschitz_bounds"])
def test_state_shared_by_two_parameters_is_refused(name, optimizer_class, fused):
    lists = lists_of(optimizer_class, [torch.ones(3), torch.ones(4)])
    lists[name] = [lists[name][0]] * 2
    assert_refused(optimizer_class, lists, f"{name} must be a tensor of its own for each parameter", fused=fused)


def test_inference_tensor_outside_inference_mode_is_refused(optimizer_class, fused):
    with torch.inference_mode():
        param = torch.ones(3)
    lists = lists_of(optimizer_class, [torch.ones(3)]) | {"params": [param]}
    assert_refused(optimizer_class, lists, "parameter 0: the parameter is an inference tensor", fused=fused)
    with torch.inference_mode():
        make_step(optimizer_class, lists, weight_decay=0, fused=fused)
        torch.testing.assert_close(param, torch.full((3,), 0.9))  # the first gradient's, or its sign's
    assert int(lists["steps"][0]) == 1


def test_parameters_on_two_devices_in_one_call(optimizer_class, fused):
    lists = lists_of(optimizer_class, [torch.ones(3), torch.ones(3, device="meta")])
    assert_refused(optimizer_class, lists, "parameter 1 is on meta, expected cpu", fused=fused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"shards": [(0, 4, 4, 1)]},
            "shards must be empty or have 5 numbers for each parameter, got 4 for 1 parameters",
        ),
        ({"shards": [(-1, 4, 4, 1, 4)]}, "parameter 0: shards has offset -1"),
        ({"shards": [(0, -4, 4, 1, 4)]}, "run length -4"),
        ({"shards": [(0, 2, 1, 2, 4)]}, "expected runs that do not overlap"),
        ({"shards": [(0, 2, 4, 2, 5)]}, "group stride 5; expected runs that do not overlap"),
        ({"shards": [(0, 2, 4, 0, 5)]}, "runs 0"),
        ({"tallies": torch.zeros(0, 4, dtype=torch.int64), "indices": [1]}, "tallies must be a contiguous Long tensor"),
        ({"tallies": torch.zeros(1, dtype=torch.int64)}, "tallies must be a contiguous Long tensor"),
        ({"tallies": torch.zeros(1, 4, dtype=torch.int64, device="meta")}, "tallies must be a contiguous Long tensor"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_private_arguments_are_checked(arguments, message, optimizer_class, fused):
    params = [torch.ones(4)]
    with pytest.raises(ValueError, match=re.escape(message)):
        operator_step(optimizer_class, params, fused=fused, **arguments)
    assert params[0].eq(1).all()


def operator_step(optimizer_class, params, **arguments):
    lists = lists_of(optimizer_class, params).values()
    step_operator(*lists, direction=optimizer_class.direction, **USUAL_OPTIONS[optimizer_class], **arguments)


def test_tallies_are_counted_from_the_first_index(optimizer_class, fused):
    params = [torch.ones(4), torch.ones(3)]
    tallies = torch.zeros(3, 4, dtype=torch.int64)
    operator_step(optimizer_class, params, fused=fused, indices=[5, 7], tallies=tallies)
    assert tallies[:, 0].tolist() == [4, 0, 3]
    with pytest.raises(ValueError, match="the first must be the smallest, got 7 and 5"):
        operator_step(optimizer_class, params, fused=fused, indices=[7, 5], tallies=tallies)


def test_no_two_parameters_share_a_row_of_the_tallies(optimizer_class, fused):
    """On a GPU their step might never end. Without tallies equal indices only draw equally."""
    params = [torch.ones(4) for _ in range(5)]
    tallies = torch.zeros(4, 4, dtype=torch.int64)
    for indices, twice in (([5, 6, 7, 8, 8], 8), ([5, 8, 6, 7, 6], 6), ([5, 5, 5, 6, 7], 5)):
        with pytest.raises(ValueError, match=f"^indices: with tallies all must be different, got {twice} twice"):
            operator_step(optimizer_class, params, fused=fused, indices=indices, tallies=tallies)
    assert not tallies.any()
    assert all(param.eq(1).all() for param in params)
    operator_step(optimizer_class, params, fused=fused, indices=[5, 5, 5, 6, 7])
    assert all(param.lt(1).all() for param in params)
