# SPDX-License-Identifier: Apache-2.0
"""Tests of many options by pairs: a covering array instead of the product of all values.

Most faults show with one value, or with two values together (D. R. Kuhn, D. R. Wallace, A. M. Gallo, "Software fault
interactions and implications for software testing", IEEE Transactions on Software Engineering 30(6), 2004).
"""

from itertools import combinations, product

import pytest


def covering_array(sizes):
    """Rows of one value index per factor, such that any two values of different factors are together in some row.

    ``sizes`` holds the number of values of each factor. Greedy, and the same rows for the same sizes: each row begins
    with the first pair that no row has yet, and takes for each other factor, the largest first, the value that adds
    most of the missing pairs; of several such values the one that the fewest rows have.
    """
    if len(sizes) < 2:
        return [(value,) for size in sizes for value in range(size)]
    missing = {
        ((i, a), (j, b)): None  # a set that keeps its order
        for i, j in combinations(range(len(sizes)), 2)
        for a, b in product(range(sizes[i]), range(sizes[j]))
    }
    by_size = sorted(range(len(sizes)), key=lambda factor: -sizes[factor])
    used = [[0] * size for size in sizes]
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for factor in by_size:
            if factor not in row:
                row[factor] = max(
                    range(sizes[factor]),
                    key=lambda value: (
                        sum(tuple(sorted(((factor, value), other))) in missing for other in row.items()),
                        -used[factor][value],
                        -value,
                    ),
                )
        for pair in combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        for factor, value in row.items():
            used[factor][value] += 1
        rows.append(tuple(row[factor] for factor in range(len(sizes))))
    return rows


def paired(factors):
    """The cases of a test, as dicts: ``factors`` maps each name to the list of its values."""
    values = list(factors.values())
    return [
        {name: values[k][index] for k, (name, index) in enumerate(zip(factors, row, strict=True))}
        for row in covering_array([len(each) for each in values])
    ]


BACKENDS = {"kernel": True, "reference": False}  # values of the fixture ``fused``


def with_ids(values):
    """[(id, value)] of a list, or of a dict from the ids to the values."""
    return list(values.items() if isinstance(values, dict) else ((str(value), value) for value in values))


def by_pairs(indirect=(), **factors):
    """pytest.mark.parametrize over several arguments; the values of each are a list, or a dict from their ids."""
    cases = paired({name: with_ids(values) for name, values in factors.items()})
    return pytest.mark.parametrize(
        tuple(factors),
        [[value for _, value in case.values()] for case in cases],
        ids=["-".join(id for id, _ in case.values()) for case in cases],
        indirect=indirect,
    )
