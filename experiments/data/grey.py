# SPDX-License-Identifier: Apache-2.0
"""Grey images: scikit-learn's digits, MNIST, Fashion-MNIST and other IDX data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tools.program import UserError

from . import idx
from .images import ImageSet, Split

DIGITS_TEST_IMAGES = 500  # of 1797, the same ones for every seed; one image is 0.2 points of accuracy
SMALLEST_SIDE = 4  # pixels
_FLIPS = {"fashion-mnist"}  # a mirrored shoe is a shoe, a mirrored digit is none


def read_digits(name: str, directory: str | None) -> ImageSet:
    """The 1797 digits of scikit-learn, 8 x 8 pixels of 0 to 16; 500 of them are test images."""
    if directory is not None:
        raise UserError(f"--data-dir {directory}: {name} come with scikit-learn; leave the option out.")
    try:  # here and not above: other data need no scikit-learn
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise UserError(
            f"--data {name}: are those of scikit-learn, and {error.name!r} is missing; pip install scikit-learn."
        ) from None
    digits = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.images.astype(np.uint8),  # whole numbers, 0 to 16
        digits.target,
        test_size=DIGITS_TEST_IMAGES,
        random_state=0,
        stratify=digits.target,
    )
    return _image_set(name, train_images, train_labels, test_images, test_labels)


def read_idx(name: str, directory: str | None) -> ImageSet:
    """The IDX data set in ``directory``; UserError where it is missing, damaged or does not fit together."""
    if directory is None:
        raise UserError(f"--data {name}: needs --data-dir, the directory that holds the IDX files.")
    folder = Path(directory)
    if not folder.exists():
        raise UserError(f"{directory}: no such directory; name the one that holds the IDX files.")
    if not folder.is_dir():
        raise UserError(f"{directory}: not a directory; name the one that holds the IDX files.")
    parts = [("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1)]
    paths = [idx.find(folder, part, ndim) for part, ndim in parts]
    arrays = [idx.read(path, ndim) for path, (_, ndim) in zip(paths, parts, strict=True)]
    for i in (0, 2):
        _check_pair(paths[i], arrays[i], paths[i + 1], arrays[i + 1])
    _check_sets(paths, arrays)
    return _image_set(name, *arrays)


def _image_set(name: str, *arrays: np.ndarray) -> ImageSet:
    """arrays: training images and labels, test images and labels."""
    train_images, train_labels, test_images, test_labels = map(torch.tensor, arrays)
    return ImageSet(
        name,
        train=Split(train_images.unsqueeze(1), train_labels.long()),
        test=Split(test_images.unsqueeze(1), test_labels.long()),
        classes=int(train_labels.max()) + 1,
        flips=name in _FLIPS,
    )


def _check_pair(images_path: Path, images: np.ndarray, labels_path: Path, labels: np.ndarray) -> None:
    if len(images) != len(labels):
        raise UserError(
            f"{images_path} has {len(images)} images and {labels_path} {len(labels)} labels; "
            "they must be equally many: check that both belong together."
        )
    if len(images) == 0:
        raise UserError(f"{images_path}: holds no images; use a data set that has some.")
    height, width = images.shape[1:]
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(
            f"{images_path}: images of {height} x {width} pixels are too small for this network; "
            f"it needs at least {SMALLEST_SIDE} x {SMALLEST_SIDE}."
        )


def _check_sets(paths: list[Path], arrays: list[np.ndarray]) -> None:
    """The two sets must fit together: images of one size, no test label that training never showed."""
    train_images, train_labels, test_images, test_labels = arrays
    if train_images.shape[1:] != test_images.shape[1:]:
        first, second = (f"{a.shape[1]} x {a.shape[2]} pixels" for a in (train_images, test_images))
        raise UserError(
            f"{paths[0]} has images of {first} and {paths[2]} of {second}; "
            "training and test images must have the same size."
        )
    classes = int(train_labels.max()) + 1
    if classes < 2:
        raise UserError(f"{paths[1]}: all labels are 0; at least two classes are needed.")
    if (highest := int(test_labels.max())) >= classes:
        raise UserError(
            f"{paths[3]}: label {highest} is out of range: the training labels go from 0 to {classes - 1}; "
            "check that both files belong together."
        )
