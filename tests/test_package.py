# SPDX-License-Identifier: Apache-2.0
"""The package around the optimizer, also without an extension."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import csgd_cuda
from csgd_cuda import extension

ROOT = Path(__file__).parent.parent


def test_extension_is_built():
    """The tests are about the kernels; they run without them only where CSGD_CUDA_BUILD=none says so."""
    if os.environ.get("CSGD_CUDA_BUILD") != "none":
        assert extension.load_error is None


def test_public_names_are_documented():
    for name in csgd_cuda.__all__:
        assert len(getattr(csgd_cuda, name).__doc__) > 60


def test_show_config_says_what_is_used(capsys):
    text = csgd_cuda.show_config()
    assert capsys.readouterr().out == text + "\n"
    assert torch.__version__ in text
    assert ("cpu: kernel" in text) == (extension.load_error is None)
    assert ("no GPU is visible" in text) == (not torch.cuda.is_available())


WITHOUT_EXTENSION = """
import sys
sys.modules["csgd_cuda._C"] = None  # as if it had not been built
import torch
from csgd_cuda import CSGD, show_config
show_config()
param = torch.ones(100, requires_grad=True)
optimizer = CSGD([param], lr=0.1, momentum=0.9)
for _ in range(3):
    optimizer.zero_grad()
    param.square().sum().backward()
    optimizer.step()
assert optimizer.backend() == "reference", optimizer.backend()
assert param.square().mean() < 0.5
try:
    CSGD([param], fused=True)
except RuntimeError as error:
    print(error)
"""


def test_package_trains_without_the_extension():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "extension: not available: " in done.stdout
    assert "cpu: reference, since the extension is not built" in done.stdout
    assert "fused=True, but the extension is not built" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_suite_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, "tools/gpu_suite.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sees no CUDA GPU" in done.stderr
