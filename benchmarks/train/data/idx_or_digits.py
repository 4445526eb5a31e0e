# SPDX-License-Identifier: Apache-2.0
"""Grey images: scikit-learn's digits, MNIST, Fashion-MNIST and other IDX data sets, by the reader of the example."""

from __future__ import annotations

from examples.training import data as example
from examples.training.errors import UserError

from .images import ImageSet, Split

_FLIPS = {"fashion-mnist"}  # a mirrored shoe is a shoe, a mirrored digit is none


def read_digits(name: str, directory: str | None) -> ImageSet:
    """The 1797 digits of scikit-learn, 8 x 8 pixels of 0 to 16; 500 of them are test images."""
    if directory is not None:
        raise UserError(f"--data-dir {directory}: {name} come with scikit-learn; leave the option out.")
    return _with_channel(name, example.load(None, None))


def read_idx(name: str, directory: str | None) -> ImageSet:
    """The IDX data set in ``directory``."""
    if directory is None:
        raise UserError(f"--data {name}: needs --data-dir, the directory that holds the IDX files.")
    return _with_channel(name, example.load(directory, None))


def _with_channel(name: str, grey: example.Dataset) -> ImageSet:
    return ImageSet(
        name,
        train=Split(grey.train_images.unsqueeze(1), grey.train_labels),
        test=Split(grey.test_images.unsqueeze(1), grey.test_labels),
        classes=grey.classes,
        flips=name in _FLIPS,
    )
