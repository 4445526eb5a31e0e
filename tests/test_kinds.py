# SPDX-License-Identifier: Apache-2.0
"""Every option of every public function takes values of its kind only; the error names the option, and what it got."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn

import csgd_cuda
from csgd_cuda import (
    CSGD,
    CalibratedAdamW,
    GradientCalibration,
    calibrate,
    calibrate_grad,
    calibrated_adamw_,
    csgd_,
    hard_threshold_,
)
from csgd_cuda.distributed import CalibratedHookState, check_ranks_agree
from csgd_cuda.optim.options import ADAMW_OPTIONS, CALIBRATION_OPTIONS, SGD_OPTIONS
from csgd_cuda.pruning.options import PRUNING_OPTIONS

from .helpers import set_grads

NUMBERS = {
    "lr", "momentum", "dampening", "weight_decay", "calibration", "bound_decay", "sparsity", "clip", "lipschitz", "eps",
    "spread",
}  # fmt: skip
INTEGERS = {
    "seed", "first_index", "threshold_every", "filter_dim", "channels", "channel_dim", "index", "rank", "block",
    "skip_below", "branches",
}  # fmt: skip
FLAGS = {
    "nesterov", "maximize", "foreach", "differentiable", "fused", "capturable", "regrow", "per_channel", "across",
    "amsgrad", "normalize", "same_on_all_ranks", "compact", "error_feedback",
}  # fmt: skip
TEXTS = {"rounding", "structure", "threshold_scope", "dropped_momentum", "where", "factors_per"}
MAY_BE_NONE = {
    "lipschitz", "foreach", "fused", "first_index", "sparsity_schedule", "channels", "index", "clip", "block", "tally",
    "lipschitz_bound", "grad_scale", "found_inf", "keeps", "indices", "process_group", "group",
}  # fmt: skip


def wrong_values(name, function):
    """Values of other kinds."""
    if (function, name) == ("calibrate_grad", "index"):
        return [None, 0, "0", [torch.tensor(0)]]
    of_kind = [] if name in MAY_BE_NONE else [None]
    if name in NUMBERS:
        return [*of_kind, "1e-3", [0.5], True, 1j, {}]
    if name in INTEGERS:
        return [*of_kind, "1", 1.5, [1], True, torch.tensor(True)]
    if name in FLAGS:
        return [*of_kind, "False", "no", [], 0.5, 2]
    if name == "betas":
        return [None, "0.9", 0.9, True, {}, [0.9], (0.9, "0.999")]
    if name in TEXTS:
        return [*of_kind, 1, True, ["element"], b"element"]
    if name == "sparsity_schedule":
        return ["cubic", 5, True, {}]
    if name == "skip":
        return [None, "of.0", 3, [1]]
    if name == "types":
        return [None, "Linear", 3, ["Conv2d"], nn.Linear(3, 4)]
    return [*of_kind, "x", 3, ["x"]] if name in LISTS else [*of_kind, "x", 3, [1], True]  # tensors, modules


LISTS = {
    "params", "grads", "momentum_buffers", "exp_avgs", "exp_avg_sqs", "steps", "lipschitz_bounds", "indices", "keeps",
    "masks",
}  # fmt: skip


def new_optimizer(**given):
    return CSGD([torch.zeros(4, 4, requires_grad=True)], **given)


def new_group(**given):
    optimizer = new_optimizer()
    try:
        optimizer.add_param_group({"params": [torch.zeros(4, 4, requires_grad=True)], **given})
    finally:
        assert len(optimizer.param_groups) == 1


def step_of_changed_group(**given):
    optimizer = new_optimizer()
    (param,) = optimizer.param_groups[0]["params"]
    set_grads([param], seed=0)
    optimizer.param_groups[0].update(given)
    try:
        optimizer.step()
    finally:
        assert not param.any()


def step_function(**given):
    call = {
        "params": [torch.zeros(4)], "grads": [torch.ones(4)], "momentum_buffers": [], "steps": [torch.tensor(0)],
        "lipschitz_bounds": [torch.tensor(0.0)], "lr": 0.1, **given,
    }  # fmt: skip
    try:
        csgd_(**call)
    finally:
        assert "params" in given or not call["params"][0].any()


def step_adamw_function(**given):
    call = {
        "params": [torch.zeros(4)], "grads": [torch.ones(4)], "exp_avgs": [torch.zeros(4)],
        "exp_avg_sqs": [torch.zeros(4)], "steps": [torch.tensor(0)], "lipschitz_bounds": [torch.tensor(0.0)], "lr": 0.1,
        **given,
    }  # fmt: skip
    try:
        calibrated_adamw_(**call)
    finally:
        assert "params" in given or not call["params"][0].any()


def gradient(**given):
    call = {"grad": torch.ones(4), "index": torch.tensor(0), "step": torch.tensor(0), **given}
    if "lipschitz" not in given and "lipschitz_bound" not in given:
        call["lipschitz_bound"] = torch.zeros((), dtype=torch.float64)
    calibrate_grad(**call)


def threshold(**given):
    call = {"params": [torch.ones(4, 4)], "keeps": [3], **given}
    try:
        hard_threshold_(**call)
    finally:
        assert "params" in given or call["params"][0].all()


OF_BRANCHES = ["branches", "normalize", "factors_per", "spread"]
FUNCTIONS = {
    "CSGD": (new_optimizer, [*SGD_OPTIONS, *PRUNING_OPTIONS]),
    "CSGD.add_param_group": (new_group, [*SGD_OPTIONS, *PRUNING_OPTIONS]),
    "CSGD.step": (step_of_changed_group, [*SGD_OPTIONS, *PRUNING_OPTIONS]),
    "csgd_": (step_function, list(inspect.signature(csgd_).parameters)),
    "CalibratedAdamW": (
        lambda **given: CalibratedAdamW([torch.zeros(4, requires_grad=True)], **given),
        [*ADAMW_OPTIONS, *PRUNING_OPTIONS],
    ),
    "calibrated_adamw_": (step_adamw_function, list(inspect.signature(calibrated_adamw_).parameters)),
    "calibrate_grad": (gradient, list(inspect.signature(calibrate_grad).parameters)),
    "GradientCalibration": (GradientCalibration, list(inspect.signature(GradientCalibration).parameters)),
    "calibrate": (
        lambda **given: calibrate(**{"model": nn.Linear(3, 4), **given}), list(inspect.signature(calibrate).parameters),
    ),
    "calibrate_filters": (
        lambda **given: csgd_cuda.calibrate_filters(**{"model": nn.Conv2d(3, 4, 1), **given}),
        list(inspect.signature(csgd_cuda.calibrate_filters).parameters),
    ),
    "GCConv2d": (lambda **given: csgd_cuda.GCConv2d(4, 4, 1, **given), OF_BRANCHES),
    "GCLinear": (lambda **given: csgd_cuda.GCLinear(4, 4, **given), [o for o in OF_BRANCHES if o != "factors_per"]),
    "fold": (csgd_cuda.fold, ["model"]),
    "hard_threshold_": (threshold, list(inspect.signature(hard_threshold_).parameters)),
    "CalibratedHookState": (
        lambda **given: CalibratedHookState(**{"module": nn.Linear(3, 4), **given}),
        list(inspect.signature(CalibratedHookState).parameters),
    ),
    "check_ranks_agree": (
        lambda **given: check_ranks_agree(**{"optimizer": new_optimizer(), **given}), ["optimizer", "group"],
    ),
    "number_layers": (csgd_cuda.number_layers, ["model"]),
    "uncalibrate": (csgd_cuda.uncalibrate, ["model"]),
    "to_semi_structured": (csgd_cuda.to_semi_structured, ["model"]),
    "export_pruned": (csgd_cuda.export_pruned, ["model"]),
    "cuttable_weights": (csgd_cuda.cuttable_weights, ["model"]),
}  # fmt: skip
CASES = [(function, name) for function, (_, names) in FUNCTIONS.items() for name in names]


@pytest.mark.parametrize(("function", "name"), CASES)
def test_value_of_another_kind_is_refused_by_the_name_of_its_option(function, name):
    call, _ = FUNCTIONS[function]
    for value in wrong_values(name, function):
        with pytest.raises(TypeError) as error:
            call(**{name: value})
        message = str(error.value)
        assert re.search(rf"\b{name}\b", message), f"{value!r}: {message}"
        assert "must be" in message, f"{value!r}: {message}"
        of = value[0] if isinstance(value, list) and len(value) == 1 else value  # of a list its entry may be named
        assert any(repr(v) in message or type(v).__name__ in message for v in (value, of)), message


def test_all_options_are_tried():
    """An option that is added to a table or a signature is of a kind that is named above."""
    for function, (_, names) in FUNCTIONS.items():
        for name in names:
            assert wrong_values(name, function), (function, name)
    assert {name for name in csgd_cuda.__all__ if name[0].islower()} - set(FUNCTIONS) == {
        "show_config",  # has no arguments
    }


GOOD = {
    "lr": [np.float32(0.5), np.float64(0.5), np.int64(1), 1, torch.tensor(0.5), torch.tensor([0.5])],
    "momentum": [np.float32(0.5), torch.tensor(0.5), np.int32(0)],
    "weight_decay": [np.float64(0.5), torch.tensor(0.5)],
    "calibration": [np.float32(0.5), 2, torch.tensor(0.5)],
    "bound_decay": [np.float32(0.5), 1, torch.tensor(0.5)],
    "lipschitz": [np.float32(0.5), 2, torch.tensor(0.5), None],
    "sparsity": [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)],
    "sparsity_schedule": [None, ("cubic", 0, 5), ["cubic", np.int64(0), 5.0]],
    "threshold_every": [np.int64(2), torch.tensor(2)],
    "filter_dim": [np.int64(1), torch.tensor(1)],
    "seed": [np.int64(3), np.uint64(2**64 - 1), torch.tensor(3)],
    "first_index": [np.int32(3), None],
    "nesterov": [np.bool_(False), 0],
    "maximize": [np.bool_(True), 1],
    "fused": [np.bool_(False), None],
    "regrow": [np.bool_(False), 0],
    "rounding": [np.str_("nearest")],
    "structure": [np.str_("filter")],
}


@pytest.mark.parametrize("name", GOOD)
def test_scalars_of_numpy_and_torch_are_what_they_stand_for(name):
    """The steps are those with the Python value."""
    for value in GOOD[name]:
        results = []
        for same in (value, value.item() if hasattr(value, "item") else value):
            param = torch.linspace(-1, 1, 16).reshape(4, 4).requires_grad_()
            optimizer = CSGD([param], **{name: same})
            for step in range(2):
                set_grads([param], seed=step)
                optimizer.step()
            results.append(param.detach().clone())
        assert torch.equal(*results), value


@pytest.mark.parametrize("name", ["calibration", "bound_decay", "lipschitz", "seed"])
def test_layers_and_functions_take_scalars_of_numpy(name):
    assert name in CALIBRATION_OPTIONS
    value = GOOD[name][0]
    model = calibrate(nn.Sequential(GradientCalibration(**{name: value}), nn.Linear(3, 4)), **{name: value})
    model(torch.ones(2, 3, requires_grad=True)).sum().backward()
    gradient(**{name: value, "channel_dim": np.int64(0), "rank": np.int64(1), "fused": np.bool_(False)})
    csgd_(
        [torch.zeros(4)], [torch.ones(4)], [], [torch.tensor(0)], [] if name == "lipschitz" else [torch.tensor(0.0)],
        lr=np.float32(0.1), indices=np.arange(1), **{name: value},
    )  # fmt: skip


def test_long_values_are_cut_in_the_message():
    with pytest.raises(TypeError, match=r"lr must be a number .*, got '1{59}\.\.\. of type str"):
        new_optimizer(lr="1" * 1000)
