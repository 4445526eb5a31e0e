# SPDX-License-Identifier: Apache-2.0
"""setup.py: what it builds for, the flags that keep the bits, and what it says when it cannot build."""

import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent


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
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CFLAGS", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


NVCC = """case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
--list-gpu-arch) printf 'compute_%s\\n' {architectures} ;;
--dryrun) echo "#$ _HERE_=$(dirname "$0")" >&2 ;;
esac
"""


def make_toolkit(folder, version="13.0", architectures="75 80 90 100 120"):
    """A stand-in for a CUDA toolkit, whose nvcc only answers what setup.py wants to know of it."""
    write_script(folder / "bin" / "nvcc", NVCC.format(version=version, architectures=architectures))
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    return str(folder)


def torch_with(cuda, *capabilities):
    """A stand-in for a torch built with CUDA of this version, which sees GPUs of these compute capabilities."""
    gpus = SimpleNamespace(device_count=lambda: len(capabilities), get_device_capability=lambda k: capabilities[k])
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda), cuda=gpus)


def test_toolkit_is_found_behind_a_wrapper(setup_functions, tmp_path, monkeypatch):
    """nvcc on the PATH may be a script in a folder that has no headers; nvcc itself reports its folder."""
    toolkit = make_toolkit(tmp_path / "toolkit-13")
    write_script(tmp_path / "elsewhere" / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"\n')
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere" / "bin"), prepend=os.pathsep)
    assert setup_functions["find_toolkit"]() == toolkit


def test_named_toolkit_without_headers_is_refused(setup_functions, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"holds no include/cuda_runtime\.h"):
        setup_functions["find_toolkit"]()


TOOLKITS = {
    "12.0": "is CUDA 12.0 and the kernels need 12.1 or later; install a newer toolkit, or set CUDA_HOME to one",
    "12.1": None,
    "12.10": None,
    "13.0": "torch is built with CUDA 12.6 and the toolkit in .* is 13.0; set CUDA_HOME",
}


@pytest.mark.parametrize("version", TOOLKITS)
def test_toolkit_must_be_that_of_torch_and_new_enough(version, setup_functions, tmp_path, capsys):
    sentence, toolkit = TOOLKITS[version], make_toolkit(tmp_path / "toolkit", version)
    assert setup_functions["want_cuda"]("auto", torch_with("12.6"), toolkit) == (sentence is None)
    assert ("building for the CPU only" in capsys.readouterr().out) == (sentence is not None)
    if sentence is not None:
        with pytest.raises(SystemExit, match=f"CSGD_CUDA_BUILD=cuda, but .*{sentence}"):
            setup_functions["want_cuda"]("cuda", torch_with("12.6"), toolkit)


def test_visible_gpu_must_be_new_enough(setup_functions, tmp_path, monkeypatch):
    """Where nothing else is said, torch compiles for the visible GPUs."""
    why_no_cuda, toolkit = setup_functions["why_no_cuda"], make_toolkit(tmp_path / "toolkit", "12.6")
    assert why_no_cuda(torch_with("12.6", (9, 0), (7, 0)), toolkit) is None
    old = torch_with("12.6", (9, 0), (6, 1))
    assert why_no_cuda(old, toolkit).startswith("GPU 1 has compute capability 6.1 and the kernels need 7.0 or later")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert why_no_cuda(old, toolkit) is None


@pytest.mark.parametrize(
    ("known", "expected"),
    [("70 75 80 86 90", "8.0;9.0+PTX"), ("75 80 90 100 103 120 121", "8.0;9.0;10.0;12.0+PTX"), ("75 80", "8.0+PTX")],
)
def test_architectures_are_those_that_nvcc_and_torch_know(known, expected, setup_functions, tmp_path, monkeypatch):
    toolkit = make_toolkit(tmp_path / "toolkit", architectures=known)
    assert setup_functions["default_architectures"](toolkit) == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", expected)
    assert len(cpp_extension._get_cuda_arch_flags()) == expected.count(".") + 1  # one more for PTX


@pytest.mark.parametrize(("listed", "old"), [("6.1;8.0", "6.1"), ("5.0+PTX", "5.0"), ("9.0 Pascal", "Pascal")])
def test_old_architectures_are_refused(listed, old, setup_functions):
    with pytest.raises(SystemExit) as stop:
        setup_functions["check_architectures"](listed)
    assert str(stop.value) == (
        f"csgd_cuda: TORCH_CUDA_ARCH_LIST is '{listed}' and the kernels need 7.0 or later; leave out {old}."
    )


@pytest.mark.parametrize("listed", ["", "native", "7.0", "7.5;9.0a;12.0+PTX", "Volta Hopper", "10.0"])
def test_other_architectures_are_accepted(listed, setup_functions):
    setup_functions["check_architectures"](listed)


# The flags


@pytest.mark.parametrize("variable", ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"])
@pytest.mark.parametrize("flag", ["--use_fast_math", "-use_fast_math", "-fmad=true", "--ftz true", "-prec-div=false"])
def test_nvcc_flags_that_change_bits_are_refused(variable, flag, setup_functions, monkeypatch):
    monkeypatch.setenv(variable, f"-lineinfo {flag}")
    with pytest.raises(SystemExit, match=f"{variable} has {flag}, which changes the bits of a step; leave it out"):
        setup_functions["check_nvcc_flags"]()
    monkeypatch.setenv(variable, "-lineinfo -fmad=false")
    setup_functions["check_nvcc_flags"]()


def test_debug_information_is_made_where_the_flags_ask_for_it(setup_functions, monkeypatch):
    assert setup_functions["cxx_flags"]() == [*setup_functions["CXX_FLAGS"], "-g0"]
    monkeypatch.setenv("CXXFLAGS", "-Wall -ggdb")
    assert setup_functions["cxx_flags"]() == setup_functions["CXX_FLAGS"]


FAST = [
    "-ffast-math", "-Ofast", "-ffinite-math-only", "-funsafe-math-optimizations", "-freciprocal-math",
    "-fassociative-math -fno-signed-zeros -fno-trapping-math",
]  # fmt: skip


@pytest.mark.parametrize("flag", FAST)
def test_fast_arithmetic_is_an_error_and_undone_by_the_flags(flag, setup_functions):
    """What every source file includes refuses it; setup.py's flags, which come last, take it back."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-fsyntax-only", "-x", "c++", "-include", str(ROOT / "csrc" / "core" / "params.h")]
    command += [os.devnull, *flag.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "leave out -ffast-math, -Ofast and their parts" in done.stderr
    subprocess.run([*command, *setup_functions["CXX_FLAGS"]], check=True)


# Stands for the package's sources: takes what a careless compiler would get wrong.
SOURCE = """
#include "../core/params.h"
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED int is_nan(double x) { return x != x; }
EXPORTED double lost(double a, double b) { return (a + b) - a; }
"""

USE = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.is_nan.argtypes, library.lost.argtypes = [ctypes.c_double], [ctypes.c_double] * 2
library.lost.restype = ctypes.c_double
print(library.is_nan(float("nan")), library.lost(1e20, 1.0), 5e-324 * 3.0 != 0)
"""


def build_with_fast_flags(folder, change=lambda text: text):
    """Runs setup.py on SOURCE in a folder, with -ffast-math for compiler and linker; ``change``: of setup.py."""
    for path, text in (
        ("setup.py", change((ROOT / "setup.py").read_text())),
        ("csrc/ops/source.cpp", SOURCE),
        *((f"csrc/core/{path.name}", path.read_text()) for path in (ROOT / "csrc" / "core").iterdir()),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    fast = "-Ofast -ffast-math -funsafe-math-optimizations"
    flags = dict.fromkeys(("CFLAGS", "CXXFLAGS", "LDFLAGS"), fast)
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
        cwd=folder, env={**os.environ, **flags, "CSGD_CUDA_BUILD": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_fast_arithmetic_in_the_environment_changes_no_bits(tmp_path):
    """NaN stays NaN, sums keep their order, and subnormal numbers are not made zero in the process."""
    done = build_with_fast_flags(tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (library,) = (tmp_path / "out").rglob("*.so")
    used = subprocess.run([sys.executable, "-c", USE, library], capture_output=True, text=True, check=True)
    assert used.stdout == "1 0.0 True\n"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_build_stops_where_fast_arithmetic_is_not_undone(tmp_path):
    done = build_with_fast_flags(tmp_path, lambda text: text.replace('"-fno-fast-math", ', ""))
    assert done.returncode != 0
    assert "leave out -ffast-math, -Ofast and their parts" in done.stdout + done.stderr
