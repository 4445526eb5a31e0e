# SPDX-License-Identifier: Apache-2.0
"""Every compiler and instruction set gives the same bits, and they are those of the package.

make try-compilers tries more compilers and flags; docs/compatibility.md has the result.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..conftest import need_kernel
from ..helpers import assert_same_bits
from . import package_cases

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import count_instructions as counts
import try_compilers as compilers

pytestmark = pytest.mark.xdist_group("loops")

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
# Arrays that are not of the case's dtype.
OTHERS = {
    **dict.fromkeys(("step", "tally", "index"), torch.int64),
    **dict.fromkeys(("bounds", "norms", "kept_norms"), torch.float64),
    **dict.fromkeys(("mask0", "mask1", "codes"), torch.uint8),
    **dict.fromkeys(("words", "own", "digits", "sums"), torch.int32),
}
CASES = [
    *[f"csgd {dtype} nesterov-decay stochastic c=0.3 whole edge" for dtype in DTYPES],
    *[f"adamw {dtype} decay stochastic c=0.3 shard any" for dtype in DTYPES],
    "csgd float32 momentum nearest c=0 scaled any",
    "csgd bfloat16 plain nearest l=1e6 scaled edge",
    "adamw float16 no-eps stochastic c=0 whole edge",
    "calibrate_grad float16 stochastic inner=7 c=0.3 edge",
    "calibrate_grad float64 nearest inner=1 c=0.3 any",
    "calibrate_grad bfloat16 stochastic one l=1e6 edge",
    "hard_threshold float32 one edge",
    "hard_threshold bfloat16 filter edge",
    "hard_threshold float64 2:4 any",
    "hard_threshold float16 together any",
    "exchange float32 3 tiny edge",
    "exchange bfloat16 130 one edge",
]


@pytest.fixture(scope="module")
def usual(loops, tmp_path_factory):
    """The folder of the program that setup.py's flags make, and its digests."""
    build, folder = compilers.Build(counts.CXX[0], before=tuple(counts.CXX[1:])), tmp_path_factory.mktemp("program")
    compilers.compile_all(build, compilers.PROGRAM, folder)
    compilers.link(build, folder, [loops / f"{source.stem}.o" for source in compilers.LOOPS])
    return folder, compilers.digests(build, folder)


def test_there_are_cases_of_every_operation(usual):
    """The same ones in each instruction set. If results did not reach the digests, those of many cases would agree."""
    _, found = usual
    assert {case.split()[0] for case in found["baseline"]} == {case.split()[0] for case in CASES}
    for digests in found.values():
        assert digests.keys() == found["baseline"].keys() >= set(CASES)
        assert len(set(digests.values())) > 0.5 * len(digests)  # float32 is not rounded, for one


def test_instruction_sets_agree(usual):
    _, found = usual
    for isa, digests in found.items():
        assert not compilers.differing(found["baseline"], digests), isa


def read(folder, case, when):
    dtype = DTYPES[case.split()[1]]
    arrays = {}
    for path in sorted(folder.glob(f"*.{when}")):
        of_array = OTHERS.get(path.stem, dtype)
        if path.stem == "bound":
            of_array = torch.float64 if case.startswith("exchange") or dtype is torch.float64 else torch.float32
        arrays[path.stem] = torch.frombuffer(bytearray(path.read_bytes()), dtype=of_array)
    return arrays


def write(built, isa, cases, folder):
    """Makes the program write the arrays of these cases, before and after; {case: folder}."""
    folders = {case: folder / str(k) for k, case in enumerate(cases)}
    for of_case in folders.values():
        of_case.mkdir()
    subprocess.run([built / "print_bits", isa, folder, *cases], check=True)
    return folders


def assert_package_agrees(case, folder, fused):
    arrays, expected = read(folder, case, "before"), read(folder, case, "after")
    package_cases.run(case, arrays, fused)
    assert len(arrays) >= 2
    for name, array in arrays.items():
        assert_same_bits(array, expected[name], f"{case}: {name}")


@pytest.fixture(scope="module")
def written(usual, tmp_path_factory):
    built, found = usual
    return write(built, list(found)[-1], CASES, tmp_path_factory.mktemp("arrays"))


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_the_reference(case, written):
    assert_package_agrees(case, written[case], fused=False)


def test_bits_are_those_of_the_kernels(usual, tmp_path):
    """Of every seventh case: the numbers of all options are products of 2, 3 and 5."""
    need_kernel(torch.device("cpu"))
    built, found = usual
    for case, folder in write(built, "baseline", list(found["baseline"])[::7], tmp_path).items():
        assert_package_agrees(case, folder, fused=True)


@pytest.mark.parametrize("build", compilers.TRIED_BY_A_TEST, ids=lambda build: build.name)
def test_other_compiler_agrees(build, usual, tmp_path):
    if reason := build.why_not():
        pytest.skip(reason)
    compilers.make_program(build, tmp_path)
    for isa, digests in compilers.digests(build, tmp_path).items():
        assert not compilers.differing(usual[1]["baseline"], digests), isa


def test_loops_are_the_cpp_of_the_oldest_torch(tmp_path):
    """torch 2.11 compiles extensions as C++17, later ones as C++20."""
    compiler = counts.CXX[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} not found")
    compilers.run([compiler, "-std=c++17", "-pedantic-errors", "-fsyntax-only", *compilers.LOOPS], cwd=tmp_path)


def test_a_word_chooses_builds_beside_the_first_one(capsys):
    of_clang = [build for build in compilers.BUILDS if build.compiler == "clang++"]
    assert compilers.chosen("") == compilers.BUILDS
    assert compilers.chosen("clang") == [compilers.BUILDS[0], *of_clang]
    assert compilers.main(["clagn"]) == 2
    assert "clagn: no build has this word in its name; they are clang++ -O3" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        compilers.main(["--help"])
    assert stop.value.code == 0


def test_the_table_of_the_documentation_has_the_builds_that_are_tried():
    page = (compilers.ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    names = {"GCC 12.2": "g++", "Clang 14.0.6": "clang++", "GCC 12.2 for aarch64, qemu 7.2": compilers.AARCH64.compiler}
    row = r"^\| ((?:GCC|Clang)[^|]*) \| ([^|]*) \| (same bits|differs, as it must) \|$"
    documented = {
        (names[compiler], flags, result == "same bits")
        for compiler, cells, result in re.findall(row, page, re.MULTILINE)
        for flags in re.findall("`([^`]*)`", cells)
    }
    assert documented == {
        (build.compiler, " ".join([*build.before, *build.after]) or "-O3", not build.wrong)
        for build in compilers.BUILDS
    }


def test_a_difference_is_reported():
    same, other = {"baseline": {"a": "1", "b": "2"}}, {"baseline": {"a": "1", "b": "3"}}
    right, wrong = compilers.Build("g++"), compilers.Build("g++", wrong=True)
    assert compilers.compare(right, same["baseline"], same) == ("same bits: baseline", True)
    assert compilers.compare(right, same["baseline"], other) == ("baseline differs in 1, as in 'b'", False)
    assert compilers.compare(wrong, same["baseline"], same) == ("does not differ", False)
    assert compilers.compare(wrong, same["baseline"], other) == ("differs, as it must, in 1", True)
