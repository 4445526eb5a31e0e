# SPDX-License-Identifier: Apache-2.0
"""Checks the CUDA part on a machine without a GPU and with a CPU build of torch.

Compiles every .cu file, the tests' own included, for sm_80, sm_90, sm_100 and PTX, as many side by side as there are
processors. Fails where the compiler had to spill registers or put arrays into local memory, where a kernel no longer
reads and writes its tensors 16 bytes at a time, and where the step takes a tenth more instructions per element, or
registers, than tests/cuda/instruction_counts.md says (--write makes that file anew). Checks the syntax of what calls
the kernels, against the installed torch's headers.
"""

import argparse
import glob
import os
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from sysconfig import get_paths
from typing import NamedTuple

import sass
from output import say

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {f"sm_{n}": f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)}
# Bytes per element, by the dtype in a mangled name.
SIZES = {"f": 4, "d": 8, "NS_8BFloat16E": 2, "NS_7Float16E": 2}
WIDE = {
    "ld": r"\bld\.global(?:\.\w+)*\.(?:v4\.[fub]32|v2\.[fub]64|b128)",
    "st": r"\bst\.global(?:\.\w+)*\.(?:v4\.[fub]32|v2\.[fub]64|b128)",
}
HOOKS = "tests/rule/hooks"
PTX_TARGET = "-gencode=arch=compute_90,code=compute_90"


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


class Outcome(NamedTuple):
    """What one check found: a line to print, errors, what kernels take as sass.costs has it."""

    line: str
    errors: list[str]
    costs: dict


def check_target(nvcc, flags, source, name):
    """Compiles one .cu file for one target."""
    errors, costs = [], {}
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "out")
        report = run([nvcc, "-std=c++17", *flags, TARGETS[name], "-Xptxas=-v", "-cubin", source, "-o", output])
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        for stack, stores, loads in re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
        ):
            if any(int(n) for n in (stack, stores, loads)):
                errors.append(f"{source} for {name}: {stack} bytes stack, {stores} + {loads} bytes spilled")
        try:
            costs = sass.costs(name, output, report)
        except ValueError as error:
            errors.append(f"{source}: {error}")
    return Outcome(f"{source} for {name}: {len(registers)} kernels, at most {max(registers)} registers", errors, costs)


def check_ptx(nvcc, flags, source):
    """Compiles one .cu file to PTX, and counts the 16-byte accesses there."""
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "out")
        run([nvcc, "-std=c++17", *flags, PTX_TARGET, "-ptx", source, "-o", output])
        expected = WIDE_ACCESSES.get(Path(source).name)
        if expected is None:
            return Outcome(f"{source}: PTX compiles", [], {})
        kernels = re.split(r"\.entry\s+", Path(output).read_text(encoding="ascii"))[1:]
    errors = check_wide_accesses(kernels, expected) if kernels else [f"{source}: no kernel found in its PTX"]
    return Outcome(f"{source}: PTX compiles; 16-byte accesses of {len(kernels)} kernels counted", errors, {})


def accesses_of_step(name, size):
    """16-byte reads and writes in step_kernel; ``size``: bytes of an element.

    Gradient, buffers and, before and after the draws, parameter. A kernel has two loops, over whole vectors and over
    what is left of them; the second one accesses those arrays by vectors whose addresses allow it. Where nothing is
    written between the two reads of the parameter, the compiler makes one of them in the first loop.
    """
    if "AdamW" in name:
        weight_decay, buffers = "StaticDecayILb0E" not in name, 2
    else:
        static = re.search(r"StaticPartsILb(\d)ELb(\d)ELb\dE", name)
        weight_decay, buffers = (int(static[1]), int(static[2])) if static else (1, 1)
    return {"ld": 2 * (2 + buffers) + weight_decay * (1 + (buffers > 0)), "st": 2 * (1 + buffers)}


def accesses_of_layer(name, size):
    return {"ld": 8 * size // 16, "st": 8 * size // 16}


WIDE_ACCESSES = {"step_cuda.cu": accesses_of_step, "calibrate_grad_cuda.cu": accesses_of_layer}


def check_wide_accesses(kernels, accesses):
    """One error for each kernel whose elements do not travel in 16-byte accesses."""
    errors = []
    for kernel in kernels:
        name = kernel.split("(")[0]
        (dtype,) = re.findall(rf"_kernelI({'|'.join(SIZES)})", name)
        for what, expected in accesses(name, SIZES[dtype]).items():
            found = len(re.findall(WIDE[what], kernel))
            if found != expected:
                errors.append(f"{name}: {found} {what} of 16 bytes, expected {expected}")
    return errors


def check_costs(found):
    """One error for each kernel that takes more than a tenth more than the table has, or is not in it."""
    table = sass.read_table()
    errors = [f"{sass.TABLE.name} has {' '.join(words)}, no kernel" for words in table.keys() - found.keys()]
    for words, cost in found.items():
        if words not in table:
            errors.append(f"{' '.join(words)}: not in {sass.TABLE.name}; make check-cuda ARGS=--write")
            continue
        for what, figure, before in zip(cost._fields, cost, table[words], strict=True):
            if figure > 1.1 * before:
                errors.append(f"{' '.join(words)}: {figure:.1f} {what}, {before} before")
    figures = [cost.instructions for cost in found.values()]
    say(f"instructions per element of {len(found)} kernels: {min(figures):.1f} to {max(figures):.1f}")
    return errors


def check_binding(includes, source):
    """Syntax only: a CPU build of torch has the CUDA headers but one, a generated macro header."""
    macros = ["-DC10_USING_CUSTOM_GENERATED_MACROS", "-DCSGD_WITH_CUDA=1", "-DTORCH_EXTENSION_NAME=_C"]
    run(["c++", "-std=c++20", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Werror", *macros, *includes, source])
    return Outcome(f"{source}: fits torch", [], {})


def checks(nvcc, flags, toolkit):
    """All checks as functions without arguments; none depends on another. Those that take longest come first."""
    from torch.utils.cpp_extension import include_paths  # slow to import

    kernels = sorted([*glob.glob("csrc/cuda/*.cu"), *glob.glob(f"{HOOKS}/*.cu")], key=os.path.getsize, reverse=True)
    for source in kernels:
        for target in TARGETS:
            yield partial(check_target, nvcc, flags, source, target)
    includes = [f"-isystem{path}" for path in [*include_paths(), get_paths()["include"], f"{toolkit}/include"]]
    for source in sorted([*glob.glob("csrc/ops/*.cpp"), *glob.glob(f"{HOOKS}/*.cpp")]):
        yield partial(check_binding, includes, source)
    for source in kernels:
        yield partial(check_ptx, nvcc, flags, source)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table of instructions and registers")
    write = parser.parse_args().write
    os.chdir(ROOT)
    setup = runpy.run_path("setup.py")
    toolkit = setup["find_toolkit"]()
    if toolkit is None:
        sys.exit("no CUDA toolkit (bin/nvcc with include/cuda_runtime.h) was found; set CUDA_HOME")
    if sass.disassembler() is None:
        sys.exit("no nvdisasm was found: install the CUDA toolkit's, or the package nvidia-cuda-nvdisasm")
    nvcc = os.path.join(toolkit, "bin", "nvcc")
    errors, costs = [], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(check) for check in checks(nvcc, setup["NVCC_FLAGS"], toolkit)]
        for done in as_completed(started):
            try:
                line, more, of_source = done.result()
            except RuntimeError as error:
                pool.shutdown(cancel_futures=True)
                sys.exit(str(error))
            say(line)
            errors += more
            costs |= of_source
    if write:
        in_order = dict(sorted(costs.items(), key=lambda row: (list(TARGETS).index(row[0][0]), row[0])))
        sass.write_table(in_order, run([nvcc, "--version"]).strip().splitlines()[-1])
    errors += check_costs(costs)
    if errors:
        sys.exit("\n".join(sorted(errors)))


if __name__ == "__main__":
    main()
