# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 from the python or the binary archive, unpacked or as .tar.gz.

Format: https://www.cs.toronto.edu/~kriz/cifar.html. An image is 3072 bytes: 32 x 32 of red, then green, then blue.
The python files are pickles of a dict; the binary ones have one (CIFAR-10) or two (CIFAR-100: coarse, fine) bytes of
label before each image.
"""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tools.program import UserError

from .images import ImageSet, Split
from .safe_pickle import UnsafePickle, load_arrays

SIDE = 32  # pixels
_PIXELS = 3 * SIDE * SIDE
_SUFFIXES = (".tar.gz", ".tgz")


@dataclass(frozen=True)
class _Variant:
    """classes: number of them. python, binary: (training files, test files). key: of the labels in the pickle.

    label_bytes: before each image of a binary file; the last of them is the label.
    """

    classes: int
    python: tuple[list[str], list[str]]
    binary: tuple[list[str], list[str]]
    key: str
    label_bytes: int


_VARIANTS = {
    "cifar10": _Variant(
        10,
        ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
        ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
        "labels",
        1,
    ),
    "cifar100": _Variant(100, (["train"], ["test"]), (["train.bin"], ["test.bin"]), "fine_labels", 2),
}


def read(name: str, directory: str | None) -> ImageSet:
    """``name`` is "cifar10" or "cifar100"; ``directory`` holds the files or the archive, or is the archive itself."""
    variant = _VARIANTS[name]
    if directory is None:
        raise UserError(f"--data {name}: needs --data-dir, the directory or .tar.gz archive of the files.")
    files = _archive(Path(directory), variant) or _Directory(Path(directory))
    for names, read_file in ((variant.python, _read_python), (variant.binary, _read_binary)):
        found = files.find(names[0] + names[1])
        if found:
            train, test = ([found[n] for n in part] for part in names)
            splits = [_join([read_file(files, path, variant) for path in part]) for part in (train, test)]
            return ImageSet(name, train=splits[0], test=splits[1], classes=variant.classes, flips=True)
    wanted = " or ".join(", ".join(part[0] + part[1]) for part in (variant.python, variant.binary))
    raise UserError(f"{directory}: does not hold {name}; looked for {wanted}, or a .tar.gz archive of these.")


class _Directory:
    """Files in a directory, or in the only directory within that has them, as the archives unpack."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise UserError(f"{path}: no such directory or archive; name what holds the CIFAR files.")
        self.path = path

    def find(self, names: list[str]) -> dict[str, str] | None:
        for folder in (self.path, *sorted(p for p in self.path.iterdir() if p.is_dir())):
            if all((folder / name).is_file() for name in names):
                return {name: str(folder / name) for name in names}
        return None

    def read(self, path: str) -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file.") from None


class _Archive:
    """Files in a .tar.gz archive; all are read at once, since going back in one is slow. None is unpacked to disk."""

    def __init__(self, path: Path, names: set[str]):
        self.path = path
        self._contents: dict[str, bytes] = {}
        try:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    if member.isfile() and Path(member.name).name in names:
                        self._contents[member.name] = archive.extractfile(member).read()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: archive damaged or cut short ({error}); fetch it again.") from None

    def find(self, names: list[str]) -> dict[str, str] | None:
        found = {Path(member).name: member for member in self._contents}
        return {name: found[name] for name in names} if found.keys() >= set(names) else None

    def read(self, path: str) -> bytes:
        return self._contents[path]


def _archive(path: Path, variant: _Variant) -> _Archive | None:
    """The archive that ``path`` is, or the only one of this data set in the directory; None where there is none."""
    names = {name for part in (variant.python, variant.binary) for name in part[0] + part[1]}
    if path.is_file():
        return _Archive(path, names)
    if path.is_dir() and not any((path / name).is_file() for name in names):
        for archive in sorted(p for p in path.iterdir() if p.name.endswith(_SUFFIXES)):
            contents = _Archive(archive, names)
            if any(contents.find(part[0] + part[1]) for part in (variant.python, variant.binary)):
                return contents
    return None


def _read_python(files: _Directory | _Archive, path: str, variant: _Variant) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = load_arrays(files.read(path))
    except UnsafePickle as error:
        raise UserError(f"{path}: not a CIFAR pickle ({error}); fetch it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a CIFAR pickle: no dict; fetch it again.")
    content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    data, labels = content.get("data"), content.get(variant.key)
    if not isinstance(data, np.ndarray) or not isinstance(labels, list):
        raise UserError(f"{path}: lacks 'data' or {variant.key!r}; check that it is of this data set.")
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise UserError(f"{path}: 'data' is {data.dtype} of shape {data.shape}, not uint8 of (N, {_PIXELS}).")
    if not all(isinstance(label, int) for label in labels):
        raise UserError(f"{path}: {variant.key!r} holds something else than whole numbers; fetch it again.")
    return _checked(path, data, np.asarray(labels, dtype=np.int64), variant)


def _read_binary(files: _Directory | _Archive, path: str, variant: _Variant) -> tuple[np.ndarray, np.ndarray]:
    raw = np.frombuffer(files.read(path), dtype=np.uint8)
    row = variant.label_bytes + _PIXELS
    if raw.size % row:
        raise UserError(f"{path}: {raw.size} bytes are no whole number of images of {row}: cut short; fetch it again.")
    rows = raw.reshape(-1, row)
    labels = rows[:, variant.label_bytes - 1].astype(np.int64)
    return _checked(path, rows[:, variant.label_bytes :], labels, variant)


def _checked(path: str, data: np.ndarray, labels: np.ndarray, variant: _Variant) -> tuple[np.ndarray, np.ndarray]:
    if len(data) != len(labels):
        raise UserError(f"{path}: {len(data)} images and {len(labels)} labels; fetch it again.")
    if len(data) == 0:
        raise UserError(f"{path}: holds no images; fetch it again.")
    if not 0 <= labels.min() <= labels.max() < variant.classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise UserError(
            f"{path}: label {wrong} is not in 0 to {variant.classes - 1}; check that it is of this data set."
        )
    return data, labels


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> Split:
    images = np.concatenate([data for data, _ in parts]).reshape(-1, 3, SIDE, SIDE)
    return Split(torch.from_numpy(images), torch.from_numpy(np.concatenate([labels for _, labels in parts])))
