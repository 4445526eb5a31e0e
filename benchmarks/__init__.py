# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: ``bench_step.py`` measures one optimizer step, ``python -m benchmarks.train`` compares trainings."""
