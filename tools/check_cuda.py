# SPDX-License-Identifier: Apache-2.0
"""Checks the CUDA part on a machine without a GPU and with a CPU build of torch.

Compiles every .cu file for sm_80, sm_90, sm_100 and PTX; fails where the compiler had to spill registers or put
arrays into local memory, and where a kernel no longer reads and writes its tensors 16 bytes at a time; checks the
syntax of the CUDA bindings against the installed torch's headers.
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
TARGETS = {f"sm_{n}": f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)}
# Arrays that a kernel reads and writes. The step reads the gradient and the momentum buffer, and the parameter in two
# places (with weight decay before the draws, without after them); it writes the momentum buffer and the parameter.
ARRAYS = {"csgd_cuda.cu": {"ld": 4, "st": 2}, "calibrate_grad_cuda.cu": {"ld": 1, "st": 1}}
PTX_TARGET = "-gencode=arch=compute_90,code=compute_90"


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
        if arrays := ARRAYS.get(Path(source).name):
            errors += check_wide_accesses(source, Path(output).read_text(), arrays)
    return errors


def check_wide_accesses(source, ptx, arrays):
    """One error for each kernel whose eight elements per thread do not travel in 16-byte accesses."""
    sizes = {"f": 4, "d": 8, "NS_8BFloat16E": 2, "NS_7Float16E": 2}  # in the mangled name: bytes per element
    wide = r"\.global(?:\.\w+)*\.(?:v4\.[fub]32|v2\.[fub]64|b128)"
    errors = []
    kernels = re.split(r"\.entry\s+", ptx)[1:]
    for kernel in kernels:
        name = kernel.split("(")[0]
        (dtype,) = re.findall(rf"_kernelI({'|'.join(sizes)})", name)
        for what, count in arrays.items():
            found, expected = len(re.findall(rf"\b{what}{wide}", kernel)), count * 8 * sizes[dtype] // 16
            if found != expected:
                errors.append(f"{name}: {found} {what} of 16 bytes, expected {expected}")
    print(f"{source}: {len(kernels)} kernels, 16-byte accesses counted")
    return errors if kernels else [f"{source}: no kernel found in its PTX"]


def check_binding(toolkit):
    """Syntax only: a CPU build of torch has the CUDA headers but one, a generated macro header."""
    import torch
    from torch.utils.cpp_extension import include_paths  # slow to import

    includes = [f"-isystem{path}" for path in [*include_paths(), get_paths()["include"], f"{toolkit}/include"]]
    for source in [*sorted(glob.glob("csrc/ops/*_cuda.cpp")), "csrc/ops/rule_hooks.cpp", "csrc/ops/bindings.cpp"]:
        macros = ["-DC10_USING_CUSTOM_GENERATED_MACROS", "-DCSGD_WITH_CUDA=1", "-DTORCH_EXTENSION_NAME=_C"]
        run(["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", *macros, *includes, source])
        print(f"{source}: fits torch {torch.__version__}")


def main():
    os.chdir(ROOT)
    setup = runpy.run_path("setup.py")
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
