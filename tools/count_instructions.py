# SPDX-License-Identifier: Apache-2.0
"""Instructions per element of a step on the CPU, as valgrind counts them: a measure that no other load disturbs.

    python tools/count_instructions.py    # prints the table; --write puts it into tests/cpu/instruction_counts.md

tests/cpu/test_instruction_count.py holds the counts against that file. valgrind does not know AVX-512, whose code is
read instead: how many of its floating-point multiplications do not work on 512 bits.
"""

import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from output import say

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "cpu" / "instruction_counts.md"
CXX_FLAGS = runpy.run_path(str(ROOT / "setup.py"))["CXX_FLAGS"]
CXX = os.environ.get("CXX", "c++").split()

NARROW = "narrow multiplications"
# (instruction set, dtype, options of count_instructions.cpp); "default" is the set that the package chooses by itself.
COUNTED = [
    ("default", "float32", "momentum"),
    ("avx2", "float32", "momentum"),
    ("avx2", "float32", "plain"),
    ("avx2", "float32", "momentum c=0"),
    ("avx2", "float32", "momentum nesterov weight-decay"),
    ("avx2", "float64", "momentum"),
    *[("avx2", dtype, options) for dtype in ("bfloat16", "float16") for options in ("momentum", "momentum nearest")],
    *[("avx2", dtype, "AdamW weight-decay") for dtype in ("float32", "float64", "bfloat16", "float16")],
    *[("baseline", dtype, "momentum") for dtype in ("float32", "float64", "bfloat16", "float16")],
]
READ = [("avx512", dtype, NARROW) for dtype in ("float32", "float64", "bfloat16", "float16")]


def why_not():
    """Why nothing can be counted here, or None."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx2" not in cpuinfo.read_text():
        return "the instruction counts are those of an x86-64 processor with AVX2, on Linux"
    if missing := [name for name in ("valgrind", "objdump", CXX[0]) if shutil.which(name) is None]:
        return f"{' and '.join(missing)} not found"
    macros = run([*CXX, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    is_gcc = "__GNUC__" in macros and "__clang__" not in macros
    return None if is_gcc else "the C++ compiler is not GCC, whose code the table is about"


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done


def compiler():
    return run([*CXX, "--version"]).stdout.splitlines()[0]


def build(folder, vector_bytes=None):
    """Compiles tests/cpu/count_instructions.cpp and csrc/cpu as setup.py would, in ``folder``, which it returns.

    ``vector_bytes`` plants a fault: vectors of that many bytes, whatever the instruction set has.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tests" / "cpu", folder / "tests" / "cpu")
    sources = sorted((folder / "csrc" / "cpu").glob("*.cpp"))
    for source in sources if vector_bytes else ():
        planted = re.sub(r"(#define CSGD_VECTOR_BYTES) \d+", rf"\1 {vector_bytes}", source.read_text())
        source.write_text(planted)
    program = [folder / "tests" / "cpu" / "count_instructions.cpp", *sources]
    # -std as torch.utils.cpp_extension adds it.
    run([*CXX, "-std=c++20", "-fPIC", *CXX_FLAGS, "-c", *program], cwd=folder)
    run([*CXX, *sorted(folder.glob("*.o")), "-o", folder / "program"])
    return folder


def instructions(built, isa, dtype, options, chunks):
    """(instructions of the whole run, elements it stepped)"""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    done = run([*command, built / "program", isa, dtype, str(chunks), *options.split()])
    return int(re.search(r"Collected : (\d+)", done.stderr)[1]), int(re.search(r"of (\d+) elements", done.stdout)[1])


def instructions_per_element(built, isa, dtype, options):
    """The difference of two runs has neither start nor set-up nor first calls in it."""
    (few, one), (many, three) = (instructions(built, isa, dtype, options, chunks) for chunks in (1, 3))
    return (many - few) / (three - one)


def narrow_multiplications(built, isa, dtype):
    """The multiplications in the step's functions of ``dtype`` that are scalar or use part of a register only.

    A few are right: the scalars of a step, once for each function.
    """
    register = {"avx512": "%zmm"}[isa]
    name = {"float32": "float", "float64": "double", "bfloat16": "csgd::BFloat16", "float16": "csgd::Float16"}[dtype]
    text = run(["objdump", "-d", "--demangle", "--no-show-raw-insn", built / f"loops_{isa}.o"]).stdout
    found = Counter()
    inside = False
    for line in text.splitlines():
        if line.endswith(">:"):
            inside = re.search(rf"csgd::{isa}::step_\w+<{name}[,>]", line) is not None
        elif inside and (multiplication := re.search(r"\tv?mul([ps])[sd]\s+(.*)", line)):
            found[multiplication[1] == "p" and register in multiplication[2]] += 1
    # Without a wide one the loops are scalar, or their names are no longer those looked for.
    return found[False] if found[True] else math.inf


def measure(built, isa, dtype, what):
    if what == NARROW:
        return narrow_multiplications(built, isa, dtype)
    return instructions_per_element(built, isa, dtype, what)


def read_table():
    """{(instruction set, dtype, what): figure} of the file, and the compiler it was made with."""
    text = TABLE.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    figures = {tuple(row[:3]): float(row[3]) for row in rows if re.fullmatch(r"[\d.]+", row[3])}
    return figures, re.search(r"Compiler: (.*)", text).group(1)


PREFACE = """\
# What the compiler makes of the CPU loop

Made by `make count-instructions ARGS=--write`. test_instruction_count.py fails when a figure is exceeded by half.

Compiler: {compiler}

One step, counted by valgrind ("default": the instruction set that the package chooses, without AVX-512):

| instruction set | dtype | options | instructions per element |
| --- | --- | --- | ---: |
{counted}

Multiplications of floating-point numbers, in the code for AVX-512, that do not use the whole register. A few are right:
the scalars of a step, once for each combination of momentum, Nesterov and weight decay, and for AdamW.

| instruction set | dtype | what | number |
| --- | --- | --- | ---: |
{read}
"""


def make_table(built):
    def rows(cases, form):
        return "\n".join(f"| {' | '.join(case)} | {measure(built, *case):{form}} |" for case in cases)

    return PREFACE.format(compiler=compiler(), counted=rows(COUNTED, ".2f"), read=rows(READ, ".0f"))


def main():
    if reason := why_not():
        sys.exit(f"count_instructions: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(build(Path(folder)))
    if "--write" in sys.argv[1:]:
        TABLE.write_text(table, encoding="utf-8")
    say(table.rstrip("\n"))


if __name__ == "__main__":
    main()
