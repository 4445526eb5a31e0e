# SPDX-License-Identifier: Apache-2.0
"""The CPU loop is vectorised: instructions per element, compared with instruction_counts.md. Nothing is timed.

After a change that makes the loop better, or worse for a good reason: make count-instructions ARGS=--write
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import count_instructions as counts

FIGURES, COMPILER = counts.read_table()
# The upper limit is twice the lower one: wherever between them a figure lies, twice as many instructions fail.
LOWER, UPPER = 0.75, 1.5


pytestmark = pytest.mark.xdist_group("loops")


@pytest.fixture(scope="module")
def built(request):
    if reason := counts.why_not():
        pytest.skip(reason)
    return request.getfixturevalue("loops")


@pytest.fixture(scope="module")
def built_with_narrow_vectors(tmp_path_factory):
    if reason := counts.why_not():
        pytest.skip(reason)
    return counts.build(tmp_path_factory.mktemp("narrow"), vector_bytes=8)


def test_the_table_has_every_case():
    assert list(FIGURES) == counts.COUNTED + counts.READ


@pytest.mark.parametrize("case", FIGURES, ids=" ".join)
def test_vector_path_is_taken(case, built):
    measured, figure = counts.measure(built, *case), FIGURES[case]
    assert measured <= UPPER * figure, "too many: is the loop still vectorised? objdump --disassemble shows it"
    if counts.compiler() == COMPILER:  # another GCC may do better
        assert measured >= LOWER * figure, "so few that the table is out of date: make count-instructions ARGS=--write"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(("isa", "what"), [("avx2", "momentum"), ("avx512", counts.NARROW)])
def test_lost_vectors_are_found_out(isa, dtype, what, built_with_narrow_vectors):
    """The test above fails for the same source with vectors of 8 bytes."""
    assert counts.measure(built_with_narrow_vectors, isa, dtype, what) > UPPER * FIGURES[isa, dtype, what]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_wrong_instruction_set_would_be_found_out(dtype):
    """If the baseline loop ran instead of the AVX2 loop, the count would exceed its limit."""
    assert FIGURES["baseline", dtype, "momentum"] > UPPER * FIGURES["avx2", dtype, "momentum"]
