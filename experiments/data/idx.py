# SPDX-License-Identifier: Apache-2.0
"""Read IDX files (the format of MNIST and Fashion-MNIST), plain or gzip-compressed, with numpy.

Layout, all integers big-endian: two zero bytes, one byte for the element type (0x08: unsigned byte), one byte
for the number of dimensions, a 32-bit size per dimension, then the elements in row-major order.
Source: https://yann.lecun.com/exdb/mnist, section "File formats".
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tools.program import UserError

_UBYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20
_KIND = {1: "labels", 3: "images"}


def candidates(part: str, ndim: int) -> list[str]:
    """File names under which one part of a data set is looked for, in order of preference.

    ``part`` is for example ``"train-images"``; ``ndim`` is 3 for images and 1 for labels.
    """
    return [f"{part}{dash}idx{ndim}-ubyte{gz}" for dash in "-." for gz in ("", ".gz")]


def find(directory: Path, part: str, ndim: int) -> Path:
    """Path of one part of the data set in ``directory``; UserError with the names looked for if none is."""
    names = candidates(part, ndim)
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise UserError(
        f"{directory}: found no {_KIND[ndim]} file {part!r} there; looked for {', '.join(names)}; "
        "put one of these into the directory."
    )


def read(path: Path, ndim: int) -> np.ndarray:
    """Elements of an IDX file as a uint8 array of ``ndim`` dimensions.

    Raises UserError for a file that cannot be read, is no IDX file of unsigned bytes, has another number of
    dimensions, or holds fewer or more elements than its header says.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if path.suffix != ".gz":
                if packed:
                    raise UserError(f"{path}: gzip data under a plain name; rename it to {path.name}.gz.")
                return _parse(raw, path, ndim)
            if not packed:
                raise UserError(f"{path}: not gzip data despite its name; drop the .gz or fetch it again.")
            with gzip.GzipFile(fileobj=raw) as unpacked:
                return _parse(unpacked, path, ndim)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: gzip data damaged or cut short ({error}); fetch the file again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file.") from None


def _parse(stream: BinaryIO, path: Path, ndim: int) -> np.ndarray:
    shape = _header(stream, path, ndim)
    wanted = math.prod(shape)
    data = _read_up_to(stream, wanted + 1)
    sizes = " x ".join(map(str, shape))
    if len(data) < wanted:
        raise UserError(
            f"{path}: truncated: the header promises {sizes} = {wanted} bytes of data, the file has "
            f"{len(data)}; fetch it again."
        )
    if len(data) > wanted:
        raise UserError(
            f"{path}: trailing data after the {sizes} = {wanted} bytes that the header promises; fetch it again."
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _header(stream: BinaryIO, path: Path, ndim: int) -> tuple[int, ...]:
    """Sizes of the dimensions, from the header; leaves the stream at the first element."""
    magic = stream.read(4)
    if len(magic) < 4:
        raise UserError(f"{path}: truncated: {len(magic)} bytes are no IDX header; fetch it again.")
    expected = f"an IDX {_KIND[ndim]} file starts with 0x{_UBYTE << 8 | ndim:08x}"
    if magic[:2] != b"\0\0":
        raise UserError(f"{path}: not an IDX file: magic number 0x{magic.hex()}; {expected}.")
    if magic[2] != _UBYTE:
        raise UserError(
            f"{path}: elements of IDX type 0x{magic[2]:02x}, only unsigned bytes (0x{_UBYTE:02x}) are read; {expected}."
        )
    if magic[3] != ndim:
        found = f"these look like {_KIND[magic[3]]}, " if magic[3] in _KIND else ""
        raise UserError(
            f"{path}: {magic[3]}-D data (magic number 0x{magic.hex()}), {found}{_KIND[ndim]} are {ndim}-D: "
            f"{expected}; check that the file has the right name."
        )
    sizes = stream.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise UserError(f"{path}: truncated: the file ends inside the IDX header; fetch it again.")
    return tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))


def _read_up_to(stream: BinaryIO, count: int) -> bytes:
    # In pieces: read(count) would allocate count bytes at once, and a damaged header may claim 2^96.
    parts = []
    while count > 0 and (part := stream.read(min(count, _CHUNK))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
