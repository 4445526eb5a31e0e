# SPDX-License-Identifier: Apache-2.0
"""``train.py`` with its parts in ``training``, which ``benchmarks.train`` uses, too, and the program ``degraded``."""
