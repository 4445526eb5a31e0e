# SPDX-License-Identifier: Apache-2.0
"""The options that the tests of this folder run the optimizers with: by pairs, any two values of different options."""

import inspect

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW

from ..pairs import BACKENDS, paired, with_ids

# Of CSGD, and below of CalibratedAdamW, whose options have the entry "optimizer" besides. The first of each is the
# default. All values of PyTorch's own tests of SGD and AdamW are among them (test_construction.py), but for amsgrad.
# A momentum decides what dampening and nesterov may be, and a fixed bound does not decay: these are one factor each.
VALUES = {
    "lr": [{}, {"lr": 0.01}, {"lr": torch.tensor(0.001)}],
    "momentum": [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}],
    "weight_decay": [{}, {"weight_decay": 0.1}, {"weight_decay": 0.5}],
    "maximize": [{}, {"maximize": True}],
    "calibration": [{}, {"calibration": 0.0}, {"calibration": 4.0}],
    "bound": [{}, {"bound_decay": 0.0}, {"lipschitz": 6.0}],
    "rounding": [{}, {"rounding": "nearest"}],
    "seed": [{}, {"seed": 2**64 - 1}],
}
SHARED = ("lr", "maximize", "calibration", "bound", "rounding", "seed")
ADAMW_VALUES = {
    **{name: VALUES[name] for name in SHARED},
    "betas": [{}, {"betas": (0.5, 0.8)}, {"betas": (0.0, 0.5), "eps": 0.125}],
    "weight_decay": [{}, {"weight_decay": 0.1}, {"weight_decay": 0.0}],
    "optimizer": [{"optimizer": CalibratedAdamW}],
}
OPTION_VALUES = {CSGD: VALUES, CalibratedAdamW: ADAMW_VALUES}
WITH_MOMENTUM = VALUES["momentum"][1:]
NO_DECAY = [{"weight_decay": 0}]
OWN = ("calibration", "lipschitz", "bound_decay", "rounding", "seed")  # the ones that torch's optimizers do not have


def name_of(options):
    return ", ".join(f"{name}={getattr(value, '__name__', value)!s}" for name, value in options.items()) or "defaults"


def merged(case):
    """The options of a case, which has one dict for each factor."""
    return {name: value for of_factor in case.values() for name, value in of_factor.items()}


def class_of(options):
    """The optimizer that the options are of."""
    return options.get("optimizer", CSGD)


def without_class(options):
    return {name: value for name, value in options.items() if name != "optimizer"}


def of_torch(options):
    """The options that torch's optimizer has, too."""
    return {name: value for name, value in without_class(options).items() if name not in OWN}


def with_options(*, optimizers=tuple(OPTION_VALUES), **factors):
    """Runs a test with ``options`` of these optimizers, with both backends where it takes ``fused``, and with its own
    ``factors``.

    A factor is a list of values, or a dict from their ids; one of an optimizer's options may be given anew. Any two
    values of different factors are together in a case.
    """
    known = {name for values in OPTION_VALUES.values() for name in values}

    def parametrized(test):
        backends = {"fused": BACKENDS} if "fused" in inspect.signature(test).parameters else {}
        others = {name: with_ids(values) for name, values in {**backends, **factors}.items() if name not in known}
        cases = []
        for optimizer in optimizers:
            of_options = {name: factors.get(name, values) for name, values in OPTION_VALUES[optimizer].items()}
            for case in paired({**of_options, **others}):
                cases.append((merged({name: case[name] for name in of_options}), [case[name] for name in others]))
        return pytest.mark.parametrize(
            ("options", *others),
            [[options, *(value for _, value in chosen)] for options, chosen in cases],
            ids=["-".join([name_of(options), *(id for id, _ in chosen)]) for options, chosen in cases],
            indirect=["options", *backends],
        )(test)

    return parametrized
