# SPDX-License-Identifier: Apache-2.0
"""The communication hook: what it sends is a twelfth of what a plain exchange does, and is counted right."""

import pytest
import torch
import torch.distributed as dist

from .launch import exchanged, run, with_hook

BIG = (1000, 1000)


def bytes_of_a_big_gradient(rank, options, noisy):
    """One coordinate in 200 is ten times the others: of one size, whose codes are mostly not 0, or normally spread."""
    model, state = with_hook([BIG], **options)
    grad = 0.1 * torch.randn(BIG, generator=torch.Generator().manual_seed(rank)) if noisy else torch.full(BIG, 0.1)
    grad.view(-1)[:: 200 + rank] *= 10
    exchanged(model, [grad])
    sent = []
    for name in ("all_to_all_single", "all_gather", "all_reduce"):
        setattr(dist, name, counted(getattr(dist, name), name, sent))
    before = state.bytes_sent
    exchanged(model, [grad])
    return {"step": state.bytes_sent - before, "plain": state.bytes_plain // 2, "payload": sum(sent)}


def counted(collective, name, sent):
    """The collective, which also notes what leaves this rank."""

    def call(first, second=None, *args, **kwargs):
        world_size = dist.get_world_size()
        if name == "all_to_all_single":  # all but the part that stays here
            own = args[1][dist.get_rank()] * second.element_size() if args else second.nbytes // world_size
            sent.append(second.nbytes - own)
        elif name == "all_gather":
            sent.append(second.nbytes * (world_size - 1))
        else:
            sent.append(2 * (world_size - 1) * first.element_size() * -(-first.numel() // world_size))
        return collective(first, second, *args, **kwargs)

    return call


CLIPPED = {"block": 32, "clip": 4.0}


@pytest.mark.parametrize("options", [{}, {"block": 32}, CLIPPED, {**CLIPPED, "compact": True}], ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_twelfth_of_the_bytes_is_sent(world_size, options):
    """Between more than two ranks a clip takes more, since each clipped coordinate goes to all others, and only the
    compact form of codes that are mostly 0 makes up for it."""
    for noisy in (False, True):
        for rank in run(world_size, bytes_of_a_big_gradient, options, noisy):
            assert rank["step"] == rank["payload"]
            ring = 2 * (world_size - 1) / world_size * 4 * 10**6
            assert abs(rank["plain"] - ring) < 100
            if "clip" not in options or world_size == 2 or (noisy and "compact" in options):
                assert rank["step"] <= ring / 12


def test_compact_codes_and_error_feedback_send_fewer_bytes():
    compact = {**CLIPPED, "compact": True}
    sent = [
        run(2, bytes_of_a_big_gradient, options, True)[0]["step"]
        for options in (CLIPPED, compact, {**compact, "error_feedback": True})
    ]
    assert sent[1] < 0.8 * sent[0]
    assert sent[2] < 0.9 * sent[1]
