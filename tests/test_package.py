# SPDX-License-Identifier: Apache-2.0
"""The package around the optimizer: without an extension, and what setup.py says when it cannot build one."""

import os
import runpy
import stat
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


def run_setup(tmp_path, torch_module=None, **environment):
    """Runs setup.py --name; returns the exit status and the last line of its output or error."""
    env = {**os.environ, **environment}
    if torch_module is not None:
        (tmp_path / "torch.py").write_text(torch_module)
        env["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    text = done.stderr if done.returncode else done.stdout
    return done.returncode, text.strip().splitlines()[-1]


def test_setup_without_torch_says_what_to_do(tmp_path):
    status, line = run_setup(tmp_path, "raise ImportError('no torch here')", CSGD_CUDA_BUILD="auto")
    assert status != 0
    assert line.startswith("csgd_cuda: cannot import torch (no torch here); install torch first")


def test_setup_without_torch_can_build_the_pure_package(tmp_path):
    assert run_setup(tmp_path, "raise ImportError('no torch here')", CSGD_CUDA_BUILD="none") == (0, "csgd_cuda")


def test_setup_refuses_an_unknown_build(tmp_path):
    status, line = run_setup(tmp_path, CSGD_CUDA_BUILD="gpu")
    assert status != 0
    assert line == "csgd_cuda: CSGD_CUDA_BUILD must be auto, cuda, cpu or none, got 'gpu'."


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_setup_says_why_cuda_cannot_be_built(tmp_path):
    status, line = run_setup(tmp_path, CSGD_CUDA_BUILD="cuda")
    assert status != 0
    assert line.startswith("csgd_cuda: CSGD_CUDA_BUILD=cuda, but torch")
    assert "is not a CUDA build" in line


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def setup_functions(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_toolkit_is_found_behind_a_wrapper(setup_functions, tmp_path, monkeypatch):
    """nvcc on the PATH may be a script in a folder that has no headers; nvcc itself reports its folder."""
    toolkit = tmp_path / "toolkit-13"
    write_script(toolkit / "bin" / "nvcc", f'echo "#$ _HERE_={toolkit}/bin" >&2\n')
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cuda_runtime.h").touch()
    write_script(tmp_path / "elsewhere" / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"\n')
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere" / "bin"), prepend=os.pathsep)
    assert setup_functions["find_toolkit"]() == str(toolkit)


def test_named_toolkit_without_headers_is_refused(setup_functions, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"holds no include/cuda_runtime\.h"):
        setup_functions["find_toolkit"]()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_suite_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, "tools/gpu_suite.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sees no CUDA GPU" in done.stderr
