# SPDX-License-Identifier: Apache-2.0
"""``train.py`` and its parts in ``training``; the data readers are used by ``benchmarks.train``, too."""
