# SPDX-License-Identifier: Apache-2.0
"""Parts of the compiled rule as Python functions: a module of the tests' own, compiled when the first of them needs it.

It takes the flags of setup.py and the pybind11 that torch brings. Where there is a GPU and nvcc, it has functions that
run on the GPU as well.
"""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sysconfig
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from ...helpers import made_once

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = [*sorted(HERE.glob("rule_hooks*")), HERE / "shortcuts.h", *sorted((ROOT / "csrc" / "core").glob("*.h"))]


def commands(setup):
    """The commands that make the module in the file OUT.so. Skips the test where something they need is missing."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler, for tests/rule/hooks")
    headers = [Path(torch.__file__).parent / "include", Path(sysconfig.get_paths()["include"])]
    for header in (headers[0] / "pybind11" / "pybind11.h", headers[1] / "Python.h"):
        if not header.is_file():
            pytest.skip(f"no {header}, for tests/rule/hooks")
    toolkit = setup["find_toolkit"]() if torch.version.cuda and torch.cuda.is_available() else None
    includes = [f"-I{folder}" for folder in headers]
    host = [compiler, "-std=c++17", "-fPIC", *setup["CXX_FLAGS"], *includes, str(HERE / "rule_hooks.cpp")]
    if toolkit is None:
        return [[*host, "-DCSGD_WITH_CUDA=0", "-shared", "-o", "OUT.so"]]
    nvcc = [f"{toolkit}/bin/nvcc", "-std=c++17", "-arch=native", "-Xcompiler=-fPIC", *setup["NVCC_FLAGS"]]
    return [
        [*host, "-DCSGD_WITH_CUDA=1", f"-I{toolkit}/include", "-c", "-o", "OUT.o"],
        [*nvcc, str(HERE / "rule_hooks_cuda.cu"), "OUT.o", "-shared", "-o", "OUT.so"],
    ]


def compile_module(to_run, path):
    for command in to_run:
        command = [word.replace("OUT.so", str(path)).replace("OUT.o", f"{path}.o") for word in command]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def load():
    """The module. Made once for all processes and runs that have the same sources and commands."""
    to_run = commands(runpy.run_path(str(ROOT / "setup.py")))
    made_of = [repr(to_run).encode(), os.fsencode(sysconfig.get_config_var("SOABI") or "")]
    made_of += [source.read_bytes() for source in SOURCES]
    folder = ROOT / "build" / "rule_hooks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{sha256(b''.join(made_of)).hexdigest()[:16]}.so"
    made_once(path, lambda unfinished: compile_module(to_run, unfinished))
    spec = importlib.util.spec_from_file_location("rule_hooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
