# SPDX-License-Identifier: Apache-2.0
"""tools/sass.py counts the instructions of a round in machine code: tried on loops whose count is known."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sass

NAME = (
    "_ZN4csgd11step_kernelINS_8BFloat16ENS_3SgdENS_12SgdDirectionIfNS_11StaticPartsILb0ELb1ELb1EEEEENS_14BufferedTensor"
    "ILi1EEEEEvNS_6LaunchIT0_NS_7StorageIT_E6OpmathET2_EE"
)
OF_ADAMW = NAME.replace("NS_3Sgd", "NS_5AdamW").replace("StaticPartsILb0ELb1ELb1E", "StaticDecayILb1E")
# Eleven instructions on the path that stores everything, without the rare block. The second loop stores nothing, the
# third one is larger.
KERNEL = """
        /*0000*/                   MOV R1, 0x1 ;
.L_x_1:
        /*0010*/                   LDG.E.128 R8, desc[UR4][R4.64] ;
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
.L_x_6:
        /*0120*/                   STG.E.128 desc[UR4][R4.64], R12 ;
        /*0130*/                   FADD R9, R9, R9 ;
        /*0140*/                   FADD R9, R9, R9 ;
        /*0150*/                   FADD R9, R9, R9 ;
        /*0160*/                   FADD R9, R9, R9 ;
        /*0170*/                   FADD R9, R9, R9 ;
        /*0180*/                   FADD R9, R9, R9 ;
        /*0190*/                   FADD R9, R9, R9 ;
        /*01a0*/                   FADD R9, R9, R9 ;
        /*01b0*/                   FADD R9, R9, R9 ;
        /*01c0*/                   FADD R9, R9, R9 ;
        /*01d0*/                   FADD R9, R9, R9 ;
        /*01e0*/                   FADD R9, R9, R9 ;
        /*01f0*/                   FADD R9, R9, R9 ;
        /*0200*/                   FADD R9, R9, R9 ;
        /*0210*/                   FADD R9, R9, R9 ;
        /*0220*/                   FADD R9, R9, R9 ;
        /*0230*/               @P3 BRA `(.L_x_6) ;
        /*0240*/                   EXIT ;
.L_x_9:
        /*0250*/                   BRA `(.L_x_3) ;
$__internal_0_$__cuda_sm20_div_s64:
        /*0260*/                   STG.E.128 desc[UR4][R4.64], R12 ;
"""


def test_the_shortest_path_that_draws_and_stores_everything_is_counted():
    assert sass.instructions_of_a_round(*sass.parse(KERNEL)) == 11


def test_a_kernel_that_stores_no_vector_has_no_such_round():
    assert sass.instructions_of_a_round(*sass.parse(KERNEL.replace("STG.E.128", "STG.E"))) is None


def test_registers_are_those_that_the_compiler_reports_for_the_kernel(monkeypatch):
    monkeypatch.setattr(sass, "functions", lambda cubin: {NAME: KERNEL})
    report = f"""
ptxas info    : Compiling entry function 'other' for 'sm_90'
ptxas info    : Used 12 registers, used 1 barriers
ptxas info    : Compiling entry function '{NAME}' for 'sm_90'
ptxas info    : Function properties for {NAME}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers
"""
    assert sass.costs("sm_90", "cubin", report) == {("sm_90", "bfloat16", "momentum nesterov"): sass.Cost(11 / 8, 80)}


def test_kernels_are_recognized_by_their_names():
    assert sass.case_of("sm_90", NAME) == ("sm_90", "bfloat16", "momentum nesterov")
    assert sass.case_of("sm_90", OF_ADAMW) == ("sm_90", "bfloat16", "CalibratedAdamW weight decay")
    assert sass.case_of("sm_90", OF_ADAMW.replace("ILb1E", "ILb0E")) == ("sm_90", "bfloat16", "CalibratedAdamW")
    assert sass.case_of("sm_90", NAME.replace("BufferedTensor", "StepShard")) is None


MOMENTUM = ("", "momentum", "momentum nesterov")


def test_the_table_has_every_kernel():
    of_csgd = [" ".join(filter(None, words)) for words in itertools.product(("", "weight decay"), MOMENTUM)]
    options = [*(words or "plain" for words in of_csgd), "CalibratedAdamW", "CalibratedAdamW weight decay"]
    dtypes = ("float32", "float64", "bfloat16", "float16")
    assert set(sass.read_table()) == set(itertools.product(("sm_80", "sm_90", "sm_100"), dtypes, options))


@pytest.mark.parametrize(("dtype", "bytes_per_element"), [("float32", 20), ("bfloat16", 10)])
def test_instructions_leave_the_memory_the_limit(dtype, bytes_per_element):
    """At 3 TB/s an H100 has instructions to spare: 132 multiprocessors, 4 warps a clock, 1.7 GHz."""
    rate = 132 * 4 * 32 * 1.7e9
    needed = sass.read_table()["sm_90", dtype, "momentum"].instructions * 3e12 / bytes_per_element
    assert needed < 0.75 * rate
