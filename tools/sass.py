# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the step's kernels: instructions per element, read from the machine code without a GPU.

Nearly all elements go through the loop over whole vectors of 16 bytes. Among the paths through that loop, this counts
the shortest one that makes all draws and stores everything: a step in which every coordinate moves. The code
that only NaN, infinity or the largest numbers need is not on that path. Conditions are not evaluated: where the code
tests a condition twice, the path counted may be one that cannot happen.
"""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).resolve().parent.parent / "tests" / "cuda" / "instruction_counts.md"
ELEMENTS = {"float32": 4, "float64": 2, "bfloat16": 8, "float16": 8}  # of a vector, which a thread takes in a round
STORE = "STG.E.128"
PHILOX_FACTORS = ("-0x2daee0ad", "0xd2511f53")  # one multiplication by it for each of the ten rounds of a call


class Case(NamedTuple):
    """A kernel that has a row in the table."""

    target: str
    dtype: str
    options: str  # those of CSGD, or CalibratedAdamW with its own


def disassembler():
    """The path of nvdisasm, from the toolkit or from the package nvidia-cuda-nvdisasm; None without both."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (str(packaged) if packaged.exists() else None)


def functions(cubin):
    """{mangled name: the function's instructions and labels, one on each line}."""
    done = subprocess.run([disassembler(), "-c", str(cubin)], capture_output=True, text=True, check=True)
    parts = re.split(r"^\.text\.(\S+):$", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parse(text):
    """(instructions, {label: number of the instruction that follows it}) of a function, without its callees."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if found := re.match(r"\s*(\.L\S+):", line):
            labels[found[1]] = len(instructions)
        elif re.match(r"\s*\$__\S+:", line):
            break
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    return instructions, labels


def branch(instruction, labels):
    """(number of the instruction that a branch may go to, or None; whether the instruction after it may be next)."""
    if re.match(r"EXIT\b", instruction):
        return None, False
    found = re.search(r"\bBRA(\.DIV)?\S*\s.*`\((\.L\S+)\)", instruction)
    if not found or found[1]:  # BRA.DIV leads away and back where threads of a warp have diverged
        return None, True
    conditional = instruction.startswith("@") or re.search(r"\bBRA\S*\s+!?U?P\d", instruction)
    return labels.get(found[2]), bool(conditional)


def loop_over_vectors(instructions, labels):
    """(first, last instruction) of the smallest loop that stores vectors; None without such a loop.

    The loop over the elements that are left can store vectors, too, and is larger.
    """
    loops = []
    for last, instruction in enumerate(instructions):
        first, _ = branch(instruction, labels)
        if first is not None and first < last and any(STORE in each for each in instructions[first:last]):
            loops.append((last - first, first, last))
    return min(loops)[1:] if loops else None


def instructions_of_a_round(instructions, labels):
    """How many instructions a thread executes for one vector; None where no loop stores vectors."""
    loop = loop_over_vectors(instructions, labels)
    if loop is None:
        return None
    first, last = loop
    # For each instruction: {(multiplications of Philox, 16-byte stores) so far: fewest instructions up to it}.
    fewest = {first: {(0, 0): 0}}
    for at in range(first, last + 1):
        instruction = instructions[at]
        draws, stores = any(f in instruction for f in PHILOX_FACTORS), STORE in instruction
        target, goes_on = branch(instruction, labels)
        following = [to for to in (target, at + 1 if goes_on else None) if to is not None and at < to <= last]
        if at == last:
            following = [last + 1]
        for (draws_before, stores_before), count in fewest.get(at, {}).items():
            key = draws_before + draws, stores_before + stores
            for to in following:
                known = fewest.setdefault(to, {})
                known[key] = min(known.get(key, count + 1), count + 1)
    paths = fewest[last + 1]
    return paths[max(paths)]


def case_of(target, name):
    """The Case of a kernel, from its mangled name; None for a kernel that the table does not list."""
    dtypes = {"f": "float32", "d": "float64", "NS_8BFloat16E": "bfloat16", "NS_7Float16E": "float16"}
    found = re.search(rf"step_kernelI({'|'.join(dtypes)})NS_\d+(Sgd|AdamW)E.*?NS_\d+(BufferedTensor|StepShard)", name)
    if not found or found[3] == "StepShard":
        return None
    if found[2] == "AdamW":
        decays = "StaticDecayILb1E" in name
        return Case(target, dtypes[found[1]], "CalibratedAdamW" + (" weight decay" if decays else ""))
    digits = re.search(r"StaticPartsILb(\d)ELb(\d)ELb(\d)E", name).groups()
    parts = zip(("weight decay", "momentum", "nesterov"), digits, strict=True)
    return Case(target, dtypes[found[1]], " ".join(part for part, digit in parts if digit == "1") or "plain")


class Cost(NamedTuple):
    """What one kernel takes."""

    instructions: float  # per element
    registers: int


def costs(target, cubin, report):
    """{Case: Cost} for the kernels of a cubin, whose compiler printed ``report`` (-Xptxas=-v)."""
    registers = dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", report, flags=re.DOTALL))
    found = {}
    for name, text in functions(cubin).items():
        case = case_of(target, name)
        if case is not None:
            instructions = instructions_of_a_round(*parse(text))
            if instructions is None:
                raise ValueError(f"{' '.join(case)}: no loop stores vectors of 16 bytes")
            found[case] = Cost(instructions / ELEMENTS[case.dtype], int(registers[name]))
    return dict(sorted(found.items()))


def read_table():
    """{Case: Cost}."""
    row = r"^\| (sm_\d+) \| (\w+) \| ([\w ]+) \| ([\d.]+) \| (\d+) \|$"
    rows = re.findall(row, TABLE.read_text(), flags=re.MULTILINE)
    return {tuple(words): Cost(float(instructions), int(registers)) for *words, instructions, registers in rows}


def write_table(found, compiler):
    rows = [f"| {' | '.join(words)} | {cost.instructions:.1f} | {cost.registers} |" for words, cost in found.items()]
    TABLE.write_text(f"""# What nvcc makes of the step's kernels

Made by `make check-cuda ARGS=--write`, which without it fails when a figure is exceeded by a tenth.

Compiler: {compiler}

Instructions that a thread executes per element where every coordinate moves, bfloat16 and float16 rounded
stochastically, read from the machine code by tools/sass.py; and registers of a thread, as the compiler reports them.

| target | dtype | options | instructions per element | registers |
| --- | --- | --- | ---: | ---: |
{chr(10).join(rows)}
""")
