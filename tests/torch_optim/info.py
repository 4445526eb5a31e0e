# SPDX-License-Identifier: Apache-2.0
"""CSGD as PyTorch's own optimizer tests see it: an OptimizerInfo with SGD's inputs and ours.

The tests of this folder are named after the promises of PyTorch's test_optim.py, which is not part of the wheel;
their bodies are our own. Each runs on every device there is, with the kernel and with the reference, over the options
of options.py by pairs; all of SGD's inputs are among them, and those below go through one test each besides.

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

import hypothesis
import pytest
import torch

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,  # noqa: F401  for the tests of errors
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,  # noqa: F401  for test_implementations.py
    optim_db,
)

from csgd_cuda import CSGD

from ..pairs import paired
from .options import VALUES, merged, name_of

hypothesis.settings.load_profile("csgd")  # the import has put PyTorch's in its place

SGD_INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)

# What a message of CSGD says where SGD's error inputs quote SGD's.
OWN_MESSAGES = {
    "Tensor lr must be 1-element": "lr must be a number or a tensor with one element, got 2 elements",
    "Invalid momentum value: -0.5": "momentum must be a finite number >= 0, got -0.5",
}


def optim_inputs_func_csgd(device, dtype=None):
    """SGD's inputs, without calibration and with it, and those of options.py. Anew for each call: a learning rate may
    be a tensor, which schedulers write to."""

    def of_sgd(suffix, **extra):
        return [
            OptimizerInput(params=None, kwargs={**each.kwargs, **extra}, desc=each.desc + suffix)
            for each in SGD_INFO.optim_inputs_func(device, dtype)
        ]

    own = [merged(copy.deepcopy(case)) for case in paired(VALUES)]
    own = [OptimizerInput(params=None, kwargs=kwargs, desc=name_of(kwargs)) for kwargs in own]
    return [*of_sgd("", calibration=0.0), *of_sgd(", calibrated", calibration=1.0), *own]


def optim_error_inputs_func_csgd(device, dtype):
    errors = SGD_INFO.optim_error_inputs_func(device, dtype)
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
    return errors + [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=f"bad {' and '.join(kwargs)}"),
            error_type=ValueError,
            error_regex=message,
        )
        for kwargs, message in refused
    ]


INFO = OptimizerInfo(
    CSGD,
    optim_inputs_func=optim_inputs_func_csgd,
    optim_error_inputs_func=optim_error_inputs_func_csgd,
    scheduler_inputs=SGD_INFO.scheduler_inputs,
    supported_impls=("foreach", "fused"),
    not_og_supported_flags=("foreach", "differentiable", "fused", "maximize", "capturable"),
    supports_fused_on=("cpu", "cuda"),
)
