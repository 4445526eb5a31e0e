# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels of a PTX module on numpy, many threads side by side.

Of the threads those with the lowest position in the program run first, so they come together again where their ways do.
What the ISA leaves open is a choice. Accesses happen at once and in one order: a missing fence is not seen.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .module import Instruction, PtxError, is_control
from .threads import WARP, Threads


class Choices(NamedTuple):
    """What the ISA leaves open."""

    # How many units in the last place rcp.approx lies from the correctly rounded result; "random": -1, 0 or 1.
    reciprocal: str = "0"
    blocks: int = 16  # that run side by side
    reverse: bool = False  # the last blocks run first, and of threads that access the same memory the last comes first
    apart: bool = False  # warps run to their next barrier one at a time, in any order; else all run in step


class Segment(NamedTuple):
    """Instructions that threads carry out together."""

    runs: list[Callable]  # the instructions made ready, but for the last one if threads may part or wait there
    control: Instruction | None  # that last one
    guard: Callable | None  # returns the threads for which its predicate is true; None if it has none
    behind: int  # the position behind the last one


class Flow:
    """Where the threads of some blocks are, and how they go on."""

    def __init__(self, threads):
        self._threads, self._kernel = threads, threads.kernel
        leaders = [*self._kernel.leaders, len(self._kernel.instructions)]
        self._behind = dict(pairwise(leaders))
        self._segments = {}
        number, size = threads.everyone, WARP if threads.choices.apart else threads.count
        self._members = [number // size == k for k in range(threads.count // size)]

    def run(self):
        self._live = np.ones(self._threads.count, bool)
        self._teams = [{0: members} for members in self._members]  # of each: position: its threads there
        self._waiting = {}  # position of a barrier: the threads that wait there
        while ready := [team for team in self._teams if team]:
            team = ready[self._threads.random.integers(len(ready))]
            while team:
                self._advance(team)
            self._release()
        if self._waiting:
            barriers = {self._kernel.instructions[position].text for position in self._waiting}
            raise PtxError(f"threads wait forever at {' and '.join(sorted(barriers))}")

    def _segment(self, begin):
        if begin not in self._segments:
            behind = self._behind.get(begin)
            if behind is None:
                raise PtxError(f"{self._kernel.name} ends without ret")
            *first, last = self._kernel.instructions[begin:behind]
            control = last if is_control(last) else None
            guard = self._threads.guard(last) if control else None
            runs = [self._ready(each) for each in (first if control else (*first, last))]
            self._segments[begin] = Segment(runs, control, guard, behind)
        return self._segments[begin]

    def _ready(self, instruction):
        try:
            return self._threads.ready(instruction)
        except (PtxError, ValueError, KeyError, IndexError) as error:
            raise PtxError(f"{error}: {instruction.text}") from error

    def _advance(self, team):
        """Lets the threads of a team with the lowest position carry out their segment."""
        begin = min(team)
        active = team.pop(begin)
        segment = self._segment(begin)
        where = True if active.all() else active
        at = 0
        try:
            for run in segment.runs:
                run(where)
                at += 1
        except PtxError as error:
            raise PtxError(f"{error}: {self._kernel.instructions[begin + at].text}") from None
        if segment.control is None:
            self._join(team, segment.behind, active)
        else:
            taken = active if segment.guard is None else active & segment.guard()
            CONTROLS[segment.control.opcode.split(".")[0]](self, team, segment, taken)
            if segment.guard is not None:
                self._join(team, segment.behind, active & ~taken)

    def _join(self, team, position, threads):
        if threads.any():
            team[position] = team[position] | threads if position in team else threads

    def _branch(self, team, segment, taken):
        (label,) = segment.control.operands
        if segment.control.opcode not in ("bra", "bra.uni"):
            raise PtxError(f"an unknown branch: {segment.control.text}")
        self._join(team, self._kernel.labels[label], taken)

    def _return(self, team, segment, taken):
        if segment.control.opcode not in ("ret", "exit"):
            raise PtxError(f"an unknown return: {segment.control.text}")
        self._live &= ~taken

    def _wait(self, team, segment, taken):
        if segment.control.guard is not None or barrier_size(segment.control, self._threads.block_size) is None:
            raise PtxError(f"an unknown barrier, or one under a predicate: {segment.control.text}")
        self._join(self._waiting, segment.behind - 1, taken)

    def _release(self):
        """Lets those go on whose whole block, or warp, waits at one barrier, except for threads that have ended."""
        for position, waiting in list(self._waiting.items()):
            size = barrier_size(self._kernel.instructions[position], self._threads.block_size)
            complete = (waiting == self._live).reshape(-1, size).all(axis=1)
            ready = waiting & np.repeat(complete, size)
            if ready.any():
                for team, members in zip(self._teams, self._members, strict=True):
                    self._join(team, position + 1, ready & members)
                del self._waiting[position]
                self._join(self._waiting, position, waiting & ~ready)


def barrier_size(control, block_size):
    """How many threads wait for each other at a barrier; None where that is not known."""
    if control.opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned") and control.operands == ("0",):
        return block_size
    if control.opcode == "bar.warp.sync" and control.operands[0] in ("-1", "0xffffffff", "4294967295"):
        return WARP
    return None


CONTROLS = {
    "bra": Flow._branch,
    "ret": Flow._return,
    "exit": Flow._return,
    "bar": Flow._wait,
    "barrier": Flow._wait,
}


class Executor:
    """Launches the kernels of a module, which access the memory of the host that ``memory`` marks as valid."""

    KEPT = 4  # kernels whose instructions are kept ready for their next launch

    def __init__(self, module, memory, choices=None):
        self._module, self._memory, self._choices = module, memory, choices or Choices()
        self._flows = OrderedDict()

    def launch(self, name, grid, block_size, argument):
        """Runs a kernel: ``argument`` is a function from the size of its parameters to their bytes."""
        kernel = self._module.kernel(name)
        data = argument(kernel.parameters.size)
        side_by_side = self._choices.blocks
        firsts = range(0, grid, side_by_side)
        for first in reversed(firsts) if self._choices.reverse else firsts:
            threads, flow = self._flow(kernel, min(side_by_side, grid - first), block_size)
            threads.begin(first, grid, data)
            with np.errstate(all="ignore"):
                flow.run()

    def _flow(self, kernel, blocks, block_size):
        key = kernel.name, blocks, block_size
        if key not in self._flows:
            threads = Threads(kernel, blocks, block_size, self._memory, self._choices)
            self._flows[key] = threads, Flow(threads)
            if len(self._flows) > self.KEPT:
                self._flows.popitem(last=False)
        self._flows.move_to_end(key)
        return self._flows[key]
