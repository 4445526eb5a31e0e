# SPDX-License-Identifier: Apache-2.0
"""Data, a command line and a checkpoint for the tests of examples/train.py."""

import numpy as np
import pytest

from .common import train

WIDTH = 3  # channels: the network has few parameters, its checkpoint few bytes
BATCH = 16


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    """A tiny IDX data set that a network can learn: noisy images with a bright row, its number the label."""
    directory = tmp_path_factory.mktemp("stripes")
    generator = np.random.default_rng(0)
    for part, count in (("train", 104), ("t10k", 40)):
        labels = np.arange(count, dtype=np.uint8) % 4
        images = generator.integers(0, 100, (count, 8, 8), dtype=np.uint8)
        images[np.arange(count), 2 * labels] += 150
        for kind, array in (("images", images), ("labels", labels)):
            header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (directory / f"{part}-{kind}-idx{array.ndim}-ubyte").write_bytes(header + array.tobytes())
    return directory


@pytest.fixture
def arguments(stripes, tmp_path):
    """Makes a command line for a short training; later options win."""

    def make(*options):
        common = ["--data", stripes, "--width", WIDTH, "--batch-size", BATCH, "--seeds", 2, "--epochs", 2]
        return [str(option) for option in (*common, "--out", tmp_path / "out", *options)]

    return make


@pytest.fixture
def saved(arguments, tmp_path):
    """A checkpoint of one epoch."""
    path = tmp_path / "saved.pt"
    assert train.main(arguments("--epochs", 1, "--save", path)) == 0
    return path


@pytest.fixture(autouse=True)
def quick(one_thread):
    """All of it is small."""
