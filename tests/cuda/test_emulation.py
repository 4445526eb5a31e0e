# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' own source, run on the CPU with a thread for each CUDA thread: bits, memory and races.

emulation/ holds the emulation of CUDA and, for each kernel, the program that compares it with its CPU loop.
"""

import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from . import exchange_faults  # noqa: F401 - adds its faults to FAULTS
from .cpp_source import Change, texts
from .emulation_programs import ADDRESS, PLAIN, QUICK, ROOT, THREAD, Program
from .faults import FAULTS

VARIANTS = {"plain": PLAIN, "address and undefined behaviour": ADDRESS, "thread": THREAD}


def smallest_program(fault, changes=()):
    """The program with the kernels that a fault needs."""
    definitions = [f"CSGD_STORAGE={fault.storage}"] if fault.storage else []
    return Program(fault.kernel, fault.flags, tuple(definitions), changes)


@pytest.mark.parametrize(
    ("kernel", "cases"),
    [("step", 77), ("calibrate_grad", 74), ("exchange", 35), ("planes", 21), ("hard_threshold", 108)],
)
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_kernels_make_the_bits_of_the_cpu_loop(flags, kernel, cases, programs):
    done = programs.run(Program(kernel, flags))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("agree") == cases


# Of each kernel: its file, function and unrounded result, and a case whose result has NaN in float32.
NANS = {
    "exchange": ("cuda/exchange_cuda.cu", "decode_kernel", "static_cast<float>(value)", "infinite bound"),
    "calibrate_grad": (
        *("cuda/calibrate_grad_cuda.cu", "calibrate8", "d * inverse_probability_above(above)"),
        "dtypes, NaN and Inf",
    ),
}
NAN_OF_A_GPU = """[](auto x) {
  using Bits = FloatBits<decltype(x)>;
  return x == x ? x : bit_cast<decltype(x)>(typename Bits::Type{Bits::kMagnitude});
}"""


@pytest.mark.parametrize("kernel", NANS)
def test_a_nan_that_arithmetic_makes_agrees_with_any_other(kernel, programs):
    """On a GPU it is 0x7FFFFFFF, on a CPU another one, which the emulation makes as well."""
    file, function, result, case = NANS[kernel]
    change = Change(file, function, result, f"({NAN_OF_A_GPU})({result})")
    done = programs.run(Program(kernel, QUICK, changes=(change,)), case)
    assert done.returncode == 0, done.stdout
    assert "agree" in done.stdout


every_fault = pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.kernel}: {fault.name}" for fault in FAULTS])


@every_fault
def test_a_broken_kernel_is_found_out(fault, programs):
    done = programs.run(smallest_program(fault, fault.changes), fault.case)
    assert done.returncode != 0
    assert any(sign in done.stdout + done.stderr for sign in ("differs", "Sanitizer", "runtime error"))


KERNELS = sorted({(fault.kernel, fault.storage or "all") for fault in FAULTS})


@pytest.mark.parametrize(("kernel", "storage"), KERNELS)
def test_the_programs_of_faults_agree_without_them(kernel, storage, programs):
    """What the test above finds is the fault, not that such a program has fewer kernels."""
    of_program = [fault for fault in FAULTS if (fault.kernel, fault.storage or "all") == (kernel, storage)]
    for case in sorted({fault.case for fault in of_program}):
        done = programs.run(smallest_program(of_program[0])._replace(flags=QUICK), case)
        assert done.returncode == 0, done.stdout
        assert "agree" in done.stdout


def one_token_a_line(source):
    return "\n".join(texts(source))


def other_style(source):
    """The source as clang-format would lay it out for another project."""
    formatter = shutil.which("clang-format", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
    if formatter is None:
        pytest.skip("no clang-format")
    style = (
        "{BasedOnStyle: GNU, ColumnLimit: 60, PointerAlignment: Right, SortIncludes: Never, BreakStringLiterals: false}"
    )
    command = [formatter, f"--style={style}", "--assume-filename=x.cpp"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


@lru_cache
def laid_out(layout, name):
    source = (ROOT / "csrc" / name).read_text()
    other = layout(source)
    assert other != source
    assert texts(other) == texts(source)
    return source, other


@pytest.mark.parametrize("layout", [one_token_a_line, other_style])
@every_fault
def test_faults_are_found_in_sources_of_any_layout(fault, layout):
    for change in fault.changes:
        source, other = laid_out(layout, change.file)
        planted = texts(change.apply(source))
        assert planted == texts(change.apply(other))
        assert planted != texts(source)


def test_code_that_is_not_there_once_is_named():
    """As it must be after a change of the kernels that a fault no longer fits."""
    change = FAULTS[0].changes[0]
    source = (ROOT / "csrc" / change.file).read_text()
    with pytest.raises(LookupError, match=r"reduce_block\(\) in cuda/blocks.cuh has 0 times, not once: __syncthreads"):
        change.apply(source.replace("__syncthreads", "__syncwarp"))
    with pytest.raises(LookupError, match=r"has 2 times, not once"):
        change.apply(
            source.replace(
                "if (threadIdx.x == 0) {", "if (threadIdx.x == 0) {} __syncthreads(); if (threadIdx.x == 0) {"
            )
        )
    with pytest.raises(LookupError, match=r"cuda/blocks.cuh has no function reduce_block\(\)"):
        change.apply(source.replace("reduce_block", "add_up"))
