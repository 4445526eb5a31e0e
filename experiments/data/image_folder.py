# SPDX-License-Identifier: Apache-2.0
"""Image files in folders, train/CLASS/*.jpeg and val/CLASS/*.jpeg, as ImageNet is laid out.

All files are read once before anything is trained: what cannot be read is known then, and not in the middle.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from experiments.seeding import generator, seeded
from experiments.vision import torchvision
from tools.program import UserError

from . import image_files
from .image_files import NotReadable, printable

SIDE = 224  # pixels of what the network sees

Sample = tuple[Path, int]  # an image and the number of its class


@dataclass(frozen=True)
class Folder:
    """classes: names, in the order of the labels."""

    classes: list[str]
    train: list[Sample]
    test: list[Sample]

    def checksum(self) -> str:
        """CRC-32 of the names within the classes, as 8 hexadecimal digits; the images themselves are not read."""
        crc = 0
        for path, _ in (*self.train, *self.test):
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
    train, test = (_Part(root / part) for part in ("train", "val"))
    if unknown := sorted(set(test.classes) - set(train.classes)):
        raise UserError(
            f"{printable(root / 'val')}: class '{printable(unknown[0])}' is not in {printable(root / 'train')}; both "
            "need the same classes."
        )
    if len(train.classes) < 2:
        raise UserError(f"{printable(root / 'train')}: at least two classes are needed, one folder each.")
    faulty = _faults([path for part in (train, test) for path, _ in part.samples], skip_unreadable)
    kept = []
    for part in (train, test):
        kept.append([(path, train.class_to_idx[path.parent.name]) for path, _ in part.samples if path not in faulty])
        lost = set(part.classes) - {path.parent.name for path, _ in kept[-1]}
        if lost:
            folder = printable(Path(part.root) / min(lost))
            raise UserError(f"{folder}: holds no readable image; put some in or drop it.")
    shuffled = torch.randperm(len(kept[0]), generator=generator("files", 0, 0)).tolist()
    return Folder(train.classes, [kept[0][i] for i in shuffled], kept[1])


class _Part(torchvision.datasets.ImageFolder):
    """Of torchvision's folder the classes and the samples, but of the images right in the folders of the classes only,
    without what is hidden; other entries are counted on stderr."""

    def __init__(self, root: Path):
        self._left_out: Counter[str] = Counter()
        super().__init__(root)
        if +self._left_out:
            _say(f"{printable(root)}: left out besides the images: {image_files.listed(+self._left_out)}.")

    def find_classes(self, directory: Path) -> tuple[list[str], dict[str, int]]:
        """Names in order, and their numbers; UserError where there are none."""
        try:
            entries = list(directory.iterdir())
        except FileNotFoundError:
            raise UserError(
                f"{printable(directory)}: no such directory; images must lie in train/CLASS and val/CLASS."
            ) from None
        except OSError as error:
            raise UserError(f"{printable(directory)}: cannot be read ({error.strerror}); check the folder.") from None
        folders = [path.name for path in entries if path.is_dir()]
        classes = sorted(name for name in folders if not name.startswith("."))  # hidden: such as .ipynb_checkpoints
        if not classes:
            raise UserError(f"{printable(directory)}: has no folders; images must lie in one folder for each class.")
        hidden = len(folders) - len(classes)
        self._left_out.update({"hidden folder(s)": hidden, "beside the classes": len(entries) - len(folders)})
        return classes, {name: i for i, name in enumerate(classes)}

    def make_dataset(self, directory: Path, class_to_idx: dict[str, int], *_: object, **__: object) -> list[Sample]:
        """The images class by class; UserError for a class without any."""
        samples = []
        for name, label in class_to_idx.items():
            images, others = image_files.sort_out(directory / name)
            if not images:
                instead = f", but {image_files.listed(others)}" if others else ""
                kinds = ", ".join(sorted(image_files.SUFFIXES))
                folder = printable(directory / name)
                raise UserError(f"{folder}: holds no {kinds} files{instead}; put some in or drop it.")
            self._left_out += others
            samples += [(path, label) for path in images]
        return samples


def _faults(paths: list[Path], skip_unreadable: bool) -> set[Path]:
    """Reads all files; those that cannot be read and are to be skipped, UserError where they are not to be."""
    bar = tqdm(image_files.faults(paths), "reading all images once", len(paths), leave=False, disable=None)
    faults = {path: fault for path, fault in zip(paths, bar, strict=True) if fault is not None}
    named = [f"{printable(path)} ({fault})" for path, fault in faults.items()]
    if faults and not skip_unreadable:
        (path, fault), *more = faults.items()
        if not more:
            what, them = f"{printable(path)}: not a readable image ({fault})", "it"
        else:
            what = f"{len(faults)} of {len(paths)} image files are not readable: {image_files.first_few(named)}"
            them = "them"
        raise UserError(f"{what}; replace or remove {them}, or leave {them} out with --skip-unreadable.")
    if faults:
        _say(f"--skip-unreadable: leaves out {len(faults)} of {len(paths)} image files: {', '.join(named)}.")
    return set(faults)


def _say(sentence: str) -> None:
    """On stderr, once: the processes that train several runs at a time scan the folders again."""
    if multiprocessing.parent_process() is None:
        print(sentence, file=sys.stderr, flush=True)


class Images(Dataset):
    """(uint8 [3, SIDE, SIDE], label) of each sample: the centre, or for ``draws`` = (seed, epoch) a random crop, in
    half of the cases mirrored, as is usual for ImageNet."""

    def __init__(self, samples: list[Sample], draws: tuple[int, int] | None = None):
        transforms = torchvision.transforms.v2
        crop = [transforms.Resize(SIDE * 8 // 7), transforms.CenterCrop(SIDE)]
        if draws is not None:
            crop = [transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip()]
        self.samples, self._draws = samples, draws
        self._transform = transforms.Compose([*crop, transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self._transformed(_read(path), index), label

    def _transformed(self, image: Image.Image, index: int) -> Tensor:
        if self._draws is None:
            return self._transform(image)
        with seeded(zlib.crc32(f"{self._draws} {index}".encode())):  # torchvision draws from the global generator
            return self._transform(image)


def _read(path: Path) -> Image.Image:
    try:
        return image_files.read(path)
    except NotReadable as error:  # it was readable when the folders were scanned
        raise UserError(f"{printable(path)}: not a readable image ({error}); replace or remove it.") from None
