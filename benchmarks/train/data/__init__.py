# SPDX-License-Identifier: Apache-2.0
"""The data sets by name; each is read from a local directory, nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable

from examples.training.errors import UserError

from ..tasks.base import DataOptions
from . import cifar, idx_or_digits
from .images import ImageSet, Split

# --data: reader of (name, directory)
READERS: dict[str, Callable[[str, str | None], ImageSet]] = {
    "digits": idx_or_digits.read_digits,
    "mnist": idx_or_digits.read_idx,
    "fashion-mnist": idx_or_digits.read_idx,
    "idx": idx_or_digits.read_idx,
    "cifar10": cifar.read,
    "cifar100": cifar.read,
}
# --data: what its labels stand for, where these are more than numbers and known here
CLASS_NAMES = {  # https://github.com/zalandoresearch/fashion-mnist, section "Labels"
    "fashion-mnist": ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"],
}


def load(options: DataOptions) -> ImageSet:
    """The data set of ``options``, divided as they say; UserError where it is missing, damaged or too small."""
    if options.data not in READERS:
        others = "" if options.data == "imagefolder" else ", imagefolder"  # which a program reads itself, or not at all
        raise UserError(f"--data {options.data}: not among {', '.join(READERS)}{others}.")
    return READERS[options.data](options.data, options.directory).divided(options.limit, options.holdout)


__all__ = ["CLASS_NAMES", "READERS", "ImageSet", "Split", "load"]
