# SPDX-License-Identifier: Apache-2.0
"""examples/train.py, from the command line: it learns, on the digits and on IDX files, and writes what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def train(*options):
    """What the program prints."""
    command = [sys.executable, str(ROOT / "examples" / "train.py"), *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(text):
    """Cells of a table by the first one."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    return {cells[0]: cells[1:] for cells in lines}


def test_csgd_learns_the_digits_as_sgd_does_and_moves_fewer_coordinates(tmp_path):
    printed = train("--seeds", 1, "--epochs", 3, "--out", tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8").strip() == printed.strip()
    table = rows(printed)
    assert table["optimizer"] == ["test accuracy, %", "test loss", "training loss", "density, %"]
    for name in ("CSGD", "torch.optim.SGD"):
        assert float(table[name][0]) > 95
    assert float(table["CSGD"][3]) < 40
    assert float(table["torch.optim.SGD"][3]) == 100
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def stripes(tmp_path):
    """IDX files: noise with a bright row that tells the class, 28 x 28 pixels."""
    directory = tmp_path / "data"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 96), ("t10k", 40)):
        labels = (np.arange(count) % 4).astype(np.uint8)
        images = generator.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 6 * labels] += 150
        for kind, array in (("images", images), ("labels", labels)):
            header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (directory / f"{part}-{kind}-idx{array.ndim}-ubyte").write_bytes(header + array.tobytes())
    return directory


def test_idx_files_in_bfloat16_with_seeds(stripes, tmp_path):
    options = "--data", stripes, "--dtype", "bfloat16", "--seeds", 2, "--epochs", 2, "--lr-step", 1
    table = rows(train(*options, "--out", tmp_path / "out"))
    assert all("±" in cell for name in ("CSGD", "torch.optim.SGD") for cell in table[name])


def test_it_can_be_copied():
    """A single file of a length that is read at once, with no import from this repository but the package."""
    text = (ROOT / "examples" / "train.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "from csgd_cuda import CSGD" in text
