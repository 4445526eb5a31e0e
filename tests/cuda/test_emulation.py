# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' own source, run on the CPU with a thread for each CUDA thread: bits, memory and races.

emulation/ holds the emulation of CUDA and, for each kernel, the program that compares it with its CPU loop.
"""

import os

import pytest

from .emulation_programs import ADDRESS, PLAIN, THREAD, Program, Programs
from .faults import FAULTS

pytestmark = pytest.mark.xdist_group("emulation")  # each process would compile all programs

VARIANTS = {"plain": PLAIN, "address and undefined behaviour": ADDRESS, "thread": THREAD}


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Shared with the other processes of the session (pytest-xdist)."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_emulation"
    folder.mkdir(exist_ok=True)
    return Programs(folder, max(1, os.cpu_count() // workers))


def smallest_program(fault, changes=()):
    """The program with the kernels that a fault needs."""
    definitions = [f"CSGD_STORAGE={fault.storage}"] if fault.storage else []
    definitions += [f"CSGD_RECORD={fault.record}"] if fault.record else []
    return Program(fault.kernel, fault.flags, tuple(definitions), changes)


@pytest.mark.parametrize(
    ("kernel", "cases"), [("csgd", 45), ("calibrate_grad", 74), ("exchange", 35), ("hard_threshold", 108)]
)
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_kernels_make_the_bits_of_the_cpu_loop(flags, kernel, cases, programs):
    done = programs.run(Program(kernel, flags))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("agree") == cases


def test_old_drivers_take_smaller_launches(programs):
    """Before CUDA 12.1 a kernel's parameters are 4 KB at most: the same bits in more launches."""
    done = programs.run(Program("csgd", PLAIN), "old driver")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("agree") == 9


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.kernel}: {fault.name}" for fault in FAULTS])
def test_a_broken_kernel_is_found_out(fault, programs):
    done = programs.run(smallest_program(fault, fault.changes), fault.case)
    assert done.returncode != 0
    assert any(sign in done.stdout + done.stderr for sign in ("differs", "Sanitizer", "runtime error"))
