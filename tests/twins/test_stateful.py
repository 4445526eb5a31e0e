# SPDX-License-Identifier: Apache-2.0
"""Random sequences of what happens to an optimizer: the kernel stays equal to the reference bit for bit.

Three twins live through the same sequence: the kernel with plans as they are kept, the reference with a new plan for
every step, and the kernel as a fresh optimizer for every step, loaded with the state of the last. Nothing outside of
their parameters, gradients and state may be written. ``pytest tests/twins/test_stateful.py --nightly`` tries 10,000
sequences. Each sequence has one of the two optimizers.
"""

import time

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from ..conftest import need_kernel
from ..helpers import OPTIMIZERS
from .drawn import INVALID
from .machine import RULES
from .mishaps import BAD_LOADS, MISHAPS
from .sequences import Sequences


@pytest.mark.long
def test_twins_stay_equal(pytestconfig, capsys):
    need_kernel(torch.device("cpu"))
    nightly = pytestconfig.getoption("nightly")
    Sequences.seen.clear()
    begin = time.monotonic()
    try:
        run_state_machine_as_test(
            Sequences, settings=settings(max_examples=10_000 if nightly else 150, stateful_step_count=20)
        )
    finally:
        if nightly:
            with capsys.disabled():
                print(f"\n{time.monotonic() - begin:.0f} s: {dict(Sequences.seen)}")
    # That the sequences are what they are meant to be: nothing in them is refused or skipped for good.
    seen = Sequences.seen
    expected = [*RULES, "errors", "bad group", "parameter in two groups", "bad load", "overflows", "mishaps"]
    expected += ["pruned groups"]
    for optimizer_class in OPTIMIZERS:
        expected.append(f"sequences of {optimizer_class.__name__}")
        if nightly:
            expected += [mishap.name for mishap in MISHAPS[optimizer_class]]
            expected += [spoil.__name__ for spoil in BAD_LOADS[optimizer_class]]
            expected += [f"invalid {name}" for name in INVALID[optimizer_class]]
    missing = [name for name in expected if not seen[name]]
    assert not missing
    assert seen["overflows"] < seen["steps"] / 2
    assert seen["steps that moved something"] > seen["steps"] / 3
