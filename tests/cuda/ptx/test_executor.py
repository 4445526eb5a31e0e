# SPDX-License-Identifier: Apache-2.0
"""Threads part and meet, wait and exchange values as the ISA says; what it forbids or the executor does not know is an
error.
"""

import numpy as np
import pytest

from .executor import Choices
from .handwritten import element, launch
from .module import Module, PtxError, of_host

NUMBERS = np.arange(64, dtype=np.uint32)
STORE = f"{element(0, 4)} st.global.u32 [%rd19], %r1;"  # %r1 of each thread
MEET = "shfl.sync.down.b32 %r1, %r23, 1, 31, -1;"


def results(body, threads=64, **options):
    """What each thread leaves in %r1."""
    (made,) = launch(f"{body} {STORE}", np.zeros(threads, np.uint32), block=options.pop("block", threads), **options)
    return made.tolist()


def fails(message, body, **options):
    with pytest.raises(PtxError, match=message):
        results(body, **options)


def test_threads_of_a_loop_leave_it_each_after_its_own_count_and_meet_behind_it():
    body = """
        mov.u32 %r1, 0; mov.u32 %r2, 0;
        loop: setp.ge.u32 %p1, %r2, %r23; @%p1 bra done;
        add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1; bra.uni loop;
        done: shfl.sync.idx.b32 %r3, %r2, 31, 31, -1; add.u32 %r1, %r1, %r3;
    """
    assert results(body) == [k * (k - 1) // 2 + 31 + k // 32 * 32 for k in range(64)]


def test_a_predicate_chooses_the_threads_of_an_instruction():
    body = "setp.lt.u32 %p1, %r23, 40; mov.u32 %r1, 7; @%p1 mov.u32 %r1, %r23; @!%p1 add.u32 %r1, %r1, 1;"
    assert results(body) == [k if k < 40 else 8 for k in range(64)]


def test_threads_that_have_returned_are_not_waited_for():
    body = f"mov.u32 %r1, 5; setp.ge.u32 %p1, %r23, 32; @%p1 ret; bar.sync 0; {STORE}"
    assert results(body) == [5] * 32 + [0] * 32


# Each thread writes its number, and reads that of a thread of the next warp.
THROUGH_SHARED = """
    shl.b32 %r2, %r23, 2; mov.u32 %r3, words; add.u32 %r2, %r2, %r3; st.shared.u32 [%r2], %r23;
    {barrier}
    add.u32 %r4, %r23, 32; and.b32 %r4, %r4, 63; shl.b32 %r4, %r4, 2; add.u32 %r4, %r4, %r3; ld.shared.u32 %r1, [%r4];
"""
WORDS = ".shared .align 4 .b8 words[256];"


def test_a_barrier_makes_warps_wait_for_each_other():
    for apart in (False, True):
        made = results(
            THROUGH_SHARED.format(barrier="bar.sync 0;"), declarations=WORDS, choices=Choices(apart=apart), blocks=1
        )
        assert made == [(k + 32) % 64 for k in range(64)]


def test_a_missing_barrier_shows_where_warps_run_one_after_another():
    made = results(THROUGH_SHARED.format(barrier=""), declarations=WORDS, choices=Choices(apart=True))
    assert made != [(k + 32) % 64 for k in range(64)]


def test_blocks_have_shared_memory_of_their_own():
    made = results(
        THROUGH_SHARED.format(barrier="bar.sync 0;") + "add.u32 %r1, %r1, %r21;",
        threads=256,
        block=64,
        blocks=4,
        declarations=WORDS,
        choices=Choices(blocks=3),
    )
    assert made == [(k + 32) % 64 + k // 64 for k in range(256)]


def test_threads_at_different_barriers_wait_forever():
    fails(
        "threads wait forever at bar.sync 0",
        "setp.lt.u32 %p1, %r23, 5; @%p1 bra other; bar.sync 0; bra.uni end; other: bar.sync 0; end: mov.u32 %r1, 0;",
    )
    fails("unknown barrier", "bar.sync 1;")
    fails("unknown barrier, or one under a predicate", "setp.lt.u32 %p1, %r23, 5; @%p1 bar.sync 0;")
    fails("unknown barrier", "bar.warp.sync 15;")


def test_a_shuffle_needs_all_lanes_that_it_names():
    fails("elsewhere", f"setp.lt.u32 %p1, %r23, 5; @%p1 bra end; {MEET} end: mov.u32 %r1, 0;")
    fails("elsewhere", MEET.replace("-1", "0xFFFF"))


@pytest.mark.parametrize(
    ("how", "amount", "control", "source"),
    [
        ("down", 3, 31, lambda k: k + 3 if k + 3 < 32 else k),
        ("down", 3, 31 + (24 << 8), lambda k: k + 3 if k % 8 + 3 < 8 else k),  # in segments of 8
        ("up", 5, 0, lambda k: k - 5 if k >= 5 else k),
        ("bfly", 16, 31, lambda k: k ^ 16),
        ("idx", 9, 31, lambda k: 9),
    ],
)
def test_shuffles_take_the_value_of_another_lane(how, amount, control, source):
    body = f"shfl.sync.{how}.b32 %r2|%p1, %r23, {amount}, {control}, -1;"
    made = results(f"{body} selp.u32 %r3, 100, 0, %p1; add.u32 %r1, %r2, %r3;")
    lanes = [source(k % 32) for k in range(64)]
    inside = [how in ("idx", "bfly") or lane != k % 32 for k, lane in enumerate(lanes)]
    assert made == [
        k // 32 * 32 + lane + 100 * found for k, (lane, found) in enumerate(zip(lanes, inside, strict=True))
    ]


def test_lanes_vote_and_are_reduced():
    odd = "and.b32 %r2, %r23, 1; setp.eq.u32 %p1, %r2, 1;"
    assert results(f"{odd} vote.sync.ballot.b32 %r1, %p1, -1;") == [0xAAAAAAAA] * 64
    assert results(f"{odd} vote.sync.any.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;") == [1] * 64
    assert results(f"{odd} vote.sync.all.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;") == [0] * 64
    assert results(f"mov.u32 %r1, 0; {odd} @%p1 activemask.b32 %r1;")[:2] == [0, 0xAAAAAAAA]
    assert results("redux.sync.max.u32 %r1, %r23, -1;") == [31] * 32 + [63] * 32
    assert results("redux.sync.add.u32 %r1, %r23, -1;") == [496] * 32 + [496 + 1024] * 32


@pytest.mark.parametrize("reverse", [False, True])
def test_threads_take_turns_at_an_atomic(reverse):
    """Each sees the value that another has left, in one order or the other."""
    body = f"atom.global.add.u32 %r1, [%rd21], 2; {STORE} red.global.max.u32 [%rd21+4], %r20;"
    body += "atom.global.exch.b32 %r2, [%rd21+8], %r20; atom.global.cas.b32 %r3, [%rd21+12], 0, %r20;"
    old, memory = launch(
        body,
        np.zeros(64, np.uint32),
        np.zeros(4, np.uint32),
        block=32,
        blocks=2,
        choices=Choices(reverse=reverse, blocks=1),
    )
    assert sorted(old.tolist()) == list(range(0, 128, 2))
    assert (old[0] > old[63]) == reverse
    assert memory.tolist() == [128, 63, 0 if reverse else 63, 63 if reverse else 1]


def test_vectors_and_parts_of_registers_are_moved_in_order():
    body = f"""{element(0, 16, "%rd1")} ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1];
        mov.b64 %rd2, {{%r1, %r2}}; mov.b64 {{%r5, _}}, %rd2; mov.b32 {{%h1, %h2}}, %r3; mov.b32 %r6, {{%h2, %h1}};
        cvt.u64.u32 %rd3, %r4; st.global.v2.u64 [%rd1], {{%rd2, %rd3}}; st.global.u32 [%rd1+12], %r6;"""
    rows = np.arange(128, dtype=np.uint32).reshape(32, 4) * 0x10001 + 7
    (made,) = launch(body, rows)
    swapped = rows[:, 2] >> 16 | rows[:, 2] << 16
    assert np.array_equal(made, np.stack([rows[:, 0], rows[:, 1], rows[:, 3], swapped], axis=1))


def test_loads_extend_by_their_type():
    body = f"{element(0, 4)} ld.global.s8 %r1, [%rd19]; ld.global.u8 %h1, [%rd19+1]; cvt.u32.u16 %r2, %h1;"
    body += "add.u32 %r1, %r1, %r2; st.global.u32 [%rd19], %r1;"
    (made,) = launch(body, np.full(32, 0x0000C3FE, np.uint32))
    assert made.tolist() == [0xC3 - 2] * 32


def test_generic_addresses_reach_all_spaces():
    body = """
        mov.u64 %rd1, words; cvta.shared.u64 %rd1, %rd1; mul.wide.u32 %rd2, %r23, 4; add.u64 %rd1, %rd1, %rd2;
        st.u32 [%rd1], %r23; ld.u32 %r2, [%rd1];
        mov.u64 %rd3, mine; cvta.local.u64 %rd3, %rd3; st.u32 [%rd3+4], %r2; cvta.to.local.u64 %rd3, %rd3;
        ld.local.u32 %r3, [%rd3+4]; mov.b64 %rd4, array0; cvta.param.u64 %rd4, %rd4; ld.u64 %rd5, [%rd4];
        setp.eq.u64 %p1, %rd5, %rd20; selp.u32 %r1, %r3, 0, %p1;
    """
    assert results(body, declarations=f"{WORDS} .local .align 8 .b8 mine[8];") == NUMBERS.tolist()


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("misaligned global access of 4 bytes", "ld.global.u32 %r1, [%rd20+2];"),
        ("misaligned global access of 16 bytes", "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd20+8];"),
        ("global access of 4 bytes, not all of which are in an array", "ld.global.u32 %r1, [%rd20+256];"),
        ("global access of 16 bytes, not", "st.global.v2.u64 [%rd20+256], {%rd1, %rd1};"),
        ("global access outside of all memory", "ld.global.u32 %r1, [%rd20+-4096];"),
        ("global access outside of all memory", "mov.u64 %rd1, 0; ld.global.u32 %r1, [%rd1];"),
        ("shared access of 4 bytes, not", "ld.shared.u32 %r1, [words+256];"),
        ("shared access outside of all memory", "mov.u32 %r2, 70000; st.shared.u32 [%r2], %r1;"),
        ("param access outside of all memory", "ld.param.u64 %rd1, [array0+64];"),
        ("an address in no space", "mov.u64 %rd1, 0x7800000000000000; ld.u32 %r1, [%rd1];"),
        ("global access", "atom.global.add.u32 %r1, [%rd20+260], 1;"),
    ],
)
def test_accesses_outside_of_arrays_or_alignment_are_found(message, body):
    fails(message, body, declarations=WORDS)


@pytest.mark.parametrize(
    "body",
    [
        "add.f32 %r1, %r2, %r3;",  # without a rounding mode
        "add.rn.ftz.f32 %r1, %r2, %r3;",
        "mul.rn.sat.f32 %r1, %r2, %r3;",
        "add.cc.u32 %r1, %r2, %r3;",
        "rcp.approx.f64 %rd1, %rd2;",
        "ld.global.L3::always.u32 %r1, [%rd20];",
        "ld.global.v3.u32 {%r1, %r2, %r3}, [%rd20];",
        "ld.const.u32 %r1, [%rd20];",
        "atom.global.inc.u32 %r1, [%rd20], 7;",
        "shfl.down.b32 %r1, %r2, 1, 31;",
        "vote.sync.some.pred %p1, %p2, -1;",
        "cp.async.cg.shared.global [%r1], [%rd20], 16;",
        "bra.always end; end: mov.u32 %r1, 0;",
        "mov.u32 %r1, %tid.y;",
        "mov.u64 %r1, 1;",
        "trap;",
    ],
)
def test_what_is_not_known_is_an_error_that_names_the_instruction(body):
    with pytest.raises(PtxError) as raised:
        results(body)
    assert body.split(";")[0].strip() in str(raised.value)


def test_directives_that_are_not_known_are_errors():
    for text in (".const .b32 table[4];", ".visible .entry f() { .texref t; ret; }", ".func g() { ret; }"):
        with pytest.raises(PtxError):
            Module(f".version 9.0\n.target sm_80\n.address_size 64\n{text}").kernel("f")


def test_kernels_are_found_by_the_name_that_a_compiler_for_the_host_gives_them():
    of_device = "_ZN4csgd47_GLOBAL__N__52c35538_14_csgd_nopass_cu_7809904611step_kernelIfEEvT_"
    assert of_host(of_device) == "_ZN4csgd12_GLOBAL__N_111step_kernelIfEEvT_"
    module = Module(f".version 9.0\n.target sm_80\n.address_size 64\n.entry {of_device}() {{ ret; }}")
    assert module.kernel(of_host(of_device)).name == of_device
    with pytest.raises(PtxError, match="no kernel other"):
        module.kernel("other")
