# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded trainings: saved by any number of processes, gone on with by any other, same bits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from ..helpers import assert_same_bits
from .launch import run
from .sharded_checkpoint import STEPS, Training
from .test_sharded import assert_same_everything, everything

BREAK = 3
ROOT = Path(__file__).parents[2]


def everything_of(training):
    return everything(list(training.model.parameters()), training.optimizer)


def saved(rank, world_size, dtype, folder):
    training = Training(world_size, dtype)
    training.run_given(BREAK)
    training.save(folder)


def gone_on(rank, world_size, dtype, folder):
    training = Training(world_size, dtype, seed=7)  # other weights, until it is loaded
    training.load(folder)
    assert training.step == BREAK
    training.run_given(STEPS - BREAK)
    return everything_of(training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 1), (2, None), (3, 2), (1, 4)])
def test_training_goes_on_with_another_number_of_processes(before, after, dtype, tmp_path):
    undisturbed = Training(None, dtype)
    undisturbed.run_given(STEPS)
    run(before, saved, before, dtype, str(tmp_path))
    for rank, got in enumerate(run(after or 1, gone_on, after, dtype, str(tmp_path))):
        assert_same_everything(everything_of(undisturbed), got, f"rank {rank}")


def through_a_full_state_dict(rank):
    """A state of whole tensors on rank 0, sent to all: [(name, tensor)] before and after."""
    training, other = Training(2), Training(2, seed=7)
    training.run_given(BREAK)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(training.model, training.optimizer, options=options)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other.model, other.optimizer, state if rank == 0 else {}, options=options)
    return [[entry for entry in everything_of(t) if not entry[0].startswith("param")] for t in (training, other)]


def test_full_state_dict_restores_each_bit():
    for before, after in run(2, through_a_full_state_dict):
        assert len(before) == 3 * 4
        assert_same_everything(before, after, "full state dict")


def torchrun(folder, *arguments):
    """The weights that a training under torchrun leaves, and what it said."""
    folder.mkdir()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    program = ["-m", "tests.distributed.sharded_checkpoint", str(folder), *arguments]
    # With the store of torchrun itself, restarted processes may find the addresses of the killed ones in it.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [sys.executable, *command, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "weights.pt"), done.stdout


def test_killed_worker_does_not_change_the_end(tmp_path):
    """SIGKILL between backward and step, after the checkpoint of step 3; torchrun starts both processes again."""
    expected, said = torchrun(tmp_path / "undisturbed")
    assert not re.search("goes on after step [0-7]", said)  # none was disturbed before its end
    got, said = torchrun(tmp_path / "killed", "--kill-rank=1", "--kill-step=5")
    assert {"0", "1"} <= set(re.findall(r"rank (\d) goes on after step 3", said))
    for k, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert_same_bits(a, b, f"parameter {k}")
