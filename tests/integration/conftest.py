# SPDX-License-Identifier: Apache-2.0
"""The models of these tests are on the CPU, whatever devices there are."""

import pytest
import torch

from ..conftest import need_kernel


@pytest.fixture(params=[True, False], ids=["kernel", "reference"])
def fused(request):
    if request.param:
        need_kernel(torch.device("cpu"))
    return request.param
