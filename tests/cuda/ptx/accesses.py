# SPDX-License-Identifier: Apache-2.0
"""Instructions that access memory, for ``threads.Threads``: loads, stores, atomics, and addresses of other spaces."""

import numpy as np

from .arithmetic import COMBINATIONS
from .memory import OFFSET, WINDOWS
from .module import TYPES, PtxError, operands_of

VECTORS = {"v2": 2, "v4": 4}
# They order accesses, or say how long a line is kept. Neither exists here, where each access is made at once.
ORDERS = {"relaxed", "acquire", "release", "acq_rel", "volatile", "cta", "gpu", "sys"}
HINTS = {"ca", "cg", "cs", "cv", "lu", "nc", "wb", "wt"}
HINTS |= {f"L1::{hint}" for hint in ("evict_normal", "evict_first", "evict_last", "no_allocate", "evict_unchanged")}


def space_of(modifiers, allowed):
    """The space that an access names, or "generic". Anything else that it says must be allowed."""
    others = [each for each in modifiers if each not in WINDOWS]
    if len(modifiers) - len(others) > 1 or not allowed.issuperset(others):
        raise PtxError("an unknown modifier of an access")
    return next((each for each in modifiers if each in WINDOWS), "generic")


def places(threads, space, numbers, addresses, dtype, count):
    """[(numbers of threads, memory as elements, index of each thread's first one)], for each space that they access."""
    if space != "generic":
        owners = threads.owners.get(space)
        owners = owners if owners is None else owners[numbers]
        return [(numbers, *threads.spaces[space].find(addresses, owners, dtype, count))]
    found = []
    for name, window in WINDOWS.items():
        here = addresses & ~OFFSET == np.uint64(window)
        if here.any():
            found += places(threads, name, numbers[here], addresses[here] & OFFSET, dtype, count)
    if sum(len(numbers) for numbers, _, _ in found) != len(numbers):
        raise PtxError("an address in no space")
    return found


def access(threads, modifiers, operands, of_memory, of_registers):
    """What ld and st have in common: (dtype, operands in registers, a function from a mask to places)."""
    *modifiers, kind = modifiers
    if kind not in TYPES or kind == "pred":
        raise PtxError("an unknown type of an access")
    count = 1
    if modifiers and modifiers[-1] in VECTORS:
        count = VECTORS[modifiers.pop()]
    space = space_of(modifiers, ORDERS | HINTS)
    group = operands[of_registers]
    registers = operands_of(group[1:-1]) if group.startswith("{") else (group,)
    if len(registers) != count:
        raise PtxError(f"{len(registers)} operands for {count} elements")
    dtype, address = TYPES[kind], threads.address(operands[of_memory])

    def find(where):
        numbers = threads.some(where)
        return places(threads, space, numbers, address()[numbers], dtype, count)

    return dtype, registers, find


def load(threads, modifiers, operands):
    dtype, registers, find = access(threads, modifiers, operands, of_memory=1, of_registers=0)
    targets = [(k, threads.target(text, dtype)) for k, text in enumerate(registers) if text != "_"]

    def run(where):
        for numbers, elements, index in find(where):
            for k, target in targets:
                target[numbers] = elements[index + k]

    return run


def store(threads, modifiers, operands):
    dtype, registers, find = access(threads, modifiers, operands, of_memory=0, of_registers=1)
    if "param" in modifiers:
        raise PtxError("parameters are only read")
    sources = [threads.source(text, dtype) for text in registers]

    def run(where):
        for numbers, elements, index in find(where):
            for k, source in enumerate(sources):
                elements[index + k] = source[numbers]

    return run


def turns(index):
    """Positions of an array, such that the elements of each turn differ, and equal ones keep their order."""
    order = np.argsort(index, kind="stable")
    ranked = index[order]
    position = np.arange(len(index))
    begins = np.r_[True, ranked[1:] != ranked[:-1]]
    rank = position - np.maximum.accumulate(np.where(begins, position, 0))
    return [order[rank == turn] for turn in range(rank.max() + 1)] if len(index) else []


def atomic(threads, modifiers, operands):
    """atom: threads with the same address take turns."""
    *modifiers, name, kind = modifiers
    if f"{name}.{kind}" not in COMBINATIONS:
        raise PtxError("an unknown atomic")
    space = space_of(modifiers, ORDERS)
    combine, dtype = COMBINATIONS[f"{name}.{kind}"], TYPES[kind]
    target = None if operands[0] == "_" else threads.target(operands[0], dtype)
    address = threads.address(operands[1])
    sources = [threads.source(text, dtype) for text in operands[2:]]

    def run(where):
        everyone = threads.some(where)
        for numbers, elements, index in places(threads, space, everyone, address()[everyone], dtype, 1):
            for turn in turns(index):
                these, at = numbers[turn], index[turn]
                old = elements[at]
                elements[at] = combine(old, *(source[these] for source in sources))
                if target is not None:
                    target[these] = old

    return run


def reduction(threads, modifiers, operands):
    """red: an atomic whose old value is not needed."""
    return atomic(threads, modifiers, ("_", *operands))


def convert_address(threads, modifiers, operands):
    """cvta between an address of a space and a generic one."""
    away = modifiers[:1] == ["to"]
    space, kind = modifiers[1 if away else 0 :]
    if kind != "u64" or space not in WINDOWS:
        raise PtxError("an unknown conversion of an address")
    source, target = threads.source(operands[1], TYPES["u64"]), threads.target(operands[0], TYPES["u64"])
    compute = np.subtract if away else np.add
    return lambda where: compute(source, np.uint64(WINDOWS[space]), out=target, where=where)


ACCESSES = {"ld": load, "st": store, "atom": atomic, "red": reduction, "cvta": convert_address}
