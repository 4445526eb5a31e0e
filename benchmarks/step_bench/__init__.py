# SPDX-License-Identifier: Apache-2.0
"""The parts of bench_step.py: lists of tensors, gradients, peers, timing, the run, the report."""
