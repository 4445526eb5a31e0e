# SPDX-License-Identifier: Apache-2.0
"""The update rule, element by element: draws, rounding, theorem, agreement of the backends."""
