# SPDX-License-Identifier: Apache-2.0
"""Image files in folders, train/CLASS/*.jpeg and val/CLASS/*.jpeg, as ImageNet is laid out.

All files are read once before anything is trained: what cannot be read is known then, and not in the middle.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tools.program import UserError

from . import image_files
from .image_files import NotReadable, printable
from .seeding import generator

SIDE = 224  # pixels of what the network sees
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
                # Names are bytes, which need not be UTF-8.
                crc = zlib.crc32(os.fsencode(f"{path.parent.name}/{path.name}\n"), crc)
        return f"{crc:08x}"


def scan(directory: str | None, skip_unreadable: bool = False) -> Folder:
    """The files; the training images in a random order that is always the same, since folders come class by class.

    All of them are read once. What is no image is left out, and said on stderr.

    Args:
        skip_unreadable: leaves out image files that cannot be read, too, and names them on stderr.

    Raises:
        UserError: folders are missing or do not fit, or image files cannot be read.
    """
    if directory is None:
        raise UserError("--data imagefolder: needs --data-dir, the directory that holds train and val.")
    root = Path(directory)
    found = {part: _classes(root / part) for part in ("train", "val")}
    classes = sorted(found["train"])
    if unknown := sorted(found["val"].keys() - found["train"].keys()):
        raise UserError(
            f"{printable(root / 'val')}: class '{printable(unknown[0])}' is not in {printable(root / 'train')}; both "
            "need the same classes."
        )
    if len(classes) < 2:
        raise UserError(f"{printable(root / 'train')}: at least two classes are needed, one folder each.")
    _check(found, skip_unreadable)
    files = {}
    for part, by_class in found.items():
        labelled = [(path, label) for label, name in enumerate(classes) for path in by_class.get(name, [])]
        files[part] = Files([path for path, _ in labelled], [label for _, label in labelled])
    shuffled = torch.randperm(len(files["train"]), generator=generator("files", 0, 0)).tolist()
    return Folder(classes, files["train"].part(shuffled), files["val"])


def _classes(directory: Path) -> dict[str, list[Path]]:
    """The image files by class; UserError where there are none."""
    shown = printable(directory)
    try:
        entries = list(directory.iterdir())
        folders = [path for path in entries if path.is_dir()]
        hidden = [path for path in folders if path.name.startswith(".")]  # such as .ipynb_checkpoints
        sorted_out = {path.name: image_files.sort_out(path) for path in folders if path not in hidden}
        others = Counter({"hidden folder(s)": len(hidden), "beside the classes": len(entries) - len(folders)})
    except FileNotFoundError:
        raise UserError(f"{shown}: no such directory; images must lie in train/CLASS and val/CLASS.") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror or error}); check the folder.") from None
    for name, (images, left_out) in sorted_out.items():
        if not images:
            instead = f", but {image_files.listed(left_out)}" if left_out else ""
            kinds = ", ".join(sorted(image_files.SUFFIXES))
            raise UserError(f"{printable(directory / name)}: holds no {kinds} files{instead}; put some in or drop it.")
        others += left_out
    if not sorted_out:
        raise UserError(f"{shown}: has no folders; images must lie in one folder for each class.")
    if +others:
        _say(f"{shown}: left out besides the images: {image_files.listed(+others)}.")
    return {name: images for name, (images, _) in sorted_out.items()}


def _check(found: dict[str, dict[str, list[Path]]], skip_unreadable: bool) -> None:
    """Reads all files, and removes those that cannot be read where they are to be skipped; UserError otherwise."""
    lists = [images for classes in found.values() for images in classes.values()]
    paths = [path for images in lists for path in images]
    bar = tqdm(image_files.faults(paths), "reading all images once", len(paths), leave=False, disable=None)
    faults = {path: fault for path, fault in zip(paths, bar, strict=True) if fault is not None}
    if not faults:
        return
    named = [f"{printable(path)} ({fault})" for path, fault in faults.items()]
    if not skip_unreadable:
        (path, fault), *more = faults.items()
        if not more:
            what, them = f"{printable(path)}: not a readable image ({fault})", "it"
        else:
            what = f"{len(faults)} of {len(paths)} image files are not readable: {image_files.first_few(named)}"
            them = "them"
        raise UserError(f"{what}; replace or remove {them}, or leave {them} out with --skip-unreadable.")
    _say(f"--skip-unreadable: leaves out {len(faults)} of {len(paths)} image files: {', '.join(named)}.")
    for images in lists:
        folder = images[0].parent
        images[:] = [path for path in images if path not in faults]
        if not images:
            raise UserError(f"{printable(folder)}: holds no readable image; put some in or drop it.")


def _say(sentence: str) -> None:
    """On stderr, once: the processes that train several runs at a time scan the folders again."""
    if multiprocessing.parent_process() is None:
        print(sentence, file=sys.stderr, flush=True)


class Images(Dataset):
    """(uint8 [3, SIDE, SIDE], label) of each file: the centre, or for ``draws`` = (seed, epoch) a random crop."""

    def __init__(self, files: Files, draws: tuple[int, int] | None = None):
        self.files, self.draws = files, draws

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.files.paths[index]
        try:
            image = image_files.read(path)
        except NotReadable as error:  # it was readable when the folders were scanned
            raise UserError(f"{printable(path)}: not a readable image ({error}); replace or remove it.") from None
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
