# SPDX-License-Identifier: Apache-2.0
"""The options that the tests of this folder run CSGD with: by pairs, any two values of different options together."""

import inspect

import pytest
import torch

from ..pairs import BACKENDS, paired, with_ids

# The first of each is CSGD's default. All values of PyTorch's own tests of SGD are among them (test_construction.py).
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
WITH_MOMENTUM = VALUES["momentum"][1:]
OWN = ("calibration", "lipschitz", "bound_decay", "rounding", "seed")  # the ones that torch.optim.SGD does not have


def name_of(options):
    return ", ".join(f"{name}={value!s}" for name, value in options.items()) or "defaults"


def merged(case):
    """The options of a case, which has one dict for each factor."""
    return {name: value for factor in VALUES for name, value in case[factor].items()}


def of_sgd(options):
    return {name: value for name, value in options.items() if name not in OWN}


def with_options(**factors):
    """Runs a test with ``options``, with both backends where it takes ``fused``, and with its own ``factors``.

    A factor is a list of values, or a dict from their ids; one of VALUES may be given anew. Any two values of
    different factors are together in a case.
    """

    def parametrized(test):
        of_options = {name: factors.get(name, values) for name, values in VALUES.items()}
        backends = {"fused": BACKENDS} if "fused" in inspect.signature(test).parameters else {}
        others = {name: with_ids(values) for name, values in {**backends, **factors}.items() if name not in VALUES}
        cases = [(merged(case), [case[name] for name in others]) for case in paired({**of_options, **others})]
        return pytest.mark.parametrize(
            ("options", *others),
            [[options, *(value for _, value in chosen)] for options, chosen in cases],
            ids=["-".join([name_of(options), *(id for id, _ in chosen)]) for options, chosen in cases],
            indirect=["options", *backends],
        )(test)

    return parametrized
