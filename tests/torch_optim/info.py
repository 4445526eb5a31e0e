# SPDX-License-Identifier: Apache-2.0
"""The optimizers as PyTorch's own tests see them: an OptimizerInfo for each, with torch's inputs and ours.

The tests of this folder are named after the promises of PyTorch's test_optim.py, which is not part of the wheel;
their bodies are our own. Each runs on every device there is, with the kernel and with the reference, over the options
of options.py by pairs; all of torch's inputs are among them, and those below go through one test each besides.

Left out, because there is nothing to hold:
    complex, complex_2d                     complex parameters are refused (tests/optim/test_errors.py)
    forloop_sparse, rosenbrock_sparse       sparse gradients are refused (tests/optim/test_errors.py)
    differentiable, hypergradients          differentiable=True is refused (test_construction.py)
    defaults_changed_to_foreach, foreach_large_tensor, peak_memory_foreach
                                            foreach is accepted and ignored (test_implementations.py holds its bits)
    capturable, graph_optims                accepted and ignored; CUDA graphs are in tests/cuda/test_cuda.py
    forloop_goes_right_direction_multigpu   mixed_device_dtype has the bits of a step over several devices
    grad_scaling_autocast_fused_optimizers  tests/optim/test_optimizer.py, tests/optim/test_traps.py
    state_dict_with_cuda_params, cpu_load_state_dict
                                            one test, checkpoint_moves_between_devices
    compiled optimizers, peak memory        not a promise of the generic tests, and slow
    duplicate_params_in_one_param_group     torch warns, CSGD refuses: both would share one step, bound and momentum
                                            (test_construction.py)
    second_order closures, Adam's and LBFGS's own tests
                                            of other optimizers
"""

import copy
from functools import partial

import hypothesis
import pytest

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,  # noqa: F401  for the tests of errors
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,  # noqa: F401  for test_implementations.py
    optim_db,
)

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import OPTIMIZERS, TORCH_CLASS
from ..pairs import paired
from .options import OPTION_VALUES, merged, name_of, without_class

hypothesis.settings.load_profile("csgd")  # the import has put PyTorch's in its place

TORCH_INFOS = {cls: next(i for i in optim_db if i.optim_cls is of_torch) for cls, of_torch in TORCH_CLASS.items()}

# What a message of ours says where torch's error inputs quote torch's.
OWN_MESSAGES = {
    "Tensor lr must be 1-element": "lr must be a number or a tensor with one element, got 2 elements",
    "Invalid momentum value: -0.5": "momentum must be a finite number >= 0, got -0.5",
    "Invalid beta parameter at index 0: 1.0": r"betas must be two numbers in \[0, 1\), got 1.0 among them",
    "Invalid weight_decay value: -1": "weight_decay must be a finite number >= 0, got -1",
}
# Refused by torch for its own implementations alone: foreach, or a graph.
LIMITS_OF_TORCH = ("is not supported for capturable=False and foreach=True", "either both floats or both Tensors")


def optim_inputs_func(cls, device, dtype=None):
    """torch's inputs, without calibration and with it, and those of options.py. Anew for each call: a learning rate may
    be a tensor, which schedulers write to."""

    def of_torch(suffix, **extra):
        return [
            OptimizerInput(params=None, kwargs={**each.kwargs, **extra}, desc=each.desc + suffix)
            for each in TORCH_INFOS[cls].optim_inputs_func(device, dtype)
            if not each.kwargs.get("amsgrad")
        ]

    own = [without_class(merged(copy.deepcopy(case))) for case in paired(OPTION_VALUES[cls])]
    own = [OptimizerInput(params=None, kwargs=kwargs, desc=name_of(kwargs)) for kwargs in own]
    return [*of_torch("", calibration=0.0), *of_torch(", calibrated", calibration=1.0), *own]


def optim_error_inputs_func(cls, device, dtype):
    errors = [
        error
        for error in TORCH_INFOS[cls].optim_error_inputs_func(device, dtype)
        if not any(limit in error.error_regex.replace("\\", "") for limit in LIMITS_OF_TORCH)
    ]
    for error in errors:
        error.error_regex = OWN_MESSAGES.get(error.error_regex, error.error_regex)
    refused = [
        ({"calibration": -1.0}, "calibration must be a finite number >= 0, got -1.0"),
        ({"lipschitz": float("nan")}, "lipschitz must be a finite number >= 0, got nan"),
        ({"bound_decay": 1.5}, r"bound_decay must be in \[0, 1\], got 1.5"),
        ({"rounding": "down"}, "rounding must be 'stochastic' or 'nearest', got 'down'"),
        ({"seed": -1}, r"seed must be in 0 ... 2\^64-1, got -1"),
        ({"differentiable": True}, "differentiable=True is not supported"),
        ({"fused": True, "foreach": True}, "fused and foreach cannot both be True"),
    ]
    if cls is CalibratedAdamW:
        refused += [
            ({"amsgrad": True}, "amsgrad=True is not supported"),
            ({"eps": -1.0}, "eps must be a finite number >= 0, got -1.0"),
            ({"betas": (0.9, -0.1)}, r"betas must be two numbers in \[0, 1\), got -0.1 among them"),
            ({"lr": -0.1}, "lr must be a finite number >= 0, got -0.1"),
        ]
    return errors + [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=f"bad {' and '.join(kwargs)}"),
            error_type=ValueError,
            error_regex=message,
        )
        for kwargs, message in refused
    ]


INFOS = {
    cls: OptimizerInfo(
        cls,
        optim_inputs_func=partial(optim_inputs_func, cls),
        optim_error_inputs_func=partial(optim_error_inputs_func, cls),
        scheduler_inputs=TORCH_INFOS[cls].scheduler_inputs,
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=("foreach", "differentiable", "fused", "maximize", "capturable"),
        supports_fused_on=("cpu", "cuda"),
    )
    for cls in OPTIMIZERS
}
INFO = INFOS[CSGD]
