# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels computes the bits of the CPU loops, as far as PTX goes."""

import re
import shutil
import struct
import subprocess
import sys
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

from ..emulation_programs import ROOT, TIME_LIMIT
from ..test_shortcuts import CASES, same_bits
from .executor import Choices, Executor
from .memory import Space
from .module import Module

KERNELS = ("step", "calibrate_grad", "exchange", "hard_threshold")
# The PTX of both is the same but for the line that names the target, as long as no source asks for the architecture.
# So each goes other ways where the ISA leaves a choice.
TARGETS = {"sm_80": Choices(), "sm_90": Choices(reciprocal="random", blocks=10, reverse=True)}
WARPS_APART = Choices(apart=True)
HOOKS = "tests/rule/hooks"

ALL_LAUNCHED = "\nnot launched: none\n"

every_target = pytest.mark.parametrize(("target", "choices"), TARGETS.items(), ids=TARGETS)


def ptx_of(programs, source, target="sm_80"):
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    return programs.ptx(ROOT / source, target)


def execute(programs, kernel, ptx, choices, *cases):
    """The CompletedProcess of a comparison program, whose kernels are those of a file of PTX."""
    options = ["--reciprocal", choices.reciprocal, "--blocks", str(choices.blocks)]
    options += [f"--{name}" for name in ("reverse", "apart") if getattr(choices, name)]
    command = [sys.executable, "-m", "tests.cuda.ptx.run", *options, programs.library(kernel), ptx, *cases]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIME_LIMIT)


@pytest.mark.long
@every_target
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ptx_makes_the_bits_of_the_cpu_loop(kernel, target, choices, programs):
    done = execute(programs, kernel, ptx_of(programs, f"csrc/cuda/{kernel}_cuda.cu", target), choices)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(ALL_LAUNCHED) or kernel == "step"  # for which the test below sees to that


def combinations():
    """All dtypes with all parts of the directions and ways to round, at any alignment, and of shards."""
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        nearest = ("", "nearest") if dtype.endswith("16") else ("",)
        directions = ("", "momentum", "momentum, nesterov", "AdamW")
        rest = (
            ("", "weight decay"),
            ("", "no calibration"),
            ("", "misaligned", "misaligned gradient", "shard"),
            nearest,
        )
        for words in product((dtype,), directions, *rest):
            yield "options: " + ", ".join(word for word in words if word)


@pytest.mark.long
@every_target
def test_the_ptx_of_the_step_makes_the_bits_of_the_cpu_loop_with_all_options(target, choices, programs):
    cases = list(combinations())
    done = execute(programs, "step", ptx_of(programs, "csrc/cuda/step_cuda.cu", target), choices, *cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agree") == len(cases) == 384
    assert done.stdout.endswith(ALL_LAUNCHED)


def shortcut_number(name):
    """The value of an enumerator of Shortcut, whose name is the shortcut's in another style."""
    (names,) = re.findall(r"enum class Shortcut.*?\{(.*?)\}", (ROOT / HOOKS / "shortcuts.h").read_text(), re.DOTALL)
    return [each.lower() for each in re.findall(r"k(\w+),", names)].index(name.replace("_", ""))


# Whatever rcp.approx returns within its error bound, where there is one.
SHORTCUTS = [(name, "0") for name in CASES] + [("inverse_probability", ulps) for ulps in ("-1", "1", "random")]


@pytest.mark.parametrize(("name", "reciprocal"), SHORTCUTS)
def test_shortcuts_are_exact_in_ptx(name, reciprocal, programs):
    arguments, expected = CASES[name]
    module = Module(ptx_of(programs, f"{HOOKS}/rule_hooks_cuda.cu").read_text(encoding="utf-8"))
    (kernel,) = (each for each in module.names if "shortcut_kernel" in each)
    values = np.zeros(-(-len(arguments) // 4) * 4, np.float32)
    values[: len(arguments)] = arguments
    data, address = values.view(np.uint8), values.ctypes.data
    memory = Space("global", data, np.ones_like(data), begin=address)
    parameters = struct.pack("<i4xQq", shortcut_number(name), address, len(arguments))
    blocks = -(-len(arguments) // 256)
    Executor(module, memory, Choices(reciprocal)).launch(kernel, blocks, 256, lambda size: parameters)
    assert same_bits(values[: len(arguments)], expected(arguments))


class Fault(NamedTuple):
    """A change of instructions, and a case that shows it."""

    kernel: str
    right: str  # a regular expression
    wrong: str
    case: str
    choices: Choices = Choices()


STEP = "options: float32, momentum"
FAULTS = {
    "the step rounds to nearest, not up": Fault("step", r"add\.rp\.f32", "add.rn.f32", STEP),
    "the step rounds to nearest, not up, in float64": Fault(
        "step", r"add\.rp\.f64", "add.rn.f64", "options: float64, momentum"
    ),
    "the step rounds to nearest, not down, to float16": Fault(
        "step", r"cvt\.rz\.f16", "cvt.rn.f16", "options: float16, momentum"
    ),
    "a fused multiply-add of the step is rounded towards zero": Fault("step", r"fma\.rn\.f32", "fma.rz.f32", STEP),
    "the other half of Philox's products": Fault("step", r"mul\.hi\.u32", "mul.lo.u32", STEP),
    "no barrier before the warps of the step are added up": Fault("step", r"bar\.sync[^;]*;", "", STEP, WARPS_APART),
    "lanes take the value of the lane below": Fault("step", r"shfl\.sync\.down", "shfl.sync.up", STEP),
    "blocks do not count how many are done": Fault("step", r"atom\.global\.add\.u64", "atom.global.exch.b64", STEP),
    "vectors are stored beside their place": Fault("step", r"(st\.global\.v4\.f32\s+\[%rd\d+)", r"\1+8", STEP),
    "a gradient is rounded to nearest, not up": Fault("calibrate_grad", r"add\.rp\.f32", "add.rn.f32", "dtypes"),
    "a gradient is rounded to nearest, not down, to float16": Fault(
        "calibrate_grad", r"cvt\.rz\.f16", "cvt.rn.f16", "dtypes"
    ),
    "a quotient is rounded towards zero": Fault("calibrate_grad", r"div\.rn\.f64", "div.rz.f64", "dtypes"),
    "no barrier before the warps of a layer are added up": Fault(
        "calibrate_grad", r"bar\.sync[^;]*;", "", "3 channels", WARPS_APART
    ),
    "the last maximum of a channel, not the largest": Fault(
        "calibrate_grad", r"atom\.global\.max\.u64", "atom.global.exch.b64", "dtypes, channels last"
    ),
    "no barriers between the counts of a block": Fault("hard_threshold", r"bar\.sync[^;]*;", "", "dtypes", WARPS_APART),
    "counts are overwritten": Fault("hard_threshold", r"atom\.shared\.add\.u32", "atom.shared.exch.b32", "dtypes"),
    "counts stay for the next pass": Fault(
        "hard_threshold", r"atom\.global\.exch\.b64", "atom.global.add.u64", "dtypes"
    ),
    "squares are added up rounded towards zero": Fault("hard_threshold", r"add\.rn\.f64", "add.rz.f64", "norms"),
    "the sums of squares go up": Fault("hard_threshold", r"shfl\.sync\.down", "shfl.sync.up", "norms"),
    "the exchange takes the other half of Philox's products": Fault("exchange", r"mul\.hi\.u32", "mul.lo.u32", "ranks"),
    "the remainder of a place, not its quotient": Fault("exchange", r"div\.u32", "rem.u32", "ranks"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_ptx_is_found(fault, programs, tmp_path):
    text = ptx_of(programs, f"csrc/cuda/{fault.kernel}_cuda.cu").read_text(encoding="utf-8")
    broken, count = re.subn(fault.right, fault.wrong, text)
    assert count > 0, "no such instruction"
    (tmp_path / "broken.ptx").write_text(broken, encoding="utf-8")
    done = execute(programs, fault.kernel, tmp_path / "broken.ptx", fault.choices, fault.case)
    assert done.returncode != 0, done.stdout
    assert "differs" in done.stdout or "PtxError" in done.stderr


@pytest.mark.parametrize("number", range(5))
def test_each_barrier_of_a_block_that_counts_is_needed(number, programs, tmp_path):
    """Without it there is an order of warps in which the result differs."""
    text = ptx_of(programs, "csrc/cuda/hard_threshold_cuda.cu").read_text(encoding="utf-8")
    before, kernel, after = re.split(r"(\.entry \S+histogram_kernelIfE.*?\n\})", text, maxsplit=1, flags=re.DOTALL)
    barriers = list(re.finditer(r"bar\.sync[^;]*;", kernel))
    assert len(barriers) == 5
    kernel = kernel[: barriers[number].start()] + kernel[barriers[number].end() :]
    (tmp_path / "broken.ptx").write_text(before + kernel + after, encoding="utf-8")
    orders = (Choices(apart=True, blocks=3), Choices(apart=True, reverse=True))
    for choices in orders:
        if execute(programs, "hard_threshold", tmp_path / "broken.ptx", choices, "across", "misaligned").returncode:
            return
    pytest.fail("it was not missed")


@pytest.mark.parametrize(
    ("kernel", "choices", "case"), sorted({(fault.kernel, fault.choices, fault.case) for fault in FAULTS.values()})
)
def test_the_ptx_agrees_without_a_fault(kernel, choices, case, programs):
    """What the test above finds is the fault, not that a case has too few kernels."""
    done = execute(programs, kernel, ptx_of(programs, f"csrc/cuda/{kernel}_cuda.cu"), choices, case)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree" in done.stdout
