# SPDX-License-Identifier: Apache-2.0
"""PTX as text, parsed: kernels with their parameters, arrays, registers and instructions."""

import re
from functools import cached_property
from typing import NamedTuple

import numpy as np


class PtxError(Exception):
    """PTX that this executor does not know, or that does what the ISA forbids."""


# What a type suffix says of a register's or an element's bits.
TYPES = {
    "pred": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
}
GAP = 16  # bytes between two arrays of shared or local memory, which nothing may touch

NAME = r"[%A-Za-z_$][\w$]*"
VARIABLE = re.compile(rf"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>{NAME})(?:\[(?P<count>\d+)\])?$")
REGISTERS = re.compile(rf"({NAME})(?:<(\d+)>)?$")
LABEL = re.compile(rf"({NAME}):\s*")
# Names, numbers, groups as {%r1, %r2}, addresses as [%rd1+8], and pairs as %r1|%p1.
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# What tells ptxas or a debugger something, and changes no result.
IGNORED = (".pragma", ".loc", ".file", ".maxntid", ".minnctapersm", ".version", ".address_size")


class Array(NamedTuple):
    """A named piece of a space: parameters, shared or local memory."""

    begin: int
    size: int


class Layout:
    """Arrays one after another, each at a multiple of its alignment, with a gap between two of them."""

    def __init__(self, gap):
        self._gap = gap
        self.arrays, self.size = {}, gap

    def add(self, declaration):
        """Takes the text of a declaration, from its alignment on, as ``.align 4 .b8 name[64]``."""
        match = VARIABLE.match(declaration)
        if match is None:
            raise PtxError(f"a declaration that is not understood: {declaration}")
        width = TYPES[match["type"]].itemsize
        align = int(match["align"] or width)
        begin = -(-self.size // align) * align
        size = int(match["count"] or 1) * width
        self.arrays[match["name"]] = Array(begin, size)
        self.size = begin + size + self._gap


class Instruction(NamedTuple):
    text: str
    guard: str | None  # the predicate that decides whether a thread carries it out, as %p1 or !%p1
    opcode: str  # with all modifiers
    operands: tuple[str, ...]


def operands_of(text):
    return tuple(OPERAND.findall(text))


def parse_instruction(text):
    guard, rest = None, text
    if text.startswith("@"):
        guard, rest = text[1:].split(None, 1)
    opcode, _, operands = rest.replace("\t", " ").partition(" ")
    return Instruction(" ".join(text.split()), guard, opcode, operands_of(operands))


def statements(text):
    """The statements of a body. Braces of scopes are dropped: the names within are those of no other scope."""
    for statement in text.split(";"):
        rest = statement.strip()
        while rest:
            match = LABEL.match(rest)
            if match:
                yield match[0].strip()
                rest = rest[match.end() :]
            elif rest[0] in "{}":
                rest = rest[1:].lstrip()
            else:
                yield rest
                break


class Kernel:
    """One ``.entry``: its parameters, arrays and registers, and its instructions in their order.

    ``leaders`` are the positions where threads may come together: labels, and what follows a branch or a barrier.
    """

    def __init__(self, name, text, shared):
        self.name = name
        parameters, body = text.split(")", 1)
        self.parameters, self.shared, self.local = Layout(0), Layout(GAP), Layout(GAP)
        for declaration in parameters.partition("(")[2].split(","):
            if declaration.strip():
                self.parameters.add(declaration.strip().removeprefix(".param").strip())
        self.registers, self.instructions, self.labels = {}, [], {}
        for declaration in shared:
            if VARIABLE.match(declaration)["name"] in body:
                self.shared.add(declaration)
        self._parse(body[body.index("{") + 1 : body.rindex("}")])
        behind = [k + 1 for k, each in enumerate(self.instructions) if is_control(each)]
        self.leaders = sorted({0, *behind, *self.labels.values()})

    def _parse(self, body):
        for statement in statements(body):
            directive, _, rest = statement.replace("\t", " ").partition(" ")
            if statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.instructions)
            elif directive == ".reg":
                self._declare(*rest.strip().split(None, 1))
            elif directive == ".shared":
                self.shared.add(rest.strip())
            elif directive == ".local":
                self.local.add(rest.strip())
            elif not directive.startswith("."):
                self.instructions.append(parse_instruction(statement))
            elif directive not in IGNORED:
                raise PtxError(f"an unknown directive in {self.name}: {statement}")

    def _declare(self, kind, names):
        dtype = TYPES[kind[1:]]
        for each in names.split(","):
            name, count = REGISTERS.match(each.strip()).groups()
            for register in [name] if count is None else [f"{name}{k}" for k in range(int(count))]:
                if self.registers.setdefault(register, dtype) != dtype:
                    raise PtxError(f"the register {register} of {self.name} is declared with two types")


def is_control(instruction):
    """Whether threads may part or wait at an instruction."""
    return instruction.opcode.split(".")[0] in ("bra", "ret", "exit", "bar", "barrier")


class Module:
    """A file of PTX. Its kernels are parsed when they are first needed: most launches are of few of them."""

    def __init__(self, text):
        text = COMMENT.sub("", text)
        head, *entries = re.split(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+", text)
        self._shared = []
        for statement in re.split(r"[;\n]", head):
            directive, _, rest = statement.strip().partition(" ")
            if directive == ".shared":
                self._shared.append(rest.strip())
            elif directive and directive not in (*IGNORED, ".target"):
                raise PtxError(f"an unknown directive before the kernels: {statement.strip()}")
        self._texts = {re.match(NAME, entry)[0]: entry for entry in entries}
        self._kernels = {}

    @cached_property
    def names(self):
        """{the name of a kernel as a C++ compiler for the host has it: its name here}"""
        return {of_host(name): name for name in self._texts}

    def kernel(self, name):
        """The kernel of this name, which may be the one that a compiler for the host gives it."""
        name = self.names.get(name, name)
        if name not in self._texts:
            raise PtxError(f"no kernel {name}; there are {', '.join(self._texts)}")
        if name not in self._kernels:
            self._kernels[name] = Kernel(name, self._texts[name], self._shared)
        return self._kernels[name]


def of_host(name):
    """A mangled name as g++ makes it. nvcc gives the anonymous namespace of each file a name of its own."""
    match = re.search(r"(\d+)_GLOBAL__N_", name)
    if match is None:
        return name
    end = match.end(1) + int(match[1])
    return f"{name[: match.start()]}12_GLOBAL__N_1{of_host(name[end:])}"
