# SPDX-License-Identifier: Apache-2.0
"""Pruning while training: hard thresholding as a function and around a step, and what a pruned model saves."""

from .export import cuttable_weights, export_pruned
from .semi_structured import is_two_of_four, to_semi_structured

__all__ = ["cuttable_weights", "export_pruned", "is_two_of_four", "to_semi_structured"]
