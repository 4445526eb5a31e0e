# SPDX-License-Identifier: Apache-2.0
"""The GPU's shortcut for 2^16 / n is the correctly rounded quotient: proven by trying all n, and all estimates."""

import numpy as np


def test_refined_reciprocal_is_correctly_rounded(rule_hooks):
    """A GPU's estimate of 1 / n is within 1 unit in the last place; from any within 2, one step must be exact."""
    n = np.arange(1, 2**16 + 1, dtype=np.float32)
    exact = np.float32(1) / n  # IEEE division rounds correctly
    for ulps in (-2, -1, 0, 1, 2):
        estimates = (exact.view(np.int32) + ulps).view(np.float32)
        refined = [rule_hooks.refine_reciprocal(float(a), float(b)) for a, b in zip(n, estimates, strict=True)]
        assert np.array_equal(np.array(refined, dtype=np.float32).view(np.int32), exact.view(np.int32))
    # 2^16 is a power of two and nothing here is subnormal: the product is exact.
    assert np.array_equal(np.float32(65536) * exact, np.float32(65536) / n)
