# SPDX-License-Identifier: Apache-2.0
"""The object files of the CPU loops, which take a minute to compile: once for all tests of this folder."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import count_instructions as counts


@pytest.fixture(scope="session")
def loops(tmp_path_factory):
    """The folder of count_instructions.cpp and csrc/cpu, compiled with the flags of setup.py."""
    if shutil.which(counts.CXX[0]) is None:
        pytest.skip(f"{counts.CXX[0]} not found")
    return counts.build(tmp_path_factory.mktemp("loops"))
