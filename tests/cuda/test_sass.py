# SPDX-License-Identifier: Apache-2.0
"""tools/sass.py counts the instructions of a round in machine code: tried on loops whose count is known."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sass

# Eleven instructions on the path that stores everything, without the rare block. The second loop copies nothing.
KERNEL = """
        /*0000*/                   MOV R1, 0x1 ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0020*/                   IMAD.WIDE.U32 R6, R7, -0x2daee0ad, RZ ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   FADD R9, R9, R9 ;
        /*0050*/                   BRA.DIV UR5, `(.L_x_9) ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   FADD R9, R9, R8 ;
        /*0080*/                   FADD R9, R9, R8 ;
        /*0090*/                   FADD R9, R9, R8 ;
        /*00a0*/                   FADD R9, R9, R8 ;
.L_x_3:
        /*00b0*/                   STG.E.128 desc[UR4][R4.64], R12 ;
        /*00c0*/              @!P1 BRA `(.L_x_4) ;
        /*00d0*/                   STG.E.128 desc[UR4][R4.64], R16 ;
.L_x_4:
        /*00e0*/                   IADD3 R0, R0, 0x1, RZ ;
        /*00f0*/              @!P2 BRA `(.L_x_1) ;
.L_x_5:
        /*0100*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0110*/               @P3 BRA `(.L_x_5) ;
        /*0120*/                   EXIT ;
.L_x_9:
        /*0130*/                   BRA `(.L_x_3) ;
$__internal_0_$__cuda_sm20_div_s64:
        /*0140*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
"""


def test_the_shortest_path_that_draws_and_stores_everything_is_counted():
    assert sass.instructions_of_a_round(*sass.parse(KERNEL)) == 11


def test_a_kernel_that_copies_nothing_ahead_has_no_such_round():
    assert sass.instructions_of_a_round(*sass.parse(KERNEL.replace("LDGSTS", "LDG"))) is None


def test_kernels_are_recognized_by_their_names():
    name = "_ZN4csgd11csgd_kernelINS_8BFloat16ENS_11StaticPartsILb0ELb1ELb1EEENS0_6LaunchILi32764EfNS_10CsgdTensorEEEE"
    case = sass.case_of("sm_90", name)
    assert case.words() == ("sm_90", "bfloat16", "momentum nesterov")
    assert sass.case_of("sm_90", name.replace("StaticParts", "RuntimeParts")) is None


def test_the_table_has_every_kernel():
    options = [(w, *m) for w in (False, True) for m in ((False, False), (True, False), (True, True))]
    dtypes = ("float32", "float64", "bfloat16", "float16")
    cases = itertools.product(("sm_80", "sm_90", "sm_100"), dtypes, options)
    assert set(sass.read_table()) == {sass.Case(t, d, *o).words() for t, d, o in cases}


@pytest.mark.parametrize(("dtype", "bytes_per_element"), [("float32", 20), ("bfloat16", 10)])
def test_instructions_leave_the_memory_the_limit(dtype, bytes_per_element):
    """At 3 TB/s an H100 has instructions to spare: 132 multiprocessors, 4 warps a clock, 1.7 GHz."""
    rate = 132 * 4 * 32 * 1.7e9
    needed = sass.read_table()["sm_90", dtype, "momentum"] * 3e12 / bytes_per_element
    assert needed < 0.75 * rate
