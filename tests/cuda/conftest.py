# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from .emulation_programs import Programs


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Shared with the other processes of the session (pytest-xdist)."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_emulation"
    folder.mkdir(exist_ok=True)
    return Programs(folder, max(1, os.cpu_count() // workers))
