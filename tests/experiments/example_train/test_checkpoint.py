# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the example program: none is half written, and one that is damaged or of other options is refused."""

import errno
import os

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from .common import assert_same, load, refused, train  # isort: skip
from training import checkpoint, loop
from training.errors import UserError


def test_contradicting_resume_is_refused(arguments, saved, stripes, capsys):
    contradictions = [
        (["--lr", 0.1], "--lr 0.05 there and 0.1 here"),
        (["--lr-step", 2], "--lr-step 10 there and 2 here"),
        (["--momentum", 0], "--momentum 0.9 there and 0.0 here"),
        (["--weight-decay", 0.01], "--weight-decay 0.0 there and 0.01 here"),
        (["--calibration", 2], "--calibration 0.25 there and 2.0 here"),
        (["--seeds", 3], "--seeds 2 there and 3 here"),
        (["--batch-size", 8], "--batch-size 16 there and 8 here"),
        (["--width", 4], "--width 3 there and 4 here"),
        (["--dtype", "bfloat16"], "--dtype float32 there and bfloat16 here"),
        (["--fused", "no"], "--fused auto there and no here"),
        (["--threads", 2], "--threads 1 there and 2 here"),
        (["--optimizers", "csgd"], "--optimizers csgd,sgd there and csgd here"),
        (["--limit", 50], "--limit None there and 50 here"),
    ]
    for options, words in contradictions:
        refused(capsys, arguments("--resume", saved, *options), saved, words, "or start afresh")
    path = stripes / "t10k-labels-idx1-ubyte"
    labels = path.read_bytes()
    try:
        path.write_bytes(labels[:-1] + bytes([labels[-1] ^ 1]))
        refused(capsys, arguments("--resume", saved), saved, "--data", "checksum")
    finally:
        path.write_bytes(labels)


def test_a_checkpoint_from_before_threads_were_recorded_is_resumed(arguments, saved):
    content = load(saved)
    del content["settings"]["threads"]
    torch.save(content, saved)
    assert train.main(arguments("--resume", saved, "--epochs", 2)) == 0


def test_resume_beyond_the_epochs_is_refused(arguments, tmp_path, capsys):
    assert train.main(arguments("--save", tmp_path / "x.pt")) == 0
    refused(capsys, arguments("--resume", tmp_path / "x.pt", "--epochs", 1), "already has 2 epochs", "--epochs 2")


def test_resume_with_nothing_left_reports_again(arguments, saved, tmp_path):
    table = (tmp_path / "out" / "table.md").read_text()
    (tmp_path / "out" / "table.md").unlink()
    assert train.main(arguments("--resume", saved, "--epochs", 1)) == 0
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_damaged_checkpoint_is_refused(arguments, saved, tmp_path, capsys):
    content = saved.read_bytes()
    middle = len(content) // 2
    weights = next(leaf for leaf in tree_leaves(load(saved)) if isinstance(leaf, torch.Tensor) and leaf.numel() > 8)
    inside = content.index(weights.numpy().tobytes())  # elsewhere it may be padding
    damages = {
        "cut": content[:middle],
        "empty": b"",
        "garbage": bytes(range(256)) * 40,
        "flipped": content[:inside] + bytes([content[inside] ^ 1]) + content[inside + 1 :],
    }
    path = tmp_path / "damaged.pt"
    for damaged in damages.values():
        path.write_bytes(damaged)
        refused(capsys, arguments("--resume", path), path, "damaged, cut short or no checkpoint")
    refused(capsys, arguments("--resume", tmp_path / "none.pt"), "none.pt", "no such file")
    refused(capsys, arguments("--resume", tmp_path), tmp_path, "cannot be read")
    for other in (torch.ones(3), {"model": 1}, {"format": 1, "settings": 1}):
        torch.save(other, path)
        refused(capsys, arguments("--resume", path), path, "not a checkpoint of this program")
    torch.save({**load(saved), "format": 99}, path)
    refused(capsys, arguments("--resume", path), path, "checkpoint format 99")
    torch.save({**load(saved), "runs": {"csgd-0": {}}}, path)
    refused(capsys, arguments("--resume", path), path, "incomplete")


def test_any_damage_is_refused_or_harmless(saved, tmp_path):
    """Cut anywhere, or with any bit flipped, the file is refused, or it is read with the same content."""
    right = load(saved)
    settings = loop.Settings(**right["settings"])
    content = saved.read_bytes()
    path = tmp_path / "damaged.pt"
    generator = np.random.default_rng(1)
    for place in generator.integers(0, len(content), 150):
        flipped = bytearray(content)
        flipped[place] ^= 1 << generator.integers(8)
        for damaged in (content[:place], bytes(flipped)):
            path.write_bytes(damaged)
            try:
                runs = checkpoint.load(str(path), settings, 9)
            except UserError:
                continue
            assert_same(runs, right["runs"])


def test_save_is_atomic(saved, monkeypatch, tmp_path):
    before = saved.read_bytes()
    settings = loop.Settings(**load(saved)["settings"])

    def disk_full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(UserError, match=r"--save .*saved\.pt: .*No space left"):
        checkpoint.save(str(saved), settings, {})
    assert saved.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
