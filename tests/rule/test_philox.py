# SPDX-License-Identifier: Apache-2.0
"""The random numbers: Philox's known answers in every language, and which draw belongs to which element."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from csgd_cuda.reference import philox

HERE = Path(__file__).parent
KNOWN_ANSWERS = HERE.parent / "philox_known_answers.txt"
ANSWERS = [
    [int(word, 16) for word in line.split()]
    for line in KNOWN_ANSWERS.read_text().splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_reference_gives_known_answers(answer, device):
    counter = [torch.tensor(word, device=device) for word in answer[:4]]
    assert [int(word) for word in philox.philox4x32_10(counter, answer[4:6])] == answer[6:]


@pytest.mark.parametrize("answer", ANSWERS)
def test_compiled_rule_gives_known_answers(answer, rule_hooks):
    assert rule_hooks.philox4x32_10(answer[:4], answer[4:6]) == answer[6:]


@pytest.mark.parametrize("answer", ANSWERS)
def test_gpu_gives_known_answers(answer, rule_hooks):
    if not hasattr(rule_hooks, "philox4x32_10_cuda"):
        pytest.skip("no GPU, or no nvcc")
    assert rule_hooks.philox4x32_10_cuda(answer[:4], answer[4:6]) == answer[6:]


def test_core_compiles_alone_and_gives_known_answers(tmp_path):
    """csrc/core needs neither torch nor CUDA."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "core_alone"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-ffp-contract=off"]
    subprocess.run([compiler, *flags, str(HERE.parent / "cpu" / "core_alone.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program, KNOWN_ANSWERS], check=True, capture_output=True, text=True)
    assert done.stdout == f"{len(ANSWERS)} known answers\n"


SEED = 0xFEDCBA9876543210


def draw_by_the_contract(position, *, seed, stream, index, step):
    """The draw of one element, spelled out from the contract in plain integers."""
    q = position >> 3
    counter = [q & 0xFFFFFFFF, (q >> 32) | stream << 28, index, step & 0xFFFFFFFF]
    words = philox.philox4x32_10([torch.tensor(word) for word in counter], (seed & 0xFFFFFFFF, seed >> 32))
    word = int(words[position & 3])
    return word & 0xFFFF if (position >> 2) & 1 == 0 else word >> 16


@pytest.mark.parametrize("begin", [0, 8, 64, 2**31 - 8, 2**31, 2**32 - 8, 2**32, 2**35 - 8, 2**35 + 8])
@pytest.mark.parametrize("stream", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3])
def test_draws_follow_the_contract(begin, stream, step, rule_hooks):
    which = {"seed": SEED, "stream": stream, "index": 2**32 - 1}
    got = philox.draws(begin, begin + 19, step=torch.tensor(step), device="cpu", **which).tolist()
    positions = range(begin, begin + 19)
    assert got == [draw_by_the_contract(p, step=step, **which) for p in positions]
    assert got == [rule_hooks.draw(SEED, stream, p, 2**32 - 1, step) for p in positions]


def test_draws_of_several_parameters_are_those_of_each(device):
    indices, steps = torch.tensor([[0], [7], [2**32 - 1]]), torch.tensor([[5], [0], [2**32 + 3]])
    which = {"seed": SEED, "stream": 1, "device": device}
    got = philox.draws(16, 45, index=indices.to(device), step=steps.to(device), **which)
    for row, index, step in zip(got, indices, steps, strict=True):
        expected = philox.draws(16, 45, index=int(index), step=step.to(device), **which)
        assert row.tolist() == expected.tolist()


def test_draws_are_uniform():
    """Over 2^20 draws every value is hit 16 times on average: a chi-square test at 6 sigma."""
    n = 2**20
    got = philox.draws(0, n, seed=1, stream=0, index=0, step=torch.tensor(0), device="cpu")
    counts = torch.bincount(got.to(torch.int64), minlength=2**16).double()
    chi_square = ((counts - n / 2**16) ** 2 / (n / 2**16)).sum()
    degrees = 2**16 - 1
    assert abs(chi_square - degrees) < 6 * (2 * degrees) ** 0.5
