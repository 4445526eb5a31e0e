# SPDX-License-Identifier: Apache-2.0
"""A progress bar where tqdm is installed, else one line for each bar."""

from __future__ import annotations

import sys
from contextlib import nullcontext

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    tqdm = None


class _NoBar:
    def update(self) -> None:
        pass


def bar(total: int, description: str):
    """A context manager whose value has update(); ``total`` updates are one bar."""
    if tqdm is None:
        print(f"{description}: {total} rounds (install tqdm for a progress bar)", file=sys.stderr, flush=True)
        return nullcontext(_NoBar())
    # A log file wants a line now and then, not ten a second.
    return tqdm(total=total, desc=description, unit="round", mininterval=0.1 if sys.stderr.isatty() else 10)
