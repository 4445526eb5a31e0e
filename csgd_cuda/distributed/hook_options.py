# SPDX-License-Identifier: Apache-2.0
"""The options of the communication hook, checked and made plain Python values."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Iterable
from typing import Any

_MOST = 2**63  # what a tensor's sizes and torch's integers can be


def checked_integer(name: str, value: Any, least: int = 0, below: int = _MOST) -> int:
    """Raises TypeError or ValueError, naming the option, for what is no integer between these."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not least <= number < below:
        raise ValueError(f"{name} must be in {least} ... 2^{below.bit_length() - 1}-1, got {value}")
    return int(number)


def checked_options(
    known_names: Collection[str], *, seed: Any, clip: Any, block: Any, skip_below: Any, skip: Any
) -> dict[str, Any]:
    """The options of ``CalibratedHookState`` for a module with parameters of these names.

    Raises:
        ValueError, TypeError: an option is out of range; the message names it.
    """
    if clip is not None and not (isinstance(clip, numbers.Real) and 0 < float(clip) < math.inf):
        raise ValueError(f"clip must be None or a finite number > 0, got {clip!r}")
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise TypeError(f"skip must be a list of parameter names, got {skip!r}")
    skipped = sorted(set(skip))
    unknown = [name for name in skipped if name not in known_names]
    if unknown:
        raise ValueError(f"skip names {unknown[0]!r}, which is not a parameter of the module")
    return {
        "seed": checked_integer("seed", seed, 0, 2**64),
        "clip": None if clip is None else float(clip),
        "block": None if block is None else checked_integer("block", block, 1),
        "skip_below": checked_integer("skip_below", skip_below),
        "skip": skipped,
    }
