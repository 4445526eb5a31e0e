# SPDX-License-Identifier: Apache-2.0
"""The data sets by name; each is read from a local directory, nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable

from tools.program import UserError

from ..task import DataOptions
from . import cifar, grey
from .images import ImageSet, Split

# --data: reader of (name, directory)
READERS: dict[str, Callable[[str, str | None], ImageSet]] = {
    "digits": grey.read_digits,
    "mnist": grey.read_idx,
    "fashion-mnist": grey.read_idx,
    "idx": grey.read_idx,
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
    images = READERS[options.data](options.data, options.directory).shrunk(options.shrink)
    return images.divided(options.limit, options.holdout)


__all__ = ["CLASS_NAMES", "READERS", "ImageSet", "Split", "load"]
