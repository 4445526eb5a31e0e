# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' own source, run on the CPU with a thread for each CUDA thread: bits, memory and races.

tests/cuda_emulation/ holds the emulation of CUDA and the program that compares with the CPU loop.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent

# Two warps instead of eight, where the thousands of threads would take minutes under a sanitizer.
SMALL_BLOCKS = "-DCSGD_CUDA_THREADS=64"
# -O1: the reports name lines. An out-of-bounds access, undefined behaviour or a data race ends the program.
VARIANTS = {
    "plain": ["-O2"],
    "address and undefined behaviour": [
        *("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", SMALL_BLOCKS)
    ],
    "thread": ["-O1", "-g", "-fsanitize=thread", SMALL_BLOCKS],
}
# A race need not show in the result, so it must end the program.
ENVIRONMENT = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}


def compiler():
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def build_and_run(root, flags, folder):
    """Compiles the comparison in the source tree ``root`` and runs it."""
    program = folder / "against_cpu_loop"
    emulation = root / "tests" / "cuda_emulation"
    sources = [emulation / "against_cpu_loop.cpp", *sorted((root / "csrc" / "cpu").glob("*.cpp"))]
    command = [compiler(), "-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{emulation}", "-x", "c++", *sources, "-pthread", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find -l" in done.stderr or "cannot find lib" in done.stderr:
        pytest.skip(f"the compiler has no runtime for {flags}")
    assert done.returncode == 0, done.stderr
    return run(program)


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_kernels_make_the_bits_of_the_cpu_loop(flags, tmp_path):
    done = build_and_run(ROOT, [*flags, "-Werror"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("agree") >= 15


def test_old_drivers_take_smaller_launches(tmp_path):
    """Before CUDA 12.1 a kernel's parameters are 4 KB at most: the same bits in more launches."""
    build_and_run(ROOT, ["-O1", SMALL_BLOCKS], tmp_path)
    done = run(tmp_path / "against_cpu_loop", "old-driver")
    assert done.returncode == 0, done.stdout
    assert "old driver: 161 tensors agree" in done.stdout


# Each breaks the kernel in one place; the comparison must notice, or it proves nothing.
FAULTS = {
    "no barrier before thread 0 adds up": ("  __syncthreads();\n", ""),
    "the first block closes the step": ("!= blocks - 1) return;", "!= 0) return;"),
    "tails are not masked": ("move &= (1u << count) - 1u;", ""),
    "the tally is not cleared": ("  atomicExch(&tally->blocks_done, 0ULL);\n", ""),
    "wide access at any address": ("aligned && count == kPerThread", "count == kPerThread"),
}
SANITIZED = {
    "no barrier before thread 0 adds up": VARIANTS["thread"],
    "wide access at any address": VARIANTS["address and undefined behaviour"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_found_out(fault, tmp_path):
    right, wrong = FAULTS[fault]
    for folder in ("core", "cpu", "cuda"):
        shutil.copytree(ROOT / "csrc" / folder, tmp_path / "csrc" / folder)
    shutil.copytree(HERE / "cuda_emulation", tmp_path / "tests" / "cuda_emulation")
    changed = 0
    for name in ("csgd_cuda.cu", "block8.cuh"):
        path = tmp_path / "csrc" / "cuda" / name
        text = path.read_text()
        changed += text.count(right)
        path.write_text(text.replace(right, wrong))
    assert changed == 1, "the kernel was changed: name another line to break"
    flags = SANITIZED.get(fault, ["-O1", SMALL_BLOCKS])
    assert build_and_run(tmp_path, flags, tmp_path).returncode != 0
