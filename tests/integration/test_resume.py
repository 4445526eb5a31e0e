# SPDX-License-Identifier: Apache-2.0
"""A training killed by SIGKILL, twice, in the middle of an epoch, ends with the bits of one that never was."""

import copy
import os
import signal

import pytest
import torch

from ..distributed.launch import PATIENCE, forkserver
from ..helpers import DTYPES, OPTIMIZERS, assert_same_snapshots
from .helpers import buffer_dtypes
from .killable_training import BATCHES, EPOCHS, SAVE_EVERY, Training, main


class Child:
    """The training in another process, a batch for each call of let."""

    def __init__(self, folder, start):
        self.connection, of_child = forkserver.Pipe()
        self.process = forkserver.Process(target=main, args=(folder, start, of_child))
        self.process.start()
        of_child.close()
        self.first_batch = self._receive()

    def _receive(self):
        assert self.connection.poll(PATIENCE), "no word from the training"
        return self.connection.recv()

    def let(self, batches):
        for _ in range(batches):
            self.connection.send("go on")

    def wait_until_after(self, batch):
        while self._receive() != batch:
            pass

    def ended(self):
        """Its exit status; minus the number of the signal that killed it."""
        self.process.join(PATIENCE)
        return self.process.exitcode

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_and_kill(folder, start, *, at):
    """Kills the training after batch ``at``, at work on the two batches after it. Returns its first batch."""
    with Child(folder, start) as child:
        child.let(at + 2 - child.first_batch)
        child.wait_until_after(at)
        os.kill(child.process.pid, signal.SIGKILL)
        assert child.ended() == -signal.SIGKILL
        return child.first_batch


@pytest.mark.parametrize("start", [0, 2**24 - 4, 2**32 - 4], ids=["0", "2^24", "2^32"])
def test_killed_training_resumes_with_every_bit(start, tmp_path):
    """Both optimizers and all dtypes at once, under torch.load(weights_only=True); the counted steps pass 2^24, and
    2^32."""
    kills = (SAVE_EVERY + 1, BATCHES + SAVE_EVERY)
    assert all(at % BATCHES and (at + 2) // BATCHES == at // BATCHES for at in kills), "not mid-epoch"
    begun = [run_and_kill(tmp_path, start, at=at) for at in kills]
    with Child(tmp_path, start) as child:
        begun.append(child.first_batch)
        child.let(EPOCHS * BATCHES - child.first_batch)
        assert child.ended() == 0
    # From checkpoints, and not from the batch that was reached.
    assert begun[0] == 0
    assert 0 < begun[1] <= kills[0] + 2
    assert begun[1] < begun[2] <= kills[1] + 2
    assert all(batch % SAVE_EVERY == 0 for batch in begun)
    saved = torch.load(tmp_path / "final.pt", weights_only=True)
    resumed = Training()
    resumed.load_state_dict(saved)

    whole = Training(start)
    while not whole.finished():
        whole.run_batch()
    assert_same_snapshots(whole.snapshot(), resumed.snapshot())
    assert [type(optimizer) for optimizer in whole.optimizers] == OPTIMIZERS
    for optimizer in whole.optimizers:
        assert {int(state["step"]) for state in optimizer.state.values()} == {start + EPOCHS * BATCHES}
        assert buffer_dtypes(optimizer) == set(DTYPES)


def test_every_part_of_the_checkpoint_counts():
    """Without the state of the optimizer the bits would differ: the test above would notice a state that is lost."""
    whole = Training()
    for _ in range(3):
        whole.run_batch()
    saved = whole.state_dict()
    for k, optimizer in enumerate(whole.optimizers):
        for name in ("step", "lipschitz_bound", *optimizer.direction.buffers):
            results = []
            for lost in ((), (name,)):
                training, checkpoint = Training(), copy.deepcopy(saved)
                for entries in checkpoint["optimizers"][k]["state"].values():
                    entries.update({key: torch.zeros_like(entries[key]) for key in lost if key in entries})
                training.load_state_dict(checkpoint)
                training.run_batch()
                results.append(training.snapshot())
            with pytest.raises(AssertionError, match="differ"):
                assert_same_snapshots(*results)
