# SPDX-License-Identifier: Apache-2.0
"""Each input of the OptimizerInfo is a test of its own."""

import pytest

try:
    from .info import DESCRIPTIONS, INFO
except pytest.skip.Exception as missing:  # a conftest.py must not be skipped
    DESCRIPTIONS = [pytest.param("", marks=pytest.mark.skip(reason=str(missing)))]


@pytest.fixture(params=DESCRIPTIONS)
def options(request, device):
    """The options of one input, made anew."""
    (found,) = (each for each in INFO.optim_inputs_func(device) if each.desc == request.param)
    return found.kwargs
