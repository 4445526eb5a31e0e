# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded trainings: saved by any number of processes, gone on with by any other, same bits.

One start of the processes serves both optimizers.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from ..helpers import OPTIMIZERS, assert_same_bits
from .launch import run
from .sharded_checkpoint import STEPS, Training, train_from_checkpoint
from .test_sharded import assert_same_everything, everything

BREAK = 3
ROOT = Path(__file__).parents[2]


def everything_of(training):
    return everything(list(training.model.parameters()), training.optimizer)


def saved(rank, how, dtype, folder):
    for optimizer_class in OPTIMIZERS:
        training = Training(how, dtype, optimizer_class=optimizer_class)
        training.run_given(BREAK)
        training.save(f"{folder}/{optimizer_class.__name__}")


def gone_on(rank, how, dtype, folder):
    results = {}
    for optimizer_class in OPTIMIZERS:
        # Other weights, until it is loaded.
        training = Training(how, dtype, seed=7, optimizer_class=optimizer_class)
        training.load(f"{folder}/{optimizer_class.__name__}")
        assert training.step == BREAK
        training.run_given(STEPS - BREAK)
        results[optimizer_class.__name__] = everything_of(training)
    return results


def processes(how):
    return 1 if how is None else math.prod(how[:2] if how[-1] == "tensor" else how)


REPLICAS, TENSOR_PARALLEL = (2, 2), (2, 2, "tensor")  # the ways of split()
CASES = [
    *[(b, a, dtype) for b, a in (((2,), (3,)), ((2,), (1,)), ((2,), None), ((3,), (2,)), ((1,), (4,)))
      for dtype in (torch.float32, torch.bfloat16)],
    *[(b, a, torch.bfloat16) for b in (REPLICAS, TENSOR_PARALLEL) for a in ((2,), (1,), None)],
    ((2,), TENSOR_PARALLEL, torch.float32), (TENSOR_PARALLEL, REPLICAS, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "dtype"), CASES, ids=str)
def test_training_goes_on_split_in_another_way(before, after, dtype, tmp_path):
    """Over another number of processes, on a mesh of another shape, or in one plain process."""
    run(processes(before), saved, before, dtype, str(tmp_path))
    of_ranks = run(processes(after), gone_on, after, dtype, str(tmp_path))
    for optimizer_class in OPTIMIZERS:
        undisturbed = Training(None, dtype, optimizer_class=optimizer_class)
        undisturbed.run_given(STEPS)
        name = optimizer_class.__name__
        for rank, got in enumerate(of_ranks):
            assert_same_everything(everything_of(undisturbed), got[name], f"{name}, rank {rank}")


FORMS = {
    "full": ({"full_state_dict": True, "cpu_offload": True}, {"full_state_dict": True, "broadcast_from_rank0": True}),
    "flat": ({"flatten_optimizer_state_dict": True},) * 2,
}


def through_a_state_dict(rank, form, how, optimizer_class):
    """State and options before and after, and the names in the state_dict; a full one is sent from rank 0 to all."""
    training, other = (Training(how, seed=seed, optimizer_class=optimizer_class) for seed in (0, 7))
    training.run_given(BREAK)
    saving, loading = (StateDictOptions(**options) for options in FORMS[form])
    state = get_optimizer_state_dict(training.model, training.optimizer, options=saving)
    names = list(state)
    for group in other.optimizer.param_groups:
        group["seed"], group["calibration"] = 1, 0.75
    given = {} if form == "full" and rank > 0 else state
    set_optimizer_state_dict(other.model, other.optimizer, given, options=loading)
    pairs = []
    for each in (training, other):
        groups = [
            # torch makes lists of the tuples that it sends from rank 0.
            {k: tuple(v) if isinstance(v, list) else v for k, v in group.items() if k != "params"}
            for group in each.optimizer.param_groups
        ]
        tensors = [entry for entry in everything_of(each) if not entry[0].startswith("param")]
        pairs.append((tensors, groups))
    return pairs, names


def both_through_a_state_dict(rank, form, how):
    return [through_a_state_dict(rank, form, how, optimizer_class) for optimizer_class in OPTIMIZERS]


@pytest.mark.parametrize("how", [(2,), TENSOR_PARALLEL], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_state_dict_restore_each_bit(form, how):
    for of_rank in run(processes(how), both_through_a_state_dict, form, how):
        for optimizer_class, (pairs, names) in zip(OPTIMIZERS, of_rank, strict=True):
            (before, groups), (after, groups_after) = pairs
            buffers = optimizer_class.direction.buffers
            assert len(before) == (len(buffers) + 2) * 4
            assert_same_everything(before, after, f"{optimizer_class.__name__}, {form}")
            assert groups_after == groups
            assert all((f"state.0.weight.{name}" in names) == (form == "flat") for name in buffers)


def torchrun(folder, count, *arguments, restarts=3):
    """What a training of ``count`` processes under torchrun said, and how it ended."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", f"--max-restarts={restarts}"]
    program = ["-m", "tests.distributed.sharded_checkpoint", str(folder), *arguments]
    # With the store of torchrun itself, restarted processes may find the addresses of the killed ones in it.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(
        [sys.executable, *command, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def undisturbed(rank):
    training = Training((2,), torch.float32)
    training.run_real(STEPS)
    return [param.full_tensor().detach() for param in training.model.parameters()]


def assert_same_weights(a, b):
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_same_bits(x, y, f"parameter {k}")


@pytest.mark.long
def test_killed_worker_does_not_change_the_end(tmp_path):
    """SIGKILL between backward and step, after the checkpoint of step 3; torchrun starts both processes again."""
    done = torchrun(tmp_path, 2, "--kill-rank=1", "--kill-step=5")
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(re.findall(r"rank (\d) began after step 3", done.stdout)) == {"0", "1"}
    for weights in run(2, undisturbed):
        assert_same_weights(weights, torch.load(tmp_path / "weights.pt"))


def gone_on_from_the_last_checkpoint(rank, folder):
    return train_from_checkpoint(folder, given=True)


@pytest.mark.long
def test_job_goes_on_with_fewer_workers_after_one_was_killed(tmp_path):
    """Of three, one is killed; two go on from the last checkpoint.

    They end with the weights of a plain training, in one process, that nothing disturbed.
    """
    plain = Training(None, torch.float32)
    plain.run_given(STEPS)
    killed = torchrun(tmp_path, 3, "--given", "--kill-rank=1", "--kill-step=5", restarts=0)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert not (tmp_path / "weights.pt").exists()
    for begun_after, weights in run(2, gone_on_from_the_last_checkpoint, tmp_path):
        assert begun_after == 3
        assert_same_weights([param.detach() for param in plain.model.parameters()], weights)
