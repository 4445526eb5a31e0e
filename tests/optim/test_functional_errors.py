# SPDX-License-Identifier: Apache-2.0
"""csgd_cuda.csgd_ checks its lists: what was wrong is named, and nothing is touched."""

import re

import pytest
import torch

from csgd_cuda import csgd_

from ..helpers import step_operator


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
        ({"lr": torch.ones(3)}, "lr must be a number or a tensor with one element"),
        ({"grads": [torch.ones(4, device="meta")]}, "parameter 0: gradient is on meta, expected cpu"),
        ({"lipschitz_bounds": [torch.zeros((), device="meta")]}, "parameter 0: lipschitz_bound"),
        ({"steps": [torch.tensor(0, device="meta")]}, "parameter 0: step"),
        ({"lr": torch.tensor(0.1, device="meta")}, "lr is a tensor on meta, expected cpu"),
        ({"found_inf": torch.tensor(0.0, device="meta")}, "found_inf must be one Float on cpu"),
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


def test_parameters_on_two_devices_in_one_call(fused):
    params = [torch.ones(3), torch.ones(3, device="meta")]
    with pytest.raises(ValueError, match="parameter 1 is on meta, expected cpu"):
        csgd_(
            params, [torch.ones_like(p) for p in params], [], [torch.tensor(0) for _ in params],
            [torch.tensor(0.0) for _ in params], lr=0.1, fused=fused,
        )  # fmt: skip
    assert params[0].eq(1).all()


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
def test_private_arguments_are_checked(arguments, message, fused):
    params = [torch.ones(4)]
    lists = ([torch.ones(4)], [], [torch.tensor(0)], [torch.tensor(0.0)])
    with pytest.raises(ValueError, match=re.escape(message)):
        step_operator(params, *lists, lr=0.1, fused=fused, **arguments)
    assert params[0].eq(1).all()


def step_with_tallies(lists, indices, tallies, fused):
    state = {"momentum_buffers": [], "bounds": [], "steps": [torch.tensor(0) for _ in indices]}
    step_operator(**lists, **state, lipschitz=0.5, lr=0.1, fused=fused, indices=indices, tallies=tallies)


def test_tallies_are_counted_from_the_first_index(fused):
    lists = {name: [torch.ones(4), torch.ones(3)] for name in ("params", "grads")}
    tallies = torch.zeros(3, 4, dtype=torch.int64)
    step_with_tallies(lists, [5, 7], tallies, fused)
    assert tallies[:, 0].tolist() == [4, 0, 3]
    with pytest.raises(ValueError, match="the first must be the smallest, got 7 and 5"):
        step_with_tallies(lists, [7, 5], tallies, fused)


def test_no_two_parameters_share_a_row_of_the_tallies(fused):
    """On a GPU their step might never end. Without tallies equal indices only draw equally."""
    lists = {name: [torch.ones(4) for _ in range(5)] for name in ("params", "grads")}
    tallies = torch.zeros(4, 4, dtype=torch.int64)
    for indices, twice in (([5, 6, 7, 8, 8], 8), ([5, 8, 6, 7, 6], 6), ([5, 5, 5, 6, 7], 5)):
        with pytest.raises(ValueError, match=f"^indices: with tallies all must be different, got {twice} twice"):
            step_with_tallies(lists, indices, tallies, fused)
    assert not tallies.any()
    assert all(param.eq(1).all() for param in lists["params"])
    step_with_tallies(lists, [5, 5, 5, 6, 7], None, fused)
    assert all(param.lt(1).all() for param in lists["params"])
