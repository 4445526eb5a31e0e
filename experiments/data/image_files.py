# SPDX-License-Identifier: Apache-2.0
"""Image files of any kind as RGB of 8 bits, those that cannot be read, and what else lies in their folders.

As torchvision reads them: the first frame of an animation or of several pages, turned as it is stored, whatever EXIF
says of its orientation, and without its transparency.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # torchvision's
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_CHUNK = 32  # files that a thread checks at a time


class NotReadable(Exception):
    """The message says what is wrong with the file, without its name."""


def printable(text: object) -> str:
    r"""The text, a path for example, in one line: line breaks and bytes that are no UTF-8 as \n, \udcff."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def read(path: Path) -> Image.Image:
    """The image in mode RGB; NotReadable where there is none, or where it is not known which value is white."""
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except NotReadable:
        raise
    except UnidentifiedImageError as error:
        raise NotReadable(type(error).__name__) from None  # its text is the name of the file
    except Exception as error:  # Pillow raises almost anything for damaged files
        text = getattr(error, "strerror", None) or error
        raise NotReadable(printable(f"{type(error).__name__}: {text}")) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if (mode == "I" and image.format in ("PNG", "PPM")) or mode.startswith("I;16"):
        return _grey_of_16_bits(image).convert("RGB")
    if mode in ("I", "F"):
        raise NotReadable(f"values of 32 bits, mode {mode}, of which it is not known which is white")
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without this step Pillow warns that the transparency is lost
    return image.convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits, as Pillow takes them of colours. Pillow itself makes all values from 255 on white."""
    bits, white_is_zero = 16, False
    if image.format == "TIFF":
        bits, white_is_zero = image.tag_v2[_BITS_PER_SAMPLE][0], image.tag_v2.get(_PHOTOMETRIC) == 0
    grey = (np.asarray(image).astype(np.int32) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if white_is_zero else grey)


def faults(paths: Sequence[Path]) -> Iterator[str | None]:
    """Reads all files, with a thread for each core; for each in turn what is wrong with it, or None."""

    def fault(path: Path) -> str | None:
        try:
            read(path)
        except NotReadable as error:
            return str(error)
        return None

    with ThreadPool(os.cpu_count()) as pool:
        yield from pool.imap(fault, paths, chunksize=_CHUNK)


def sort_out(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The image files in a folder, in the order of their names, and how many entries of which kind are none.

    Hidden entries and folders are none, whatever their names end in.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    for path in sorted(folder.iterdir()):
        kind = _kind_of_other(path)
        if kind is None:
            images.append(path)
        else:
            others[kind] += 1
    return images, others


def _kind_of_other(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "folder(s)"
    if path.exists() and not path.is_file():
        return "no regular file(s)"  # a pipe, from which reading would wait
    suffix = path.suffix.lower()
    return None if suffix in SUFFIXES else printable(suffix) or "without a suffix"


def listed(counts: Counter[str]) -> str:
    """For example "2 .gif, 1 hidden", the most first."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def first_few(names: Iterable[str], shown: int = 10) -> str:
    """The names as they stand in a sentence, with the number of those that are left out."""
    names = list(names)
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*names[:shown], *more])
