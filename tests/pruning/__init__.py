# SPDX-License-Identifier: Apache-2.0
"""Pruning by hard thresholding."""
