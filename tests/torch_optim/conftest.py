# SPDX-License-Identifier: Apache-2.0
"""Each input of the OptimizerInfo is a test of its own."""

import pytest

from .info import DESCRIPTIONS, INFO


@pytest.fixture(params=DESCRIPTIONS)
def options(request, device):
    """The options of one input, made anew."""
    (found,) = (each for each in INFO.optim_inputs_func(device) if each.desc == request.param)
    return found.kwargs
