# SPDX-License-Identifier: Apache-2.0
"""Image files in folders, train/CLASS/*.jpeg and val/CLASS/*.jpeg, as ImageNet is laid out."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.training.errors import UserError

from .seeding import generator

SIDE = 224  # pixels of what the network sees
_SUFFIXES = {".jpeg", ".jpg", ".png"}
_CENTRE = 224 / 256  # share of the shorter side that the centre crop keeps
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of random crops; Szegedy et al., 2015


@dataclass(frozen=True)
class Files:
    """paths: of the images; labels: index of the class of each."""

    paths: list[Path]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, chosen: list[int]) -> Files:
        """Those at the positions ``chosen``."""
        return Files([self.paths[i] for i in chosen], [self.labels[i] for i in chosen])


@dataclass(frozen=True)
class Folder:
    """classes: names, in the order of the labels."""

    classes: list[str]
    train: Files
    test: Files

    def checksum(self) -> str:
        """CRC-32 of the names within the classes, as 8 hexadecimal digits; the images themselves are not read."""
        crc = 0
        for files in (self.train, self.test):
            for path in files.paths:
                crc = zlib.crc32(f"{path.parent.name}/{path.name}\n".encode(), crc)
        return f"{crc:08x}"


def scan(directory: str | None) -> Folder:
    """The files; the training images in a random order that is always the same, since folders come class by class."""
    if directory is None:
        raise UserError("--data imagefolder: needs --data-dir, the directory that holds train and val.")
    root = Path(directory)
    found = {part: _classes(root / part) for part in ("train", "val")}
    classes = sorted(found["train"])
    if unknown := sorted(found["val"].keys() - found["train"].keys()):
        raise UserError(f"{root / 'val'}: class {unknown[0]!r} is not in {root / 'train'}; both need the same classes.")
    if len(classes) < 2:
        raise UserError(f"{root / 'train'}: at least two classes are needed, one folder each.")
    files = {}
    for part, by_class in found.items():
        labelled = [(path, label) for label, name in enumerate(classes) for path in by_class.get(name, [])]
        files[part] = Files([path for path, _ in labelled], [label for _, label in labelled])
    shuffled = torch.randperm(len(files["train"]), generator=generator("files", 0, 0)).tolist()
    return Folder(classes, files["train"].part(shuffled), files["val"])


def _classes(directory: Path) -> dict[str, list[Path]]:
    """The image files by class; UserError where there are none."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; images must lie in train/CLASS and val/CLASS.")
    classes = {
        folder.name: sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        for folder in directory.iterdir()
        if folder.is_dir()
    }
    for name, paths in classes.items():
        if not paths:
            raise UserError(
                f"{directory / name}: holds no {', '.join(sorted(_SUFFIXES))} files; put some in or drop it."
            )
    if not classes:
        raise UserError(f"{directory}: has no folders; images must lie in one folder for each class.")
    return classes


class Images(Dataset):
    """(uint8 [3, SIDE, SIDE], label) of each file: the centre, or for ``draws`` = (seed, epoch) a random crop."""

    def __init__(self, files: Files, draws: tuple[int, int] | None = None):
        self.files, self.draws = files, draws

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image  # here: no other data set needs Pillow

        path = self.files.paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except Exception as error:  # Pillow raises almost anything for damaged files
            raise UserError(f"{path}: not a readable image ({type(error).__name__}); replace or remove it.") from None
        if self.draws is None:
            box, mirrored = centre(image.size), False
        else:
            random = np.random.default_rng([*self.draws, index])
            box, mirrored = random_crop(image.size, random), random.random() < 0.5
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.files.labels[index]


def centre(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the centre crop of an image of (width, height) pixels."""
    side = min(size) * _CENTRE
    left, top = ((length - side) / 2 for length in size)
    return left, top, left + side, top + side


def random_crop(size: tuple[int, int], random: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop of random area and ratio; the centre where none fits in ten tries."""
    width, height = size
    for _ in range(_TRIES):
        area = width * height * random.uniform(*_AREA)
        ratio = math.exp(random.uniform(*map(math.log, _RATIO)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return left, top, left + w, top + h
    return centre(size)
