# SPDX-License-Identifier: Apache-2.0
"""The threads of some blocks that run side by side: a kernel's registers and memory, and its instructions made ready.

Each register is an array with one element for each thread. An instruction made ready is a function of the threads that
carry it out: True for all, or a mask.
"""

import re

import numpy as np

from . import accesses, warps
from .arithmetic import APPROXIMATIONS, OPERATIONS, canonical
from .memory import UNWRITTEN, Space
from .module import NAME, TYPES, PtxError, operands_of

WARP = 32
ADDRESS = re.compile(rf"\[\s*({NAME})\s*(?:\+\s*(-?\d+))?\s*\]$")
FENCES = {
    *(f"membar.{scope}" for scope in ("cta", "gl", "sys")),
    *(f"fence.{order}.{scope}" for order in ("acq_rel", "sc") for scope in ("cta", "gpu", "sys")),
}


class Threads:
    def __init__(self, kernel, blocks, block_size, memory, choices):
        if block_size % WARP:
            raise PtxError(f"blocks of {block_size} threads, no whole number of warps")
        self.kernel, self.block_size, self.choices = kernel, block_size, choices
        self.count = blocks * block_size
        self.everyone = np.arange(self.count)
        self.spaces = {
            "global": memory,
            "shared": Space.of_layout("shared", kernel.shared, blocks),
            "local": Space.of_layout("local", kernel.local, self.count),
            "param": Space.of_layout("param", kernel.parameters, 1),
        }
        self.owners = {"shared": self.everyone // block_size, "local": self.everyone}
        self._of_block = (self.everyone % block_size).astype(np.uint32)
        self._block, self._grid = np.zeros(self.count, np.uint32), np.zeros(1, np.uint32)
        self._special = {
            "%tid.x": self._of_block,
            "%ntid.x": np.uint32([block_size]),
            "%ctaid.x": self._block,
            "%nctaid.x": self._grid,
            "%laneid": self._of_block % np.uint32(WARP),
        }
        self._registers = {}
        self.random = np.random.default_rng(0)

    def begin(self, first_block, grid, argument):
        """Makes these the threads of the blocks from the first on, at their first instruction."""
        self._block[...] = first_block + self.owners["shared"]
        self._grid[...] = grid
        self.spaces["shared"].forget()
        self.spaces["local"].forget()
        self.spaces["param"].write(argument)
        for bits in self._registers.values():
            bits.view(np.uint8)[...] = 0 if bits.dtype == np.bool_ else UNWRITTEN

    # Operands.

    def register(self, name):
        """The bits of a register, as unsigned integers or bool. Not written, they are no likely numbers."""
        if name not in self._registers:
            if name not in self.kernel.registers:
                raise PtxError(f"no register {name}")
            dtype = self.kernel.registers[name]
            bits = np.full(self.count * dtype.itemsize, 0 if dtype == np.bool_ else UNWRITTEN, np.uint8)
            self._registers[name] = bits.view(dtype if dtype == np.bool_ else f"u{dtype.itemsize}")
        return self._registers[name]

    def source(self, text, dtype):
        """An operand as an array of the dtype that holds its value at any time; of a wider register the low bits."""
        if text in self._special:
            return np.broadcast_to(self._special[text], self.count).view(dtype)
        if text.startswith("%"):
            bits = self.register(text)
            if (dtype == np.bool_) != (bits.dtype == np.bool_) or bits.dtype.itemsize < dtype.itemsize:
                raise PtxError(f"{text} is no operand of {dtype}")
            return bits.view(dtype)[:: bits.dtype.itemsize // dtype.itemsize]
        return np.broadcast_to(self._constant(text, dtype), self.count)

    def _constant(self, text, dtype):
        for layout in (self.kernel.shared, self.kernel.local, self.kernel.parameters):
            if text in layout.arrays:
                return np.array([layout.arrays[text].begin], dtype)
        match = re.match(r"0([fd])([0-9A-Fa-f]+)$", text)
        if match and dtype.itemsize == {"f": 4, "d": 8}[match[1]]:
            return np.array([int(match[2], 16)], f"u{dtype.itemsize}").view(dtype)
        try:
            value = int(text.rstrip("U"), 0)
        except ValueError:
            raise PtxError(f"an operand that is not understood: {text}") from None
        if dtype == np.bool_:
            return np.array([value != 0])
        if dtype.kind == "f":
            raise PtxError(f"the integer {text} as an operand of {dtype}")
        return np.array([value & 2 ** (8 * dtype.itemsize) - 1], f"u{dtype.itemsize}").view(dtype)

    def target(self, text, dtype):
        """The array that takes a result of the dtype. In a wider register it is extended as its type says."""
        bits = self.register(text)
        if dtype == np.bool_ or bits.dtype == np.bool_:
            if dtype != bits.dtype:
                raise PtxError(f"{text} takes no result of {dtype}")
            return bits
        if bits.dtype.itemsize < dtype.itemsize or (dtype.kind == "f" and bits.dtype.itemsize != dtype.itemsize):
            raise PtxError(f"{text} takes no result of {dtype}")
        return bits.view(f"{dtype.kind}{bits.dtype.itemsize}")

    def address(self, text):
        """The addresses of an operand as [%rd1+8]."""
        match = ADDRESS.match(text)
        if match is None:
            raise PtxError(f"an address that is not understood: {text}")
        name = match[1]
        narrow = name.startswith("%") and self.kernel.registers[name].itemsize == 4  # an address of shared memory
        base = self.source(name, TYPES["u32" if narrow else "u64"])
        offset = np.uint64(int(match[2] or 0) & 2**64 - 1)
        return lambda: base + offset

    def some(self, where):
        """The numbers of threads, in the order in which they access memory."""
        numbers = self.everyone if where is True else np.flatnonzero(where)
        return numbers[::-1] if self.choices.reverse else numbers

    # Instructions.

    def ready(self, instruction):
        """A function of the threads that carry the instruction out."""
        run = self._ready(instruction.opcode, instruction.operands)
        guard = self.guard(instruction)
        if guard is None:
            return run
        return lambda where: run(guard() if where is True else where & guard())

    def guard(self, instruction):
        """A function that returns the threads for which an instruction's predicate is true; None if it has none."""
        if instruction.guard is None:
            return None
        predicate = self.source(instruction.guard.lstrip("!"), TYPES["pred"])
        return (lambda: ~predicate) if instruction.guard.startswith("!") else (lambda: predicate)

    def _ready(self, opcode, operands):
        if opcode in OPERATIONS:
            return self._operation(OPERATIONS[opcode], operands)
        if opcode in APPROXIMATIONS:
            return self._approximation(*APPROXIMATIONS[opcode], operands)
        if opcode in FENCES:
            return lambda where: None
        name, *modifiers = opcode.split(".")
        if name == "mov" and len(modifiers) == 1 and modifiers[0] in TYPES:
            return self._move(TYPES[modifiers[0]], operands)
        for table in (accesses.ACCESSES, warps.EXCHANGES):
            if name in table:
                return table[name](self, modifiers, operands)
        raise PtxError("an unknown instruction")

    def _operation(self, operation, operands):
        result, kinds, compute = operation
        to, *sources = operands
        sources = [self.source(text, TYPES[kind]) for text, kind in zip(sources, kinds, strict=True)]
        to = self.target(to, TYPES[result])
        if isinstance(compute, np.ufunc) and to.dtype in (np.bool_, sources[0].dtype):
            return lambda where: compute(*sources, out=to, where=where)
        return lambda where: np.copyto(to, compute(*sources), where=where)

    def _approximation(self, kind, compute, operands):
        source, to = self.source(operands[1], TYPES[kind]), self.target(operands[0], TYPES[kind])
        tiny, bits = np.finfo(TYPES[kind]).tiny, f"i{TYPES[kind].itemsize}"

        def run(where):
            exact = compute(source)
            ulps = self.choices.reciprocal
            ulps = self.random.integers(-1, 2, self.count) if ulps == "random" else int(ulps)
            other = (exact.view(bits) + ulps).astype(bits).view(exact.dtype)
            ordinary = np.isfinite(exact) & (np.abs(exact) > 2 * tiny) & np.isfinite(other)
            np.copyto(to, canonical(np.where(ordinary, other, exact)), where=where)

        return run

    def _move(self, dtype, operands):
        """mov, also between a register and its parts, as ``mov.b64 {%r1, %r2}, %rd1``."""
        to, source = operands
        if source.startswith("{"):
            parts = operands_of(source[1:-1])
            part = np.dtype(f"u{dtype.itemsize // len(parts)}")
            whole = self.register(to).view(part)
            pairs = [(whole[k :: len(parts)], self.source(text, part)) for k, text in enumerate(parts)]
        elif to.startswith("{"):
            parts = operands_of(to[1:-1])
            part = np.dtype(f"u{dtype.itemsize // len(parts)}")
            whole = np.ascontiguousarray(self.source(source, dtype)) if source[0] != "%" else self.register(source)
            whole = whole.view(part)
            pairs = [(self.target(text, part), whole[k :: len(parts)]) for k, text in enumerate(parts) if text != "_"]
        else:
            pairs = [(self.target(to, dtype), self.source(source, dtype))]

        def run(where):
            for target, value in pairs:
                np.copyto(target, value, where=where)

        return run
