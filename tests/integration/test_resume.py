# SPDX-License-Identifier: Apache-2.0
"""A training killed by SIGKILL, three times, in the middle of an epoch, ends with the bits of one that never was."""

import copy

import pytest
import torch

from benchmarks import kills
from benchmarks.kills import Child, Work
from benchmarks.long_training import BATCHES, OPTIMIZERS, Training, resumed

from ..distributed import launch
from ..helpers import DTYPES, assert_same_snapshots, snapshot
from .helpers import buffer_dtypes

EVERY, LAST = 3, 33
# While the first layer is frozen, later while there is one more group and others are pruned.
KILLS = (EVERY + 1, BATCHES + EVERY, 28)
assert kills.forkserver is launch.forkserver  # whose processes need not import torch
pytestmark = pytest.mark.filterwarnings("ignore:several optimizers")  # compared with each other


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    """Of an optimizer."""
    return request.param


def tensors_of(training):
    """Copies of everything that the steps change."""
    params = [param for group in training.optimizer.param_groups for param in group["params"]]
    return snapshot(params, training.optimizer)


def begun(name, start):
    """A training after its first batch, whose counted steps are ``start`` more."""
    training = Training(name, DTYPES)
    training.run_batch()
    for state in training.optimizer.state.values():
        state["step"] += start
    return training


def run_and_kill(work, *, at):
    """Kills the training after batch ``at``, at work on the two batches after it. Returns its first batch."""
    with Child(work._replace(until=at + 2)) as child:
        first = child.wait_for("begun")
        child.wait_for("batch", at)
        child.kill()
        return first


@pytest.mark.parametrize("start", [0, 2**24 - 4, 2**32 - 4], ids=["0", "2^24", "2^32"])
def test_killed_training_resumes_with_every_bit(name, start, tmp_path):
    """All dtypes at once, under torch.load(weights_only=True); the counted steps pass 2^24, and 2^32."""
    assert all(at % BATCHES and (at + 2) // BATCHES == at // BATCHES for at in KILLS), "not mid-epoch"
    work = Work(name, tmp_path / "checkpoint.pt", EVERY, LAST, dtypes=DTYPES)
    begun(name, start).save(work.checkpoint)
    first = [run_and_kill(work, at=at) for at in KILLS]
    with Child(work) as child:
        first.append(child.wait_for("begun"))
        child.wait_for("done", LAST)
    # From checkpoints, and not from the batch that was reached.
    assert first[0] == 1
    for before, at, after in zip(first, KILLS, first[1:], strict=False):
        assert before < after <= at + 2
        assert after % EVERY == 0
    last = resumed(name, work.checkpoint, DTYPES)

    whole = begun(name, start)
    while whole.batch < LAST:
        whole.run_batch()
    assert_same_snapshots(tensors_of(whole), tensors_of(last))
    assert max(int(state["step"]) for state in whole.optimizer.state.values()) == start + LAST
    assert buffer_dtypes(whole.optimizer) == set(DTYPES)


def test_every_part_of_the_checkpoint_counts(name):
    """Without the state of the optimizer the bits would differ: the test above would notice a state that is lost."""
    whole = Training(name, DTYPES)
    for _ in range(3):
        whole.run_batch()
    saved = whole.state_dict()
    for entry in ("step", "lipschitz_bound", *whole.optimizer.direction.buffers):
        results = []
        for lost in ((), (entry,)):
            training, checkpoint = Training(name, DTYPES), copy.deepcopy(saved)
            for entries in checkpoint["optimizer"]["state"].values():
                entries.update({key: torch.zeros_like(entries[key]) for key in lost if key in entries})
            training.load_state_dict(checkpoint)
            training.run_batch()
            results.append(tensors_of(training))
        with pytest.raises(AssertionError, match="differ"):
            assert_same_snapshots(*results)
