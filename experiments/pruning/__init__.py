# SPDX-License-Identifier: Apache-2.0
"""Accuracy against sparsity: hard thresholding while training, and one-shot magnitude pruning."""
