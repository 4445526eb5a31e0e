# SPDX-License-Identifier: Apache-2.0
"""The tests that go by pairs leave no pair out, and are the same ones each time."""

from itertools import combinations, product
from math import prod

import pytest

from .pairs import covering_array, paired

SIZES = [(), (1,), (5,), (2, 3), (1, 4, 1), (3, 3, 3, 3), (2, 3, 4, 2, 3, 2, 4), (24, 2, 2), (2, 3, 3, 2, 4) * 3]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_pair_of_values_is_in_some_row(sizes):
    rows = covering_array(sizes)
    for row in rows:
        assert len(row) == len(sizes)
        assert all(0 <= value < size for value, size in zip(row, sizes, strict=True))
    for i, j in combinations(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(range(sizes[i]), range(sizes[j])))
    if len(sizes) == 1:
        assert rows == [(value,) for value in range(*sizes)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_are_few_and_the_same_each_time(sizes):
    """No row twice; and far from the product, near the least that two largest factors need."""
    rows = covering_array(sizes)
    assert rows == covering_array(sizes)
    assert len(set(rows)) == len(rows) <= prod(sizes)
    assert len(rows) <= 2 * prod(sorted(sizes)[-2:])


def test_cases_have_the_names_and_values_of_their_factors():
    cases = paired({"a": "xy", "b": [1.5, 2.5, None]})
    assert sorted((case["a"], str(case["b"])) for case in cases) == sorted(product("xy", ("1.5", "2.5", "None")))
    assert all(list(case) == ["a", "b"] for case in cases)
