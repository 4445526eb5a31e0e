# SPDX-License-Identifier: Apache-2.0
"""The example program resumes bit for bit, and trains both optimizers alike."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .common import assert_same, load, train  # isort: skip
from training import loop

PROGRAM = Path(train.__file__).resolve()


@pytest.mark.parametrize("fused", ["auto", "no"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_epochs_are_two_and_two_more(arguments, tmp_path, dtype, fused):
    options = ["--dtype", dtype, "--fused", fused, "--lr-step", 3]
    whole, half, resumed = (tmp_path / name for name in ("whole.pt", "half.pt", "resumed.pt"))
    assert train.main(arguments(*options, "--epochs", 4, "--save", whole)) == 0
    assert train.main(arguments(*options, "--epochs", 2, "--save", half)) == 0
    assert train.main(arguments(*options, "--epochs", 4, "--resume", half, "--save", resumed)) == 0
    a, b = load(whole), load(resumed)
    assert_same(a, b)
    assert set(a["runs"]) == {"csgd-0", "csgd-1", "sgd-0", "sgd-1"}
    for run in a["runs"].values():
        assert len(run["history"]) == 4
        assert [epoch["lr"] for epoch in run["history"]] == pytest.approx([0.05, 0.05, 0.05, 0.005])
        assert {t.dtype for t in run["model"].values() if t.is_floating_point()} == {getattr(torch, dtype)}
        assert all("momentum_buffer" in state for state in run["optimizer"]["state"].values())


def test_resumes_in_a_process_of_its_own(arguments, tmp_path):
    """From another directory, by path, with nothing but the checkpoint in common."""
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    assert train.main(arguments("--epochs", 3, "--save", whole)) == 0
    assert train.main(arguments("--epochs", 1, "--save", part)) == 0
    command = [sys.executable, str(PROGRAM), *arguments("--epochs", 3, "--resume", part, "--save", part)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr  # the progress bar
    assert_same(load(whole), load(part))


def test_resumes_where_an_interrupted_program_was(arguments, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    assert train.main(arguments("--save", whole)) == 0
    epochs = []
    real = loop.Trainer.train_epoch

    def interrupted(self, after_step):
        epochs.append(self.name)
        if len(epochs) == 4:
            raise KeyboardInterrupt
        real(self, after_step)

    monkeypatch.setattr(loop.Trainer, "train_epoch", interrupted)
    assert train.main(arguments("--save", part)) == 130
    monkeypatch.undo()
    assert [len(run["history"]) for run in load(part)["runs"].values()] == [2, 1]
    assert train.main(arguments("--resume", part, "--save", part)) == 0
    assert_same(load(whole), load(part))


def test_both_optimizers_get_the_same_start_and_batches(arguments, tmp_path):
    """Without calibration CSGD is SGD: only the same initialisation and order make the losses equal, too."""
    assert train.main(arguments("--calibration", 0, "--save", tmp_path / "c.pt")) == 0
    runs = load(tmp_path / "c.pt")["runs"]
    for seed in (0, 1):
        losses = [[e["train_loss"] for e in runs[f"{name}-{seed}"]["history"]] for name in ("csgd", "sgd")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs["csgd-0"]["history"][0]["train_loss"] != runs["csgd-1"]["history"][0]["train_loss"]


def test_every_epoch_has_an_order_of_its_own():
    orders = [torch.cat(loop._batches(100, 16, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(order.sort().values.equal(torch.arange(100)) for order in orders)
    assert all(not orders[i].equal(orders[j]) for i in range(4) for j in range(i))


def test_global_state_is_left_alone(arguments):
    before = torch.random.get_rng_state()
    assert train.main(arguments("--epochs", 1)) == 0
    assert torch.random.get_rng_state().equal(before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
