# SPDX-License-Identifier: Apache-2.0
"""Checks the CUDA part on a machine without a GPU and with a CPU build of torch.

Compiles every .cu file for sm_80, sm_90 and PTX, fails where the compiler had to spill registers or put arrays into
local memory, and checks the syntax of the CUDA binding against the installed torch's headers.
"""

import glob
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from sysconfig import get_paths

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"sm_80": "-gencode=arch=compute_80,code=sm_80", "sm_90": "-gencode=arch=compute_90,code=sm_90"}
PTX_TARGET = "-gencode=arch=compute_90,code=compute_90"


def load_setup():
    """The functions and flags of setup.py, without building anything."""
    os.environ["CSGD_CUDA_BUILD"] = "none"
    sys.argv = ["setup.py", "--quiet", "--name"]
    return runpy.run_path("setup.py")


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def check_kernels(nvcc, flags, source):
    """Compiles one .cu file for each target; returns an error for each kernel that uses local memory."""
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "out")
        for name, target in TARGETS.items():
            report = run([nvcc, "-std=c++17", *flags, target, "-Xptxas=-v", "-cubin", source, "-o", output])
            registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
            for stack, stores, loads in re.findall(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
            ):
                if any(int(n) for n in (stack, stores, loads)):
                    errors.append(f"{source} for {name}: {stack} bytes stack, {stores} + {loads} bytes spilled")
            print(f"{source} for {name}: {len(registers)} kernels, at most {max(registers)} registers")
        run([nvcc, "-std=c++17", *flags, PTX_TARGET, "-ptx", source, "-o", output])
        print(f"{source}: PTX compiles")
    return errors


def check_binding(toolkit):
    """Syntax only: a CPU build of torch has the CUDA headers but one, a generated macro header."""
    import torch
    from torch.utils.cpp_extension import include_paths  # slow to import

    includes = [f"-isystem{path}" for path in [*include_paths(), get_paths()["include"], f"{toolkit}/include"]]
    for source in ("csrc/ops/csgd_cuda.cpp", "csrc/ops/rule_hooks.cpp", "csrc/ops/bindings.cpp"):
        macros = ["-DC10_USING_CUSTOM_GENERATED_MACROS", "-DCSGD_WITH_CUDA=1", "-DTORCH_EXTENSION_NAME=_C"]
        run(["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", *macros, *includes, source])
        print(f"{source}: fits torch {torch.__version__}")


def main():
    os.chdir(ROOT)
    setup = load_setup()
    toolkit = setup["find_toolkit"]()
    if toolkit is None:
        sys.exit("no CUDA toolkit (bin/nvcc with include/cuda_runtime.h) was found; set CUDA_HOME")
    nvcc = os.path.join(toolkit, "bin", "nvcc")
    errors = [
        e for source in sorted(glob.glob("csrc/cuda/*.cu")) for e in check_kernels(nvcc, setup["NVCC_FLAGS"], source)
    ]
    check_binding(toolkit)
    if errors:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    main()
