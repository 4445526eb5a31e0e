# SPDX-License-Identifier: Apache-2.0
"""Instructions by which the lanes of a warp exchange values, for ``threads.Threads``: shuffles, votes, reductions."""

import numpy as np

from .arithmetic import COMBINATIONS
from .module import TYPES, PtxError

LANES = np.arange(32)
BITS = np.uint32(1) << LANES.astype(np.uint32)


def by_warp(array):
    """A row for each warp."""
    return array.reshape(-1, 32)


def active_lanes(threads, where):
    """Of each warp the lanes that carry the instruction out: as a mask, and as the bits of a word."""
    active = by_warp(np.ones(threads.count, bool) if where is True else where)
    return active, np.where(active, BITS, 0).sum(axis=1, dtype=np.uint32)[:, None]


def check_members(threads, where, members):
    """The lanes that carry the instruction out, of each warp. They must be those that it names."""
    active, word = active_lanes(threads, where)
    if np.count_nonzero((by_warp(members) != word) & active):
        raise PtxError("lanes that the instruction names are elsewhere, or others are here")
    return active


def shuffle(threads, modifiers, operands):
    if len(modifiers) != 3 or modifiers[0] != "sync" or modifiers[2] != "b32":
        raise PtxError("an unknown shuffle")
    how = modifiers[1]
    to, _, found = operands[0].partition("|")
    word = TYPES["b32"]
    value, amount, control, members = (threads.source(text, word) for text in operands[1:])
    target = threads.target(to, word)
    in_range = threads.target(found, TYPES["pred"]) if found else None

    def run(where):
        active = check_members(threads, where, members)
        step = by_warp(amount).astype(np.int64) & 31
        clamp, segment = (by_warp(control).astype(np.int64) >> bits & 31 for bits in (0, 8))
        low = LANES & segment
        limit = low | clamp & ~segment
        lane = {"down": LANES + step, "up": LANES - step, "bfly": LANES ^ step, "idx": low | step & ~segment}[how]
        inside = lane >= limit if how == "up" else lane <= limit
        lane = np.where(inside, lane, LANES)
        if np.count_nonzero(active & ~np.take_along_axis(active, lane, axis=1)):
            raise PtxError("a lane takes the value of one that is elsewhere")
        np.copyto(target, np.take_along_axis(by_warp(value), lane, axis=1).ravel(), where=where)
        if in_range is not None:
            np.copyto(in_range, inside.ravel(), where=where)

    if how not in ("down", "up", "bfly", "idx"):
        raise PtxError("an unknown shuffle")
    return run


def spread(rows, threads):
    """A value of each warp, for each of its lanes."""
    return np.repeat(rows, 32)[: threads.count]


VOTES = {
    "all.pred": lambda votes, active: (votes | ~active).all(axis=1),
    "any.pred": lambda votes, active: (votes & active).any(axis=1),
    "ballot.b32": lambda votes, active: np.where(votes & active, BITS, 0).sum(axis=1, dtype=np.uint32),
}


def vote(threads, modifiers, operands):
    how = ".".join(modifiers[1:])
    if modifiers[0] != "sync" or how not in VOTES:
        raise PtxError("an unknown vote")
    negated = operands[1].startswith("!")
    predicate = threads.source(operands[1].lstrip("!"), TYPES["pred"])
    members = threads.source(operands[2], TYPES["b32"])
    target = threads.target(operands[0], TYPES[modifiers[-1]])

    def run(where):
        active = check_members(threads, where, members)
        votes = by_warp(~predicate if negated else predicate)
        np.copyto(target, spread(VOTES[how](votes, active), threads), where=where)

    return run


def active_mask(threads, modifiers, operands):
    if modifiers != ["b32"]:
        raise PtxError("an unknown modifier")
    target = threads.target(operands[0], TYPES["b32"])
    return lambda where: np.copyto(target, spread(active_lanes(threads, where)[1], threads), where=where)


def reduce_warp(threads, modifiers, operands):
    how = ".".join(modifiers[1:])
    if modifiers[0] != "sync" or how not in COMBINATIONS or how.startswith(("exch", "cas")):
        raise PtxError("an unknown reduction")
    combine, dtype = COMBINATIONS[how], TYPES[modifiers[-1]]
    source, target = threads.source(operands[1], dtype), threads.target(operands[0], dtype)
    members = threads.source(operands[2], TYPES["b32"])

    def run(where):
        active = check_members(threads, where, members)
        values = by_warp(source)
        total, begun = np.zeros(len(values), dtype), np.zeros(len(values), bool)
        for lane in LANES:
            here = active[:, lane]
            both = np.where(begun, combine(total, values[:, lane]), values[:, lane])
            total, begun = np.where(here, both, total), begun | here
        np.copyto(target, spread(total, threads), where=where)

    return run


EXCHANGES = {"shfl": shuffle, "vote": vote, "activemask": active_mask, "redux": reduce_warp}
