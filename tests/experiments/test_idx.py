# SPDX-License-Identifier: Apache-2.0
"""IDX data: what is read, and one clear sentence for each thing that can be wrong."""

import gzip
import struct

import numpy as np
import pytest

from experiments import data
from experiments.data import idx
from experiments.task import DataOptions, create
from tools.program import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 9, 7), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 4
PARTS = {
    "train-images-idx3-ubyte": IMAGES,
    "train-labels-idx1-ubyte": LABELS,
    "t10k-images-idx3-ubyte": IMAGES[:8],
    "t10k-labels-idx1-ubyte": LABELS[:8],
}


def encode(array, kind=0x08):
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def directory(tmp_path):
    """A small data set that is right in every way."""
    for name, array in PARTS.items():
        (tmp_path / name).write_bytes(encode(array))
    return tmp_path


def load(directory, **options):
    return data.load(DataOptions("idx", str(directory), **options))


def test_reads_what_was_written(directory):
    read = load(directory)
    np.testing.assert_array_equal(read.train.images[:, 0].numpy(), IMAGES)
    np.testing.assert_array_equal(read.train.labels.numpy(), LABELS)
    np.testing.assert_array_equal(read.test.images[:, 0].numpy(), IMAGES[:8])
    np.testing.assert_array_equal(read.test.labels.numpy(), LABELS[:8])
    assert read.classes == 4


@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_every_spelling_reads_equal(directory, tmp_path_factory, dash, packed):
    other = tmp_path_factory.mktemp("other")
    for name, array in PARTS.items():
        path = other / (name.replace("-idx", f"{dash}idx") + ".gz" * packed)
        path.write_bytes(gzip.compress(encode(array)) if packed else encode(array))
    assert load(other).checksum() == load(directory).checksum()


def test_limit_and_holdout_take_the_first_and_the_last_training_images(directory):
    read = load(directory, limit=5, holdout=3)
    np.testing.assert_array_equal(read.train.images[:, 0].numpy(), IMAGES[:5])
    np.testing.assert_array_equal(read.validation.images[:, 0].numpy(), IMAGES[17:])
    assert read.validation.labels.tolist() == LABELS[17:].tolist()
    assert (len(read.train), len(read.test), read.classes) == (5, 8, 4)


def test_constant_images_stay_finite(directory):
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        (directory / name).write_bytes(encode(np.full_like(PARTS[name], 7)))
    task = create("classification", DataOptions("idx", str(directory)))
    assert all((inputs == 0).all() for inputs, _ in task.batches(0, 0, 8))


# file, its new content (None: removed), and what the message must say besides the file's name
HEADER = 16  # bytes
DAMAGES = {
    "missing images": ("train-images-idx3-ubyte", None, ["train-images-idx3-ubyte.gz", "train-images.idx3-ubyte"]),
    "missing labels": ("t10k-labels-idx1-ubyte", None, ["t10k-labels-idx1-ubyte.gz", "t10k-labels.idx1-ubyte"]),
    "empty": ("train-images-idx3-ubyte", b"", ["truncated", "0 bytes"]),
    "magic cut": ("train-images-idx3-ubyte", encode(IMAGES)[:3], ["truncated", "3 bytes"]),
    "header cut": ("train-images-idx3-ubyte", encode(IMAGES)[: HEADER - 1], ["truncated", "inside the IDX header"]),
    "data cut": ("train-images-idx3-ubyte", encode(IMAGES)[:-1], ["truncated", "20 x 9 x 7 = 1260", "1259"]),
    "no data": ("t10k-labels-idx1-ubyte", encode(LABELS[:8])[:8], ["truncated", "8 = 8", "has 0"]),
    "trailing": ("train-images-idx3-ubyte", encode(IMAGES) + b"\0", ["trailing data", "1260"]),
    "labels as images": ("train-images-idx3-ubyte", encode(LABELS), ["0x00000801", "look like labels", "0x00000803"]),
    "images as labels": ("train-labels-idx1-ubyte", encode(IMAGES), ["0x00000803", "look like images", "0x00000801"]),
    "4-D images": ("train-images-idx3-ubyte", encode(IMAGES[None]), ["4-D", "images are 3-D", "0x00000803"]),
    "2-D labels": ("train-labels-idx1-ubyte", encode(LABELS[None]), ["2-D", "labels are 1-D", "0x00000801"]),
    "signed bytes": ("train-images-idx3-ubyte", encode(IMAGES, 0x09), ["type 0x09", "unsigned bytes"]),
    "floats": ("train-images-idx3-ubyte", encode(IMAGES.astype(">f4"), 0x0D), ["type 0x0d", "unsigned bytes"]),
    "a picture": ("train-images-idx3-ubyte", b"\x89PNG\r\n\x1a\n" + bytes(99), ["not an IDX file", "0x89504e47"]),
    "gzip, plain name": ("train-images-idx3-ubyte", gzip.compress(encode(IMAGES)), ["gzip data", "rename it to"]),
    "vast": ("train-images-idx3-ubyte", encode(IMAGES)[:4] + b"\xff" * 12 + bytes(9), ["truncated", "has 9"]),
    "counts differ": ("train-labels-idx1-ubyte", encode(LABELS[:-1]), ["20 images", "19 labels"]),
    "no images": ("train-images-idx3-ubyte", encode(IMAGES[:0]), ["0 images", "20 labels"]),
    "sizes differ": ("t10k-images-idx3-ubyte", encode(IMAGES[:8, :8]), ["9 x 7", "8 x 7", "same size"]),
    "label out of range": ("t10k-labels-idx1-ubyte", encode(LABELS[:8] + 1), ["label 4", "0 to 3"]),
    "one class": ("train-labels-idx1-ubyte", encode(LABELS * 0), ["two classes"]),
    "a directory": ("train-images-idx3-ubyte", "directory", ["train-images-idx3-ubyte.gz"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(directory, damage):
    name, content, words = DAMAGES[damage]
    (directory / name).unlink()
    if content == "directory":
        (directory / name).mkdir()
    elif content is not None:
        (directory / name).write_bytes(content)
    assert_refused(directory, str(directory), name.partition("-idx")[0], *words)


GZIP = gzip.compress(encode(IMAGES))
GZIP_DAMAGES = {
    "cut": (GZIP[:-20], "damaged or cut short"),
    "no body": (GZIP[:2], "damaged or cut short"),
    "bit flipped": (GZIP[:40] + bytes([GZIP[40] ^ 0xFF]) + GZIP[41:], "damaged or cut short"),
    "wrong checksum": (GZIP[:-8] + b"\0\0\0\0" + GZIP[-4:], "damaged or cut short"),
    "junk after it": (GZIP + b"junk", "damaged or cut short"),
    "second member": (GZIP + gzip.compress(b"more"), "trailing data"),
    "inner data cut": (gzip.compress(encode(IMAGES)[:-5]), "truncated"),
    "not gzip": (encode(IMAGES), "not gzip data"),
    "empty": (b"", "not gzip data"),
}


@pytest.mark.parametrize("damage", GZIP_DAMAGES)
def test_damaged_gzip_is_named(directory, damage):
    content, words = GZIP_DAMAGES[damage]
    (directory / "train-images-idx3-ubyte").unlink()
    (directory / "train-images-idx3-ubyte.gz").write_bytes(content)
    assert_refused(directory, str(directory / "train-images-idx3-ubyte.gz"), words)


def test_a_data_set_without_images_is_named(directory):
    (directory / "train-images-idx3-ubyte").write_bytes(encode(IMAGES[:0]))
    (directory / "train-labels-idx1-ubyte").write_bytes(encode(LABELS[:0]))
    assert_refused(directory, "train-images-idx3-ubyte", "no images")


@pytest.mark.parametrize("shape", [(20, 3, 9), (20, 9, 0)])
def test_images_too_small_for_the_network_are_named(directory, shape):
    for name, count in (("train-images-idx3-ubyte", 20), ("t10k-images-idx3-ubyte", 8)):
        (directory / name).write_bytes(encode(np.zeros((count, *shape[1:]), dtype=np.uint8)))
    assert_refused(directory, f"{shape[1]} x {shape[2]} pixels", "at least 4 x 4")


def test_a_missing_directory_is_named(tmp_path):
    assert_refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such directory")


def test_a_file_as_directory_is_named(directory):
    path = directory / "train-images-idx3-ubyte"
    assert_refused(path, str(path), "not a directory")


def test_every_cut_of_a_gzip_file_is_refused(tmp_path):
    for length in range(len(GZIP)):
        (tmp_path / "x.gz").write_bytes(GZIP[:length])
        with pytest.raises(UserError, match=r"x\.gz"):
            idx.read(tmp_path / "x.gz", 3)


def assert_refused(directory, *words):
    """One sentence with all these words in it."""
    with pytest.raises(UserError) as caught:
        load(directory)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert message.count("\n") == 0
    assert message.endswith(".")
