# SPDX-License-Identifier: Apache-2.0
"""The package around the optimizer, also without an extension."""

import os
import shutil
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


TRAIN = """
import sys, warnings
# An editable install finds modules of the package elsewhere.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import csgd_cuda
    csgd_cuda.show_config()
    param = torch.ones(100, requires_grad=True)
    optimizer = csgd_cuda.CSGD([param], lr=0.1)
    param.square().sum().backward()
    for _ in range(3):
        optimizer.step()
    csgd_cuda.extension.takes_kernel(torch.device("cuda"), None)
    csgd_cuda.calibrate_grad(torch.ones(3), index=torch.tensor(0), step=torch.tensor(0), lipschitz=1.0)
print("backend:", optimizer.backend())
for warning in caught:
    print("warning:", warning.filename, warning.message)
"""
BUILT = """
def build_info():
    return {"torch": "%s", "cuda": %s, "cuda_architectures": "", "compiler": "none", "cpu_isa": "none"}
"""
RELEASE = torch.__version__.partition("+")[0]
UNUSABLE = {  # the name and text of a file beside the package's modules, and what is said of it
    "not a library": ("_C.so", "", "file too short"),
    "undefined symbol": ("_C.py", "raise ImportError('undefined symbol: launch')", "undefined symbol: launch"),
    "any other error": ("_C.py", "raise OSError('no such driver')", "OSError: no such driver"),
    "older build": ("_C.py", "", "has no attribute 'build_info'"),
    "another Python": ("_C.cpython-30-x86_64-linux-gnu.so", "", "_C.cpython-30-x86_64-linux-gnu.so is for another Py"),
    "another torch": ("_C.py", BUILT % ("1.13.1", None), f"for torch 1.13.1, and this is torch {torch.__version__}"),
    "another minor release": ("_C.py", BUILT % (RELEASE.rpartition(".")[0] + "9.0", None), "and this is torch"),
    "another CUDA": ("_C.py", BUILT % (RELEASE, "'9.2'"), "built for CUDA 9.2, and this torch is for"),
}  # fmt: skip


def train_with(folder, name, text):
    """The output of TRAIN in a copy of the package that has this file for an extension."""
    shutil.copytree(ROOT / "csgd_cuda", folder / "csgd_cuda", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    if name is not None:
        (folder / "csgd_cuda" / name).write_text(text)
    (folder / "train.py").write_text(TRAIN)
    done = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_extension_that_cannot_be_used_is_warned_of_once(case, tmp_path):
    name, text, reason = UNUSABLE[case]
    printed = train_with(tmp_path, name, text)
    warned = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert warned[0].startswith(f"warning: {tmp_path / 'train.py'} The compiled extension of csgd_cuda is there, but")
    assert reason in warned[0]
    assert any(line.startswith("extension: not available: ") and reason in line for line in printed.splitlines())
    assert "cpu: reference, since the extension is there, but cannot be used (" in printed
    assert "backend: reference" in printed


def test_no_extension_is_no_reason_for_a_warning_on_a_cpu(tmp_path):
    printed = train_with(tmp_path, None, "")
    assert "cpu: reference, since the extension is not built (No module named 'csgd_cuda._C')" in printed
    assert [line.partition("since ")[2][:26] for line in printed.splitlines() if line.startswith("warning: ")] == [
        "the extension is not built"  # the one for a GPU
    ]


@pytest.mark.parametrize(("built", "here", "fits"), [
    ("2.13.0", "2.13.0", True), ("2.13.0", "2.13.0+cpu", True), ("2.13.0", "2.13.0+cu130", True),
    ("2.14.0", "2.14.0.dev20260101+cu130", True), ("2.14.0", "2.14.0a0+git1234567", True), ("2.13.0", "2.14.0", False),
    ("2.13.0", "2.13.1", False), ("2.13.0", "2.1.30", False),
])  # fmt: skip
def test_torch_is_compared_by_its_release(built, here, fits, monkeypatch):
    monkeypatch.setattr(torch, "__version__", here)
    assert (extension._why_not_for_this_torch({"torch": built, "cuda": None}) is None) == fits


@pytest.mark.parametrize(("built", "here", "fits"), [
    (None, None, True), (None, "13.0", True), ("12.6", "12.8", True), ("12.6", "13.0", False), ("12.6", None, False),
])  # fmt: skip
def test_cuda_is_compared_by_its_major_version(built, here, fits, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", here)
    assert (extension._why_not_for_this_torch({"torch": torch.__version__, "cuda": built}) is None) == fits


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_suite_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, "tools/gpu_suite.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sees no CUDA GPU" in done.stderr
