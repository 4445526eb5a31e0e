# SPDX-License-Identifier: Apache-2.0
"""The data sets: scikit-learn's handwritten digits, or any IDX data set in a directory."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import idx
from .errors import UserError

DIGITS_TEST_IMAGES = 500  # of 1797, the same ones for every seed; one image is 0.2 points of accuracy
SMALLEST_SIDE = 4  # pixels


@dataclass(frozen=True)
class Dataset:
    """Images in grey levels, uint8 of shape [N, height, width]; labels int64 of shape [N] in [0, classes)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    checksum: str  # CRC-32 of all of the above as 8 hexadecimal digits: tells a checkpoint's data from others
    mean: float  # of the training images, in grey levels
    std: float

    def to(self, device: torch.device) -> Dataset:
        """The same data with all tensors on ``device``."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Dataset(**{**vars(self), **tensors})

    def inputs(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Network input for uint8 ``images`` [B, H, W]: normalised, shape [B, 1, H, W], in ``dtype``."""
        return ((images.float() - self.mean) / self.std).unsqueeze(1).to(dtype)


def load(directory: str | None, limit: int | None) -> Dataset:
    """The IDX data set in ``directory``, or the digits when it is None; at most ``limit`` training images."""
    if directory is None:
        return _build("digits (scikit-learn)", *_digits(), limit)
    # In an ASCII locale Python has surrogates for what is not ASCII in a file's name; no file takes these.
    name = os.fsencode(Path(directory).resolve().name).decode("utf-8", errors="replace")
    return _build(name, *_idx_directory(Path(directory)), limit)


def _digits() -> tuple[np.ndarray, ...]:
    try:  # here and not above: with --data no scikit-learn is needed
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise UserError(
            f"the default data are the digits of scikit-learn, and {error.name!r} is missing; "
            "pip install scikit-learn, or give --data DIR."
        ) from None
    digits = load_digits()
    split = train_test_split(
        digits.images.astype(np.uint8),  # whole numbers, 0 to 16
        digits.target,
        test_size=DIGITS_TEST_IMAGES,
        random_state=0,
        stratify=digits.target,
    )
    train_images, test_images, train_labels, test_labels = split
    return train_images, train_labels, test_images, test_labels


def _idx_directory(directory: Path) -> tuple[np.ndarray, ...]:
    if not directory.exists():
        raise UserError(f"{directory}: no such directory; name the one that holds the IDX files.")
    if not directory.is_dir():
        raise UserError(f"{directory}: not a directory; name the one that holds the IDX files.")
    parts = [("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1)]
    paths = [idx.find(directory, part, ndim) for part, ndim in parts]
    arrays = [idx.read(path, ndim) for path, (_, ndim) in zip(paths, parts, strict=True)]
    for i in (0, 2):
        _check_pair(paths[i], arrays[i], paths[i + 1], arrays[i + 1])
    _check_sets(paths, arrays)
    return tuple(arrays)


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


def _build(name: str, *rest) -> Dataset:
    train_images, train_labels, test_images, test_labels, limit = rest
    classes = int(train_labels.max()) + 1
    train_images, train_labels = train_images[:limit], train_labels[:limit]
    tensors = [
        torch.tensor(train_images),
        torch.tensor(train_labels, dtype=torch.int64),
        torch.tensor(test_images),
        torch.tensor(test_labels, dtype=torch.int64),
    ]
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.numpy().tobytes(), crc)
    # A set of constant images has no spread; 1 leaves it as it is.
    mean, std = float(train_images.mean()), float(train_images.std()) or 1.0
    return Dataset(name, *tensors, classes=classes, checksum=f"{crc:08x}", mean=mean, std=std)
