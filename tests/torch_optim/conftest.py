# SPDX-License-Identifier: Apache-2.0
"""The options of a case; which ones there are: options.py."""

import copy

import pytest


@pytest.fixture
def options(request):
    """A copy for each test: schedulers write to a learning rate that is a tensor."""
    return copy.deepcopy(request.param)
